"""Sends spans by OTLP over HTTP to a collector, in batches. Nothing else imports the SDK of OpenTelemetry.

The SDK reads its own OTEL_ variables. Ended spans wait in a bounded queue. A thread sends them; where the
queue is full, spans are lost.
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

CLOSE_S = 3.0  # for what is left to leave; a collector that does not answer is not waited for longer


class Traces:
    """Owns the provider, whose processor has the queue and the thread that sends."""

    tracer: Tracer

    def __init__(self, exporter: SpanExporter, version: str) -> None:
        """exporter: sends a batch, in the sending thread. Raises ValueError for an OTEL_ variable with a bad value."""
        ours = {"service.name": "tminus", "service.version": version, "service.instance.id": str(uuid.uuid4())}
        resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # which would wait for half a minute
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self._provider.get_tracer("tminus", version)

    def close(self) -> None:
        """Send what is left, as far as that can be done in a moment."""
        closing = threading.Thread(target=self._provider.shutdown, name="tminus-traces-close", daemon=True)
        closing.start()
        closing.join(CLOSE_S)
        if closing.is_alive():
            log.warning("the collector of traces has not taken the last spans in %g s; they are lost", CLOSE_S)


class Reported(SpanExporter):
    """Says once that spans cannot be sent, and once that they can again, in place of another exporter."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter, self._fails = exporter, False
        self._log = logging.getLogger(type(exporter).__module__)  # says it again every few seconds
        self._log.addFilter(self._passes)

    def _passes(self, _record: logging.LogRecord) -> bool:
        return not self._fails

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans, and note whether that could be done."""
        result = self._exporter.export(spans)
        failed = result is not SpanExportResult.SUCCESS
        if failed and not self._fails:
            log.warning("spans cannot be sent; nothing more is said until they can, and those meanwhile are lost")
        elif self._fails and not failed:
            log.info("spans are sent again")
        self._fails = failed
        return result

    def shutdown(self) -> None:
        """Send nothing more."""
        self._exporter.shutdown()
        self._log.removeFilter(self._passes)


def send_spans(version: str) -> Traces:
    """Begin to send, to where the OTEL_ variables say. Raises ValueError where one of them has a bad value."""
    return Traces(Reported(OTLPSpanExporter()), version)
