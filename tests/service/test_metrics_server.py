"""/metrics on a port of its own, over real sockets, while a server runs."""

import socket
import threading
from contextlib import ExitStack

import httpx
import pytest

from tests.service.client.conftest import SPEC, MakeServed, Served, make_served, served  # noqa: F401
from tests.service.fakes import wait_until
from tminus.service.metrics import Metrics
from tminus.service.metrics_server import MOST, serve_metrics
from tminus.service.server import bind


def start(metrics: Metrics) -> str:
    listener = bind("127.0.0.1", 0)
    listener.listen()
    serve_metrics(listener, metrics)
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_what_happens_in_the_server_is_told_there(served: Served) -> None:  # noqa: F811
    url = start(served.metrics_kept)
    assert httpx.post(f"{served.url}/sample", json=SPEC).status_code == 200
    text = httpx.get(f"{url}/metrics").text
    for line in ('tminus_images_total{model="fake"} 2.0', "tminus_store_up 1.0", "tminus_rows_waiting 0.0"):
        assert line in text
    assert "tminus_tasks 0.0" not in text


@pytest.mark.parametrize("path", ["/", "/model", "/metrics/x", "/healthz"])
def test_nothing_else_is(path: str) -> None:
    assert httpx.get(f"{start(Metrics())}{path}").status_code == 404


def test_it_is_read_only() -> None:
    assert httpx.post(f"{start(Metrics())}/metrics").status_code == 405


def test_idle_connections_take_no_threads_and_no_more_than_their_share() -> None:
    url, threads = start(Metrics()), threading.active_count()
    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    with ExitStack() as stack:
        for _ in range(4 * MOST):
            stack.enter_context(socket.create_connection(address))
        assert threading.active_count() <= threads + 1
    wait_until(lambda: httpx.get(f"{url}/metrics").status_code == 200)
