"""Starts the real `tminus serve` as a process, on a free port, with a real checkpoint."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.client import Client
from tests.e2e.forked import Forked

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "checkpoints" / "fashion-mnist-32"
START_TIMEOUT_S = 240.0  # the first start measures, and the cores may be busy with other things


@dataclass
class RunningServer:
    process: Forked
    lines: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def client(self, **kwargs: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=120, **kwargs)  # type: ignore[arg-type]

    def api(self, **options: Any) -> Client:
        """Our own client; `with` closes it."""
        return Client(self.url, **options)

    def post(self, **kwargs: object) -> httpx.Response:
        return httpx.post(f"{self.url}/sample", timeout=120, **kwargs)  # type: ignore[arg-type]

    def wait_until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 60
        while not holds():
            assert time.monotonic() < deadline, f"it did not happen:\n{self.log}"
            time.sleep(0.01)  # the server needs the cores more than we do

    def metric(self, name: str) -> float:
        """The sum over labels of one metric."""
        text = httpx.get(f"{self.url}/metrics").text
        return sum(float(m[1]) for m in re.finditer(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE))


@pytest.fixture(scope="session", autouse=True)
def _cache_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Which executor is fastest is measured once for all processes of a session, and never for the user's."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        if "PYTEST_XDIST_WORKER" in os.environ:  # workers share what they measure
            base = base.parent
        patch.setenv("XDG_CACHE_HOME", str(base / "measured"))
        yield


def run_cli(*arguments: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | env, capture_output=True, text=True, timeout=timeout, check=False
    )


def start_server(*flags: str, **env: str) -> RunningServer:
    """Start a server and wait until it is ready; its log is kept."""
    defaults = {"TMINUS_STATE_DIR": ":memory:"}  # several servers at a time, and nothing left behind
    process = Forked(["serve", "--port", "0", "--device", "cpu", *flags], os.environ | defaults | env)
    server = RunningServer(process)
    listening = threading.Event()

    def read() -> None:
        for line in process.output:
            server.lines.append(line)
            if match := re.search(r"listening on (http://\S+)", line):
                server.url = match[1]
                listening.set()
        process.output.close()
        listening.set()

    threading.Thread(target=read, daemon=True).start()
    deadline = time.monotonic() + START_TIMEOUT_S
    listening.wait(START_TIMEOUT_S)
    while server.url and time.monotonic() < deadline:
        if httpx.get(f"{server.url}/readyz").status_code == 200:
            return server
        time.sleep(0.01)
    stop_server(server)
    raise AssertionError(f"the server did not become ready:\n{server.log}")


def stop_server(server: RunningServer) -> int:
    if server.process.poll() is None:
        server.process.terminate()
    try:
        return server.process.wait(60)
    except subprocess.TimeoutExpired:
        server.process.kill()
        raise


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """One server on the bundled checkpoint, for every test that does it no harm."""
    # No memory for repeats, so that each answer is made.
    flags = ("--max-body-bytes", "65536", "--result-cache-mb", "0")
    running = start_server("--checkpoint", str(BUNDLED), *flags)
    yield running
    assert stop_server(running) == 0, running.log
    assert "Traceback" not in running.log, running.log


@pytest.fixture
def own_server() -> Iterator[Callable[..., RunningServer]]:
    """Starts servers of a test's own, and stops them."""
    started: list[RunningServer] = []

    def start(*flags: str, **env: str) -> RunningServer:
        started.append(start_server(*flags, **env))
        return started[-1]

    yield start
    for running in started:
        stop_server(running)
