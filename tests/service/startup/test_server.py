"""What service/startup/server.py relies on in uvicorn, which does not document the methods that it extends."""

import inspect
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import uvicorn
from fastapi import FastAPI, Response

from tests.service.fakes import INFO, PATIENCE_S, wait_until
from tminus.model.catalogue import Recommended
from tminus.model.sampler_tables import Table
from tminus.service.api.edge.stream_limits import Streams
from tminus.service.metrics import Metrics
from tminus.service.startup.app import Application
from tminus.service.startup.server import Server, bind, first_request
from tminus.service.startup.starting import Starting

ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHANGED = f"uvicorn {uvicorn.__version__} has changed what service/startup/server.py extends: "
EXTENDED = sorted(name for name, member in vars(Server).items() if inspect.isfunction(member) and name[0] != "_")


class FakeWorker:
    """A worker that ends when it is told to."""

    def __init__(self) -> None:
        self.draining, self.closed, self.ended = False, False, threading.Event()

    def drain(self) -> None:
        self.draining = True

    def join(self) -> None:
        self.ended.wait(PATIENCE_S)

    ready, alive, hangs, crashed = True, True, False, False

    def close(self) -> bool:
        self.closed = True
        if not self.hangs:
            self.ended.set()
        return not self.hangs


def make_app() -> FastAPI:
    app = FastAPI()
    app.get("/")(lambda: Response(status_code=204))
    return app


class Running:
    """A server in a thread, so that it gets no signals."""

    def __init__(self, grace_s: float) -> None:
        self.listener = bind("127.0.0.1", 0)
        self.listener.listen()
        self.worker, self.streams = FakeWorker(), Streams(8, 8)
        application = Application(make_app(), self.worker, self.streams, Metrics(), INFO, None)  # type: ignore[arg-type]
        self.starting = Starting(lambda: application, lambda: setattr(self.server, "should_exit", True))
        self.server = Server(uvicorn.Config(self.starting, http="h11", log_config=None), self.starting, grace_s)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()
        wait_until(lambda: not self.starting.measuring)

    def answers(self) -> bool:
        with socket.create_connection(self.listener.getsockname(), PATIENCE_S) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return client.recv(100).startswith(b"HTTP/1.1 204")

    def stop(self) -> None:
        self.worker.ended.set()
        self.thread.join(PATIENCE_S)
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)
        self.listener.close()


@pytest.fixture
def running() -> Iterator[Running]:
    server = Running(grace_s=3600)
    yield server
    server.stop()


@pytest.fixture
def kept(running: Running) -> Iterator[socket.socket]:
    """A connection that has had an answer and is kept."""
    with socket.create_connection(running.listener.getsockname(), PATIENCE_S) as client:
        client.sendall(ASK)
        assert client.recv(100).startswith(b"HTTP/1.1 204")
        yield client


@pytest.mark.parametrize("name", EXTENDED)
def test_uvicorn_has_each_method_that_is_extended(name: str) -> None:
    theirs = getattr(uvicorn.Server, name, None)
    assert theirs is not None, f"{CHANGED}there is no Server.{name}"
    parameters = [*inspect.signature(theirs).parameters]
    assert parameters == [*inspect.signature(getattr(Server, name)).parameters], f"{CHANGED}Server.{name}"


def test_uvicorn_has_handle_exit_called_on_a_signal() -> None:
    starting = Starting(
        lambda: Application(make_app(), FakeWorker(), Streams(1, 1), Metrics(), INFO, None), lambda: None
    )  # type: ignore[arg-type]
    server = Server(uvicorn.Config(starting), starting, 3600)
    with server.capture_signals():
        for signum in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(signum) == server.handle_exit, f"{CHANGED}SIGTERM does not drain the worker"


