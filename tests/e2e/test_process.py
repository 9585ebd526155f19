"""The server as a process: limits, signals, and checkpoints that cannot be served."""

import os
import re
import resource
import select
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import httpx
import pytest
from PIL import Image

from bench.servers import free_port
from tests.documents import ROOT
from tests.e2e.conftest import RunningServer, run_cli, serving, start_server
from tests.trials.injected import hang
from tminus.service.worker.loop import Loop

Start = Callable[..., RunningServer]
Hanging = Callable[..., tuple[RunningServer, Path]]
FEW_THREADS = ("--executor", "eager", "--threads", "1", "--max-batch", "16")


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


def wait_until_it_drains(server: RunningServer) -> None:
    server.wait_until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)


@pytest.mark.alone
def test_sigterm_finishes_what_runs_and_exits_zero(own_server: Start) -> None:
    server = own_server()
    server.slow_down(0.01)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: server.post(params={"n": 8, "steps": 400}))
        server.wait_until(lambda: server.metric("tminus_rows_active") > 0)
        server.process.terminate()
        wait_until_it_drains(server)
        refused = server.post(params={"steps": 1})
        assert (refused.status_code, refused.json()["code"]) == (503, "draining")
        assert running.result(60).status_code == 200
    assert server.process.wait(30) == 0, server.log
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/readyz")


@pytest.mark.parametrize("grace_s", [1, 100])
def test_work_past_the_grace_period_or_a_second_sigterm_is_given_up_with_an_answer(
    own_server: Start, grace_s: int
) -> None:
    server = own_server("--grace-s", str(grace_s))
    server.slow_down()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(lambda: server.post(params={"n": 64, "steps": 1000}))
        server.wait_until(lambda: server.metric("tminus_rows_active") > 0)
        server.process.terminate()
        if grace_s > 1:
            wait_until_it_drains(server)
            server.process.terminate()
        answer = running.result(30)
    assert (answer.status_code, answer.json()["code"]) == (503, "draining")
    assert server.process.wait(30) == 0, server.log
    assert "Traceback" not in server.log


@pytest.mark.parametrize("said", ["loading", "ready: open"])
def test_signals_that_come_until_the_process_has_ended_are_no_failure(small: Path, said: str) -> None:
    """A process of its own, as the end of the interpreter is looked at, which gives up handlers of signals."""
    command = [sys.executable, "-m", "tminus", "serve", "--port", "0", "--checkpoint", str(small)]
    env = os.environ | {"TMINUS_STATE_DIR": ":memory:", "TMINUS_LOG_LEVEL": "debug"}
    with subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while said not in (line := process.stderr.readline()):
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


# --- threads that hang ---


@pytest.fixture
def hanging(small: Path, tmp_path: Path) -> Iterator[Hanging]:
    """Starts a server of which a part hangs while a file is there."""
    started: list[RunningServer] = []

    def start(where: str, known_after_s: float, *flags: str) -> tuple[RunningServer, Path]:
        trigger = tmp_path / "trigger"
        started.append(start_server(small, *flags, prepare=partial(hang, where, trigger, known_after_s)))
        return started[-1], trigger

    yield start
    for running in started:
        running.process.kill()


@pytest.mark.long
def test_a_hang_of_the_event_loop_is_told_at_the_port_of_the_metrics_until_it_ends(hanging: Hanging) -> None:
    port = free_port()
    server, trigger = hanging("event loop", 3.0, "--metrics-port", str(port))
    there = f"http://127.0.0.1:{port}"
    assert httpx.get(f"{there}/healthz").status_code == 200
    trigger.touch()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(httpx.get, f"{server.url}/readyz", timeout=60)
        server.wait_until(lambda: httpx.get(f"{there}/healthz").status_code == 503)
        problem = httpx.get(f"{there}/healthz").json()
        assert problem["code"] == "stalled"
        assert problem["detail"].startswith("the event loop has hung for ")
        metrics = httpx.get(f"{there}/metrics").text
        assert float(re.search(r"^tminus_stalled_seconds (\S+)$", metrics, re.MULTILINE)[1]) > 3  # type: ignore[index]
        trigger.unlink()
        asked.result()
    server.wait_until(lambda: httpx.get(f"{there}/healthz").status_code == 200)
    assert "tminus_stalled_seconds 0.0" in httpx.get(f"{there}/metrics").text


@pytest.mark.long
def test_an_encoder_that_hangs_is_told_refuses_work_and_ends_with_the_process(hanging: Hanging) -> None:
    server, trigger = hanging("encoder", 3.0)
    trigger.touch()
    for _ in range(2):  # one that waits for the encoder, and one that comes later
        answer = server.post(params={"steps": 1})
        assert (answer.status_code, answer.json()["code"]) == (503, "stalled")
        assert answer.json()["detail"].startswith("the encoder has hung for ")
    for path in ("/healthz", "/readyz"):
        assert httpx.get(f"{server.url}{path}").json()["code"] == "stalled"
    assert server.metric("tminus_stalled_seconds") > 3
    server.process.terminate()
    assert server.process.wait(40) == 1


@pytest.mark.long
def test_a_server_ends_while_its_encoder_hangs_and_the_clients_that_wait_get_an_answer(hanging: Hanging) -> None:
    server, trigger = hanging("encoder", 3600.0)
    trigger.touch()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(lambda: server.post(params={"steps": 1}))
        server.wait_until(lambda: " done: " in server.log)
        server.process.terminate()
        answer = asked.result()
    assert (answer.status_code, answer.json()["code"]) == (503, "draining")
    assert server.process.wait(40) == 0


def test_what_cannot_be_served_ends_in_one_clear_line(server: RunningServer, small: Path, tmp_path: Path) -> None:
    """As a process; the other reasons are in tests/service/cli/test_serve.py."""
    port = server.url.rpartition(":")[2]
    for checkpoint, flags, says in (
        (tmp_path, ["--port", "0"], str(tmp_path)),
        (small, ["--port", port], f":{port}"),
        (small, ["--port", "0", "--device", "cuda:99"], "cuda:99"),
    ):
        result = run_cli("serve", "--checkpoint", str(checkpoint), *flags)
        assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
        assert says in result.stderr


def few_files(count: int) -> Callable[[], None]:
    return partial(resource.setrlimit, resource.RLIMIT_NOFILE, (count, count))


@pytest.mark.long
def test_where_few_files_may_be_open_there_are_fewer_connections_and_each_is_answered(small: Path) -> None:
    head, clients = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n", list[socket.socket]()
    with serving(small, *FEW_THREADS, prepare=few_files(440)) as server:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        assert server.log.count("at most 56 connections instead of 4096") == 1
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
        start_server(small, *FEW_THREADS, prepare=few_files(300))


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
        assert image.size == (8 * 64, 8 * 32), "as a person sees it"
