"""ASGI app that stands between Ray's proxies and the app of a replica."""

import asyncio
from ipaddress import ip_address

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tminus.service.api.answers.problems import render
from tminus.service.errors import Draining, NotOpen

REQUEST_ID = b"x-request-id"


class Front:
    """An ASGI app for Serve that handles lifespan events itself and passes requests to the replica's app.

    If `anybody` is False, only requests to a loopback address are answered, because Ray's settings decide where Ray's
    proxies listen. Used in one event loop only.
    """

    def __init__(self, app: ASGIApp, *, anybody: bool) -> None:
        """anybody: answer requests to any address, not only loopback. The app itself checks keys."""
        self._app, self._anybody = app, anybody
        self._ending = asyncio.Event()

    def end_streams(self) -> None:
        """Close the open WebSockets. Call this when no more jobs run on them."""
        self._ending.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif not self._anybody and not _asked_here(scope):
            await _refuse(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._stream(scope, receive, send)
        else:
            await self._app(scope, receive, _without_id(send))

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app on a WebSocket. If the replica ends first, close with the code "try again later"."""
        ending = asyncio.ensure_future(self._ending.wait())
        receiving: asyncio.Future[Message] | None = None  # kept if the app stops waiting, so that no message is lost
        ended = False

        async def receive_until_the_end() -> Message:
            nonlocal receiving, ended
            if receiving is None:
                receiving = asyncio.ensure_future(receive())
            await asyncio.wait((receiving, ending), return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                message, receiving = receiving.result(), None
                return message
            ended = True
            return {"type": "websocket.disconnect", "code": Draining().ws_close}

        try:
            await self._app(scope, receive_until_the_end, send)
            if ended:
                await send({"type": "websocket.close", "code": Draining().ws_close, "reason": Draining.code})
        finally:
            for waiting in (ending, receiving):
                if waiting is not None:
                    waiting.cancel()


async def _live(receive: Receive, send: Send) -> None:
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


async def _refuse(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": NotOpen().ws_close})
    else:
        await render(NotOpen(), scope)(scope, receive, send)


def _asked_here(scope: Scope) -> bool:
    """Return True if the request was sent to a loopback address of the proxy's machine."""
    try:
        return ip_address(scope["server"][0]).is_loopback
    except (LookupError, TypeError, ValueError):
        return False


def _without_id(send: Send) -> Send:
    """Remove X-Request-ID from responses, because Ray's proxy adds the same header."""

    async def send_without(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [pair for pair in message.get("headers", ()) if pair[0].lower() != REQUEST_ID]
        await send(message)

    return send_without
