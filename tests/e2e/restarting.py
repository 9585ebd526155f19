"""Real servers that are started again and again on one folder of durable jobs, and jobs for them."""

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from bench.servers import Server
from tests.e2e.conftest import RunningServer
from tests.e2e.forked import Forked
from tests.trials.injected import DEADLY_SEED, Fault, inject

PROBES_S = 1.0  # from the first probe that fails to the last
LONG = {"n": 2, "steps": 1000}
OPEN = {"waiting", "running", ""}  # a job's states until its end; none while no server lives
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

    def post(self, spec: dict[str, Any], key: str, model: str = "") -> str:
        """Post a durable job to a model's path; return its id."""
        response = httpx.post(f"{self.server.url}{model}/jobs", json=spec, headers={"Idempotency-Key": key}, timeout=60)
        assert response.status_code == 202, response.text
        return str(response.json()["id"])

    def wait_for(self, job_id: str) -> dict[str, Any]:
        self.server.wait_until(lambda: self.get(f"/jobs/{job_id}").json()["state"] not in ("waiting", "running"))
        found: dict[str, Any] = self.get(f"/jobs/{job_id}").json()
        return found


class ForkedServer(Server):
    """That of the bench, in a forked process. prepare: is called in it before the command runs."""

    prepare: Callable[[], None] | None = None

    def _spawn(self) -> Forked:  # type: ignore[override]
        process = Forked(self.command[3:], self._environment, self.prepare)
        threading.Thread(target=_pass_on, args=(process,), daemon=True).start()
        return process


class Deadly:
    """Servers that one job ends or hangs. As by a supervisor, each is killed while it hangs, and started again."""

    def __init__(self, servers: Sequence[ForkedServer], trigger: Path, fault: Fault = "death") -> None:
        self.servers, self._trigger = servers, trigger
        self.deaths = 0
        self._hung_since_s: dict[ForkedServer, float] = {}
        for server in servers:
            server.prepare = partial(inject, fault, trigger)
            server.start()

    def post(self, specs: Sequence[dict[str, Any]], spec: Mapping[str, Any] = LONG) -> tuple[str, list[str]]:
        """Have the first server accept a job and others, and then the job be deadly; its id and theirs."""
        url = f"{self.servers[0].url}/jobs"
        *others, deadly = [
            str(httpx.post(url, json=each, timeout=60, trust_env=False).raise_for_status().json()["id"])
            for each in (*specs, {**spec, "seed": DEADLY_SEED})
        ]
        self._trigger.touch()
        return deadly, others

    @property
    def living(self) -> int:
        """How many servers live."""
        return sum(server.process is not None and server.process.poll() is None for server in self.servers)

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as a server tells it that lives; {} while none does."""
        for server in self.servers:
            with contextlib.suppress(httpx.HTTPError):
                found = httpx.get(f"{server.url}/jobs/{job_id}", timeout=10, trust_env=False)
                if found.status_code == 200:
                    job: dict[str, Any] = found.json()
                    return job
        return {}

    def states(self, ids: Sequence[str], patience_s: float) -> list[str]:
        """Start again what dies until all jobs have ended, or for so long; how they are then."""
        until_s = time.monotonic() + patience_s
        while True:
            for server in self.servers:
                self._kill_if_it_hangs(server)
                if server.process is None or server.process.poll() is not None:
                    self.deaths += 1
                    with contextlib.suppress(RuntimeError):  # it may die before it is ready
                        server.start()
            states = [self.job(job_id).get("state", "") for job_id in ids]
            if OPEN.isdisjoint(states) or time.monotonic() > until_s:
                return states
            time.sleep(0.1)

    def _kill_if_it_hangs(self, server: ForkedServer) -> None:
        status = 0
        with contextlib.suppress(httpx.HTTPError):
            status = httpx.get(f"{server.url}/healthz", timeout=10, trust_env=False).status_code
        if status != 503:
            self._hung_since_s.pop(server, None)
        elif time.monotonic() > self._hung_since_s.setdefault(server, time.monotonic()) + PROBES_S:
            server.kill()

    def image(self, job_id: str, spec: dict[str, Any]) -> tuple[bytes, bytes]:
        """What a job has made, and what an undisturbed run makes."""
        url = self.servers[0].url
        made = httpx.get(f"{url}/jobs/{job_id}/image", timeout=60, trust_env=False)
        return made.content, httpx.post(f"{url}/sample", json=spec, timeout=60, trust_env=False).content

    def stop(self) -> None:
        for server in self.servers:
            if server.process is not None:
                server.process.kill()


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
