"""What listens: the early answers, what is relied on in uvicorn, the end of the work, and the port for metrics.

uvicorn does not document the methods that service/startup/server.py extends.
"""

import asyncio
import inspect
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Response
from starlette.testclient import TestClient, WebSocketDenialResponse

from tests.service.client.conftest import SPEC, MakeServed, Served, make_served, served  # noqa: F401
from tests.service.conftest import INSTANT, Site
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, wait_until
from tminus.service.api.edge.connections import Streams
from tminus.service.api.edge.origin import AllowedSites
from tminus.service.errors import Stalled
from tminus.service.metrics import Metrics
from tminus.service.startup.app import Application
from tminus.service.startup.serve import _run, first_request
from tminus.service.startup.server import MOST_FOR_METRICS, Opening, Server, bind, config_of, serve_metrics
from tminus.service.startup.settings import Settings

ASK = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CHANGED = f"uvicorn {uvicorn.__version__} has changed what service/startup/server.py extends: "
EXTENDED = sorted(
    name for name, member in vars(Server).items() if inspect.isfunction(member) and name[0] != "_" and name != "end"
)


class FakeWorker:
    """A worker that ends when it is told to."""

    def __init__(self) -> None:
        self.closed, self.ended = False, threading.Event()
        self.state = SimpleNamespace(ready=True, alive=True, draining=False, hangs=False, crashed=False, stall=None)

    def drain(self) -> None:
        self.state.draining = True

    def join(self) -> None:
        self.ended.wait(PATIENCE_S)

    def close(self) -> bool:
        self.closed = True
        if not self.state.hangs:
            self.ended.set()
        return not self.state.hangs


class Running:
    """A server in a thread, so that it gets no signals, whose application is built once `go` is set."""

    def __init__(self, build: Callable[[], Application], grace_s: float = 3600) -> None:
        self.listener = bind("127.0.0.1", 0)
        self.listener.listen()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.opening, self.go, self.failure = Opening(), threading.Event(), list[Exception]()
        config = uvicorn.Config(self.opening, http="h11", lifespan="off", log_config=None)
        self.server = Server(config, self.opening, grace_s)

        def build_when_told() -> Application:
            assert self.go.wait(PATIENCE_S)
            return build()

        def run() -> None:
            try:
                asyncio.run(_run(self.server, self.opening, self.listener, build_when_told, self.url))
            except Exception as error:
                self.failure.append(error)

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", trust_env=False)

    def has_ended(self) -> bool:
        self.thread.join(PATIENCE_S)
        return not self.thread.is_alive()

    def stop(self) -> None:
        self.go.set()
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)
        self.listener.close()


class Working(Running):
    """A server whose worker is a fake, and which has an application at once."""

    def __init__(self, grace_s: float = 3600) -> None:
        self.worker, self.streams = FakeWorker(), Streams(8, 8)
        app = FastAPI()
        app.get("/")(lambda: Response(status_code=204))
        models = SimpleNamespace(default=SimpleNamespace(model=INFO))
        parts: Any = SimpleNamespace(worker=self.worker, streams=self.streams, models=models)
        super().__init__(lambda: Application(app, parts), grace_s)
        self.go.set()
        wait_until(lambda: self.server.started and self.opening.application is not None)

    def answers(self) -> bool:
        with socket.create_connection(self.listener.getsockname(), PATIENCE_S) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return client.recv(100).startswith(b"HTTP/1.1 204")

    def stop(self) -> None:
        self.worker.ended.set()
        self.thread.join(PATIENCE_S)
        super().stop()


@pytest.fixture
def running() -> Iterator[Working]:
    server = Working()
    yield server
    server.stop()


@pytest.fixture
def kept(running: Working) -> Iterator[socket.socket]:
    """A connection that has had an answer and is kept."""
    with socket.create_connection(running.listener.getsockname(), PATIENCE_S) as client:
        client.sendall(ASK)
        assert client.recv(100).startswith(b"HTTP/1.1 204")
        yield client


