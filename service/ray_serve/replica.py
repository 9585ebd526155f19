"""One server as a replica in Ray Serve: startup, reports to Ray, and shutdown."""

import asyncio
import errno
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress

import uvicorn
from ray import serve
from starlette.types import ASGIApp

from tminus.service.ray_serve.front import Front
from tminus.service.ray_serve.router import BACKLOG_S, WAITING_S, Standing
from tminus.service.ray_serve.settings import RaySettings
from tminus.service.startup.app import VERSION, Application
from tminus.service.startup.logs import SERVER_FORM, set_up_log
from tminus.service.startup.serve import measure_and_build, open_all
from tminus.service.startup.server import (
    ANSWER_S,
    BACKLOG,
    SWITCH_S,
    Opening,
    allow_connections,
    bind,
    config_of,
    is_ready,
)
from tminus.service.startup.traces import start_traces
from tminus.service.threads import LOADING, in_daemon_thread
from tminus.service.worker.worker import CLOSE_S, CRASHED

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.05
LEAVE_S = 2.0  # seconds until every proxy knows that this replica is ending
FAILED_S = 0.5  # seconds to send the error responses after a crash


def ending_s(grace_s: float) -> float:
    """Return the maximum duration of a replica's shutdown in seconds."""
    return LEAVE_S + grace_s + ANSWER_S + CLOSE_S + LEAVE_S


