import asyncio
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from tests.service.api.test_middleware import scope_of
from tminus.service.api.answers import progress
from tminus.service.api.answers.progress import EventStream
from tminus.service.api.edge.middleware import PIECE_BYTES

SEND_S = 1.0


def stream_to_a_reader_that_takes(monkeypatch: pytest.MonkeyPatch, piece_s: float, num_pieces: int) -> tuple[int, int]:
    """How many bytes of one event arrive, and how often the stream was closed."""
    monkeypatch.setattr(progress, "SEND_S", SEND_S)
    closed, arrived = [], 0

    async def events() -> AsyncGenerator[bytes]:
        yield bytes(num_pieces * PIECE_BYTES)

    async def send(message: Message) -> None:
        nonlocal arrived
        if body := message.get("body", b""):
            await asyncio.sleep(piece_s * len(body) / PIECE_BYTES)
            arrived += len(body)

    async def receive() -> Message:
        await asyncio.sleep(60)
        return {"type": "http.disconnect"}

    asyncio.run(EventStream(events(), lambda: closed.append(1))(scope_of(), receive, send))
    return arrived, len(closed)


def test_a_large_event_may_take_a_slow_reader_longer_than_a_piece_of_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stream_to_a_reader_that_takes(monkeypatch, 0.25, 6) == (6 * PIECE_BYTES, 1)


def test_who_reads_nothing_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert stream_to_a_reader_that_takes(monkeypatch, 60.0, 6) == (0, 1)