# --- while the model is measured ---


def test_while_the_model_is_measured_a_server_is_alive_and_says_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tminus.service.startup.server")
    opening = Opening()
    client = TestClient(opening, base_url="http://localhost")
    assert client.get("/healthz").json() == {"status": "alive"}
    assert client.get("/v2/health/live").json() == {"live": True}
    ready = client.get("/readyz")
    assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
    assert "measured" in ready.json()["detail"]
    assert int(ready.headers["Retry-After"]) >= 1
    assert client.post("/sample", json={}).json()["code"] == "not_ready"
    for early in (client.get("/v2/health/ready"), client.post("/", json={}), client.post("/models/any/", json={})):
        assert (early.status_code, early.json()["code"]) == (503, "not_ready")
        assert early.json()["error"] == ready.json()["detail"], "as clients of other APIs read it"
    openai = client.post("/v1/images/generations", json={"prompt": ""})
    assert (openai.status_code, openai.json()["error"]["code"]) == (503, "not_ready")
    page = client.get("/")
    assert page.status_code == 503
    assert "being measured" in page.text
    assert 'http-equiv="refresh"' in page.text
    told = Opening()
    for _ in range(2):
        told.report("MNIST", "trying <all>", 3.2)
    said = [record.getMessage() for record in caplog.records if record.name == "tminus.service.startup.server"]
    assert said == ["MNIST: trying <all>; about 3 s to go"], "said once"
    assert (
        "Now: trying &lt;all&gt; (MNIST); about 3 s to go"
        in TestClient(told, base_url="http://localhost").get("/").text
    )
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert client.get("/models/any/").text == page.text
    with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect("/sample/stream"):
        pass
    assert caught.value.status_code == 503


def test_requests_are_passed_on_as_soon_as_the_model_is_there_until_its_worker_ends() -> None:
    site = Site(INFO, LIMITS, INSTANT)
    running = Running(lambda: site.application)
    wait_until(lambda: running.server.started)
    assert (running.get("/healthz").status_code, running.get("/readyz").status_code) == (200, 503)
    running.go.set()
    wait_until(lambda: running.get("/readyz").status_code == 200)
    assert httpx.post(f"{running.url}/sample", json={"steps": 1}, trust_env=False).status_code == 200
    site.worker.drain()
    assert running.has_ended()
    assert not site.worker.state.alive
    assert not running.failure
    running.stop()


def test_a_start_that_fails_ends_the_server_with_its_error() -> None:
    def fail() -> Application:
        raise ValueError("no executor runs here")

    running = Running(fail)
    running.go.set()
    assert running.has_ended()
    assert [str(error) for error in running.failure] == ["no executor runs here"]
    running.stop()


def test_a_server_that_is_stopped_before_it_could_start_does_not_wait_for_it() -> None:
    site = Site(INFO, LIMITS, INSTANT)
    running = Running(lambda: site.application)
    wait_until(lambda: running.server.started)
    running.server.handle_exit(signal.SIGTERM, None)
    assert running.has_ended()
    assert (running.opening.application, running.failure) == (None, [])
    running.stop()


# --- what is relied on in uvicorn ---


@pytest.mark.parametrize(
    ("header", "address"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("spoofed, 203.0.113.9:4711", "203.0.113.9"),
        ("[2001:db8::1]:80", "2001:db8::1"),
        ("<b>anything</b>", "127.0.0.1"),
        ("tm_a-key, 203.0.113", "127.0.0.1"),
        ("fe80::1%anything", "127.0.0.1"),
        ("", "127.0.0.1"),
    ],
)
@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_only_an_address_is_taken_for_the_one_that_a_proxy_names(kind: str, header: str, address: str) -> None:
    seen: list[str] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        seen.append(scope["client"][0])

    config = config_of(Settings(), app)
    config.load()
    headers = [(b"x-forwarded-for", header.encode())]
    scope = {"type": kind, "scheme": "http", "client": ("127.0.0.1", 1), "headers": headers}
    asyncio.run(config.loaded_app(scope, None, None))
    assert seen == [address]


