"""The port of a replica's own, where the other replicas and a Prometheus ask this one."""

import asyncio
import errno
import socket
from collections.abc import Generator, Sequence
from contextlib import contextmanager

import uvicorn

from tminus.service.startup.server import bind

BACKLOG = 2048  # connections that wait, as of uvicorn


def listen(host: str, ports: Sequence[int]) -> socket.socket:
    """Listen on the first of these ports that is free. Raises OSError, or ValueError where none is.

    At once, since an address that somebody has reserved, and does not listen on, can be reserved again.
    """
    for port in ports:
        listener = _listen(host, port)
        if listener is not None:
            return listener
    raise ValueError(f"--replica-ports (TMINUS_REPLICA_PORTS): none of {ports[0]}..{ports[-1]} is free on {host}")


def _listen(host: str, port: int) -> socket.socket | None:
    """What listens there; None where something else does."""
    try:
        listener = bind(host, port)
        try:
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None
        raise
    return listener


class PeerServer(uvicorn.Server):
    """A uvicorn server in an event loop of Ray's."""

    def __init__(self, config: uvicorn.Config, listener: socket.socket) -> None:
        super().__init__(config)
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listen, until `stop`."""
        self._listener.listen(self.config.backlog)
        self._task = asyncio.get_running_loop().create_task(self.serve([self._listener]))

    async def stop(self) -> None:
        """Answer what was asked, and listen no more."""
        self.should_exit = True
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals of the process to Ray."""
        yield
