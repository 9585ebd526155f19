"""A job that is watched over the WebSocket /sample/stream."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any, Self

import websockets.asyncio.client
from websockets.exceptions import ConnectionClosed

from tminus.service.client._async.connection import AsyncConnection
from tminus.service.client.bounds import Asked
from tminus.service.client.errors import ClientError
from tminus.service.client.messages import CANCEL, Cancelled, Done, Message, message_of, opening_of
from tminus.service.client.parameters import text_of
from tminus.service.client.patience import Patience
from tminus.service.client.reading import Reading


class AsyncWatching:
    """A watched job. Iterate over it, once; use `with` where the loop may be left by another way than `break`."""

    def __init__(self, connection: AsyncConnection, parameters: Mapping[str, Any]) -> None:
        self._connection, self._parameters = connection, parameters
        self._ws: websockets.asyncio.client.ClientConnection | None = None
        self._begun = False

    async def __aiter__(self) -> AsyncIterator[Message]:
        if self._begun:  # a second loop would make a second job
            return
        self._begun = True
        accepted, text, asked = False, text_of(self._parameters), Asked.of(self._parameters)
        patience = Patience(self._connection.patience_s)
        while True:
            try:
                async with self._connection.websocket("/sample/stream", asked.picture_bytes) as ws:
                    await ws.send(text)
                    self._ws, reading = ws, Reading(asked)
                    while True:
                        message = await _receive(ws, reading)
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
            with suppress(ConnectionClosed):
                await self._ws.send(CANCEL)


async def _receive(ws: websockets.asyncio.client.ClientConnection, reading: Reading) -> Message:
    """Receive a message and the images that follow it."""
    opening = opening_of(await ws.recv())
    reading.begin(opening)
    message = message_of(opening, [await ws.recv() for _ in range(opening.images)])
    reading.end(message)
    return message
