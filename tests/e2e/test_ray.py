"""A real Ray on this machine, with two replicas on a real PostgreSQL."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from tests import postgres
from tests.e2e.conftest import ROOT, START_TIMEOUT_S, RunningServer

pytestmark = pytest.mark.slow

SPEC = {"n": 2, "steps": 30, "class_label": 1, "guidance": 2}
PATIENCE_S = 120.0
OWN_PORT = re.compile(r"own port of this replica is (http://\S+)")


@dataclass
class OnRay:
    """`tminus ray serve`, and the log of all that it has started."""

    process: subprocess.Popen[str]
    url: str
    lines: list[str] = field(default_factory=list)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def replicas(self) -> list[str]:
        """The own ports of those that have started, the first one first."""
        return OWN_PORT.findall(self.log)

    def wait_until(self, holds: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
        until_s = time.monotonic() + patience_s
        while not holds():
            assert time.monotonic() < until_s, f"it did not happen:\n{self.log}"
            assert self.process.poll() is None, self.log
            time.sleep(0.1)

    def sample(self, seed: int, **more: object) -> httpx.Response:
        return httpx.post(f"{self.url}/sample", json=SPEC | {"seed": seed} | more, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def database() -> Iterator[postgres.Postgres]:
    with postgres.running() as server:
        yield server


@pytest.fixture(scope="module")
def on_ray(database: postgres.Postgres, small: Path) -> Iterator[OnRay]:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets have long names below it
    port = postgres.free_port()
    env = os.environ | {"RAY_TMPDIR": folder, "HOME": folder, "PYTHONPATH": str(ROOT), "TMINUS_GRACE_S": "20"}
    env |= {"TMINUS_JOB_STORE": database.url(), "TMINUS_JOB_LEASE_S": "2"}
    env.pop("RAY_ADDRESS", None)
    flags = {"checkpoint": small, "port": port, "device": "cpu", "max-replicas": 2, "replica-cpus": 1}
    flags |= {"target-backlog-s": 4, "upscale-delay-s": 0, "downscale-delay-s": 4, "result-cache-mb": 0}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    process = subprocess.Popen(
        [sys.executable, "-m", "tminus", "ray", "serve", *arguments],
        env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    running = OnRay(process, f"http://127.0.0.1:{port}")
    assert process.stdout is not None
    reading = threading.Thread(target=running.lines.extend, args=(process.stdout,))
    reading.start()
    try:
        running.wait_until(lambda: "with 1 to 2 replicas" in running.log, START_TIMEOUT_S)
        yield running
        process.terminate()
        assert process.wait(PATIENCE_S) == 0, running.log
    finally:
        process.kill()
        reading.join(PATIENCE_S)
        process.stdout.close()
        shutil.rmtree(folder, ignore_errors=True)
    assert "Traceback" not in running.log, running.log


def served(replica: str, what: str = "/sample") -> int:
    """How many requests of a kind a replica has answered."""
    text = httpx.get(f"{replica}/metrics").text
    pattern = rf'^tminus_request_duration_seconds_count{{route="{what}",status="200"}} (\S+)$'
    return sum(int(float(count)) for count in re.findall(pattern, text, re.MULTILINE))


def reached(on_ray: OnRay, replica: str) -> bool:
    """Whether a small request through Ray comes to this replica."""
    before = served(replica)
    assert on_ray.sample(0).status_code == 200
    return served(replica) == before + 1


def test_replicas_on_ray(on_ray: OnRay, own_server: Callable[..., RunningServer]) -> None:
    """In one test, since what it waits for takes most of its time."""
    plain = own_server("--threads", "1", "--result-cache-mb", "0")
    wanted = [plain.post(json=SPEC | {"seed": seed}).content for seed in range(4)]

    # Work that waits, in a replica and in the database, brings a second replica.
    jobs = [
        httpx.post(f"{on_ray.url}/jobs", json={"n": 8, "steps": 1000, "seed": seed}, timeout=PATIENCE_S).json()["id"]
        for seed in range(3)
    ]
    on_ray.wait_until(lambda: len(on_ray.replicas) == 2)

    # Requests through Ray make the bytes that a server makes, at either replica, and keep their id.
    first, second = on_ray.replicas
    with ThreadPoolExecutor(4) as threads:
        while not (served(first) and served(second)):
            answers = list(threads.map(on_ray.sample, range(4)))
            assert [answer.content for answer in answers] == wanted
            assert all("," not in answer.headers["x-request-id"] for answer in answers)

    # Durable jobs are known at each replica, and end.
    for job_id in jobs:
        on_ray.wait_until(lambda job_id=job_id: httpx.get(f"{on_ray.url}/jobs/{job_id}").json()["state"] == "done")
        images = {httpx.get(f"{url}/jobs/{job_id}/image").content for url in (first, second, on_ray.url)}
        assert len(images) == 1

    # Whichever has the least to do gets the next request.
    with ThreadPoolExecutor(1) as thread:
        busy = thread.submit(
            lambda: httpx.post(f"{second}/sample", json={"n": 8, "steps": 1000, "seed": 1}, timeout=PATIENCE_S)
        )
        # Idle replicas take turns: two in a row at the first, and the second has told that it is busy.
        on_ray.wait_until(lambda: all(reached(on_ray, first) for _ in range(2)))
        before = served(first)
        for seed in range(5):
            assert on_ray.sample(seed).status_code == 200
        assert served(first) == before + 5
        assert busy.result().status_code == 200

    # A WebSocket has its previews, and stays open until its replica drains: then the client is told to come back.
    with connect(f"ws{on_ray.url.removeprefix('http')}/sample/stream") as ws:
        ws.send(json.dumps(SPEC | {"seed": 1, "every": 10, "keep_open": True}))
        messages = [ws.recv()]
        while json.loads(messages[-1] if isinstance(messages[-1], str) else "{}").get("type") != "done":
            messages.append(ws.recv())
        assert ws.recv() == wanted[1]
        kinds = [json.loads(message)["type"] for message in messages if isinstance(message, str)]
        assert kinds == ["accepted", "frame", "frame", "done"]

    # With less to do one of them drains, and no request fails.
    failed: list[httpx.Response] = []
    sent = 0
    until_s = time.monotonic() + PATIENCE_S
    while "is stopped" not in on_ray.log:
        assert time.monotonic() < until_s, on_ray.log
        answer = on_ray.sample(sent % 4)
        if answer.status_code != 200 or answer.content != wanted[sent % 4]:
            failed.append(answer)
        sent += 1
    assert not failed, failed[0].text
    assert sent > 10
    assert "takes no more work" in on_ray.log
