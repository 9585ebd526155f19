"""An exception of the engine, logged and told to clients by its type."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tminus.service.errors import EngineFailed

log = logging.getLogger(__name__)


@contextmanager
def errors_to(fail: Callable[[EngineFailed], object], detail: str, log_line: str, *args: object) -> Iterator[None]:
    """Log an exception and pass it to fail as EngineFailed; clients see its type, not its text.

    It fails the jobs involved, not the server.
    """
    try:
        yield
    except Exception as error:
        log.exception(log_line, *args)
        fail(EngineFailed(f"{detail}: {type(error).__name__}"))
