"""The port of a replica's own, where the other replicas and a Prometheus ask this one."""

import asyncio
import socket
from collections.abc import Generator
from contextlib import contextmanager

import uvicorn


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
