"""Runs the app under uvicorn: on SIGTERM refuse new work, finish what runs within the grace period, stop.

uvicorn has no hook for doing something between the signal and the end of serving, so three methods of its Server are
extended. They are not documented: pyproject.toml bounds uvicorn's version, and tests/service/test_server.py names what
is missing if they change.
"""

import logging
import resource
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn

from service.api.stream_limits import Streams
from service.api.websocket_protocol import stream_protocol
from service.app import Application
from service.worker.worker import Worker

log = logging.getLogger(__name__)

SWITCH_S = 0.0005
SPARE_FILES = 256  # beside the connections: for libraries, logs, the encoders
PING_S = 20.0  # many proxies close a WebSocket that is silent for longer
PONG_S = 40.0  # for the answer, which comes after whatever a slow reader has not read yet
ANSWER_S = 5.0  # after the last tick, for the answers to reach their clients


class Server(uvicorn.Server):
    """A uvicorn server that goes on answering until the worker has ended: drained after a signal, or crashed."""

    def __init__(self, config: uvicorn.Config, worker: Worker, streams: Streams, grace_s: float) -> None:
        super().__init__(config)
        self._worker, self._streams = worker, streams
        self._give_up = threading.Timer(grace_s, worker.close)
        self._give_up.daemon = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, and from then on watch the worker."""
        await super().startup(sockets)
        threading.Thread(target=self._stop_after_worker, name="tminus-watch", daemon=True).start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the jobs of WebSockets, then stop as uvicorn does, which waits only for the answers to requests."""
        if not self.force_exit:
            await self._streams.quiet(ANSWER_S)
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more work and start the grace period; a second signal stops at once."""
        if self._worker.draining:
            super().handle_exit(sig, frame)
        else:
            self._worker.drain()
            self._give_up.start()

    def _stop_after_worker(self) -> None:
        self._worker.join()
        self._give_up.cancel()
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


def _allow_files(count: int) -> None:
    """Raise the soft limit of open files to what so many connections need, as far as the hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + SPARE_FILES if hard == resource.RLIM_INFINITY else min(count + SPARE_FILES, hard)
    if soft != resource.RLIM_INFINITY and wanted > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def serve(
    application: Application,
    listener: socket.socket,
    *,
    grace_s: float,
    log_level: str,
    max_connections: int,
    max_message_bytes: int,
) -> bool:
    """Serve until SIGTERM or SIGINT; True if that is how it ended, False if the worker crashed."""
    config = uvicorn.Config(
        application.app,
        log_level=log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=max_connections,
        timeout_graceful_shutdown=int(ANSWER_S),
        ws=stream_protocol(),
        ws_max_size=max_message_bytes,
        ws_ping_interval=PING_S,
        ws_ping_timeout=PONG_S,
        ws_per_message_deflate=False,  # images are compressed already
    )
    _allow_files(max_connections)
    # The worker needs the interpreter for a moment after each pass; the other threads may keep it no longer than this.
    sys.setswitchinterval(SWITCH_S)
    server = Server(config, application.worker, application.streams, grace_s)
    # These stop uvicorn until it installs its own handlers. When it has stopped it raises the signal again, which must
    # have no effect: to stop when asked is no failure.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda _signum, _frame: setattr(server, "should_exit", True))
    listener.listen(config.backlog)  # from here on a client waits instead of being refused
    host, port = listener.getsockname()[:2]
    log.info("listening on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    server.run([listener])
    return not application.worker.crashed
