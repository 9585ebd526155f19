# Generated from service/client/_async/watching.py by tests/unasync.py. Change that file and run `make client`.
"""A job that is watched over the WebSocket /sample/stream."""

import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from ..errors import ClientError
from ..messages import CANCEL, Cancelled, Done, Message
from ..parameters import text_of
from ..patience import Patience
from ..reading import Expected, Reading
from .connection import Connection

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection


class Watching:
    """A watched job. Iterate over it, once; use `with` where the loop may be left by another way than `break`."""

    def __init__(self, connection: Connection, parameters: Mapping[str, Any]) -> None:
        self._connection, self._parameters = connection, parameters
        self._ws: ClientConnection | None = None
        self._begun = False

    def __iter__(self) -> Iterator[Message]:
        if self._begun:  # a second loop would make a second job
            return
        self._begun = True
        accepted, text, expected = False, text_of(self._parameters), Expected.of(self._parameters)
        patience = Patience(self._connection.patience_s)
        while True:
            try:
                with self._connection.websocket("/sample/stream", expected.picture_bytes) as ws:
                    ws.send(text)
                    self._ws, reading = ws, Reading(expected)
                    while True:
                        images = reading.begin(ws.recv())
                        message = reading.end([ws.recv() for _ in range(images)])
                        accepted = True
                        yield message
                        if isinstance(message, Done | Cancelled):
                            return
            except ClientError as error:
                if accepted:  # trying again would make another job
                    raise
                time.sleep(patience.pause_s(error))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._ws is not None:
            self._ws.close()

    def cancel(self) -> None:
        """Cancel the job once there is one, from any thread; the loop ends with Cancelled, or Done if it was done."""
        if self._ws is not None:
            from websockets.exceptions import ConnectionClosed

            with suppress(ConnectionClosed):  # then it is not wanted any more
                self._ws.send(CANCEL)
