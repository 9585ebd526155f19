"""The uvicorn server: responses before the app is ready, and the shutdown after SIGTERM.

uvicorn has no hook between the signal and its own shutdown, so `Server` overrides three methods of uvicorn.Server.
These methods are undocumented. Therefore pyproject.toml limits uvicorn's version, and
tests/service/startup/test_server.py fails if the methods change.
"""

import asyncio
import html
import logging
import re
import resource
import socket
import threading
import time
from collections.abc import Mapping
from types import FrameType

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket
from uvicorn.protocols.http.h11_impl import H11Protocol

from tminus.service.api.answers.documents import StatusAnswer
from tminus.service.api.answers.problems import render
from tminus.service.api.edge.connections import ForwardedAddresses, stream_protocol
from tminus.service.api.edge.http_protocol import ACCEPTED, http_protocol
from tminus.service.api.edge.origin import READING, AllowedSites
from tminus.service.api.page import FOLDER, HEADERS
from tminus.service.api.system import alive, metrics_answer
from tminus.service.errors import ForeignHost, NotReady
from tminus.service.model_info import max_edit_bytes
from tminus.service.startup.app import Application
from tminus.service.startup.settings import Settings
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

SWITCH_S = 0.0005
SPARE_FILES = 384  # open files reserved for libraries, logs, encoders and refused connections
LEAST_CONNECTIONS = 8
BACKLOG = 2048  # maximum number of connections that wait in the kernel to be accepted
PING_S = 20.0  # seconds between pings; many proxies close a WebSocket that is silent for longer
PONG_S = 40.0  # seconds to wait for a pong; a slow client sends it only after reading earlier messages
ANSWER_S = 5.0  # seconds that responses may take to reach clients after the last tick
KEPT_S = 1.0  # further seconds to refuse one last request on each keep-alive connection
KEPT_INTERVAL_S = 0.02  # seconds between checks of the keep-alive connections
WARM_UP_INTERVAL_S = 0.05  # seconds between checks whether the warm-up has ended
MOST_FOR_METRICS = 16  # maximum number of connections; Prometheus and a supervisor use one each
REFRESH_S = 2
ALIVE: Mapping[str, Mapping[str, object]] = {"/healthz": {"status": "alive"}, "/v2/health/live": {"live": True}}
PAGE_PATH = re.compile(r"/(models/[^/]+/)?(?P<style>page/page\.css)?")
DETAIL = "the model is being measured, to find the fastest way of running it on this machine"
PAGE = f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="refresh" content="{REFRESH_S}">
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="page/page.css">
<title>tminus is starting</title></head><body><h1>tminus is starting</h1>
<p class="explain">%s.</p><p class="explain">This page opens by itself.</p></body></html>"""


class Opening:
    """The ASGI app of a server that is starting. Once `application` is set, passes every request to it.

    A first start takes seconds or minutes to measure the models. Until then, liveness paths such as `/healthz` answer
    200, and other paths answer 503. A browser gets a page that reloads itself until the model is ready.
    """

    application: Application | None = None  # None until the models have been measured
    detail = DETAIL  # what the server is doing now, for clients

    def report(self, model: str, what: str, left_s: float | None) -> None:
        """Show clients and the log the current measurement and the seconds left. Any thread may call this."""
        before = self.detail
        left = f"; about {max(1, round(left_s))} s to go" if left_s is not None else ""
        self.detail = f"{DETAIL}. Now: {what} ({model}){left}"
        if self.detail != before:
            log.info("%s: %s%s", model, what, left)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.application is not None:
            await self.application.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocket(scope, receive, send).send_denial_response(render(NotReady(self.detail)))
        else:
            await _early_answer(scope, self.detail)(scope, receive, send)


def _early_answer(scope: Scope, detail: str) -> Response:
    if scope["path"] in ALIVE:
        return JSONResponse(ALIVE[scope["path"]])
    if scope["method"] in READING and (page := PAGE_PATH.fullmatch(scope["path"])):
        if page["style"]:
            return FileResponse(FOLDER / "page.css", headers=HEADERS)
        sentence = html.escape(detail[0].upper() + detail[1:])
        return HTMLResponse(PAGE % sentence, 503, headers=HEADERS | {"Retry-After": str(REFRESH_S)})
    return render(NotReady(detail), scope)


class Server(uvicorn.Server):
    """A uvicorn server that answers requests until the worker has ended, after a signal or a crash."""

    def __init__(self, config: uvicorn.Config, opening: Opening, grace_s: float) -> None:
        super().__init__(config)
        self._opening = opening
        self._give_up = threading.Timer(grace_s, self._close_worker)
        self._give_up.daemon = True

    def end(self) -> None:
        """Accept no more connections, and stop when all connections have ended. Any thread may call this."""
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, but let more connections wait in the kernel."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the jobs of WebSockets, then shut down as uvicorn does.

        uvicorn waits only for HTTP responses. Each keep-alive connection may send one more request, which is refused.
        """
        self._give_up.cancel()
        application = self._opening.application
        if application is not None and not self.force_exit:
            await application.served.streams.quiet(ANSWER_S)
            if application.served.worker.state.draining and not application.served.worker.state.crashed:
                await self._end_kept_connections()
        await super().shutdown(sockets)

    async def _end_kept_connections(self) -> None:
        """Wait up to KEPT_S for one more request on each keep-alive connection. Leave silent connections open."""
        until_s, connections = time.monotonic() + KEPT_S, self.server_state.connections
        while (  # noqa: ASYNC110  uvicorn has no event for the end of one
            time.monotonic() < until_s and any(isinstance(each, H11Protocol) for each in connections)
        ):
            await asyncio.sleep(KEPT_INTERVAL_S)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Accept no more work, and start the grace period. A second signal ends the grace period and all jobs."""
        application = self._opening.application
        if application is None:
            super().handle_exit(sig, frame)
        elif not application.served.worker.state.draining:
            application.served.worker.drain()
            self._give_up.start()
        else:
            self._give_up.cancel()
            threading.Thread(target=self._close_worker, name="tminus-close", daemon=True).start()

    def _close_worker(self) -> None:
        application = self._opening.application
        assert application is not None
        if not application.served.worker.close():  # the worker hangs, so its requests will not end
            self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Bind a socket to an address without listening. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket as `bind` does, but raise ValueError with a one-line message if that fails."""
    try:
        return bind(host, port)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"cannot listen on {host}:{port}: {error}") from None


