"""The server as a process: limits, signals, and checkpoints that cannot be served."""

import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from tests.e2e.conftest import BUNDLED, ROOT, RunningServer, run_cli, start_server, stop_server
from tminus.service.worker.loop import Loop

Start = Callable[..., RunningServer]
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"


@pytest.mark.alone
def test_too_much_work_is_refused_with_a_time_that_is_right(own_server: Start) -> None:
    server = own_server(TMINUS_MAX_BACKLOG_S="1")
    server.fill(n=8, steps=150)
    with server.client() as client:
        refused = client.post("/sample", params={"n": 8, "steps": 150})
        assert refused.status_code == 429, refused.text
        assert refused.json()["code"] == "overloaded"
        server.speed_up()
        time.sleep(int(refused.headers["Retry-After"]))
        # Waiting as told is enough, but for a machine that has become slower meanwhile: then once more.
        again = client.post("/sample", params={"n": 8, "steps": 150})
        if again.status_code == 429:
            time.sleep(int(again.headers["Retry-After"]))
            again = client.post("/sample", params={"n": 8, "steps": 150})
    assert again.status_code == 200
    assert server.metric("tminus_rejected_total") >= 1


@pytest.mark.alone
def test_sigterm_finishes_what_runs_and_exits_zero(own_server: Start) -> None:
    server = own_server()
    server.slow_down(0.01)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: server.post(params={"n": 8, "steps": 400}))
        server.wait_until(lambda: server.metric("tminus_rows_active") > 0)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        refused = server.post(params={"steps": 1})
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert running.result(60).status_code == 200
    assert server.process.wait(30) == 0, server.log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/readyz")


@pytest.mark.alone
def test_work_past_the_grace_period_is_given_up_with_an_answer(own_server: Start) -> None:
    server = own_server("--grace-s", "1")
    server.slow_down()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: server.post(params={"n": 64, "steps": 1000}))
        server.wait_until(lambda: server.metric("tminus_rows_active") > 0)
        server.process.send_signal(signal.SIGTERM)
        answer = running.result(30)
    assert (answer.status_code, answer.json()["code"]) == (503, "draining")
    assert server.process.wait(30) == 0, server.log


def test_a_second_sigterm_gives_up_what_runs_with_an_answer_and_no_traceback(own_server: Start) -> None:
    server = own_server()
    server.slow_down()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: server.post(params={"n": 64, "steps": 1000}))
        server.wait_until(lambda: server.metric("tminus_rows_active") > 0)
        server.process.send_signal(signal.SIGTERM)
        server.wait_until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
        server.process.send_signal(signal.SIGTERM)
        answer = running.result(30)
    assert (answer.status_code, answer.json()["code"]) == (503, "draining")
    assert server.process.wait(30) == 0, server.log
    assert "Traceback" not in server.log


def test_signals_that_come_until_the_process_has_ended_are_no_failure(small: Path) -> None:
    """A process of its own, as the end of the interpreter is looked at, which gives up handlers of signals."""
    command = [sys.executable, "-m", "tminus", "serve", "--port", "0", "--checkpoint", str(small)]
    env = os.environ | {"TMINUS_STATE_DIR": ":memory:"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "ready. Try" not in (line := process.stderr.readline()):
            assert line, "it has ended"
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            time.sleep(0.01)
    assert process.returncode == 0


def crash_on_the_first_job() -> None:
    """Have the worker's thread fail by an error of its own."""
    tick = Loop.tick

    def failing(self: Loop) -> bool:
        if self.has_work:
            raise RuntimeError("injected")
        return tick(self)

    Loop.tick = failing  # type: ignore[method-assign]


def test_a_crash_of_the_worker_ends_the_process_once_its_jobs_have_their_answers(small: Path) -> None:
    server = start_server(small, prepare=crash_on_the_first_job)
    answer = server.post(params={"steps": 1})
    assert (answer.status_code, answer.json()["code"]) == (500, "engine_failed")
    assert server.process.wait(30) == 1, server.log
    server.wait_until(lambda: "tminus: the worker crashed; the log says why" in server.log)
    assert "RuntimeError: injected" in server.log


def test_sigterm_while_loading_ends_at_once() -> None:
    command = [
        sys.executable,
        "-m",
        "tminus",
        "serve",
        "--port",
        "0",
        "--checkpoint",
        str(BUNDLED),
        "--log-level",
        "debug",
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process.stderr:
        assert "loading" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
        assert process.wait(30) == 0, said
        assert "ready" not in said


class Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return Path.touch, (Path("/tmp/tminus-pickle-ran"),)  # type: ignore[return-value]


def break_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Payload()}, folder / "unet" / "diffusion_pytorch_model.bin")


