"""Refusals, servers that cannot be reached and answers from elsewhere, sync and async."""

import asyncio
import gzip
import socket
import socketserver
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.service.client.breaking import Breaking
from tests.service.client.conftest import ADMIN_KEY, SPEC, Connect, MakeServed, Served
from tests.service.client.hostile import IMAGE_HEAD, PNG, answering, endless
from tests.service.fakes import PATIENCE_S
from tminus.service.client import AsyncClient, Client, Done, Problem, UnexpectedAnswer, Unreachable
from tminus.service.client._async import KEEP_ALIVE
from tminus.service.client.reading import IMAGE_BYTES
from tminus.service.startup.server import bind


def test_custom_headers_are_sent_with_every_request_and_websocket(served: Served, connect: Connect) -> None:
    transport = Breaking()
    tminus = connect(served.url, headers={"Authorization": "Bearer x"}, transport=transport)
    tminus.model()
    assert transport.requests[0].headers["authorization"] == "Bearer x"
    foreign = connect(served.url, headers={"Origin": "https://evil.example"})  # seen in how the server answers
    with pytest.raises(Problem) as caught:
        list(foreign.watch(**SPEC))
    assert (caught.value.status, caught.value.code) == (403, "foreign_origin")


def test_the_admin_key_goes_with_a_change_of_models_only_and_in_place_of_other_credentials(
    several: Served, connect: Connect
) -> None:
    for url in (several.url, several.url.replace("http://", "http://user:password@")):
        transport = Breaking()
        tminus = connect(url, model="colour", headers={"Authorization": "Basic x"}, transport=transport)
        tminus.reload_model("colour", ADMIN_KEY)
        tminus.models()
        tminus.model()
        change, *others = transport.requests
        assert change.url.path == "/models/colour/reload"
        assert change.headers["authorization"] == f"Bearer {ADMIN_KEY}"
        assert all(ADMIN_KEY not in str(request.headers) for request in others)


def test_the_admin_key_is_sent_to_no_other_host_and_is_in_no_log(
    several: Served, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url.host)
        return httpx.Response(307, headers={"Location": several.url})

    asked = list[str]()
    caplog.set_level("DEBUG")
    with pytest.raises(UnexpectedAnswer, match="307"):
        connect("http://server", transport=httpx.MockTransport(answer)).load_model("spare", ADMIN_KEY)
    assert asked == ["server"]
    connect(several.url).load_model("spare", ADMIN_KEY)
    with pytest.raises(Unreachable) as caught:
        connect("http://127.0.0.1:1").load_model("spare", ADMIN_KEY)
    assert caplog.records
    assert ADMIN_KEY not in caplog.text + repr(caught.value)


def test_a_change_of_models_is_waited_for_however_long_it_takes(connect: Connect) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        waited.append(request.extensions["timeout"])
        return httpx.Response(204)

    waited = list[dict[str, float | None]]()
    connect("http://server", transport=httpx.MockTransport(answer)).unload_model("x", ADMIN_KEY)
    assert (waited[0]["read"], waited[0]["connect"]) == (None, 10)


class Noting(Breaking):
    """Keeps what the sockets of the connections were told."""

    def note(self, response: httpx.Response) -> httpx.Response:
        opened = response.extensions["network_stream"].get_extra_info("socket")
        names = {"SO_KEEPALIVE": socket.SOL_SOCKET} | dict.fromkeys(KEEP_ALIVE, socket.IPPROTO_TCP)
        here = {name: level for name, level in names.items() if hasattr(socket, name)}
        self.told = {name: opened.getsockopt(level, getattr(socket, name)) for name, level in here.items()}
        return response

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self.note(super().handle_request(request))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        return self.note(await super().handle_async_request(request))


def test_tcp_itself_finds_a_server_that_is_silently_gone(served: Served, connect: Connect) -> None:
    for call in (lambda tminus: tminus.model(), lambda tminus: list(tminus.submit(**SPEC).events())):
        transport = Noting()
        call(connect(served.url, transport=transport))
        here = {name: value for name, value in KEEP_ALIVE.items() if hasattr(socket, name)}
        assert {"TCP_KEEPIDLE", "TCP_USER_TIMEOUT"} <= here.keys() or sys.platform != "linux"
        assert transport.told == here | {"SO_KEEPALIVE": 1}


