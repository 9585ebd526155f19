"""A job that is watched over the WebSocket /sample/stream."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from ..errors import ClientError
from ..messages import CANCEL, Cancelled, Done, Message
from ..parameters import text_of
from ..patience import Patience
from ..reading import Expected, Reading
from .connection import AsyncConnection

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection


class AsyncWatching:
    """A watched job. Iterate over it, once; use `with` where the loop may be left by another way than `break`."""

    def __init__(self, connection: AsyncConnection, parameters: Mapping[str, Any]) -> None:
        self._connection, self._parameters = connection, parameters
        self._ws: ClientConnection | None = None
        self._begun = False

    async def __aiter__(self) -> AsyncIterator[Message]:
        if self._begun:  # a second loop would make a second job
            return
        self._begun = True
        accepted, text, expected = False, text_of(self._parameters), Expected.of(self._parameters)
        patience = Patience(self._connection.patience_s)
        while True:
            try:
                async with self._connection.websocket("/sample/stream", expected.picture_bytes) as ws:
                    await ws.send(text)
                    self._ws, reading = ws, Reading(expected)
                    while True:
                        images = reading.begin(await ws.recv())
                        message = reading.end([await ws.recv() for _ in range(images)])
                        accepted = True
                        yield message
                        if isinstance(message, Done | Cancelled):
                            return
            except ClientError as error:
                if accepted:  # trying again would make another job
                    raise
                await asyncio.sleep(patience.pause_s(error))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._ws is not None:
            await self._ws.close()

    async def cancel(self) -> None:
        """Cancel the job once there is one, from any task; the loop ends with Cancelled, or Done if it was done."""
        if self._ws is not None:
            from websockets.exceptions import ConnectionClosed

            with suppress(ConnectionClosed):  # then it is not wanted any more
                await self._ws.send(CANCEL)
