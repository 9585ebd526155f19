"""Start and stop the contenders' processes. Each contender runs alone: the next starts when the last has ended."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx

READY_S = 90.0
STOP_S = 5.0
HOST = "127.0.0.1"


@contextmanager
def tminus(checkpoint: Path, max_batch: int, threads: int | None) -> Iterator[str]:
    """Run `tminus serve`; gives its URL."""
    port = _free_port()
    # The load is meant to be more than it can do at once, so the backlog must not be what is measured.
    flags = ["--host", HOST, "--port", str(port), "--max-batch", str(max_batch), "--max-backlog-s", "100000"]
    command = ["service", "serve", "--checkpoint", str(checkpoint), *flags, "--log-level", "warning", "--grace-s", "0"]
    with _server(command + _threads(threads), port) as url:
        yield url


@contextmanager
def lock_server(checkpoint: Path, threads: int | None) -> Iterator[str]:
    """Run the lock around DDPMPipeline; gives its URL."""
    port = _free_port()
    command = ["bench.lock_server", "--checkpoint", str(checkpoint), "--port", str(port)]
    with _server(command + _threads(threads), port) as url:
        yield url


def bare(checkpoint: Path, batches: Sequence[int], seconds: float, threads: int | None) -> dict[str, Any]:
    """Run the bare loop to its end; gives what it printed."""
    command = ["bench.bare", "--checkpoint", str(checkpoint), "--seconds", str(seconds), "--batches"]
    command += [*map(str, batches), *_threads(threads)]
    limit_s = READY_S + 4 * seconds * (len(batches) + 1)
    done = subprocess.run(_python(command), env=_environment(), capture_output=True, text=True, timeout=limit_s)
    if done.returncode != 0:
        raise RuntimeError(f"the bare loop ended with {done.returncode}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@contextmanager
def _server(command: list[str], port: int) -> Iterator[str]:
    url = f"http://{HOST}:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(_python(command), env=_environment(), stdout=log, stderr=log)
        try:
            _wait_until_ready(process, url, log)
            yield url
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended by itself: {_tail(log)}")
        finally:
            _stop(process)


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: IO[str]) -> None:
    end = time.monotonic() + READY_S
    with httpx.Client(trust_env=False) as client:
        while time.monotonic() < end:
            if process.poll() is not None:
                raise RuntimeError(f"a server did not start: {_tail(log)}")
            try:
                if client.get(f"{url}/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
    raise RuntimeError(f"a server was not ready after {READY_S:g} s: {_tail(log)}")


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _tail(log: IO[str]) -> str:
    log.seek(0)
    return log.read()[-2000:]


def _python(command: list[str]) -> list[str]:
    return [sys.executable, "-m", *command]


def _threads(threads: int | None) -> list[str]:
    return [] if threads is None else ["--threads", str(threads)]


def _environment() -> dict[str, str]:
    """Settings from outside would make the contenders differ, and nothing here needs the network."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TMINUS_")}
    return kept | {"HF_HUB_OFFLINE": "1"}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
