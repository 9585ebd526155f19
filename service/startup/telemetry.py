"""Traces by OpenTelemetry: spans go in batches to a collector, by OTLP over HTTP. Nothing else imports its SDK.

The SDK reads its own OTEL_ variables. Whoever ends a span puts it in a bounded queue and goes on. A thread sends what
is there; where the queue is full, spans are lost. There is no global provider, so that libraries add no spans.
"""

import logging
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from tminus.service.tracing import Attributes, why

log = logging.getLogger(__name__)

CLOSE_S = 3.0  # for what is left to leave; a collector that does not answer is not waited for longer


class OtelSpan:
    """A Span. `None` as a time is left to the SDK, for which it means now."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span) -> None:
        self._tracer, self._span = tracer, span

    @property
    def ids(self) -> Mapping[str, str]:
        """See Span."""
        return _ids(self._span)

    def set(self, attributes: Attributes) -> None:
        """See Span."""
        self._span.set_attributes(attributes)

    def rename(self, name: str) -> None:
        """See Span."""
        self._span.update_name(name)

    def add_event(self, name: str) -> None:
        """See Span."""
        self._span.add_event(name)

    def add_child(
        self,
        name: str,
        began_ns: int,
        ended_ns: int | None,
        attributes: Attributes,
        events: Mapping[str, int],
    ) -> None:
        """See Span."""
        within = trace.set_span_in_context(self._span)
        child = self._tracer.start_span(name, within, attributes=attributes, start_time=began_ns)
        for event, at_ns in events.items():
            child.add_event(event, timestamp=at_ns)
        child.end(ended_ns)

    def fail(self, code: str, *, by_server: bool) -> None:
        """See Span."""
        self._span.set_attribute("error.type", code)
        if by_server:
            self._span.set_status(trace.StatusCode.ERROR, code)

    def end(self, at_ns: int | None = None) -> None:
        """See Span."""
        self._span.end(at_ns)


class OtelTracer:
    """A Tracer. Owns the provider, whose processor has the queue and the thread that sends."""

    def __init__(self, exporter: SpanExporter, version: str) -> None:
        """exporter: sends a batch, in the sending thread. Raises ValueError for an OTEL_ variable with a bad value."""
        ours = {"service.name": "tminus", "service.version": version, "service.instance.id": str(uuid.uuid4())}
        resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # which would wait for half a minute
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("tminus", version)
        self._of_headers = TraceContextTextMapPropagator()

    @property
    def ids(self) -> Mapping[str, str]:
        """See Tracer."""
        return _ids(trace.get_current_span())

    @contextmanager
    def request(self, headers: Mapping[str, str]) -> Iterator[OtelSpan]:
        """See Tracer."""
        context = self._of_headers.extract(headers)
        with self._tracer.start_as_current_span(
            "HTTP", context, trace.SpanKind.SERVER, record_exception=False, set_status_on_exception=False
        ) as span:
            yield OtelSpan(self._tracer, span)

    @contextmanager
    def span(self, name: str, attributes: Attributes) -> Iterator[OtelSpan]:
        """See Tracer."""
        with self._tracer.start_as_current_span(
            # The SDK would record an exception with its text and traceback, which may quote a request.
            name, attributes=attributes, record_exception=False, set_status_on_exception=False,
        ) as span:  # fmt: skip
            begun = OtelSpan(self._tracer, span)
            try:
                yield begun
            except BaseException as error:
                code, by_server = why(error)
                begun.fail(code, by_server=by_server)
                raise

    def begin(self, name: str, began_ns: int, attributes: Attributes) -> OtelSpan:
        """See Tracer."""
        return OtelSpan(self._tracer, self._tracer.start_span(name, attributes=attributes, start_time=began_ns))

    def note(self, attributes: Attributes) -> None:
        """See Tracer."""
        trace.get_current_span().set_attributes(attributes)

    def close(self) -> None:
        """See Tracer."""
        closing = threading.Thread(target=self._provider.shutdown, name="tminus-traces-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            log.warning("the collector of traces has not taken the last spans in %g s; they are lost", CLOSE_S)


class Reported(SpanExporter):
    """An exporter around another, which says once that spans cannot be sent, and once that they can again."""

    def __init__(self, exporter: SpanExporter, loggers: Sequence[str]) -> None:
        """loggers: those of the exporter, which would say it again every few seconds."""
        self._exporter, self._fails = exporter, False
        self._loggers = [logging.getLogger(name) for name in loggers]
        for logger in self._loggers:
            logger.addFilter(self._passes)

    def _passes(self, _record: logging.LogRecord) -> bool:
        return not self._fails

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """See SpanExporter."""
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._fails:
            log.warning("spans cannot be sent; nothing more is said until they can, and those meanwhile are lost")
        elif self._fails and not failed:
            log.info("spans are sent again")
        self._fails = failed
        return result

    def shutdown(self) -> None:
        """See SpanExporter."""
        self._exporter.shutdown()
        for logger in self._loggers:
            logger.removeFilter(self._passes)


def start_tracer(version: str) -> OtelTracer:
    """Begin to send, to where the OTEL_ variables say. Raises ValueError where one of them has a bad value."""
    return OtelTracer(Reported(OTLPSpanExporter(), (OTLPSpanExporter.__module__,)), version)


def _ids(span: trace.Span) -> Mapping[str, str]:
    context = span.get_span_context()
    if not context.is_valid:
        return {}
    return {"trace_id": trace.format_trace_id(context.trace_id), "span_id": trace.format_span_id(context.span_id)}
