"""An answer of server-sent events, held to a time for each event; what it holds is given back when it ends."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable

from fastapi.sse import EventSourceResponse
from starlette.types import Message, Receive, Scope, Send

from tminus.service.api.answers.pieces import PIECE_BYTES
from tminus.service.errors import TooManyBytes

log = logging.getLogger(__name__)

SEND_S = 40.0  # for each PIECE_BYTES of an event to leave: a client that reads nothing is disconnected
QUIET_S = 15.0  # until a comment is sent, so that no proxy takes the connection for dead
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EventStream(EventSourceResponse):
    """A stream that calls `close` when it ends, however it ends."""

    def __init__(
        self, content: AsyncIterator[bytes], close: Callable[[], None], headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(content, headers={**(headers or {}), **HEADERS})
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            size_bytes = len(message.get("body", b""))  # a large event may take a slow reader longer
            async with asyncio.timeout(SEND_S * max(1, math.ceil(size_bytes / PIECE_BYTES))):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except TimeoutError:
            log.info("a client reads no events, and is disconnected")
        except TooManyBytes as error:  # the client comes back, and is told where the job is then
            log.info("an event is not sent, and its client is disconnected: %s", error.detail)
        finally:
            self._close()
