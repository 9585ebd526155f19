"""Runs the app under uvicorn: drain on SIGTERM, finish what runs within the grace period, exit 0."""

import signal
import threading
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.worker import Worker

ANSWER_S = 5.0  # after the grace period, for the refusals of given-up work to reach their clients


class Server(uvicorn.Server):
    """uvicorn, with the worker told first when a signal comes."""

    def __init__(self, config: uvicorn.Config, worker: Worker, grace_s: float) -> None:
        super().__init__(config)
        self._worker = worker
        self._give_up = threading.Timer(grace_s, worker.close)
        self._give_up.daemon = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more work and start the grace period; a second signal gives up at once, as uvicorn does."""
        if not self._worker.draining:
            self._worker.drain()
            self._give_up.start()
        super().handle_exit(sig, frame)


def serve(app: FastAPI, *, host: str, port: int, grace_s: float, log_level: str) -> None:
    """Serve until SIGTERM or SIGINT. Raises SystemExit where the address cannot be had."""
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level=log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(grace_s + ANSWER_S),
        limit_concurrency=None,
        h11_max_incomplete_event_size=64 * 1024,
    )
    # uvicorn raises the signal again when it is done; being asked to stop and having stopped is no failure.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda _signum, _frame: None)
    Server(config, app.state.worker, grace_s).run()
