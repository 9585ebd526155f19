"""What comes in over WebSockets is bounded over all of them, on a real uvicorn with an app that only listens."""

import asyncio
import inspect
import logging
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import uvicorn
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.service.api.asgi import Served
from tests.service.fakes import PATIENCE_S, wait_until
from tminus.service.api.edge.connections import StreamProtocol, stream_protocol
from tminus.service.byte_budget import ByteBudget

Protocol = Any
CHANGED = f"uvicorn {uvicorn.__version__} has changed what service/api/edge/connections.py extends: "
EXTENDED = {
    name for name, member in vars(StreamProtocol).items() if inspect.isfunction(member) and not name.startswith("_")
}


async def echo_sizes(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] != "websocket":
        return
    while (message := await receive())["type"] != "websocket.disconnect":
        if message["type"] == "websocket.connect":
            await send({"type": "websocket.accept"})
        else:
            await send({"type": "websocket.send", "text": str(len(message["text"]))})


@pytest.fixture
def served() -> Iterator[tuple[str, Protocol]]:
    """An address, and the protocol class there, which holds at most 200,000 bytes."""
    protocol = stream_protocol(200_000)
    with Served(echo_sizes, ws=protocol, ws_max_size=10**6, ws_per_message_deflate=False) as running:
        host, port = running.address
        yield f"ws://{host}:{port}", protocol
    assert protocol.budget.held_bytes == 0


@contextmanager
def half_sent(url: str, size: int) -> Iterator[ClientConnection]:
    """A client that has sent this much of a message that does not end."""
    pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    with connect(url) as ws:
        sending = threading.Thread(target=lambda: ws.send(iter(pieces.get, None)))
        sending.start()
        pieces.put("x" * size)
        try:
            yield ws
        finally:
            pieces.put(None)
            sending.join(PATIENCE_S)


def send_and_wait(ws: ClientConnection, text: str) -> object:
    ws.send(text)
    return ws.recv(PATIENCE_S)


def test_what_all_send_at_once_is_bounded_and_small_messages_are_always_accepted(served: tuple[str, Protocol]) -> None:
    url, protocol = served
    with half_sent(url, 150_000):
        wait_until(lambda: protocol.budget.held_bytes > 150_000)
        with connect(url) as other:
            with pytest.raises(ConnectionClosed):
                send_and_wait(other, "x" * 100_000)
            assert other.close_code in (1013, 1006)
        with connect(url) as small:
            small.send("x" * 10_000)
            assert small.recv(PATIENCE_S) == "10000"
    wait_until(lambda: protocol.budget.held_bytes < 1000)
    with connect(url) as again:
        for _ in range(3):
            again.send("x" * 150_000)
            assert again.recv(PATIENCE_S) == "150000", "a message that was taken does not count"


# --- frames by hand: what no library sends ---

UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
TEXT, CONTINUATION, PING, PONG, END = 0x1, 0x0, 0x9, 0xA, 0x80


def frame(code: int, data: bytes = b"") -> bytes:
    """A client's frame, whose mask is zero."""
    size = bytes([0x80 | len(data)]) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2)
    return bytes([code]) + size + bytes(4) + data


def ending(url: str, frames: bytes) -> tuple[int, str]:
    """Why the server closes a connection that sends these."""
    with connect(url) as ws:
        ws.socket.sendall(frames)
        with pytest.raises(ConnectionClosed):
            ws.recv(PATIENCE_S)
        return ws.close_code or 0, ws.close_reason or ""


def test_a_message_of_many_tiny_fragments_closes_the_connection(served: tuple[str, Protocol]) -> None:
    for data in (b"", b"x", b"x" * 40):
        code, why = ending(served[0], frame(TEXT) + frame(CONTINUATION, data) * 20_000)
        assert code == 1009
        assert "fragments" in why


def test_a_message_may_have_some_tiny_fragments_and_any_number_of_others(served: tuple[str, Protocol]) -> None:
    with connect(served[0]) as ws:
        for data, count in ((b"x", 1000), (b"x" * 100, 1500), (b"", 1000)):
            ws.socket.sendall(frame(TEXT) + frame(CONTINUATION, data) * count + frame(END | CONTINUATION))
            assert ws.recv(PATIENCE_S) == str(len(data) * count)


