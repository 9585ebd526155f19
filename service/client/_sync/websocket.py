# Generated from service/client/_async/websocket.py by tests/unasync.py. Change that file and run `make client`.
"""WebSockets to a server. Imported for `watch` alone: the rest does without websockets."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import websockets.sync.client
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from ..transport import CLOSE_S, CONNECT_S, PONG_S, closed, lost, refused

MESSAGES_AHEAD = 2  # that have come over a WebSocket and were not asked for yet; each may be as long as they get


@contextmanager
def opened(
    url: str,
    headers: Mapping[str, str],
    max_bytes: int,
) -> Iterator[websockets.sync.client.ClientConnection]:
    """Open a WebSocket, with messages of at most max_bytes.

    Raises ClientError, also where it is closed by the server while it is used.
    """
    options: dict[str, Any] = {
        "additional_headers": headers,
        "open_timeout": CONNECT_S,
        "close_timeout": CLOSE_S,
        "ping_timeout": PONG_S,
        "compression": None,
        "max_size": max_bytes,
        "max_queue": MESSAGES_AHEAD,
    }
    try:
        with websockets.sync.client.connect(url, **options) as ws:
            try:
                yield ws
            finally:
                ws.close()  # with 1000: leaving early is not the internal error that `with` would report
    except ConnectionClosed as error:
        raise closed(error, max_bytes) from None
    except InvalidStatus as error:
        raise refused(error) from None
    except (OSError, WebSocketException) as error:
        raise lost(error) from None


def send_unless_closed(ws: websockets.sync.client.ClientConnection, text: str) -> None:
    """Send a message; one that is not wanted any more is not missed."""
    with suppress(ConnectionClosed):
        ws.send(text)
