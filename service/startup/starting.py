"""The ASGI app that is there before the model: it answers probes and says that the model is being measured.

A first start measures for seconds or minutes. The socket listens meanwhile, `/healthz` is 200, `/readyz` and all else
503, and the page opens by itself when the model is ready. From then on the app itself gets every request.
"""

import asyncio
import html
import logging
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.types import Receive, Scope, Send
from starlette.websockets import WebSocket

from tminus.service.api.answers.problems import render
from tminus.service.api.edge.origin import READING
from tminus.service.api.page import HEADERS
from tminus.service.errors import NotReady
from tminus.service.model_info import ModelInfo
from tminus.service.startup.app import Application
from tminus.service.startup.threads import LOADING, in_daemon_thread

log = logging.getLogger(__name__)

LOOK_S = 0.05  # how often the worker is asked whether its warm-up is over
REFRESH_S = 2
ALIVE: Mapping[str, Mapping[str, object]] = {"/healthz": {"status": "alive"}, "/v2/health/live": {"live": True}}
A_PAGE = re.compile(r"/(models/[^/]+/)?")
DETAIL = (
    "the model is being measured, to find the fastest way of running it on this machine; a first start takes up to a "
    "minute, later ones seconds"
)
PAGE = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_S}">
<title>tminus is starting</title></head><body><h1>tminus is starting</h1><p>{html.escape(DETAIL.capitalize())}.</p>
<p>This page opens by itself.</p></body></html>"""


class Starting:
    """Builds the application in a thread, and passes requests on to it from then on."""

    def __init__(
        self,
        build: Callable[[], Application],
        on_end: Callable[[], None],
        hint: Callable[[ModelInfo], str] = lambda _: "",
    ) -> None:
        """Build in the lifespan.

        build: takes long, and may raise; on_end: is called, in any thread, when it raised or the worker ended; hint: of
        the model, is logged when requests are answered.
        """
        self._build, self._on_end, self._hint = build, on_end, hint
        self.application: Application | None = None
        self.failure: Exception | None = None
        self._stack = AsyncExitStack()
        self._launching: asyncio.Task[None] | None = None

    @property
    def measuring(self) -> bool:
        """Whether the application is not there yet."""
        return self.application is None and self.failure is None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self.application is not None:
            await self.application.app(scope, receive, send)
        else:
            await _early(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        """Begin to build at startup, which ends at once; end what was built at shutdown."""
        await receive()
        self._launching = asyncio.create_task(self._launch())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._launching.cancel()
        await asyncio.gather(self._launching, return_exceptions=True)
        await self._stack.aclose()
        await send({"type": "lifespan.shutdown.complete"})

    async def _launch(self) -> None:
        try:
            application = await in_daemon_thread(self._build, LOADING)
            await self._stack.enter_async_context(application.app.router.lifespan_context(application.app))
        except Exception as error:
            self.failure = error
            self._on_end()
            return
        self.application = application
        threading.Thread(target=self._watch, args=(application,), name="tminus-watch", daemon=True).start()
        while not application.worker.ready and application.worker.alive:  # noqa: ASYNC110  it is another thread's
            await asyncio.sleep(LOOK_S)
        if application.worker.ready:
            log.info("ready. %s", self._hint(self.application.model))

    def _watch(self, application: Application) -> None:
        application.worker.join()
        self._on_end()


async def _early(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer before the model is there."""
    if scope["type"] == "websocket":
        await WebSocket(scope, receive, send).send_denial_response(render(NotReady(DETAIL)))
        return
    answer: Response = render(NotReady(DETAIL), scope)
    if scope["path"] in ALIVE:
        answer = JSONResponse(ALIVE[scope["path"]])
    elif scope["method"] in READING and A_PAGE.fullmatch(scope["path"]):
        answer = HTMLResponse(PAGE, 503, headers=HEADERS | {"Retry-After": str(REFRESH_S)})
    await answer(scope, receive, send)