@pytest.mark.parametrize("name", EXTENDED)
def test_uvicorn_has_each_method_that_is_extended(name: str) -> None:
    theirs = getattr(uvicorn.Server, name, None)
    assert theirs is not None, f"{CHANGED}there is no Server.{name}"
    parameters = [*inspect.signature(theirs).parameters]
    assert parameters == [*inspect.signature(getattr(Server, name)).parameters], f"{CHANGED}Server.{name}"


def test_uvicorn_has_handle_exit_called_on_a_signal() -> None:
    server = Server(uvicorn.Config(Opening()), Opening(), 3600)
    with server.capture_signals():
        for signum in (signal.SIGTERM, signal.SIGINT):
            assert signal.getsignal(signum) == server.handle_exit, f"{CHANGED}SIGTERM does not drain the worker"


# --- the end of the work ---


def test_the_first_signal_drains_and_the_server_answers_until_the_worker_has_ended(running: Working) -> None:
    running.server.handle_exit(signal.SIGTERM, None)
    assert running.worker.state.draining
    assert running.answers()
    assert not running.worker.closed
    running.worker.ended.set()
    assert running.has_ended()


def test_the_second_signal_ends_the_grace_period(running: Working) -> None:
    for _ in range(2):
        running.server.handle_exit(signal.SIGTERM, None)
    assert running.has_ended(), f"{CHANGED}Server.should_exit does not end it"
    assert running.worker.closed, "what runs is given up with an answer"


@pytest.mark.parametrize("hangs", [False, True])
def test_work_is_given_up_after_the_grace_period_also_by_a_worker_that_hangs(hangs: bool) -> None:
    running = Working(grace_s=0.05)
    running.worker.state.hangs = hangs
    running.server.handle_exit(signal.SIGTERM, None)
    assert running.has_ended(), "a worker that hangs does not keep the process"
    assert (running.worker.closed, running.worker.ended.is_set()) == (True, not hangs)
    running.stop()


def test_a_server_waits_for_streams_that_have_a_job_and_answers_meanwhile(running: Working) -> None:
    with ExitStack() as job:
        job.enter_context(running.streams.busy())
        running.worker.ended.set()
        running.thread.join(0.3)  # uvicorn looks at should_exit every 0.1 s
        assert running.server.should_exit
        assert running.answers(), f"{CHANGED}Server.shutdown is not called before it stops listening"
        # The stream's own thread is the event loop's.
        running.server.servers[0].get_loop().call_soon_threadsafe(job.pop_all().close)
    assert running.has_ended()


def test_the_first_command_that_is_shown_is_one_that_the_model_takes() -> None:
    assert first_request("http://here", INFO) == "Try: curl -X POST 'http://here/sample?n=8' -o out.png"
    classes_only = replace(INFO, null_class=None, class_names=("1", "0"))
    assert "/sample?n=8&class_label=number%3A0'" in first_request("http://here", classes_only)


def test_a_request_on_a_kept_connection_that_comes_just_after_the_end_of_the_work_is_answered(
    running: Working, kept: socket.socket
) -> None:
    running.server.handle_exit(signal.SIGTERM, None)
    running.worker.ended.set()
    wait_until(lambda: running.server.should_exit)
    running.thread.join(0.3)  # uvicorn looks at should_exit every 0.1 s
    kept.sendall(ASK)
    assert kept.recv(100).startswith(b"HTTP/1.1 204"), f"{CHANGED}it is not H11Protocol that kept connections are of"
    assert running.has_ended()