def test_a_proxy_that_the_environment_names_is_asked(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", served.url)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with pytest.raises(Problem, match=r"this server is not known as tminus\.example"):
        connect("http://tminus.example").model()


def test_long_calls_keep_no_other_call_from_a_connection() -> None:
    """More at once than httpx has connections for, unless told otherwise."""
    count, whole = 101, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
    asked = threading.Barrier(count)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(2**16)
            asked.wait(PATIENCE_S)
            self.request.sendall(whole)

    class Server(socketserver.ThreadingTCPServer):
        request_queue_size = 2 * count

    async def ask_async(url: str) -> list[Any]:
        async with AsyncClient(url) as tminus:
            return await asyncio.gather(*(tminus.model() for _ in range(count)))

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            assert asyncio.run(ask_async(url)) == [{}] * count
            with Client(url) as tminus, ThreadPoolExecutor(count) as threads:
                assert list(threads.map(lambda _: tminus.model(), range(count))) == [{}] * count
        finally:
            server.shutdown()


def test_a_refused_call_is_tried_again_while_patience_lasts(make_served: MakeServed, connect: Connect) -> None:
    served = make_served(max_jobs=1)
    served.engine.gate.shut()
    hasty = connect(served.url)
    kept = hasty.submit(steps=1)
    with pytest.raises(Problem) as caught:
        hasty.sample(steps=1)
    assert (caught.value.status, caught.value.code) == (429, "overloaded")
    assert caught.value.retry_after_s >= 1
    with pytest.raises(Problem) as caught:
        list(hasty.watch(steps=1))
    assert (caught.value.status, caught.value.retry_after_s) == (429, caught.value.document["retry_after_s"])
    opener = threading.Timer(0.5, served.engine.gate.open)
    opener.start()
    patient = connect(served.url, patience_s=PATIENCE_S)
    assert patient.sample(**SPEC).seed == 5
    assert kept.wait(PATIENCE_S).state == "done"
    served.engine.gate.shut()
    kept = hasty.submit(steps=1)
    opener.join()
    threading.Timer(0.5, served.engine.gate.open).start()
    assert isinstance(list(patient.watch(**SPEC))[-1], Done)


def test_a_server_that_is_not_there_is_unreachable(connect: Connect) -> None:
    listener = bind("127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    tminus = connect(url)
    listed: list[Callable[[], object]] = [
        tminus.model,
        lambda: tminus.submit(steps=1),
        lambda: list(tminus.watch(steps=1)),
        lambda: list(tminus.jobs()),
        connect(url, patience_s=0.6).model,
    ]
    for call in listed:
        with pytest.raises(Unreachable) as caught:
            call()
        assert not caught.value.reached
    listener.close()


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"status_code": 200, "text": "hello"}, "200, and not from a tminus server"),
        ({"status_code": 301, "headers": {"Location": "http://elsewhere"}}, "301"),
        ({"status_code": 400, "headers": {"Content-Type": "application/problem+json"}, "text": "{"}, "400"),
    ],
)
def test_an_answer_from_another_server_is_unexpected(answer: dict[str, Any], says: str, connect: Connect) -> None:
    transport = httpx.MockTransport(lambda request: httpx.Response(**answer))
    tminus = connect("http://server", transport=transport, patience_s=60)
    listed: list[Callable[[], object]] = [
        tminus.sample,
        tminus.model,
        tminus.submit,
        tminus.job("x").state,
        tminus.job("x").image,
        lambda: tminus.noise(b"", 1),
        tminus.models,
        lambda: tminus.load_model("x", ADMIN_KEY),
        lambda: tminus.reload_model("x", ADMIN_KEY),
    ]
    for call in listed:
        with pytest.raises(UnexpectedAnswer, match=says):
            call()


# --- the contract ---


