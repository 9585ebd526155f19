"""Whether traces are sent, what is sent, and what a bad collector costs: with the SDK in process and a real socket."""

import logging
import threading
import time
from collections.abc import Iterator

import pytest

from tests.service.collector import Collector, collector
from tests.service.fakes import wait_until
from tminus.service.errors import JobNotFound
from tminus.service.startup.telemetry import CLOSE_S, Traces, send_spans
from tminus.service.startup.traces import start_traces
from tminus.service.tracing import TRACER, ids_of, note, traced

ENDPOINT, PROTOCOL = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_PROTOCOL"
OF_TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
HERE = "http://127.0.0.1:9"  # nobody is asked before a span has ended
NAMES = ("TRACES_EXPORTER", "SDK_DISABLED", "SERVICE_NAME", "RESOURCE_ATTRIBUTES", "TRACES_SAMPLER")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (ENDPOINT, OF_TRACES, PROTOCOL, *(f"OTEL_{name}" for name in NAMES)):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collector() as listening:
        monkeypatch.setenv(ENDPOINT, listening.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        yield listening


@pytest.fixture
def traces(spans: Collector) -> Iterator[Traces]:
    made = send_spans("1.2.3")
    token = TRACER.set(made.tracer)
    yield made
    TRACER.reset(token)
    spans.open.set()
    made.close()


# --- whether they are sent ---


@pytest.mark.parametrize(
    ("values", "on"),
    [
        ({}, False),
        ({ENDPOINT: ""}, False),
        ({"OTEL_SERVICE_NAME": "studio"}, False),
        ({ENDPOINT: HERE, "OTEL_SDK_DISABLED": "TRUE"}, False),
        ({ENDPOINT: HERE, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({OF_TRACES: f"{HERE}/v1/traces"}, True),
        ({ENDPOINT: HERE, "OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "false"}, True),
        ({ENDPOINT: HERE, PROTOCOL: "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}, True),
    ],
)
def test_traces_are_sent_where_an_endpoint_is_set(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], on: bool
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    made = start_traces("1.2.3")
    assert (made is not None) == on
    if made is not None:
        made.close()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({ENDPOINT: "collector:4318"}, (ENDPOINT, "'collector:4318'")),
        ({ENDPOINT: "http://collector:port"}, (ENDPOINT, "'http://collector:port'")),
        ({OF_TRACES: "ftp://somebody:password@collector"}, (OF_TRACES, "got 'collector'")),
        ({ENDPOINT: HERE, "OTEL_TRACES_EXPORTER": "zipkin"}, ("OTEL_TRACES_EXPORTER", "'zipkin'")),
        ({ENDPOINT: HERE, PROTOCOL: "grpc"}, (PROTOCOL, "http/protobuf", "'grpc'")),
        ({ENDPOINT: HERE, "OTEL_BSP_MAX_QUEUE_SIZE": "5"}, ("max_export_batch_size",)),
    ],
)
def test_a_variable_with_a_bad_value_ends_in_a_line_that_names_it(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], named: tuple[str, ...]
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="OTEL_TRACES_EXPORTER=none serves without") as refusal:
        start_traces("1.2.3")
    for word in named:
        assert word in str(refusal.value)


# --- what is sent ---


@pytest.mark.usefixtures("traces")
def test_a_span_in_a_span_is_its_part_and_the_log_gets_the_ids_of_the_inner_one(spans: Collector) -> None:
    assert ids_of() == {}
    with traced("outer", {}), traced("inner", {"tminus.images": 2}):
        inside = ids_of()
        note({"tminus.problem": "none"})
    assert ids_of() == {}
    inner, outer = spans.one("inner"), spans.one("outer")
    assert inside == {"trace_id": inner.trace_id, "span_id": inner.id}
    assert (inner.trace_id, inner.parent) == (outer.trace_id, outer.id)
    assert inner.attributes == {"tminus.images": 2, "tminus.problem": "none"}
    assert (inner.resource["service.name"], inner.resource["service.version"]) == ("tminus", "1.2.3")
    assert inner.resource["service.instance.id"]


def test_variables_say_what_the_service_is_called(spans: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "studio")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.version=mine,deployment.environment.name=test")
    made = send_spans("1.2.3")
    made.tracer.start_span("one").end()
    made.close()
    resource = spans.one("one").resource
    assert (resource["service.name"], resource["service.version"]) == ("studio", "mine")
    assert resource["deployment.environment.name"] == "test"


@pytest.mark.usefixtures("traces")
def test_an_error_is_sent_by_its_code_or_type_and_never_with_its_text(spans: Collector) -> None:
    for name, error in (("ours", JobNotFound("a secret job")), ("other", RuntimeError("a secret"))):
        with pytest.raises(type(error)), traced(name, {}):
            raise error
    ours, other = spans.one("ours"), spans.one("other")
    assert (ours.attributes, ours.failed, ours.events) == ({"error.type": "job_not_found"}, False, {})
    assert (other.attributes, other.failed, other.events) == ({"error.type": "RuntimeError"}, True, {})
    assert b"secret" not in b"".join(spans.bodies)


def test_what_is_left_is_sent_at_the_end(spans: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    made = send_spans("1.2.3")
    for _ in range(1500):  # three batches
        made.tracer.start_span("each").end()
    made.close()
    assert len(spans.named("each")) == 1500


# --- a bad collector ---


def test_a_collector_that_hangs_keeps_nobody_waiting(
    traces: Traces, spans: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    spans.open.clear()
    began_s, threads = time.monotonic(), threading.active_count()
    for number in range(5000):  # more than the queue holds
        with traced("each", {"tminus.images": number}):
            pass
    assert time.monotonic() - began_s < 5
    assert threading.active_count() <= threads + 1, "that of the collector"
    wait_until(lambda: spans.asked == 1)
    began_s = time.monotonic()
    traces.close()
    assert time.monotonic() - began_s < CLOSE_S + 1
    assert "are lost" in caplog.text


@pytest.mark.usefixtures("traces")
def test_a_collector_that_refuses_is_told_of_once_and_when_it_takes_spans_again(
    spans: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    spans.status = 400
    for asked in (1, 2, 3):
        with traced("refused", {}):
            pass
        wait_until(lambda asked=asked: spans.asked >= asked)  # type: ignore[misc]
    spans.status = 200
    with traced("taken", {}):
        pass
    spans.one("taken")
    wait_until(lambda: "spans are sent again" in caplog.text)
    assert caplog.text.count("spans cannot be sent") == 1
    assert caplog.text.count("Failed to export") == 1
