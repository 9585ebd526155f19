"""An exception of the engine, logged and told to clients by its type; or, where the device is lost, not caught."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import EngineFailed

log = logging.getLogger(__name__)


@contextmanager
def errors_to(
    fail: Callable[[EngineFailed], object], engine: RowEngine | None, detail: str, log_line: str, *args: object
) -> Iterator[None]:
    """Log an exception and pass it to fail as EngineFailed; clients see its type, not its text.

    It fails the jobs involved, not the server. But where the engine's device is lost it is raised, so that it ends the
    worker: every further job would fail too, and this is no fault of theirs.
    """
    try:
        yield
    except Exception as error:
        log.exception(log_line, *args)
        if engine is not None and engine.is_lost():
            raise
        fail(EngineFailed(f"{detail}: {type(error).__name__}"))
