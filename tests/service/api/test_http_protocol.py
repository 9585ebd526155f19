"""The HTTP side of uvicorn, over real sockets: deadlines, bounds, and clients that do what no library does."""

import asyncio
import contextlib
import gc
import json
import logging
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from tests.service.api.asgi import Served
from tests.service.fakes import PATIENCE_S, wait_until
from tminus.service.api.answers.problems import render
from tminus.service.api.edge import http_protocol, middleware
from tminus.service.api.edge.http_protocol import MAX_HEAD_BYTES
from tminus.service.api.edge.middleware import PIECE_BYTES, MemoryLimit, RequestContext
from tminus.service.byte_budget import ByteBudget
from tminus.service.errors import MalformedRequest, ServiceError

HEAD = b"POST /echo HTTP/1.1\r\nHost: localhost\r\n"
GET = b"GET /ok HTTP/1.1\r\nHost: localhost\r\n\r\n"
LARGE = bytes(range(256)) * 2**16  # 16 MiB
HANDSHAKE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


class Running(Served):
    """A server; /wait answers when its client has gone or the test says so."""

    def __init__(self, max_per_address: int = 100, max_connections: int = 1000) -> None:
        self.began, self.gone, self.go = [], [], threading.Event()  # type: ignore[var-annotated]
        app = MemoryLimit(self.app, 10**6, {}, ByteBudget(), lambda _: None)
        http = http_protocol.http_protocol(max_connections, max_per_address)
        super().__init__(RequestContext(app, lambda *_: None), http)

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            while scope["path"] == "/never" and (await receive())["type"] != "websocket.disconnect":
                self.began.append(scope)
            if scope["path"] == "/accept":
                await receive()
                await send({"type": "websocket.accept"})
                await receive()
            await send({"type": "websocket.close", "code": 1000})
            return
        body, more = b"", scope["path"] != "/early"
        try:
            while more:
                message = await receive()
                body, more = body + message.get("body", b""), message.get("more_body", False)
        except ServiceError as error:
            await render(error)(scope, receive, send)
            return
        if scope["path"] == "/wait":
            self.began.append(scope)
            leaving = asyncio.ensure_future(receive())
            going = asyncio.ensure_future(asyncio.to_thread(self.go.wait, PATIENCE_S))
            await asyncio.wait({leaving, going}, return_when=asyncio.FIRST_COMPLETED)
            if leaving.done():
                self.gone.append(scope)
                self.go.set()
                return
            leaving.cancel()
        if scope["path"] == "/large":
            body = LARGE
        if scope["path"] == "/left":  # chunked, until a little of it is left in the transport
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while not self.unsent():
                await send({"type": "http.response.body", "body": bytes(4096), "more_body": True})
            await send({"type": "http.response.body", "body": b"the end"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        if scope["path"] == "/pause":  # between head and body
            await asyncio.to_thread(self.go.wait, PATIENCE_S)
        await send({"type": "http.response.body", "body": body})

    def connections(self) -> list[Any]:
        return list(self.server.server_state.connections)

    def unsent(self) -> int:
        """Bytes in the transports of all connections."""
        return sum(each.transport.get_write_buffer_size() for each in self.connections())

    def connect(self, receive_bytes: int | None = None, source: str = "127.0.0.1") -> socket.socket:
        """receive_bytes: of the client's buffer; the kernel tells of room in it by sixteenths."""
        client = socket.socket()
        client.bind((source, 0))
        client.settimeout(PATIENCE_S)
        if receive_bytes is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        client.connect(self.address)
        return client

    def ask(self, data: bytes) -> bytes:
        """All that is answered before the server closes."""
        with self.connect() as client:
            client.sendall(data)
            return read_all(client)

    def __exit__(self, *_error: object) -> None:
        self.go.set()
        super().__exit__()


def ok(client: socket.socket, data: bytes = GET) -> None:
    """Send a request whose answer is short."""
    client.sendall(data)
    assert client.recv(65536).startswith(b"HTTP/1.1 200")


def read_all(client: socket.socket) -> bytes:
    found = b""
    while chunk := client.recv(65536):
        found += chunk
    return found


def read_body(client: socket.socket, pause_s: float = 0) -> bytes:
    """The body of one answer of a declared length, at most 64 KiB at a time."""
    answer, found = HTTPResponse(client), bytearray()
    answer.begin()
    while piece := answer.read(65536):
        found += piece
        time.sleep(pause_s)
    return bytes(found)


def problem(answer: bytes) -> tuple[int, str]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head, answer
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["code"]


@pytest.fixture
def running() -> Iterator[Running]:
    with Running() as server:
        yield server


def test_a_head_that_does_not_come_is_waited_for_no_longer_than_a_time(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.2)
    assert running.ask(b"") == b"", "who says nothing is told nothing"
    assert problem(running.ask(HEAD)) == (408, "slow_head")
    with running.connect() as client:
        client.sendall(GET)
        client.recv(1000)
        client.sendall(b"G")
        assert problem(read_all(client)) == (408, "slow_head"), "of a further request too"


def test_a_head_that_comes_byte_by_byte_is_too_slow(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.3)
    with running.connect() as client, contextlib.suppress(OSError):
        for byte in GET[:20]:
            client.sendall(bytes([byte]))
            time.sleep(0.05)
    assert not running.connections()


def test_a_head_is_bounded(running: Running) -> None:
    for head in (
        GET[:-2] + b"X: " + b"y" * 200_000_000,
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",  # complete, in one piece
        GET[:-2] + b"".join(b"X-%d: y\r\n" % number for number in range(3000)) + b"\r\n",
    ):
        with running.connect() as client, contextlib.suppress(OSError):  # it may be closed while we still send
            client.sendall(head)
            assert problem(read_all(client)) == (400, "malformed_request")
    head = HEAD + b"Connection: close\r\nContent-Length: 100000\r\nX: "
    head += b"y" * (http_protocol.MAX_HEAD_BYTES - len(head) - 4) + b"\r\n\r\n"
    assert len(head) == http_protocol.MAX_HEAD_BYTES
    assert running.ask(head + b"x" * 100_000).endswith(b"x" * 100_000)


def test_a_body_that_stalls_or_crawls_is_given_up(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "WINDOW_S", 0.3)
    declared = HEAD + b"Content-Length: 500000\r\n\r\n"
    assert problem(running.ask(declared + b"x" * 100)) == (408, "slow_body")
    assert problem(running.ask(declared + b"x" * 100_000)) == (408, "slow_body"), "a fast beginning is no excuse"


@pytest.mark.parametrize("framing", [b"Content-Length: 4000000", b"Transfer-Encoding: chunked"])
def test_who_sends_too_much_and_only_then_reads_gets_the_answer(running: Running, framing: bytes) -> None:
    with running.connect() as client:
        client.sendall(HEAD + framing + b"\r\n\r\n")
        piece = b"x" * 40_000
        for _ in range(100):
            client.sendall(piece if b"Length" in framing else b"9c40\r\n%b\r\n" % piece)
            time.sleep(0.002)
        assert problem(read_all(client)) == (413, "body_too_large")
    wait_until(lambda: not running.server.server_state.connections)


EARLY = HEAD.replace(b"/echo", b"/early")  # what is answered before the body has come


@pytest.mark.parametrize("framing", ["Content-Length: 9000000000", "Transfer-Encoding: chunked"])
def test_who_has_the_answer_does_not_hold_the_connection_by_a_body_byte_by_byte(
    running: Running, monkeypatch: pytest.MonkeyPatch, framing: str
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 0.3)
    monkeypatch.setattr(http_protocol, "LINGER_S", 0.3)
    with running.connect() as client:
        ok(client, EARLY + framing.encode() + b"\r\n\r\n")

        def one_more() -> bool:
            with contextlib.suppress(OSError):
                client.sendall(b"x" if "Length" in framing else b"1\r\nx\r\n")
            return not running.server.server_state.connections

        wait_until(one_more)


def test_who_has_the_answer_may_send_the_rest_of_its_body_and_ask_again(running: Running) -> None:
    with running.connect() as client:
        for _ in range(3):
            ok(client, EARLY + b"Content-Length: 9\r\n\r\nhalf")
            client.sendall(b" half")
            ok(client)
            ok(client, EARLY + b"Content-Length: 4\r\n\r\n")
            ok(client, b"rest" + GET)


@pytest.mark.parametrize("bound", ["LINGER_S", "LINGER_BYTES"])
def test_what_is_sent_after_the_answer_is_taken_within_bounds(
    running: Running, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    if bound == "LINGER_S":
        monkeypatch.setattr(http_protocol, "LINGER_S", 0.2)
    with running.connect() as client:
        client.sendall(HEAD + b"Content-Length: 9000000000\r\n\r\n")
        assert problem(read_all(client)) == (413, "body_too_large")
        assert running.server.server_state.connections, "it waits for the client to close"
        if bound == "LINGER_BYTES":
            with pytest.raises(ConnectionError):
                client.sendall(bytes(2 * http_protocol.LINGER_BYTES))
        wait_until(lambda: not running.server.server_state.connections)


# --- who reads slowly, or not at all ---


def test_who_reads_no_answer_takes_little_memory(running: Running) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(8)]
        for client in clients:
            client.sendall(GET.replace(b"/ok", b"/large"))
        wait_until(lambda: len([each for each in running.connections() if each.flow.write_paused]) == len(clients))
        assert running.unsent() <= len(clients) * 3 * PIECE_BYTES
        for client in clients[:2]:
            assert read_body(client) == LARGE


@pytest.mark.parametrize("path", [b"/large", b"/left"])
@pytest.mark.parametrize("connection", [b"keep-alive", b"close"])
def test_who_reads_no_answer_is_disconnected(
    running: Running, monkeypatch: pytest.MonkeyPatch, path: bytes, connection: bytes
) -> None:
    """In the middle of it, or where all of it was written; also where the server has closed already."""
    monkeypatch.setattr(http_protocol, "SENT_S", 0.5)
    with running.connect() as client:
        client.sendall(GET.replace(b"/ok", path)[:-2] + b"Connection: " + connection + b"\r\n\r\n")
        wait_until(running.unsent)
        wait_until(lambda: not running.connections())
        wait_until(lambda: not running.server.server_state.tasks)


def test_who_reads_slowly_enough_gets_the_whole_answer(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "SENT_S", 1.0)
    with running.connect(receive_bytes=262_144) as client:
        client.sendall(GET.replace(b"/ok", b"/large"))
        began = time.monotonic()
        assert read_body(client, pause_s=0.01) == LARGE
        assert time.monotonic() - began > 2 * http_protocol.SENT_S, "so that it was looked at"
        ok(client)


def test_a_handshake_after_an_answer_that_was_not_read_is_refused(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library for WebSockets may close at once, and nobody would see what is left leave."""
    with running.connect() as client:
        client.sendall(GET.replace(b"/ok", b"/left"))
        wait_until(lambda: not running.server.server_state.tasks and running.unsent())
        client.sendall(HANDSHAKE.replace(b"Sec-WebSocket-Version: 13", b"Sec-WebSocket-Version: 5") + b"\r\n")
        answer = read_all(client)
    assert problem(answer[answer.index(b"the end") :].partition(b"\r\n0\r\n\r\n")[2]) == (400, "malformed_request")


def test_who_lingers_does_not_hold_up_the_end(running: Running, caplog: pytest.LogCaptureFixture) -> None:
    """Neither who did before, nor who begins to when the server has begun to end."""
    with running.connect() as before, running.connect() as after:
        before.sendall(HEAD + b"Content-Length: 9000000000\r\n\r\n")
        assert problem(read_all(before)) == (413, "body_too_large")
        after.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
        wait_until(lambda: running.server.server_state.tasks)
        running.server.should_exit = True
        wait_until(lambda: len(running.server.server_state.connections) == 1)
        after.sendall(b"%x\r\n%b\r\n" % (2 * 10**6, bytes(2 * 10**6)))
        begun = time.monotonic()
        assert problem(read_all(after)) == (413, "body_too_large")
        running.thread.join(PATIENCE_S)
        assert time.monotonic() - begun < http_protocol.LINGER_S - 1
    assert all(record.levelno < logging.ERROR for record in caplog.records)


def test_a_connection_that_ended_is_freed_at_once(running: Running) -> None:
    """By counting references: with many connections, what waits for the collector is a leak for a while."""
    living: weakref.WeakSet[object] = weakref.WeakSet()
    gc.collect()
    gc.disable()
    try:
        for data in (GET, HEAD + b"Content-Length: 9000000000\r\n\r\n", HEAD + b"Content-Length: 1\r\n\r\nx"):
            with running.connect() as client:
                client.sendall(data)
                client.recv(10_000)
                living.update(running.server.server_state.connections)
                assert len(living) == 1
            wait_until(lambda: not living)
    finally:
        gc.enable()


def test_a_handshake_that_is_refused_counts_until_it_is_closed() -> None:
    with Running(max_per_address=1) as running:
        with running.connect() as client:
            client.sendall(HANDSHAKE + b"Content-Length: 1000\r\n\r\n")
            assert problem(read_all(client))[0] == 400
            assert running.ask(b"").startswith(b"HTTP/1.1 503")
        wait_until(lambda: not running.server.server_state.connections)
        assert running.ask(GET[:-2] + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_a_handshake_counts_and_is_timed_until_it_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    handshake = HANDSHAKE + b"\r\n"
    with Running(max_per_address=1) as running, running.connect() as accepted:
        accepted.sendall(handshake.replace(b"/ws", b"/accept"))
        assert accepted.recv(1000).startswith(b"HTTP/1.1 101")
        monkeypatch.setattr(http_protocol, "HEAD_S", 0.5)
        with running.connect() as silent:
            silent.sendall(handshake.replace(b"/ws", b"/never"))
            wait_until(lambda: bool(running.began))
            assert running.ask(b"").startswith(b"HTTP/1.1 503"), "the one that has no answer has the only place"
            assert read_all(silent) == b"", "it is closed, though nobody answered"
        assert running.ask(GET[:-2] + b"Connection: close\r\n\r\n").startswith(b"HTTP/1.1 200")
        accepted.settimeout(0.2)
        with pytest.raises(TimeoutError):
            accepted.recv(1000)


def test_frames_that_do_not_wait_for_the_handshake_are_read_after_it(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_S", 1.0)
    with running.connect() as client:
        client.sendall(HANDSHAKE.replace(b"/ws", b"/never") + b"\r\n")
        wait_until(lambda: bool(running.began))
        client.sendall(b"\xff" * 5000)  # no frames
        time.sleep(0.1)
    wait_until(lambda: not running.server.server_state.tasks)
    assert all(record.levelno < logging.ERROR for record in caplog.records)
    with running.connect() as client:
        client.sendall(HANDSHAKE.replace(b"/ws", b"/accept") + b"\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 101")
        client.sendall(b"\xff" * 5000)
        assert client.recv(1000)[2:4] == (1002).to_bytes(2)


@pytest.mark.parametrize("bound", ["max_connections", "max_per_address"])
def test_connections_above_the_most_are_answered_503_and_closed(bound: str) -> None:
    with Running(**{bound: 2}) as running:
        for _ in range(2):  # those that ended are not counted
            clients = [running.connect() for _ in range(2)]
            for client in clients:
                client.sendall(GET[:-2])
            wait_until(lambda: len(running.connections()) == 2)
            refused = running.ask(GET)  # what it sends is not read, and does not cost it the answer
            assert refused.startswith(b"HTTP/1.1 503")
            for client in clients:
                ok(client, b"\r\n")  # the others are served
                client.close()
            wait_until(lambda: not running.server.server_state.connections)


def kept(running: Running) -> list[float]:
    """For how many seconds each idle connection is still kept."""
    timers = [each.timeout_keep_alive_task for each in running.connections()]
    return [timer.when() - time.monotonic() for timer in timers if timer is not None]


def test_a_new_connection_takes_the_place_of_an_idle_one_of_its_own_address_only() -> None:
    with Running(max_per_address=2, max_connections=4) as running, ExitStack() as stack:
        other = stack.enter_context(running.connect(source="127.0.0.2"))
        clients = [other]
        for count in (1, 2, 3):
            ok(clients[-1])
            wait_until(lambda count=count: len(kept(running)) == count)
            clients.append(stack.enter_context(running.connect()))
        assert all(60 < left_s <= 75 for left_s in kept(running)), "longer than clients keep them"
        ok(clients[3])  # its address had two connections, both idle
        assert clients[1].recv(1000) == b"", "and this is the one that was idle for longest"
        for client in clients[2:]:
            client.sendall(GET[:-2])
        wait_until(lambda: len(kept(running)) == 1)
        assert running.ask(GET).startswith(b"HTTP/1.1 503"), "none of its own is idle"
        ok(other)
    with Running(max_connections=2) as running, ExitStack() as stack:  # of all addresses together
        clients = []
        for count in (1, 2, 2):
            clients.append(stack.enter_context(running.connect()))
            ok(clients[-1])
            wait_until(lambda count=count: len(kept(running)) == count)
        assert clients[0].recv(1000) == b"", "it has been idle for longest"


def test_those_that_are_turned_away_take_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "LAST_LINGER_S", PATIENCE_S)
    with Running(max_per_address=1, max_connections=2) as running, ExitStack() as stack:
        clients = [stack.enter_context(running.connect()) for _ in range(9)]
        wait_until(lambda: len(running.connections()) == 9)
        other = stack.enter_context(running.connect(source="127.0.0.2"))
        ok(other)
        assert all(client.recv(1000).startswith(b"HTTP/1.1 503") for client in clients[1:])


def test_requests_that_do_not_wait_for_the_answer_before_end_with_their_connection(running: Running) -> None:
    wait = GET.replace(b"/ok", b"/wait")
    for pieces in ((wait * 8,), (wait, wait * 7)):
        running.began.clear(), running.gone.clear(), running.go.clear()
        with running.connect() as client:
            for piece in pieces:
                client.sendall(piece)
                wait_until(lambda: len(running.began) == 1)
        wait_until(lambda: len(running.gone) == 1)
        time.sleep(0.1)
        assert len(running.began) == 1, "none of the others is begun"


@pytest.mark.parametrize("method", [b"HEAD", b"GET"])
def test_who_has_the_whole_answer_before_the_server_knows_may_ask_again(running: Running, method: bytes) -> None:
    with running.connect() as client:
        ok(client, GET.replace(b"GET /ok", method + b" /pause"))  # its body is empty: this is all of it
        client.sendall(GET[:20])
        time.sleep(0.05)
        client.sendall(GET[20:])
        time.sleep(0.05)
        running.go.set()
        for _ in range(2):
            assert client.recv(65536).startswith(b"HTTP/1.1 200")
            client.sendall(GET)


def test_what_waits_for_an_answer_to_end_is_bounded(running: Running) -> None:
    with running.connect() as client:
        ok(client, GET.replace(b"/ok", b"/pause"))
        client.sendall(GET * (1 + MAX_HEAD_BYTES // len(GET)))
        time.sleep(0.1)
        running.go.set()
        assert read_all(client) == b""


def test_what_no_library_would_answer_is_answered_without_a_traceback(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    malformed, chunked = (400, "malformed_request"), b"Transfer-Encoding: chunked\r\n\r\n"
    with caplog.at_level(logging.INFO):
        for data, expected in (
            (HANDSHAKE + b"X: " + b"y" * 9000 + b"\r\n\r\n", (431, "too_many_headers")),
            (HANDSHAKE + b"".join(b"X-%d: y\r\n" % k for k in range(130)) + b"\r\n", (431, "too_many_headers")),
            (HANDSHAKE + b"Content-Length: 50000\r\n\r\n" + b"x" * 50000, malformed),
            (HANDSHAKE + chunked + b"0\r\n\r\n", malformed),
            (HANDSHAKE + b"X-A: \x1b\r\n\r\n", malformed),
            (b"\x00\xff\xfe\r\n\r\n", malformed),
            (HEAD + chunked + b"zz\r\n", malformed),
            (HEAD + b"Expect: 100-continue\r\n" + chunked + b"zz\r\n", malformed),
        ):
            assert problem(running.ask(data)) == expected, data[-50:]
        assert running.ask(HANDSHAKE + b"\r\n").startswith(b"HTTP/1.1 403"), "as the app closes it before it accepts"
        wait_until(lambda: not running.server.server_state.tasks)
    assert all(record.levelno < logging.ERROR and record.exc_info is None for record in caplog.records)


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"http://localhost:80/a%20b?x=/y", "/a b", b"x=/y"),
        (b"HTTPS://localhost:80", "/", b""),
        (b"http://localhost:80?x", "/", b"x"),
    ],
)
@pytest.mark.parametrize("upgrade", [b"", HANDSHAKE.partition(b"\r\n")[2]])
def test_a_target_with_a_host_is_taken_and_its_host_is_the_one_that_counts(
    target: bytes, path: str, query: bytes, upgrade: bytes
) -> None:
    scopes: list[Scope] = []

    async def app(scope: Scope, _receive: Receive, send: Send) -> None:
        scopes.append(scope)
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
        else:
            await render(MalformedRequest("no"))(scope, _receive, send)

    head = b"GET " + target + b" HTTP/1.1\r\n" + (upgrade or b"Host: evil.example\r\n")
    with Served(app) as served, socket.create_connection(served.address) as client:
        client.sendall(head.replace(b"Host: localhost\r\n", b"Host: evil.example\r\n") + b"\r\n")
        assert client.recv(65536)
    (scope,) = scopes
    assert (scope["type"], scope["path"], scope["query_string"]) == ("websocket" if upgrade else "http", path, query)
    assert [value for name, value in scope["headers"] if name == b"host"] == [b"localhost:80"]


# --- bodies in pieces ---

CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def test_a_body_of_many_tiny_chunks_is_refused(running: Running) -> None:
    for size in (1, 40):
        answer = running.ask(CHUNKED + (b"%x\r\n%s\r\n" % (size, b"x" * size)) * 40_000)
        assert problem(answer) == (400, "malformed_request")
        assert b"1024 chunks" in answer


def test_a_body_may_have_some_tiny_chunks_in_each_request_and_any_number_of_others(running: Running) -> None:
    with running.connect() as client:
        for chunks in (b"1\r\nx\r\n" * 1000, b"80\r\n%s\r\n" % (b"x" * 128) * 4000, b"1\r\nx\r\n" * 1000):
            client.sendall(CHUNKED + chunks + b"0\r\n\r\n")
            assert len(read_body(client)) == chunks.count(b"x")


@pytest.mark.parametrize("framing", ["chunked", "length"])
def test_what_is_parsed_in_one_turn_is_bounded(running: Running, framing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    parse = H11Protocol.data_received
    monkeypatch.setattr(H11Protocol, "data_received", lambda self, data: (turns.append(len(data)), parse(self, data)))
    body = b"x" * 500_000
    head = CHUNKED if framing == "chunked" else HEAD + b"Content-Length: %d\r\n\r\n" % len(body)
    with running.connect() as client:
        client.sendall(head + (b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if framing == "chunked" else body))
        assert read_body(client) == body
    assert max(turns) <= (2048 if framing == "chunked" else 65_536)
    assert turns[0] <= 2048, "a head"


def test_a_request_with_two_lengths_is_the_last_of_its_connection(running: Running) -> None:
    answer = running.ask(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"hello")
