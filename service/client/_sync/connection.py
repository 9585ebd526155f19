# Generated from service/client/_async/connection.py by unasync.py. Change that file and run `make client`.
"""The connections to one server: HTTP requests, streamed responses and WebSockets."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
import websockets.sync.client
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

from service.client.errors import ClientError
from service.client.patience import Patience
from service.client.transport import CONNECT_S, check, closed, http_address, lost, refused, timeouts, ws_address


class Connection:
    """Connects to one server, and turns the errors of httpx and websockets into ClientErrors.

    Raises ValueError for a url that is not one. `patience_s` is that of the client.
    """

    def __init__(
        self,
        url: str,
        patience_s: float,
        headers: Mapping[str, str] | None,
        transport: httpx.BaseTransport | None,
    ) -> None:
        address = http_address(url)
        self.patience_s = patience_s
        self._ws_address, self._headers = ws_address(address), dict(headers or {})
        self._http = httpx.Client(
            base_url=address,
            headers=self._headers,
            timeout=timeouts(),
            transport=transport,
        )

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def request(self, method: str, path: str, patience: Patience | None = None, **options: Any) -> httpx.Response:
        """Send a request until the response is 2xx; `options` are those of httpx. Raises ClientError."""
        patience = patience or Patience(self.patience_s)
        while True:
            try:
                return self._send(method, path, options)
            except ClientError as error:
                time.sleep(patience.pause_s(error))

    def _send(self, method: str, path: str, options: Mapping[str, Any]) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.HTTPError as error:
            raise lost(error) from None
        check(response)
        return response

    @contextmanager
    def stream(
        self, path: str, params: Mapping[str, Any], headers: Mapping[str, str], quiet_s: float
    ) -> Iterator[httpx.Response]:
        """Open a response of 2xx that is read while it is sent. Raises ClientError, also where it breaks off later."""
        options: dict[str, Any] = {"params": dict(params), "headers": headers, "timeout": timeouts(quiet_s)}
        try:
            with self._http.stream("GET", path, **options) as response:
                if not response.is_success:
                    response.read()
                check(response)
                yield response
        except httpx.HTTPError as error:
            raise lost(error) from None

    @contextmanager
    def websocket(self, path: str) -> Iterator[websockets.sync.client.ClientConnection]:
        """Open a WebSocket. Raises ClientError, also where it is closed by the server while it is used."""
        options: dict[str, Any] = {"additional_headers": self._headers, "open_timeout": CONNECT_S, "max_size": None}
        try:
            with websockets.sync.client.connect(self._ws_address + path, **options) as ws:
                try:
                    yield ws
                finally:
                    ws.close()  # with 1000: leaving early is not the internal error that `with` would report
        except ConnectionClosed as error:
            raise closed(error) from None
        except InvalidStatus as error:
            raise refused(error) from None
        except (OSError, WebSocketException) as error:
            raise lost(error) from None
