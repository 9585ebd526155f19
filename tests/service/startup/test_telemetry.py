"""OpenTelemetry's SDK in process, with a collector on a real socket: what is sent, and what a bad collector costs."""

import logging
import threading
import time
from collections.abc import Iterator

import pytest

from tests.service.collector import Collector, collector
from tests.service.fakes import wait_until
from tminus.service.errors import JobNotFound
from tminus.service.startup.telemetry import CLOSE_S, OtelTracer, start_tracer


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    with collector() as listening:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", listening.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
        for name in ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES", "OTEL_TRACES_SAMPLER"):
            monkeypatch.delenv(name, raising=False)
        yield listening


@pytest.fixture
def tracer(spans: Collector) -> Iterator[OtelTracer]:
    made = start_tracer("1.2.3")
    yield made
    spans.open.set()
    made.close()


def test_a_span_in_a_span_is_its_part_and_the_log_gets_the_ids_of_the_inner_one(
    tracer: OtelTracer, spans: Collector
) -> None:
    assert tracer.ids == {}
    with tracer.request({}) as request:
        assert tracer.ids == request.ids
        with tracer.span("inner", {"tminus.images": 2}):
            inside = tracer.ids
            tracer.note({"tminus.problem": "none"})
        request.rename("GET /model")
    assert tracer.ids == {}
    inner, outer = spans.one("inner"), spans.one("GET /model")
    assert inside == {"trace_id": inner.trace_id, "span_id": inner.id}
    assert (inner.trace_id, inner.parent) == (outer.trace_id, outer.id)
    assert inner.attributes == {"tminus.images": 2, "tminus.problem": "none"}


def test_the_server_says_who_it_is(tracer: OtelTracer, spans: Collector) -> None:
    with tracer.span("one", {}):
        pass
    resource = spans.one("one").resource
    assert (resource["service.name"], resource["service.version"]) == ("tminus", "1.2.3")
    assert resource["service.instance.id"]


def test_variables_say_what_the_service_is_called(spans: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "studio")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "service.version=mine,deployment.environment.name=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-token=of-the-collector")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    tracer = start_tracer("1.2.3")
    with tracer.span("one", {}):
        pass
    tracer.close()
    resource = spans.one("one").resource
    assert (resource["service.name"], resource["service.version"]) == ("studio", "mine")
    assert resource["deployment.environment.name"] == "test"
    assert spans.headers[0]["x-token"] == "of-the-collector"


def test_a_sampler_may_drop_all_but_what_a_client_wants(spans: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    tracer = start_tracer("1.2.3")
    for headers in ({}, {"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}):
        with tracer.request(headers), tracer.span("inner", {}):
            tracer.begin("job", time.time_ns(), {}).end()
    tracer.close()
    assert sorted(span.name for span in spans.spans) == ["HTTP", "inner", "job"]


def test_an_error_is_sent_by_its_code_or_type_and_never_with_its_text(tracer: OtelTracer, spans: Collector) -> None:
    for name, error in (("ours", JobNotFound("a secret job")), ("other", RuntimeError("a secret"))):
        with pytest.raises(type(error)), tracer.span(name, {}):
            raise error
    ours, other = spans.one("ours"), spans.one("other")
    assert (ours.attributes, ours.failed, ours.events) == ({"error.type": "job_not_found"}, False, {})
    assert (other.attributes, other.failed, other.events) == ({"error.type": "RuntimeError"}, True, {})
    assert b"secret" not in b"".join(spans.bodies)


def test_what_is_left_is_sent_at_the_end(spans: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "60000")
    tracer = start_tracer("1.2.3")
    for _ in range(1500):  # three batches
        with tracer.span("each", {}):
            pass
    tracer.close()
    assert len(spans.named("each")) == 1500


def test_a_collector_that_hangs_keeps_nobody_waiting(
    tracer: OtelTracer, spans: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    spans.open.clear()
    began_s, threads = time.monotonic(), threading.active_count()
    slowest_s = 0.0
    for number in range(5000):  # more than the queue holds
        at_s = time.monotonic()
        with tracer.span("each", {"tminus.images": number}):
            pass
        slowest_s = max(slowest_s, time.monotonic() - at_s)
    took_s = time.monotonic() - began_s
    assert (slowest_s < 0.5, took_s < 5.0) == (True, True), (slowest_s, took_s)
    assert threading.active_count() <= threads + 1, "that of the collector"
    wait_until(lambda: spans.asked == 1)
    began_s = time.monotonic()
    tracer.close()
    assert time.monotonic() - began_s < CLOSE_S + 1
    assert "are lost" in caplog.text


def test_a_collector_that_refuses_is_told_of_once_and_when_it_takes_spans_again(
    tracer: OtelTracer, spans: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    spans.status = 400
    for asked in (1, 2, 3):
        with tracer.span("refused", {}):
            pass
        wait_until(lambda asked=asked: spans.asked >= asked)  # type: ignore[misc]
    spans.status = 200
    with tracer.span("taken", {}):
        pass
    spans.one("taken")
    wait_until(lambda: "spans are sent again" in caplog.text)
    assert caplog.text.count("spans cannot be sent") == 1
    assert caplog.text.count("Failed to export") == 1
