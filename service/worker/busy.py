"""Since when the worker's thread has been at something that may hang."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Busy:
    """Written by one thread, read by any."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.since_s: float | None = None

    @contextmanager
    def with_engine(self) -> Iterator[None]:
        """While an engine does something."""
        self.since_s = self._clock()
        try:
            yield
        finally:
            self.since_s = None
