"""What is answered while the model is being measured, and what becomes of a start that fails."""

import threading
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from starlette.testclient import WebSocketDenialResponse

from tests.service.conftest import INSTANT, Site
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, wait_until
from tminus.service.metrics import Metrics
from tminus.service.startup.app import Application
from tminus.service.startup.starting import Starting


class Slow:
    """An application that takes until `go` to build."""

    def __init__(self) -> None:
        self.site = Site(INFO, LIMITS, INSTANT)
        self.go, self.ended = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.starting = Starting(self.build, self.ended.set)

    def build(self) -> Application:
        assert self.go.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error
        return Application(self.site.app, self.site.worker, self.site.streams, Metrics(), INFO, None)


@pytest.fixture
def slow() -> Iterator[Slow]:
    made = Slow()
    yield made
    made.go.set()


def open_client(slow: Slow) -> TestClient:
    return TestClient(slow.starting, base_url="http://localhost")


def test_a_start_listens_at_once_and_says_what_it_does(slow: Slow) -> None:
    with open_client(slow) as client:
        assert client.get("/healthz").status_code == 200
        ready = client.get("/readyz")
        assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
        assert "measured" in ready.json()["detail"]
        assert int(ready.headers["Retry-After"]) >= 1
        assert client.post("/sample", json={}).json()["code"] == "not_ready"
        assert client.get("/v2/health/live").json() == {"live": True}
        for early in (client.get("/v2/health/ready"), client.post("/", json={}), client.post("/models/any/", json={})):
            assert (early.status_code, early.json()["code"]) == (503, "not_ready")
            assert early.json()["error"] == ready.json()["detail"]
        page = client.get("/")
        assert page.status_code == 503
        assert "being measured" in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.headers["x-content-type-options"] == "nosniff"
        assert client.get("/models/any/").text == page.text
        assert 'http-equiv="refresh"' in page.text
        with pytest.raises(WebSocketDenialResponse) as caught, client.websocket_connect("/sample/stream"):
            pass
        assert caught.value.status_code == 503
        slow.go.set()
        wait_until(lambda: client.get("/readyz").status_code == 200)
        assert client.post("/sample", json={"steps": 1}).status_code == 200
        assert client.get("/").status_code == 200
    assert not slow.site.worker.alive, "the application's lifespan has ended too"
    assert slow.ended.wait(PATIENCE_S)


def test_a_start_that_fails_ends_the_server_with_its_error(slow: Slow) -> None:
    slow.error = ValueError("no executor runs here")
    with open_client(slow):
        slow.go.set()
        assert slow.ended.wait(PATIENCE_S)
    assert slow.starting.failure is slow.error


def test_a_server_that_is_stopped_before_it_could_start_does_not_wait_for_it(slow: Slow) -> None:
    with open_client(slow) as client:
        assert client.get("/healthz").status_code == 200
    assert slow.starting.measuring


def test_a_worker_that_ends_by_itself_ends_the_server(slow: Slow) -> None:
    slow.go.set()
    with open_client(slow) as client:
        wait_until(lambda: client.get("/readyz").status_code == 200)
        slow.site.worker.drain()
        assert slow.ended.wait(PATIENCE_S)


def test_clients_of_other_apis_are_told_in_their_form(slow: Slow) -> None:
    with open_client(slow) as client:
        refused = client.post("/v1/images/generations", json={"prompt": ""})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert int(refused.headers["Retry-After"]) >= 1
        slow.go.set()
        wait_until(lambda: client.get("/readyz").status_code == 200)
