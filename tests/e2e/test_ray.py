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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from websockets.sync.client import connect

from tests import postgres
from tests.documents import ROOT
from tests.e2e.conftest import START_TIMEOUT_S, RunningServer

pytestmark = pytest.mark.long

SPEC: dict[str, object] = {"n": 2, "steps": 30, "class_label": 1, "guidance": 2}
LONG: dict[str, object] = {"n": 8, "steps": 1000, "seed": 1}
PATIENCE_S = 120.0
OWN_PORT = re.compile(r"own port of this replica is (http://\S+)")


def post(url: str, spec: dict[str, object]) -> httpx.Response:
    return httpx.post(url, json=spec, timeout=PATIENCE_S)


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=PATIENCE_S)


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

    def sample(self, seed: int) -> httpx.Response:
        return post(f"{self.url}/sample", SPEC | {"seed": seed})


@pytest.fixture(scope="module")
def on_ray(database: postgres.Postgres, small: Path) -> Iterator[OnRay]:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's sockets have long names below it
    port = postgres.free_port()
    env = os.environ | {"RAY_TMPDIR": folder, "HOME": folder, "PYTHONPATH": str(ROOT), "TMINUS_GRACE_S": "20"}
    env |= {"TMINUS_JOB_STORE": database.url(), "TMINUS_JOB_LEASE_S": "2"}
    env.pop("RAY_ADDRESS", None)
    flags = {"checkpoint": small, "port": port, "device": "cpu", "max-replicas": 2, "replica-cpus": 1}
    flags |= {"target-backlog-s": 2, "upscale-delay-s": 0, "downscale-delay-s": 4, "result-cache-mb": 0}
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    try:
        with ray_serve(arguments, port, folder, env) as running:
            yield running
            running.process.terminate()
            assert running.process.wait(PATIENCE_S) == 0, running.log
        assert "Traceback" not in running.log, running.log
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_serve(arguments: list[str], port: int, folder: str, env: dict[str, str]) -> Iterator[OnRay]:
    """Run the command until it serves; again where a process of Ray has not started in the 30 s that Ray gives it."""
    until_s = time.monotonic() + START_TIMEOUT_S
    serves = False
    while True:
        process = subprocess.Popen(
            [sys.executable, "-m", "tminus", "ray", "serve", *arguments],
            env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        running = OnRay(process, f"http://127.0.0.1:{port}")
        assert process.stdout is not None
        reading = threading.Thread(target=running.lines.extend, args=(process.stdout,))
        reading.start()
        try:
            while process.poll() is None and not (serves := "with 1 to 2 replicas" in running.log):
                assert time.monotonic() < until_s, running.log
                time.sleep(0.1)
            if "The current node timed out during startup" not in running.log:
                assert serves, running.log
                yield running
                return
        finally:
            process.kill()
            reading.join(PATIENCE_S)
            process.stdout.close()


def served(replica: str, what: str = "/sample") -> int:
    """How many requests of a kind a replica has answered."""
    pattern = rf'^tminus_request_duration_seconds_count{{route="{what}",status="200"}} (\S+)$'
    return sum(int(float(count)) for count in re.findall(pattern, get(f"{replica}/metrics").text, re.MULTILINE))


def unfinished(url: str) -> list[str]:
    """The durable jobs that have not ended, the newest first."""
    jobs = get(f"{url}/jobs?state=waiting,running&limit=200").json()["jobs"]
    return [job["id"] for job in jobs if job["durable"]]


def test_replicas_on_ray(on_ray: OnRay, own_server: Callable[..., RunningServer]) -> None:
    """In one test, since what it waits for takes most of its time."""
    plain = own_server("--threads", "1", "--result-cache-mb", "0")
    wanted = [plain.post(json=SPEC | {"seed": seed}).content for seed in range(4)]

    # Work that waits, in a replica and in the database, brings a second replica: as much as that takes on this machine.
    def second_has_started() -> bool:
        if len(unfinished(on_ray.url)) < 12:
            assert post(f"{on_ray.url}/jobs", LONG).status_code == 202
        return len(on_ray.replicas) == 2

    on_ray.wait_until(second_has_started)
    first, second = on_ray.replicas
    *surplus, one, other = unfinished(on_ray.url)
    for job_id in surplus:
        assert httpx.post(f"{on_ray.url}/jobs/{job_id}/cancel", timeout=PATIENCE_S).status_code == 200

    # Requests through Ray make the bytes that a server makes, at either replica, and keep their id.
    with ThreadPoolExecutor(4) as threads:

        def both_have_served() -> bool:
            answers = list(threads.map(on_ray.sample, range(4)))
            assert [answer.content for answer in answers] == wanted
            assert all("," not in answer.headers["x-request-id"] for answer in answers)
            return served(first) > 0 and served(second) > 0

        on_ray.wait_until(both_have_served)

    # Durable jobs are known at each replica, and end.
    for job_id in (one, other):
        on_ray.wait_until(lambda job_id=job_id: get(f"{on_ray.url}/jobs/{job_id}").json()["state"] == "done")
        images = {get(f"{url}/jobs/{job_id}/image").content for url in (first, second, on_ray.url)}
        assert len(images) == 1

    # Whichever has the least to do gets the next request: nearly always, as Ray may not hear from it in time.
    busy, rounds = threading.Event(), []
    busy.set()

    def keep_busy() -> None:
        while busy.is_set():
            assert post(f"{second}/sample", LONG).status_code == 200

    def to_first(count: int) -> int:
        before = served(first)
        for seed in range(count):
            assert on_ray.sample(seed).status_code == 200
        return served(first) - before

    with ThreadPoolExecutor(2) as threads:
        asking = [threads.submit(keep_busy) for _ in range(2)]  # so that it is never without work
        try:
            # Idle replicas take turns: two in a row at the first, and the second has told that it is busy.
            on_ray.wait_until(lambda: to_first(2) == 2)
            rounds.append(to_first(20))
        finally:
            busy.clear()
        for each in asking:
            each.result()
    assert rounds[0] >= 16

    # A WebSocket has its previews, and stays open until its replica drains: then the client is told to come back.
    with connect(f"ws{on_ray.url.removeprefix('http')}/sample/stream") as ws:
        ws.send(json.dumps(SPEC | {"seed": 1, "every": 10, "keep_open": True}))
        messages = [ws.recv()]
        while json.loads(messages[-1] if isinstance(messages[-1], str) else "{}").get("type") != "done":
            messages.append(ws.recv())
        assert ws.recv() == wanted[1]
        kinds = [json.loads(message)["type"] for message in messages if isinstance(message, str)]
        assert (kinds[0], {*kinds[1:-1]}, kinds[-1]) == ("accepted", {"frame"}, "done")

    # With less to do one of them drains, and no request fails.
    sent = 0

    def is_stopped() -> bool:
        nonlocal sent
        answer = on_ray.sample(sent % 4)
        assert (answer.status_code, answer.content) == (200, wanted[sent % 4]), answer.text
        sent += 1
        return "is stopped" in on_ray.log

    on_ray.wait_until(is_stopped)
    for _ in range(5):
        is_stopped()
    assert "takes no more work" in on_ray.log
