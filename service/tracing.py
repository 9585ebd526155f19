"""Spans by OpenTelemetry's API. Its SDK, which sends them, is in startup/telemetry.py alone.

TRACER is None while traces are off; a span then costs the look at it. It is a variable of the context and not
OpenTelemetry's global one, so that libraries add no spans of their own.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode, Tracer

from tminus.service.errors import ServiceError

PROBLEM = "tminus.problem"  # the code of what a client was told
Attributes = Mapping[str, str | bool | int | float]

TRACER: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


def traced(name: str, attributes: Attributes) -> AbstractContextManager[object]:
    """Put a span around a block; do nothing while traces are off."""
    tracer = TRACER.get()
    return nullcontext() if tracer is None else _span(tracer, name, attributes)


@contextmanager
def _span(tracer: Tracer, name: str, attributes: Attributes) -> Iterator[None]:
    """Note what the block raises by its code or type: its text and traceback, as the SDK has them, may be secret."""
    with tracer.start_as_current_span(
        name, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as span:
        try:
            yield
        except BaseException as error:
            code, by_server = why(error)
            fail(span, code, by_server=by_server)
            raise


def note(attributes: Attributes) -> None:
    """Add to what is known of the span that this thread or task is in, if it is in one."""
    trace.get_current_span().set_attributes(attributes)


def fail(span: Span, code: str, *, by_server: bool) -> None:
    """Note why a span failed. by_server: whether somebody has to look at the server for that."""
    span.set_attribute("error.type", code)
    if by_server:
        span.set_status(StatusCode.ERROR, code)


def ids_of(span: Span | None = None) -> Mapping[str, str]:
    """Return the ids of a span, or of that which this thread or task is in; nothing where it is in none."""
    context = (span or trace.get_current_span()).get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}


def why(error: BaseException) -> tuple[str, bool]:
    """Return the code of an error, or its type, and whether somebody has to look at the server for that."""
    if isinstance(error, ServiceError):
        return error.code, error.status >= 500
    return type(error).__name__, isinstance(error, Exception)