def test_the_first_signal_drains_and_the_server_answers_until_the_worker_has_ended(running: Running) -> None:
    running.server.handle_exit(signal.SIGTERM, None)
    assert running.worker.draining
    assert running.answers()
    assert not running.worker.closed
    running.worker.ended.set()
    running.thread.join(PATIENCE_S)
    assert not running.thread.is_alive(), f"{CHANGED}the lifespan is not run, so nobody watches the worker"


def test_the_second_signal_ends_the_grace_period(running: Running) -> None:
    for _ in range(2):
        running.server.handle_exit(signal.SIGTERM, None)
    running.thread.join(PATIENCE_S)
    assert not running.thread.is_alive(), f"{CHANGED}Server.should_exit does not end it"
    assert running.worker.closed, "what runs is given up with an answer"


def test_work_is_given_up_after_the_grace_period() -> None:
    running = Running(grace_s=0.05)
    running.server.handle_exit(signal.SIGTERM, None)
    running.thread.join(PATIENCE_S)
    assert running.worker.closed
    running.stop()


def test_a_worker_that_hangs_does_not_keep_the_process() -> None:
    running = Running(grace_s=0.05)
    running.worker.hangs = True
    running.server.handle_exit(signal.SIGTERM, None)
    running.thread.join(PATIENCE_S)
    assert not running.thread.is_alive()
    assert not running.worker.ended.is_set()
    running.stop()


def test_a_server_waits_for_streams_that_have_a_job_and_answers_meanwhile(running: Running) -> None:
    with ExitStack() as job:
        job.enter_context(running.streams.busy())
        running.worker.ended.set()
        running.thread.join(0.3)  # uvicorn looks at should_exit every 0.1 s
        assert running.server.should_exit
        assert running.answers(), f"{CHANGED}Server.shutdown is not called before it stops listening"
        # The stream's own thread is the event loop's.
        running.server.servers[0].get_loop().call_soon_threadsafe(job.pop_all().close)
    running.thread.join(PATIENCE_S)
    assert not running.thread.is_alive()


def test_the_first_command_that_is_shown_has_settings_that_the_model_takes() -> None:
    assert "steps=20&sampler=dpmpp_2m'" in first_request("http://here", INFO)
    assert "steps=7&sampler=dpmpp_2m'" in first_request("http://here", replace(INFO, num_timesteps=7))
    table = Table("consistency", 2, 1.0, (49.0, 20.0), ((0, 1, 0, 0, 0.1), (0, 1, 0, 0, 0)))
    student = replace(INFO, samplers=("consistency",), tables=(table,), student={"guidance": 1.0})
    assert "steps=2&sampler=consistency'" in first_request("http://here", student)
    tuned = replace(INFO, tables=(replace(table, sampler="tuned"),), recommended=Recommended("tuned", 2, 1.5))
    assert "steps=2&sampler=tuned'" in first_request("http://here", tuned)
    guided = replace(tuned, tables=(replace(table, sampler="tuned", guidance=1.5),))
    assert "steps=20&sampler=dpmpp_2m'" in first_request("http://here", guided)


def test_a_request_on_a_kept_connection_that_comes_just_after_the_end_of_the_work_is_answered(
    running: Running, kept: socket.socket
) -> None:
    running.server.handle_exit(signal.SIGTERM, None)
    running.worker.ended.set()
    wait_until(lambda: running.server.should_exit)
    running.thread.join(0.3)  # uvicorn looks at should_exit every 0.1 s
    kept.sendall(ASK)
    assert kept.recv(100).startswith(b"HTTP/1.1 204"), f"{CHANGED}it is not H11Protocol that kept connections are of"
    running.thread.join(PATIENCE_S)
    assert not running.thread.is_alive()


def test_a_kept_connection_on_which_nothing_comes_holds_the_end_up_for_a_moment_only(
    running: Running, kept: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.startup.server.KEPT_S", 0.05)
    running.server.handle_exit(signal.SIGTERM, None)
    running.worker.ended.set()
    running.thread.join(PATIENCE_S)
    assert not running.thread.is_alive()
    assert kept.recv(100) == b""