def test_a_bad_checkpoint_ends_in_one_clear_line(tmp_path: Path) -> None:
    """One for all, as a process; the other ways to break one are in tests/service/cli/test_serve.py."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(BUNDLED, folder)
    break_pickle(folder)
    result = run_cli("serve", "--checkpoint", str(folder), "--port", "0")
    assert result.returncode == 1
    assert "never run" in result.stderr
    assert str(tmp_path) in result.stderr
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert not Path("/tmp/tminus-pickle-ran").exists()


def test_an_address_in_use_ends_in_a_clear_line(server: RunningServer, small: Path) -> None:
    port = server.url.rpartition(":")[2]
    result = run_cli("serve", "--checkpoint", str(small), "--port", port)
    assert result.returncode == 1
    assert f":{port}" in result.stderr
    assert "in use" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def few_files(count: int) -> Callable[[], None]:
    return partial(resource.setrlimit, resource.RLIMIT_NOFILE, (count, count))


def test_where_few_files_may_be_open_there_are_fewer_connections_and_each_is_answered(small: Path) -> None:
    server = start_server(small, "--executor", "eager", "--threads", "1", "--max-batch", "16", prepare=few_files(440))
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    assert server.log.count("at most 56 connections instead of 4096") == 1
    head, clients = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", list[socket.socket]()
    try:
        for _ in range(500):  # none has its answer before all are there
            clients.append(socket.create_connection(address, 60))
            with suppress(OSError):
                clients[-1].sendall(head)
        server.wait_until(lambda: len(select.select(clients, [], [], 0)[0]) == 444)
        for client in clients:
            with suppress(OSError):
                client.sendall(b"\r\n")
        answers = Counter(map(answer_of, clients))
        assert answers[b"HTTP/1.1 200"] == 56
        assert answers[b"HTTP/1.1 503"] >= 64, answers
        for client in clients:
            client.close()
        server.wait_until(lambda: is_well(server))
    finally:
        assert stop_server(server) == 0, server.log
    assert "Traceback" not in server.log, server.log


def answer_of(client: socket.socket) -> bytes:
    """The beginning of the answer; where hundreds are turned away at a time, some only see the connection end."""
    try:
        return client.recv(12)
    except ConnectionError:
        return b""


def is_well(server: RunningServer) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"{server.url}/healthz").status_code == 200
    return False


def test_where_hardly_any_file_may_be_open_there_is_one_clear_line(small: Path) -> None:
    with pytest.raises(AssertionError, match=r"open files \(ulimit -Hn\) must be at least 392, got 300"):
        start_server(small, "--executor", "eager", "--threads", "1", "--max-batch", "16", prepare=few_files(300))


def test_a_device_that_is_not_there_ends_in_a_clear_line() -> None:
    result = run_cli("serve", "--checkpoint", str(BUNDLED), "--device", "cuda:99")
    assert result.returncode == 1
    assert "cuda:99" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_sample_offline_and_from_the_server_draw_the_same(server: RunningServer, small: Path, tmp_path: Path) -> None:
    what = ("-n", "2", "--steps", "5", "--sampler", "ddim", "--seed", "9", "--class-label", "bag", "--guidance", "2")
    offline = run_cli("sample", "--checkpoint", str(small), *what, "--out", str(tmp_path / "offline"))
    remote = run_cli("sample", "--url", server.url, *what, "--out", str(tmp_path / "remote"))
    assert offline.returncode == remote.returncode == 0, offline.stderr + remote.stderr
    names = sorted(file.name for file in (tmp_path / "offline").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "remote").iterdir()) == ["00000.png", "00001.png"]
    for name in names:
        assert (tmp_path / "offline" / name).read_bytes() == (tmp_path / "remote" / name).read_bytes()
    sheet = run_cli("sample", "--url", server.url, *what, "--out", str(tmp_path / "sheet.png"))
    assert sheet.returncode == 0
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (64, 32)