def test_a_kept_connection_on_which_nothing_comes_holds_the_end_up_for_a_moment_only(
    running: Working, kept: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.startup.server.KEPT_S", 0.05)
    running.server.handle_exit(signal.SIGTERM, None)
    running.worker.ended.set()
    assert running.has_ended()
    assert kept.recv(100) == b""


# --- /metrics and /healthz on a port of their own ---


def start(metrics: Metrics | None, worker: Any = None, allowed_sites: AllowedSites | None = None) -> str:
    """metrics: None while the model is measured."""
    opening: Any = SimpleNamespace(application=None)
    if metrics is not None:
        opening.application = SimpleNamespace(served=SimpleNamespace(metrics=metrics, worker=worker))
    listener = bind("127.0.0.1", 0)
    listener.listen()
    serve_metrics(listener, opening, allowed_sites or AllowedSites())
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_what_happens_in_the_server_is_told_there(served: Served) -> None:  # noqa: F811
    url = start(served.application.served.metrics)
    assert httpx.post(f"{served.url}/sample", json=SPEC).status_code == 200
    text = httpx.get(f"{url}/metrics").text
    for line in ('tminus_images_total{model="fake"} 2.0', "tminus_store_up 1.0", "tminus_rows_waiting 0.0"):
        assert line in text
    assert "tminus_asyncio_tasks 0.0" not in text
    asked = httpx.get(f"{url}/metrics", headers={"Accept": "application/openmetrics-text"})
    assert asked.headers["Content-Type"].startswith("application/openmetrics-text")
    assert ' # {request_id="' in asked.text


def test_a_supervisor_is_answered_there_as_at_the_server(served: Served) -> None:  # noqa: F811
    url = start(served.application.served.metrics, served.worker)
    for _ in range(2):
        there, here = (httpx.get(f"{each}/healthz") for each in (url, served.url))
        assert (there.status_code, there.json()) == (here.status_code, here.json()) == (200, {"status": "alive"})
        served.worker.drain()
    assert httpx.head(f"{url}/healthz").status_code == 200


def test_what_is_wrong_is_told_and_nothing_else_is_asked_for() -> None:
    url = start(None)  # while the model is measured
    assert httpx.get(f"{url}/healthz").json() == {"status": "alive"}
    answer = httpx.get(f"{url}/metrics")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
    worker: Any = FakeWorker()
    url = start(Metrics(), worker)
    assert httpx.get(f"{url}/healthz").status_code == 200
    worker.state.stall = Stalled(90.0)
    assert (httpx.get(f"{url}/healthz").status_code, httpx.get(f"{url}/metrics").status_code) == (503, 200)
    worker.state.crashed = True
    assert httpx.get(f"{url}/healthz").status_code == 500
    for path in ("/", "/model", "/metrics/x", "/readyz"):
        assert httpx.get(f"{url}{path}").status_code == 404
    assert httpx.post(f"{url}/metrics").status_code == 405


def test_metrics_are_told_by_the_names_of_the_server_alone() -> None:
    """By DNS rebinding the page of another site is of this origin, as browsers see it, and here no key is asked for."""
    url = start(Metrics(), FakeWorker(), AllowedSites(hosts=frozenset({"tminus"})))
    port = url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "tminus.evil.example", "["):
        answer = httpx.get(f"{url}/metrics", headers={"Host": host})
        assert (answer.status_code, answer.json()["code"]) == (403, "foreign_host"), host
        assert httpx.get(f"{url}/healthz", headers={"Host": host}).status_code == 200, "as at the server"
    for host in (f"127.0.0.1:{port}", "localhost", f"Tminus:{port}", "10.1.2.3:9100", f"[::1]:{port}"):
        assert httpx.get(f"{url}/metrics", headers={"Host": host}).status_code == 200, host


def test_idle_connections_take_no_threads_and_no_more_than_their_share() -> None:
    url, threads = start(Metrics()), threading.active_count()
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    with ExitStack() as stack:
        for _ in range(4 * MOST_FOR_METRICS):
            stack.enter_context(socket.create_connection(address))
        assert threading.active_count() <= threads + 1
    wait_until(lambda: httpx.get(f"{url}/metrics").status_code == 200)