def allow_connections(connections: int) -> int:
    """Raise the limit on open files if needed, and return the number of connections that it allows.

    Raises ValueError if the limit allows fewer than LEAST_CONNECTIONS.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + SPARE_FILES
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == needed:
        return connections
    if allowed < LEAST_CONNECTIONS + SPARE_FILES:
        raise ValueError(
            f"the hard limit of open files (ulimit -Hn) must be at least {LEAST_CONNECTIONS + SPARE_FILES}, got {hard}"
        )
    log.warning(
        "at most %d connections instead of %d: the hard limit of open files (ulimit -Hn) is %d, of which %d are for "
        "other things",
        allowed - SPARE_FILES, connections, hard, SPARE_FILES,
    )  # fmt: skip
    return allowed - SPARE_FILES


def config_of(settings: Settings, app: ASGIApp) -> uvicorn.Config:
    """Return uvicorn's configuration. It turns off the app's lifespan, which `serve` runs instead."""
    config = uvicorn.Config(
        app,
        # Always use h11 and asyncio, because httptools does not limit the size of a request's headers. A small request
        # takes 0.18 ms, against 0.10 ms with httptools and uvloop. For comparison, one step of one row takes 2 ms on
        # the same two cores.
        http=http_protocol(settings.max_connections, settings.max_connections_per_address),
        loop="asyncio",
        lifespan="off",
        log_level=settings.log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # ForwardedAddresses reads the proxy's headers instead
        backlog=ACCEPTED,
        timeout_graceful_shutdown=int(ANSWER_S),
        ws=stream_protocol(),
        ws_max_size=max_edit_bytes(settings.max_body_bytes, settings.max_image_bytes),
        ws_ping_interval=PING_S,
        ws_ping_timeout=PONG_S,
        ws_per_message_deflate=False,  # images are already compressed
    )
    config.app = ForwardedAddresses(app, config.forwarded_allow_ips)
    return config


async def is_ready(worker: Worker) -> bool:
    """Wait until the warm-up has ended. Return True if the worker accepts jobs."""
    while not worker.state.ready and worker.state.alive:  # noqa: ASYNC110  it is another thread's
        await asyncio.sleep(WARM_UP_INTERVAL_S)
    return worker.state.ready


def serve_metrics(listener: socket.socket, opening: Opening, allowed_sites: AllowedSites) -> None:
    """Serve /metrics and /healthz on a separate port, in a thread, until the process ends.

    A supervisor gets an answer on this port even if clients use all of the server's connections. On this port, the
    metrics need no key although they contain the names of all keys. So the Host header is checked, against DNS
    rebinding.
    """

    async def get_metrics(request: Request) -> Response:
        try:
            allowed_sites.check_host(request.headers.get("host", ""))
        except ForeignHost as refusal:
            return render(refusal)
        if (application := opening.application) is None:
            return render(NotReady(DETAIL))
        return metrics_answer(application.served.metrics, request)

    async def healthz(_request: Request) -> Response:
        application = opening.application
        answer = StatusAnswer(status="alive") if application is None else alive(application.served.worker)
        return JSONResponse(answer.model_dump()) if isinstance(answer, StatusAnswer) else answer

    config = uvicorn.Config(
        Starlette(routes=[Route("/metrics", get_metrics), Route("/healthz", healthz)]),
        http=http_protocol(MOST_FOR_METRICS, MOST_FOR_METRICS),
        backlog=ACCEPTED,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([listener],), name="tminus-metrics", daemon=True).start()
