"""Request ids, and spans with the OpenTelemetry API.

Only startup/telemetry.py imports the SDK, which exports spans. TRACER is None while tracing is off, so a span costs
only a lookup. TRACER is a context variable instead of OpenTelemetry's global tracer, so that libraries add no spans of
their own.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

from opentelemetry import trace
from opentelemetry.trace import Span, StatusCode, Tracer

from tminus.service.errors import ServiceError

PROBLEM = "tminus.problem"  # span attribute with the error code that the client received
Attributes = Mapping[str, str | bool | int | float]

NO_ID = "-"  # the request id outside of requests
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default=NO_ID)
"""The id of the request that is being answered, for log lines. Other threads have it only by `asyncio.to_thread`."""

TRACER: ContextVar[Tracer | None] = ContextVar("tracer", default=None)


def traced(name: str, attributes: Attributes) -> AbstractContextManager[object]:
    """Wrap a block in a span. Without tracing, return an empty context manager."""
    tracer = TRACER.get()
    return nullcontext() if tracer is None else _span(tracer, name, attributes)


@contextmanager
def _span(tracer: Tracer, name: str, attributes: Attributes) -> Iterator[None]:
    """Record only the code or type of an exception, because its message and traceback may contain secrets."""
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
    """Add attributes to the current span, if any."""
    trace.get_current_span().set_attributes(attributes)


def fail(span: Span, code: str, *, by_server: bool) -> None:
    """Record why a span failed. by_server: True if the cause is in the server, so an operator should look."""
    span.set_attribute("error.type", code)
    if by_server:
        span.set_status(StatusCode.ERROR, code)


def ids_of(span: Span | None = None) -> Mapping[str, str]:
    """Return the trace id and span id of a span, by default the current one. Empty without a span."""
    context = (span or trace.get_current_span()).get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}


def exemplar(request_id: str | None = None, span: Span | None = None) -> dict[str, str]:
    """Return the exemplar labels of a request, by default the current one.

    The labels are the request id, and the trace id if the trace is sampled. OpenMetrics allows 128 characters in
    labels. These labels have at most 114, because a request id has at most 64.
    """
    request_id = REQUEST_ID.get() if request_id is None else request_id
    labels = {} if request_id == NO_ID else {"request_id": request_id}
    context = (span or trace.get_current_span()).get_span_context()
    if context.is_valid and context.trace_flags.sampled:
        labels["trace_id"] = trace.format_trace_id(context.trace_id)
    return labels


def why(error: BaseException) -> tuple[str, bool]:
    """Return an error's code or type, and True if the cause is in the server."""
    if isinstance(error, ServiceError):
        return error.code, error.status >= 500
    return type(error).__name__, isinstance(error, Exception)


class JobSpan:
    """The span of a job, with a child span for each phase (queue, denoise, decode) and counts of ticks.

    The child spans are added when the job ends, because only then are their ends known. A tick only adds three numbers.
    Times are in seconds since the job was accepted.
    """

    def __init__(self, tracer: Tracer, accepted_ns: int, attributes: Attributes) -> None:
        """Start the span as a child of the current span. accepted_ns: Unix time in nanoseconds."""
        self.span = tracer.start_span("job", attributes=attributes, start_time=accepted_ns)
        self._tracer, self._accepted_ns = tracer, accepted_ns
        self._ticks, self._ticks_s, self._places = 0, 0.0, 0  # totals over the ticks that included rows of this job

    def add_tick(self, seconds: float, places: int) -> None:
        """Count a tick that included rows of this job. places: size of the tick, including the rows of other jobs."""
        self._ticks += 1
        self._ticks_s += seconds
        self._places += places

    def end(
        self,
        started_s: float | None,
        first_step_s: float,
        denoised_s: float | None,
        ended_s: float | None,
        *,
        decoded: int = 0,
        error: BaseException | None = None,
    ) -> None:
        """End the span. decoded: number of decoded images.

        A time is None if the job did not get that far. The phase that was running then ends now.
        """
        self._begin_part("queue", 0.0).end(self._ns(started_s))
        if started_s is not None:
            denoise = self._begin_part("denoise", started_s)
            if self._ticks:
                denoise.set_attribute("tminus.ticks", self._ticks)
                denoise.set_attribute("tminus.ticks_s", round(self._ticks_s, 6))
                denoise.set_attribute("tminus.places_per_tick", round(self._places / self._ticks, 3))
            denoise.add_event("first step", timestamp=self._ns(first_step_s))
            denoise.end(self._ns(denoised_s))
        if denoised_s is not None and decoded:
            decode = self._begin_part("decode", denoised_s)
            decode.set_attribute("tminus.images", decoded)
            decode.end(self._ns(ended_s))
        code, by_server = ("done", False) if error is None else why(error)
        self.span.set_attribute("tminus.outcome", code)
        if error is not None:
            fail(self.span, code, by_server=by_server)
        self.span.end(self._ns(ended_s))

    def _begin_part(self, name: str, began_s: float) -> Span:
        return self._tracer.start_span(name, trace.set_span_in_context(self.span), start_time=self._ns(began_s))

    def _ns(self, moment_s: float | None) -> int | None:
        return None if moment_s is None else self._accepted_ns + round(moment_s * 1e9)
