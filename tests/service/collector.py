"""A collector of traces on a real socket, which takes OTLP over HTTP, and may hang or refuse; and one in memory."""

import gzip
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.service.fakes import wait_until
from tminus.service.startup.telemetry import Traces

SERVER = ProtoSpan.SpanKind.SPAN_KIND_SERVER
ERROR = Status.StatusCode.STATUS_CODE_ERROR


@dataclass(frozen=True)
class Received:
    """One span, as it came."""

    name: str
    trace_id: str
    id: str
    parent: str  # empty for a root
    kind: int
    began_ns: int
    ended_ns: int
    failed: bool
    attributes: dict[str, Any]
    events: dict[str, int]  # their times, by name
    resource: dict[str, Any]

    @property
    def seconds(self) -> float:
        return (self.ended_ns - self.began_ns) / 1e9


@dataclass
class Collector:
    """What came. `status` is what is answered; `open` is cleared to answer nothing."""

    endpoint: str = ""
    spans: list[Received] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    asked: int = 0
    status: int = 200
    open: threading.Event = field(default_factory=threading.Event)

    def named(self, name: str, **attributes: Any) -> list[Received]:
        """The spans of a name that have these attributes, `tminus.` left out and _ for a point."""
        wanted = {f"tminus.{key.replace('_', '.')}": value for key, value in attributes.items()}
        return [span for span in list(self.spans) if span.name == name and wanted.items() <= span.attributes.items()]

    def one(self, name: str, **attributes: Any) -> Received:
        """Wait for a span that must be the only one."""
        wait_until(lambda: bool(self.named(name, **attributes)))
        (found,) = self.named(name, **attributes)
        return found

    def parts(self, whole: Received, *names: str) -> list[Received]:
        """Wait for the parts of a span, which must have these names; in the order of the names."""
        found: list[Received] = []

        def all_came() -> bool:
            found[:] = sorted(
                (span for span in list(self.spans) if span.parent == whole.id), key=lambda each: each.name
            )
            return len(found) >= len(names)

        wait_until(all_came)
        assert [span.name for span in found] == sorted(names)
        return found


@contextmanager
def collector() -> Iterator[Collector]:
    """Listens until the block ends."""
    seen = Collector()
    seen.open.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            seen.asked += 1
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            seen.open.wait()
            if seen.status == 200:
                assert self.path == "/v1/traces"
                assert self.headers["Content-Type"] == "application/x-protobuf"
                seen.headers.append(dict(self.headers.items()))
                seen.bodies.append(body)
                seen.spans += decode(body)
            self.send_response(seen.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield seen
    finally:
        seen.open.set()
        server.shutdown()
        thread.join()
        server.server_close()


def decode(body: bytes) -> list[Received]:
    """Read what an exporter sends."""
    request = ExportTraceServiceRequest.FromString(body)
    return [
        Received(
            span.name,
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.kind,
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            span.status.code == ERROR,
            _attributes(span.attributes),
            {event.name: event.time_unix_nano for event in span.events},
            _attributes(resource.resource.attributes),
        )
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _attributes(pairs: Sequence[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: AnyValue) -> Any:
    return getattr(value, value.WhichOneof("value") or "string_value")


class Kept:
    """Spans that stay here."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.traces = Traces(self._exporter, "1.2.3")

    def all(self) -> list[ReadableSpan]:
        """All spans, after which there are no more."""
        self.traces.close()
        return list(self._exporter.get_finished_spans())

    def by_name(self) -> dict[str, ReadableSpan]:
        """All spans, which must have different names."""
        spans = self.all()
        found = {span.name: span for span in spans}
        assert len(found) == len(spans), "each once"
        return found
