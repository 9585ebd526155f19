"""/metrics and /healthz on a port of their own, over real sockets, while a server runs."""

import socket
import threading
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tests.service.client.conftest import SPEC, MakeServed, Served, make_served, served  # noqa: F401
from tests.service.fakes import wait_until
from tminus.service.api.edge.origin import Doors
from tminus.service.metrics import Metrics
from tminus.service.startup.metrics_server import MOST, serve_metrics
from tminus.service.startup.server import bind


class FakeWorker:
    """What a supervisor wants to know of one."""

    crashed, stalled_s = False, 0.0


def start(metrics: Metrics | None, worker: Any = None, doors: Doors | None = None) -> str:
    """metrics: None while the model is measured."""
    application: Any = None if metrics is None else SimpleNamespace(metrics=metrics, worker=worker)
    listener = bind("127.0.0.1", 0)
    listener.listen()
    serve_metrics(listener, lambda: application, doors or Doors())
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_what_happens_in_the_server_is_told_there(served: Served) -> None:  # noqa: F811
    url = start(served.metrics_kept)
    assert httpx.post(f"{served.url}/sample", json=SPEC).status_code == 200
    text = httpx.get(f"{url}/metrics").text
    for line in ('tminus_images_total{model="fake"} 2.0', "tminus_store_up 1.0", "tminus_rows_waiting 0.0"):
        assert line in text
    assert "tminus_tasks 0.0" not in text


def test_a_supervisor_is_answered_there_as_at_the_server(served: Served) -> None:  # noqa: F811
    url = start(served.metrics_kept, served.worker)
    for _ in range(2):
        there, here = (httpx.get(f"{each}/healthz") for each in (url, served.url))
        assert (there.status_code, there.json()) == (here.status_code, here.json()) == (200, {"status": "alive"})
        served.worker.drain()
    assert httpx.head(f"{url}/healthz").status_code == 200


def test_a_worker_that_hangs_or_has_crashed_is_told_of() -> None:
    worker = FakeWorker()
    url = start(Metrics(), worker)
    assert httpx.get(f"{url}/healthz").status_code == 200
    worker.stalled_s = 90.0
    assert (httpx.get(f"{url}/healthz").status_code, httpx.get(f"{url}/metrics").status_code) == (503, 200)
    worker.crashed = True
    assert httpx.get(f"{url}/healthz").status_code == 500


def test_while_the_model_is_measured_it_is_alive_and_has_no_metrics() -> None:
    url = start(None)
    assert httpx.get(f"{url}/healthz").json() == {"status": "alive"}
    answer = httpx.get(f"{url}/metrics")
    assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")


@pytest.mark.parametrize("path", ["/", "/model", "/metrics/x", "/readyz"])
def test_nothing_else_is(path: str) -> None:
    assert httpx.get(f"{start(Metrics())}{path}").status_code == 404


def test_metrics_are_told_by_the_names_of_the_server_alone() -> None:
    """By DNS rebinding the page of another site is of this origin, as browsers see it, and here no key is asked for."""
    url = start(Metrics(), FakeWorker(), Doors(hosts=frozenset({"tminus"})))
    port = url.rpartition(":")[2]
    for host in ("evil.example", f"evil.example:{port}", "tminus.evil.example", "["):
        answer = httpx.get(f"{url}/metrics", headers={"Host": host})
        assert (answer.status_code, answer.json()["code"]) == (403, "foreign_host"), host
        assert httpx.get(f"{url}/healthz", headers={"Host": host}).status_code == 200, "as at the server"
    for host in (f"127.0.0.1:{port}", "localhost", f"Tminus:{port}", "10.1.2.3:9100", f"[::1]:{port}"):
        assert httpx.get(f"{url}/metrics", headers={"Host": host}).status_code == 200, host


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
