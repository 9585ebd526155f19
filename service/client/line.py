"""Runs calls, waiting in the caller's thread. What httpx and websockets do happens here."""

import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, suppress
from typing import Any, TypeVar

import httpx
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from service.client.effects import (
    Answer,
    Ask,
    Call,
    Chunk,
    Dial,
    Effect,
    Give,
    Hear,
    Listen,
    Pause,
    Request,
    Returned,
    advance,
)
from service.client.errors import Unreachable
from service.client.transport import CONNECT_S, SWITCHING_PROTOCOLS, arguments_of, closed, lost, refused

T = TypeVar("T")


class Line:
    """Runs one call at a time, and holds what it has open."""

    def __init__(self, http: httpx.Client, ws_address: str, headers: Mapping[str, str]) -> None:
        self._http, self._ws_address, self._headers = http, ws_address, headers
        self._open = ExitStack()
        self._chunks: Iterator[bytes] = iter(())
        self._ws: ClientConnection | None = None

    def run(self, call: Call[T]) -> T:
        """Bring a call to its end."""
        effect = advance(call)
        while not isinstance(effect, Returned):
            effect = advance(call, *self._attempt(effect))
        result: T = effect.value
        return result

    def iterate(self, call: Call[None]) -> Generator[Any, None, None]:
        """Yield what a call gives; what it holds open is closed when it ends or is left."""
        try:
            effect = advance(call)
            while not isinstance(effect, Returned):
                if isinstance(effect, Give):
                    yield effect.value
                    effect = advance(call)
                else:
                    effect = advance(call, *self._attempt(effect))
        finally:
            self.close()

    def say(self, text: str) -> None:
        """Send a message over the WebSocket, if it is open still."""
        ws = self._ws  # another thread may close it meanwhile
        if ws is not None:
            with suppress(ConnectionClosed):
                ws.send(text)

    def close(self) -> None:
        """Close what is open."""
        self._ws = None
        self._open.close()

    def _attempt(self, effect: Effect) -> tuple[Any, Unreachable | None]:
        try:
            return self._do(effect), None
        except Unreachable as error:
            return None, error
        except httpx.HTTPError as error:
            return None, lost(error)

    def _do(self, effect: Effect) -> Any:
        match effect:
            case Ask(request):
                response = self._http.send(self._build(request))
                return Answer(response.status_code, response.headers, response.content)
            case Listen(request):
                self.close()
                response = self._http.send(self._build(request), stream=True)
                self._open.callback(response.close)
                if response.status_code != httpx.codes.OK:
                    response.read()
                    return Answer(response.status_code, response.headers, response.content)
                self._chunks = response.iter_bytes()
                return Answer(response.status_code, response.headers)
            case Chunk():
                return next(self._chunks, None)
            case Dial(path, text):
                return self._dial(path, text)
            case Hear():
                assert self._ws is not None, "dial first"
                try:
                    return self._ws.recv()
                except ConnectionClosed as error:
                    raise closed(error) from None
            case Pause(seconds):
                return time.sleep(seconds)
        raise AssertionError(effect)

    def _build(self, request: Request) -> httpx.Request:
        return self._http.build_request(**arguments_of(request))

    def _dial(self, path: str, text: str) -> Answer:
        self.close()
        address = self._ws_address + path
        try:
            ws = self._open.enter_context(
                connect(address, additional_headers=self._headers, open_timeout=CONNECT_S, max_size=None)
            )
            ws.send(text)
        except InvalidStatus as error:
            return refused(error)
        except (OSError, WebSocketException) as error:
            raise lost(error) from None
        self._ws = ws
        return Answer(SWITCHING_PROTOCOLS, {})
