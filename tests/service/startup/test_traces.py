"""Whether traces are sent: by the setting, or by the variables of OpenTelemetry. Without the extra: tests/e2e."""

from collections.abc import Callable

import pytest

from tests.service.collector import collector
from tminus.service.startup.traces import start_traces

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"
PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL"
OF_TRACES = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
HERE = "http://127.0.0.1:9"  # nobody is asked before a span has ended
Set = Callable[[dict[str, str]], None]


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> Set:
    """Sets variables of OpenTelemetry, and no others are set."""
    names = "ENDPOINT", "TRACES_ENDPOINT", "PROTOCOL", "TRACES_PROTOCOL"
    for name in (*(f"OTEL_EXPORTER_OTLP_{name}" for name in names), "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"):
        monkeypatch.delenv(name, raising=False)

    def put(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("wanted", "values"),
    [
        (None, {}),
        (None, {ENDPOINT: ""}),
        (None, {"OTEL_SERVICE_NAME": "studio"}),
        (False, {ENDPOINT: HERE}),
        (None, {ENDPOINT: HERE, "OTEL_SDK_DISABLED": "true"}),
        (True, {"OTEL_SDK_DISABLED": "TRUE"}),
        (True, {"OTEL_TRACES_EXPORTER": "none"}),
    ],
)
def test_traces_are_off(variables: Set, wanted: bool | None, values: dict[str, str]) -> None:
    variables(values)
    assert start_traces(wanted) is None


@pytest.mark.parametrize(
    ("wanted", "values"),
    [
        (True, {}),
        (True, {ENDPOINT: HERE}),
        (None, {ENDPOINT: HERE}),
        (None, {OF_TRACES: f"{HERE}/v1/traces"}),
        (None, {ENDPOINT: HERE, "OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "false"}),
        (None, {ENDPOINT: HERE, PROTOCOL: "http/protobuf"}),
        (None, {ENDPOINT: HERE, PROTOCOL: "grpc", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}),
    ],
)
def test_traces_are_on(variables: Set, wanted: bool | None, values: dict[str, str]) -> None:
    variables(values)
    tracer = start_traces(wanted)
    assert tracer is not None
    tracer.close()


def test_the_endpoint_of_traces_is_taken_as_it_is(variables: Set) -> None:
    with collector() as spans:
        variables({ENDPOINT: HERE, OF_TRACES: f"{spans.endpoint}/v1/traces"})
        tracer = start_traces(None)
        assert tracer is not None
        with tracer.span("one", {}):
            pass
        tracer.close()
        spans.one("one")


@pytest.mark.parametrize(
    ("wanted", "values", "named"),
    [
        (None, {ENDPOINT: "collector:4318"}, (ENDPOINT, "'collector:4318'")),
        (None, {ENDPOINT: "collector"}, (ENDPOINT, "'collector'")),
        (None, {ENDPOINT: "http://collector:port"}, (ENDPOINT, "'http://collector:port'")),
        (None, {OF_TRACES: "ftp://somebody:password@collector"}, (OF_TRACES, "got 'collector'")),
        (True, {"OTEL_TRACES_EXPORTER": "zipkin"}, ("--traces (TMINUS_TRACES)", "OTEL_TRACES_EXPORTER", "'zipkin'")),
        (True, {PROTOCOL: "grpc"}, (PROTOCOL, "http/protobuf", "'grpc'")),
        (True, {"OTEL_BSP_MAX_QUEUE_SIZE": "5"}, ("max_export_batch_size",)),
    ],
)
def test_a_variable_with_a_bad_value_ends_in_a_line_that_names_it(
    variables: Set, wanted: bool | None, values: dict[str, str], named: tuple[str, ...]
) -> None:
    variables(values)
    with pytest.raises(ValueError, match="--no-traces") as refusal:
        start_traces(wanted)
    for word in named:
        assert word in str(refusal.value)
