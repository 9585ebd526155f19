"""Real servers that are started again and again on one folder of durable jobs, and jobs for them."""

import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from bench.crash import Server
from tests.e2e.conftest import RunningServer
from tests.e2e.forked import Forked

Start = Callable[..., RunningServer]


class Restarting:
    """A server that is started again and again on one state folder."""

    def __init__(self, start: Start, state: Path) -> None:
        self._start, self.state = start, state
        self.server = self.start()

    def start(self, *flags: str, **env: str) -> RunningServer:
        env = {"TMINUS_RESULT_CACHE_MB": "0", "TMINUS_STATE_DIR": str(self.state)} | env
        self.server = self._start(*flags, **env)
        return self.server

    def kill(self) -> None:
        self.server.process.send_signal(signal.SIGKILL)
        assert self.server.process.wait(30) == -signal.SIGKILL

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return httpx.get(f"{self.server.url}{path}", timeout=60, **kwargs)

    def post(self, spec: dict[str, Any], key: str) -> str:
        response = httpx.post(f"{self.server.url}/jobs", json=spec, headers={"Idempotency-Key": key}, timeout=60)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def wait_for(self, job_id: str) -> dict[str, Any]:
        self.server.wait_until(lambda: self.get(f"/jobs/{job_id}").json()["state"] not in ("waiting", "running"))
        found: dict[str, Any] = self.get(f"/jobs/{job_id}").json()
        return found


class ForkedServer(Server):
    """That of the bench, in a forked process."""

    def _spawn(self) -> Forked:  # type: ignore[override]
        process = Forked(self._command[3:], self._environment)
        threading.Thread(target=_pass_on, args=(process,), daemon=True).start()
        return process


def _pass_on(process: Forked) -> None:
    """What a server logs goes where our errors go."""
    with process.output as output:
        for line in output:
            os.write(2, line.encode())


def make_specs(count: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    samplers = ["ddpm", "ddim", "dpmpp_2m"]
    return [
        {
            "n": rng.randint(1, 3),
            "steps": rng.choice([50, 150, 300]),
            "sampler": samplers[k % 3],
            "seed": k,
            "class_label": k % 10,
            "guidance": rng.choice([1, 2]),
        }
        for k in range(count)
    ]
