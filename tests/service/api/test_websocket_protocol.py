"""What comes in over WebSockets is bounded over all of them, on a real uvicorn with an app that only listens."""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from service.api.websocket_protocol import stream_protocol
from tests.service.fakes import PATIENCE_S, wait_until

Protocol = Any


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
    config = uvicorn.Config(
        echo_sizes,
        port=0,
        lifespan="off",
        ws=protocol,
        log_config=None,
        ws_max_size=10**6,
        ws_per_message_deflate=False,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    wait_until(lambda: server.started)
    yield f"ws://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", protocol
    server.should_exit = True
    thread.join(PATIENCE_S)
    assert protocol.budget.held_bytes == 0


@contextmanager
def half_sent(url: str, size: int) -> Iterator[ClientConnection]:
    """Somebody who has sent so much of a message that does not end."""
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


def test_what_many_send_at_once_is_bounded_and_who_sends_little_is_heard(served: tuple[str, Protocol]) -> None:
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