def test_a_problem_has_all_that_is_wrong(served: Served, connect: Connect) -> None:
    with pytest.raises(Problem, match=r"eta must be .*; steps must be") as caught:
        connect(served.url).sample(steps=0, eta=2)
    assert {each["field"] for each in caught.value.errors} == {"steps", "eta"}
    assert caught.value.field == caught.value.errors[0]["field"]
    with pytest.raises(Problem) as caught:
        connect(served.url).job("x").state()
    assert caught.value.errors == []


def test_a_server_of_another_version_refuses_and_a_call_that_goes_away_is_warned_of(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport = Breaking()
    tminus = connect(served.url, transport=transport)
    tminus.model()
    assert transport.requests[0].headers["api-version"] == "1"
    monkeypatch.setattr("tminus.service.api.edge.authentication.API_VERSION", "2")
    with pytest.raises(Problem) as caught:
        tminus.model()
    assert (caught.value.code, caught.value.bound) == ("unsupported_api_version", "2")
    headers = {"Deprecation": "@1798761600", "Sunset": "Fri, 01 Jan 2027 00:00:00 GMT"}
    old = httpx.MockTransport(lambda request: httpx.Response(200, headers=headers, json={}))
    with pytest.warns(FutureWarning, match="GET /model is deprecated, and works until Fri, 01 Jan 2027"):
        connect("http://server", transport=old).model()


# --- hostile servers ---


BOMB = gzip.compress(bytes(2**26))


@pytest.mark.parametrize(
    ("head", "pieces", "status", "says"),
    [
        (IMAGE_HEAD, lambda: endless(PNG), "200 OK", r"longer than an answer to this can be \(16777216 bytes\)"),
        (IMAGE_HEAD + "Content-Encoding: gzip\r\n", lambda: [BOMB], "200 OK", "compressed"),
        (IMAGE_HEAD + "Content-Encoding: gzip, gzip\r\n", endless, "200 OK", "compressed"),
        ("Content-Type: application/problem+json\r\n", endless, "422 No", "longer than"),
        ("", endless, "404 No", "longer than"),
        ("Content-Type: application/problem+json\r\n", lambda: [b'{"detail": ' * 20_000], "400 No", "400"),
        (IMAGE_HEAD, lambda: [b"not an image"], "200 OK", "no image/png"),
    ],
    ids=["endless", "gzip bomb", "gzip in gzip", "endless problem", "endless error", "deep problem", "no image"],
)
def test_no_more_is_read_than_can_answer_the_request(
    head: str, pieces: Callable[[], Any], status: str, says: str, connect: Connect
) -> None:
    with answering(head, pieces, status) as hostile:
        with pytest.raises(UnexpectedAnswer, match=says):
            connect(hostile.url, patience_s=60).sample(n=1)
        assert hostile.sent < IMAGE_BYTES + 2**24, "what the sockets hold comes on top"


def test_a_document_is_bounded_in_length_and_depth(connect: Connect) -> None:
    for pieces in (lambda: endless(b"{"), lambda: [b"[" * 10**6], lambda: [b'{"a":' * 10**5], lambda: [b"[1]"]):
        with answering("Content-Type: application/json\r\n", pieces) as hostile:
            tminus = connect(hostile.url)
            for call in (tminus.model, tminus.models, tminus.job("x").state):
                with pytest.raises(UnexpectedAnswer, match="200"):
                    call()


@pytest.mark.parametrize(
    "members",
    [
        {"errors": 5},
        {"errors": [5]},
        {"errors": [{"detail": 5}]},
        {"detail": 5},
        {"code": ["x"]},
        {"status": "429"},
        {"field": {}},
        {"bound": 1},
        {"status": -1},
    ],
    ids=str,
)
def test_a_problem_whose_members_have_other_types_is_unexpected(members: dict[str, Any], connect: Connect) -> None:
    answer = {"headers": {"Content-Type": "application/problem+json", "Retry-After": "0"}, "json": members}
    transport = httpx.MockTransport(lambda request: httpx.Response(429, **answer))
    with pytest.raises(UnexpectedAnswer, match="429"):
        connect("http://server", transport=transport, patience_s=60).model()
