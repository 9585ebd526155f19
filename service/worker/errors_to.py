"""What an error of the engine does: it fails the jobs involved, or ends the worker where the device is lost."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import Draining, EngineFailed, ServiceError

log = logging.getLogger(__name__)

Read = TypeVar("Read")


def reading(
    read: Callable[[], Read], engine: RowEngine, post: Callable[[Callable[[], None]], None]
) -> Callable[[], Read]:
    """Make a function that reads from a device in another thread, and ends the worker where the device is lost.

    A GPU tells of an error when it is waited for, which may be here first. post: has something done in the worker's
    thread. What was to be read is then as unfinished as if the server had ended before.
    """

    def end() -> None:
        raise RuntimeError("the device is lost")

    def read_or_end() -> Read:
        try:
            return read()
        except ServiceError:
            raise
        except Exception as error:
            if not engine.is_lost():
                raise
            log.exception("what was made could not be read")
            post(end)
            raise Draining from error

    return read_or_end


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
