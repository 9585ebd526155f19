"""Sends spans to a collector in batches, by OTLP over HTTP.

Only this module imports the OpenTelemetry SDK. The SDK reads the OTEL_ environment variables. Spans wait in a bounded
queue until a thread sends them. When the queue is full, the oldest spans are dropped.
"""

import logging
import threading
import uuid
from collections.abc import Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Tracer

log = logging.getLogger(__name__)

CLOSE_S = 3.0  # longest wait at shutdown for the collector to take the last spans


class Traces:
    """Owns the tracer provider, the queue of spans, and the thread that sends them."""

    tracer: Tracer

    def __init__(self, exporter: SpanExporter, version: str) -> None:
        """exporter: sends batches of spans, in the sending thread. Raises ValueError for an invalid OTEL_ variable."""
        ours = {"service.name": "tminus", "service.version": version, "service.instance.id": str(uuid.uuid4())}
        resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # it would wait up to 30 s at exit
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self._provider.get_tracer("tminus", version)

    def close(self) -> None:
        """Send the remaining spans. Gives up after CLOSE_S seconds."""
        closing = threading.Thread(target=self._provider.shutdown, name="tminus-traces-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            log.warning("the collector of traces has not taken the last spans in %g s; they are lost", CLOSE_S)


class Reported(SpanExporter):
    """Wraps an exporter. Logs once when sending starts to fail, and once when it works again."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter, self._fails = exporter, False
        self._log = logging.getLogger(type(exporter).__module__)  # the exporter's own log; silenced while sending fails
        self._log.addFilter(self._passes)

    def _passes(self, _record: logging.LogRecord) -> bool:
        return not self._fails

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans. Log the first failure, and the first success after a failure."""
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._fails:
            log.warning("spans cannot be sent; nothing more is said until they can, and those meanwhile are lost")
        elif self._fails and not failed:
            log.info("spans are sent again")
        self._fails = failed
        return result

    def shutdown(self) -> None:
        self._exporter.shutdown()
        self._log.removeFilter(self._passes)


def send_spans(version: str) -> Traces:
    """Start sending spans, as configured by the OTEL_ variables. Raises ValueError for an invalid variable."""
    return Traces(Reported(OTLPSpanExporter()), version)
