"""The way into a replica from Ray's proxies."""

import asyncio
from ipaddress import ip_address

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tminus.service.api.answers.problems import render
from tminus.service.errors import Draining, NotOpen

REQUEST_ID = b"x-request-id"


class Front:
    """An ASGI app for Serve, which has no say in the life of the app behind it. In one event loop only.

    Without keys it answers those only who asked a loopback address, as a server does that listens there: which
    addresses Ray's proxies listen to is in Ray's settings, not in ours.
    """

    def __init__(self, app: ASGIApp, *, anybody: bool) -> None:
        """anybody: whether requests of other machines are let through to the app, which asks for keys."""
        self._app, self._anybody = app, anybody
        self._ending = asyncio.Event()

    def end_streams(self) -> None:
        """Close the WebSockets that are open: no job runs on them."""
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
        """Run the app on a WebSocket until it ends, or the replica does: then the client is told to come back."""
        ending = asyncio.ensure_future(self._ending.wait())
        receiving: asyncio.Future[Message] | None = None  # is kept where the app gives up waiting: no message is lost
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
    """Whether the proxy was asked by a loopback address of its machine."""
    try:
        return ip_address(scope["server"][0]).is_loopback
    except (LookupError, TypeError, ValueError):
        return False


def _without_id(send: Send) -> Send:
    """Send without X-Request-ID, which Ray's proxy adds: it gave the request the id that the app has used."""

    async def send_without(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [pair for pair in message.get("headers", ()) if pair[0].lower() != REQUEST_ID]
        await send(message)

    return send_without
