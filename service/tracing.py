"""Spans as the parts of the server see them: what began, and what came of it. No OpenTelemetry: see telemetry.py.

TRACER is None while traces are off; a span then costs the look at it.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Protocol

from tminus.service.errors import ServiceError

PROBLEM = "tminus.problem"  # the code of what a client was told
Attributes = Mapping[str, str | bool | int | float]


class Span(Protocol):
    """Something that takes time. Any thread may call. Times are Unix time in nanoseconds; None is now."""

    @property
    def ids(self) -> Mapping[str, str]:
        """Its trace_id and span_id, for the lines of a log."""

    def set(self, attributes: Attributes) -> None:
        """Add to what is known of it."""

    def rename(self, name: str) -> None:
        """Give it the name that is known only now."""

    def add_event(self, name: str) -> None:
        """Note that something happened now."""

    def add_child(
        self,
        name: str,
        began_ns: int,
        ended_ns: int | None,
        attributes: Attributes,
        events: Mapping[str, int],
    ) -> None:
        """Add a part of it that is over. events: their times, by name."""

    def fail(self, code: str, *, by_server: bool) -> None:
        """Note why it failed. by_server: whether somebody has to look at the server for that."""

    def end(self, at_ns: int | None = None) -> None:
        """Note that it is over, once. What `span` and `request` of a tracer begin ends by itself."""


class Tracer(Protocol):
    """Begins spans. Any thread may call; a new span is a part of the one that this thread or task is in."""

    @property
    def ids(self) -> Mapping[str, str]:
        """The ids of the span that this thread or task is in; empty where it is in none."""

    def request(self, headers: Mapping[str, str]) -> AbstractContextManager[Span]:
        """Begin the span of a request, which goes on with the client's trace where the headers name one."""

    def span(self, name: str, attributes: Attributes) -> AbstractContextManager[Span]:
        """Begin a span around a block. What the block raises is noted by its code or type, never by its text."""

    def begin(self, name: str, began_ns: int, attributes: Attributes) -> Span:
        """Begin a span that whoever holds it ends."""

    def note(self, attributes: Attributes) -> None:
        """Add to what is known of the span that this thread or task is in."""

    def close(self) -> None:
        """Send what is left, as far as that can be done in a moment."""


TRACER: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


def traced(name: str, attributes: Attributes) -> AbstractContextManager[object]:
    """A span around a block; nothing while traces are off."""
    tracer = TRACER.get()
    return nullcontext() if tracer is None else tracer.span(name, attributes)


def note(attributes: Attributes) -> None:
    """Add to what is known of the span that this thread or task is in; nothing while traces are off."""
    if (tracer := TRACER.get()) is not None:
        tracer.note(attributes)


def why(error: BaseException) -> tuple[str, bool]:
    """The code of an error, or its type, and whether somebody has to look at the server for that."""
    if isinstance(error, ServiceError):
        return error.code, error.status >= 500
    return type(error).__name__, isinstance(error, Exception)
