"""Runs calls in an event loop; otherwise as line.py."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any, TypeVar

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException

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


class AsyncLine:
    """Runs one call at a time, and holds what it has open."""

    def __init__(self, http: httpx.AsyncClient, ws_address: str, headers: Mapping[str, str]) -> None:
        self._http, self._ws_address, self._headers = http, ws_address, headers
        self._open = AsyncExitStack()
        self._chunks: AsyncIterator[bytes] | None = None
        self._ws: ClientConnection | None = None

    async def run(self, call: Call[T]) -> T:
        """Bring a call to its end."""
        effect = advance(call)
        while not isinstance(effect, Returned):
            effect = advance(call, *await self._attempt(effect))
        result: T = effect.value
        return result

    async def iterate(self, call: Call[None]) -> AsyncGenerator[Any, None]:
        """Yield what a call gives; what it holds open is closed when it ends or is left."""
        try:
            effect = advance(call)
            while not isinstance(effect, Returned):
                if isinstance(effect, Give):
                    yield effect.value
                    effect = advance(call)
                else:
                    effect = advance(call, *await self._attempt(effect))
        finally:
            await self.close()

    async def say(self, text: str) -> None:
        """Send a message over the WebSocket, if it is open still."""
        if self._ws is not None:
            with suppress(ConnectionClosed):
                await self._ws.send(text)

    async def close(self) -> None:
        """Close what is open."""
        self._ws = None
        await self._open.aclose()

    async def _attempt(self, effect: Effect) -> tuple[Any, Unreachable | None]:
        try:
            return await self._do(effect), None
        except Unreachable as error:
            return None, error
        except httpx.HTTPError as error:
            return None, lost(error)

    async def _do(self, effect: Effect) -> Any:
        match effect:
            case Ask(request):
                response = await self._http.send(self._build(request))
                return Answer(response.status_code, response.headers, response.content)
            case Listen(request):
                await self.close()
                response = await self._http.send(self._build(request), stream=True)
                self._open.push_async_callback(response.aclose)
                if response.status_code != httpx.codes.OK:
                    await response.aread()
                    return Answer(response.status_code, response.headers, response.content)
                self._chunks = response.aiter_bytes()
                return Answer(response.status_code, response.headers)
            case Chunk():
                assert self._chunks is not None, "listen first"
                return await anext(self._chunks, None)
            case Dial(path, text):
                return await self._dial(path, text)
            case Hear():
                assert self._ws is not None, "dial first"
                try:
                    return await self._ws.recv()
                except ConnectionClosed as error:
                    raise closed(error) from None
            case Pause(seconds):
                return await asyncio.sleep(seconds)
        raise AssertionError(effect)

    def _build(self, request: Request) -> httpx.Request:
        return self._http.build_request(**arguments_of(request))

    async def _dial(self, path: str, text: str) -> Answer:
        await self.close()
        address = self._ws_address + path
        try:
            ws = await self._open.enter_async_context(
                connect(address, additional_headers=self._headers, open_timeout=CONNECT_S, max_size=None)
            )
            await ws.send(text)
        except InvalidStatus as error:
            return refused(error)
        except (OSError, WebSocketException) as error:
            raise lost(error) from None
        self._ws = ws
        return Answer(SWITCHING_PROTOCOLS, {})