def test_a_flood_of_control_frames_closes_the_connection(served: tuple[str, Protocol]) -> None:
    code, why = ending(served[0], frame(END | PING) * 20_000)
    assert code == 1008
    assert "control frames" in why


def test_text_that_is_not_utf8_closes_the_connection_without_a_traceback(
    served: tuple[str, Protocol], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert ending(served[0], frame(END | TEXT, b"\xff\xfe"))[0] == 1007
    assert all(record.exc_info is None for record in caplog.records)


def test_control_frames_are_not_counted_as_held(served: tuple[str, Protocol]) -> None:
    url, protocol = served
    with connect(url) as ws:
        for _ in range(30):
            ws.socket.sendall(frame(END | PING, b"x" * 125))
        wait_until(lambda: protocol.budget.held_bytes == 0)
        ws.send("x" * 150_000)
        assert ws.recv(PATIENCE_S) == "150000"


def test_sending_a_message_lasts_until_it_has_left() -> None:
    sent: queue.SimpleQueue[int] = queue.SimpleQueue()

    async def send_much(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "websocket.accept"})
        await send({"type": "websocket.send", "bytes": bytes(4_000_000)})
        sent.put(1)

    with Served(send_much) as running, socket.create_connection(running.address, PATIENCE_S) as client:
        client.sendall(UPGRADE)
        with pytest.raises(queue.Empty):  # the kernel holds some of it
            sent.get(timeout=0.3)
        while client.recv(65_536):
            pass
        assert not sent.empty()


def test_what_is_parsed_in_one_turn_is_bounded(served: tuple[str, Protocol], monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    parse = WebSocketsSansIOProtocol.data_received
    monkeypatch.setattr(
        WebSocketsSansIOProtocol, "data_received", lambda self, data: (turns.append(len(data)), parse(self, data))
    )
    with connect(served[0]) as ws:
        ws.send("x" * 100_000)
        assert ws.recv(PATIENCE_S) == "100000"
    assert len(turns) > 50
    assert max(turns) <= 2048


def test_others_have_their_turn_between_two_messages_of_one_connection() -> None:
    async def both() -> list[str]:
        loop, seen = asyncio.get_running_loop(), list[str]()
        protocol = stream_protocol()(uvicorn.Config(echo_sizes), ServerState(), {}, _loop=loop)
        protocol._received = protocol.budget.hold()
        for text in ("first", "second"):
            protocol.queue.put_nowait({"type": "websocket.receive", "text": text})

        async def other() -> None:
            for _ in range(2):
                seen.append("other")
                await asyncio.sleep(0)

        waiting = asyncio.ensure_future(other())
        for _ in range(2):
            seen.append((await protocol.receive())["text"])
        await waiting
        return seen

    assert asyncio.run(both()) == ["other", "first", "other", "second"]


# --- what is extended is not documented by uvicorn ---


@pytest.mark.parametrize("name", sorted(EXTENDED))
def test_uvicorn_has_each_method_that_is_extended(name: str) -> None:
    theirs = getattr(WebSocketsSansIOProtocol, name, None)
    assert theirs is not None, f"{CHANGED}there is no {name}"
    parameters = [*inspect.signature(theirs).parameters]
    assert parameters == [*inspect.signature(getattr(StreamProtocol, name)).parameters], f"{CHANGED}{name}"


def test_uvicorn_calls_each_method_that_is_extended() -> None:
    called: set[str] = set()

    class Spy(StreamProtocol):
        budget = ByteBudget()

        def __getattribute__(self, name: str) -> Any:
            called.add(name)
            return super().__getattribute__(name)

    with (
        Served(echo_sizes, ws=Spy, ws_ping_interval=0.05, ws_ping_timeout=0.05) as running,
        socket.create_connection(running.address, PATIENCE_S) as client,
        suppress(ConnectionResetError),
    ):
        client.sendall(UPGRADE)
        client.recv(1000)
        client.sendall(frame(TEXT, b"a message ") + frame(END | CONTINUATION, b"in two") + frame(END | PING))
        client.sendall(frame(END | PONG))  # of no ping
        while client.recv(1000):  # and no ping is answered
            pass
    assert not EXTENDED - called, f"{CHANGED}{EXTENDED - called} is never called"