class Replica:
    """Owns the application and the replica's own port. Serve calls its methods in one event loop."""

    def __init__(self, settings: RaySettings) -> None:
        self._settings = settings
        self._name = serve.get_replica_context().replica_id.unique_id
        self._stack = AsyncExitStack()
        self._following: asyncio.Task[None] | None = None  # None until the replica has started
        self._ending: asyncio.Task[None] | None = None
        self._is_listed = False  # Serve sends requests to this replica
        self._waiting_s = 0.0  # seconds of work in jobs that no replica holds, when last known

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        """Load and measure the models, and return the app once it accepts jobs. Raises the error of a failed start."""
        self._loop, settings = asyncio.get_running_loop(), self._settings
        set_up_log(settings.log_level.upper(), SERVER_FORM, settings.log_format)
        sys.setswitchinterval(SWITCH_S)
        settings = settings.model_copy(update={"max_connections": allow_connections(settings.max_connections)})
        listener = listen_on_one(settings.host, settings.own_ports)
        self._stack.callback(listener.close)
        try:
            address = listener.getsockname()[:2]
            application = await in_daemon_thread(lambda: _build(settings, address), LOADING)
            app, self._served = application.app, application.served
            await self._stack.enter_async_context(app.router.lifespan_context(app))
            await is_ready(self._served.worker)
            if self._served.worker.state.crashed:
                raise RuntimeError(CRASHED)
        except BaseException:
            await self._stack.aclose()
            raise
        self._peers = PeerServer(config_of(settings, app), listener)
        self._peers.start()
        self._front = Front(app, anybody=self._served.access.has_keys or settings.open)
        threading.Thread(target=self._watch, name="tminus-watch", daemon=True).start()
        log.info("ready; the own port of this replica is http://%s:%d", *address)
        self._following = self._loop.create_task(self._follow())
        return self._front

    # --- called by Serve ---

    async def check_health(self) -> None:
        """Raise RuntimeError if Serve should replace this replica."""
        worker = self._served.worker
        if worker.state.crashed:
            raise RuntimeError(CRASHED)
        if (stall := worker.state.stall) is not None:
            raise RuntimeError(str(stall))
        if worker.state.draining and self._is_listed:
            raise RuntimeError("this replica takes no more work, though requests are still sent to it")

    async def record_routing_stats(self) -> dict[str, float]:
        """Return the report for BacklogRouter."""
        worker = self._served.worker
        return Standing(self._backlog_s, len(worker.jobs), worker.state.ready).report()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the report for BacklogPolicy."""
        if (known := self._served.waiting_in_store()) is not None:
            self._waiting_s = known[1]
        return {BACKLOG_S: self._backlog_s, WAITING_S: self._waiting_s}

    @property
    def _backlog_s(self) -> float:
        return self._served.admission.backlog_s

    # --- shutdown ---

    def _watch(self) -> None:
        """End the process if the worker crashes.

        Serve then sends it no more requests, and starts a new replica. If the process stayed alive, it would get
        requests until three of Serve's health checks had failed, and would keep renewing the leases of its jobs.
        """
        worker = self._served.worker
        worker.join()
        if not worker.state.crashed:
            return
        ending = asyncio.run_coroutine_threadsafe(self._end_crashed(), self._loop)
        with suppress(Exception):
            ending.result(ANSWER_S + CLOSE_S)
        logging.shutdown()
        sys.stderr.flush()
        os._exit(1)

    async def _end_crashed(self) -> None:
        """Let the responses finish, then close the stores, which record the jobs running at the crash."""
        await asyncio.sleep(FAILED_S)
        self._front.end_streams()
        await self._peers.stop()
        await self._stack.aclose()

    async def is_there(self) -> None:
        """Do nothing. The first call through a handle creates the handle's router."""

    async def _follow(self) -> None:
        """Create this deployment's router in this process, so that the replica learns when Serve removes it.

        The router gets the list of replicas and passes it on. Serve itself tells a removed replica only after its last
        request, but a WebSocket may never end.
        """
        context = serve.get_replica_context()
        self._handle = serve.get_deployment_handle(context.deployment, context.app_name)
        try:
            await self._handle.is_there.remote()
        except Exception:
            log.exception("this replica will learn late that it is to end")

    def replicas_changed(self, names: set[str]) -> None:
        """Update the list of replicas that get requests. Thread-safe."""
        self._loop.call_soon_threadsafe(self._see, names)

    def _see(self, names: set[str]) -> None:
        was_listed, self._is_listed = self._is_listed, self._name in names
        if was_listed and not self._is_listed and self._ending is None:
            self._ending = self._loop.create_task(self._leave())

    async def _leave(self) -> None:
        await asyncio.sleep(LEAVE_S)
        if self._is_listed:  # listed again, for example after a restart of Serve's controller
            self._ending = None
        else:
            await self._end_work()

    async def _end_work(self) -> None:
        """Stop accepting work, leave durable jobs to other replicas, and finish other jobs within the grace period."""
        worker, until_s = self._served.worker, time.monotonic() + self._settings.grace_s
        if not worker.state.draining:
            log.info("this replica takes no more work, and ends when what runs is done")
            worker.drain()
        while worker.state.alive and time.monotonic() < until_s:  # noqa: ASYNC110  it is another thread's
            await asyncio.sleep(POLL_INTERVAL_S)
        await asyncio.to_thread(worker.close)
        await self._served.streams.quiet(ANSWER_S)
        self._front.end_streams()

    async def __del__(self) -> None:
        """Shut down. Serve awaits this when no request is left, or after a timeout."""
        if self._following is None:
            return
        self._following.cancel()
        await (self._ending or self._end_work())
        await self._peers.stop()
        await self._stack.aclose()


def _build(settings: RaySettings, address: tuple[str, int]) -> Application:
    return measure_and_build(open_all(settings, address), start_traces(VERSION), Opening())


# --- own port for other replicas and for Prometheus ---


def listen_on_one(host: str, ports: Sequence[int]) -> socket.socket:
    """Listen on the first free port. Raises OSError, or ValueError if no port is free.

    listen() must directly follow bind(), because until then another socket can bind the same address.
    """
    for port in ports:
        try:
            listener = bind(host, port)
            try:
                listener.listen(BACKLOG)
            except OSError:
                listener.close()
                raise
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            return listener
    raise ValueError(f"--replica-ports (TMINUS_REPLICA_PORTS): none of {ports[0]}..{ports[-1]} is free on {host}")


class PeerServer(uvicorn.Server):
    """A uvicorn server that runs in one of Ray's event loops."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self.serve([self._listener]))

    async def stop(self) -> None:
        """Finish the responses and stop listening."""
        self.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave signal handling to Ray."""
        yield
