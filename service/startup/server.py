"""Runs the app under uvicorn: on SIGTERM refuse new work, finish what runs within the grace period, stop.

uvicorn has no hook for doing something between the signal and the end of serving, so three methods of its Server are
extended. They are not documented: pyproject.toml bounds uvicorn's version, and tests/service/startup/test_server.py
names what is missing if they change.
"""

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tminus.service.api.edge.http_protocol import ACCEPTED, http_protocol
from tminus.service.api.edge.websocket_protocol import stream_protocol
from tminus.service.model_info import ModelInfo
from tminus.service.startup.app import Application
from tminus.service.startup.starting import Starting
from tminus.service.startup.threads import LOADING

log = logging.getLogger(__name__)

SWITCH_S = 0.0005
SPARE_FILES = 384  # beside the connections: for libraries, logs, the encoders, and connections that are turned away
LEAST_CONNECTIONS = 8
BACKLOG = 2048  # connections that the kernel holds until they are accepted
PING_S = 20.0  # many proxies close a WebSocket that is silent for longer
PONG_S = 40.0  # for the answer, which comes after whatever a slow reader has not read yet
ANSWER_S = 5.0  # after the last tick, for the answers to reach their clients
KEPT_S = 1.0  # after that, for connections that are kept: a request that is on its way is answered with a refusal
LOOK_S = 0.02


class Server(uvicorn.Server):
    """A uvicorn server that goes on answering until the worker has ended: drained after a signal, or crashed."""

    def __init__(self, config: uvicorn.Config, starting: Starting, grace_s: float) -> None:
        super().__init__(config)
        self._starting = starting
        self._give_up = threading.Timer(grace_s, self._close_worker)
        self._give_up.daemon = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections, as many in a turn as uvicorn is told, and have the kernel hold more than that."""
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(BACKLOG)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the jobs of WebSockets, then stop as uvicorn does, which waits only for the answers to requests.

        Before it stops to listen, whoever keeps a connection has a moment for one more request, which is refused.
        """
        self._give_up.cancel()
        application = self._starting.application
        if application is not None and not self.force_exit:
            await application.streams.quiet(ANSWER_S)
            if application.worker.draining and not application.worker.crashed:
                await self._end_kept_connections()
        await super().shutdown(sockets)

    async def _end_kept_connections(self) -> None:
        """Answer on kept connections, each of which ends with its answer; those that stay silent end later."""
        until_s, connections = time.monotonic() + KEPT_S, self.server_state.connections
        while (  # noqa: ASYNC110  uvicorn tells nobody when one ends
            time.monotonic() < until_s and any(isinstance(each, H11Protocol) for each in connections)
        ):
            await asyncio.sleep(LOOK_S)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more work and start the grace period; a second signal ends it, so that what runs is given up."""
        application = self._starting.application
        if application is None:
            super().handle_exit(sig, frame)
        elif not application.worker.draining:
            application.worker.drain()
            self._give_up.start()
        else:
            self._give_up.cancel()
            threading.Thread(target=self._close_worker, name="tminus-close", daemon=True).start()

    def _close_worker(self) -> None:
        application = self._starting.application
        assert application is not None
        if not application.worker.close():  # it hangs: nothing that waits for it will ever end
            self.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """Reserve the address, before anything slow is done. Raises OSError if that fails."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def allow_connections(asked: int) -> int:
    """Return for how many connections the limit of open files has room, after raising it as far as the system allows.

    Raises ValueError if that is hardly any.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = asked + SPARE_FILES
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and allowed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == needed:
        return asked
    if allowed < LEAST_CONNECTIONS + SPARE_FILES:
        raise ValueError(
            f"the hard limit of open files (ulimit -Hn) must be at least {LEAST_CONNECTIONS + SPARE_FILES}, got {hard}"
        )
    log.warning(
        "at most %d connections instead of %d: the hard limit of open files (ulimit -Hn) is %d, of which %d are for "
        "other things",
        allowed - SPARE_FILES, asked, hard, SPARE_FILES,
    )  # fmt: skip
    return allowed - SPARE_FILES


def config_of(
    app: ASGIApp,
    *,
    log_level: str,
    max_connections: int,
    max_connections_per_address: int,
    max_message_bytes: int,
    lifespan: bool = True,
) -> uvicorn.Config:
    """How uvicorn serves an app here. lifespan: whether it starts and ends the app."""
    return uvicorn.Config(
        app,
        # One pair, whatever is installed. A small request takes 0.18 ms with it, 0.10 ms with httptools and uvloop; but
        # httptools bounds no head, and one step of one row takes 2 ms on the same two cores.
        http=http_protocol(max_connections, max_connections_per_address),
        loop="asyncio",
        lifespan="auto" if lifespan else "off",
        log_level=log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=ACCEPTED,
        timeout_graceful_shutdown=int(ANSWER_S),
        ws=stream_protocol(),
        ws_max_size=max_message_bytes,
        ws_ping_interval=PING_S,
        ws_ping_timeout=PONG_S,
        ws_per_message_deflate=False,  # images are compressed already
    )


def serve(
    build: Callable[[], Application],
    listener: socket.socket,
    *,
    grace_s: float,
    log_level: str,
    max_connections: int,
    max_connections_per_address: int,
    max_message_bytes: int,
) -> bool:
    """Listen at once, build the application, serve until SIGTERM or SIGINT. True if that is how it ended.

    Raises what building raised. False: the worker crashed, or hangs.
    """
    host, port = listener.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    starting = Starting(build, lambda: setattr(server, "should_exit", True), lambda model: first_request(url, model))
    config = config_of(
        starting,
        log_level=log_level,
        max_connections=max_connections,
        max_connections_per_address=max_connections_per_address,
        max_message_bytes=max_message_bytes,
    )
    # The worker needs the interpreter for a moment after each pass; the other threads may keep it no longer than this.
    sys.setswitchinterval(SWITCH_S)
    server = Server(config, starting, grace_s)
    # These stop uvicorn until it installs its own handlers. When it has stopped it raises the signal again, which must
    # have no effect: to stop when asked is no failure.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda _signum, _frame: setattr(server, "should_exit", True))
    listener.listen(BACKLOG)  # from here on a client waits instead of being refused
    log.info("listening on %s", url)
    server.run([listener])
    if starting.failure is not None:
        raise starting.failure
    worker = starting.application.worker if starting.application is not None else None
    loading = any(thread.name == LOADING and thread.is_alive() for thread in threading.enumerate())
    if worker is None or worker.hangs or loading:
        # A thread that measures, or a worker that hangs, cannot be ended from outside, and the interpreter would wait.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(1 if worker is not None and (worker.hangs or worker.crashed) else 0)
    return not worker.crashed


def first_request(url: str, model: ModelInfo) -> str:
    """A first command, with settings that this model takes; by the table that it recommends, if it has one unguided."""
    sampler, steps, own = "dpmpp_2m", min(20, model.num_timesteps), model.recommended
    unguided = {(table.sampler, table.steps) for table in model.tables if table.guidance == 1}
    if own is not None and (own.sampler, own.steps) in unguided:
        sampler, steps = own.sampler, own.steps
    elif sampler not in model.samplers:  # of a student, which has its own alone
        sampler, steps = model.samplers[0], model.tables[0].steps
    return f"Try: curl -X POST '{url}/sample?n=8&steps={steps}&sampler={sampler}' -o out.png"
