"""/metrics has every metric that METRICS describes, with its type and labels, and no other; exemplars."""

import pytest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from tests.service.collector import Kept
from tests.service.conftest import MakeSite, Site
from tests.service.fakes import INFO
from tminus.service.metrics import EXEMPLAR_S, METRICS, Metrics

AT_0 = {  # with labels, and there from the start
    "tminus_errors_total": [{"status": "500"}, {"status": "507"}],
    "tminus_jobs_aborted_total": [{"reason": "engine_failed"}, {"reason": "not_finite"}],
}
OF_A_STORE = ("tminus_store_jobs_waiting", "tminus_store_backlog_seconds")


def exposed(text: str) -> dict[str, Metric]:
    """The families of tminus by the name that a query has; without the times at which counters started."""
    families = [family for family in text_string_to_metric_families(text) if family.name.startswith("tminus_")]
    return {
        family.name + "_total" * (family.type == "counter"): family
        for family in families
        if not family.name.endswith("_created")
    }


@pytest.fixture(scope="module")
def moved() -> dict[str, Metric]:
    """Each metric after something has happened to it, so that its labels can be seen."""
    metrics = Metrics()
    metrics.model_loaded(INFO)
    watched = {*METRICS} - {"tminus_models", "tminus_model_info", "tminus_last_snapshot_timestamp_seconds", *OF_A_STORE}
    gauges = {name: lambda: 1.0 for name in watched if METRICS[name].kind == "gauge"}
    metrics.watch(gauges, {"loaded": lambda: 1.0}, lambda: (1, 1.0))
    metrics.ticked("fake", 1.0, 1, {"ddpm": 1})
    metrics.job_started(queue_s=1.0, first_step_s=1.0, exemplar={})
    metrics.snapshotted(1)
    for name, told in METRICS.items():
        if told.kind == "counter":
            metrics.count(name, *told.labels)
    metrics.observe("tminus_webhook_attempt_duration_seconds", 1.0, "delivered")
    metrics.observe("tminus_encode_duration_seconds", 1.0, "png")
    metrics.observe("tminus_autoencoder_duration_seconds", 1.0, "decode")
    metrics.requested("/sample", 200, 1.0)
    metrics.requested("/sample", 500, 1.0)
    return exposed(metrics.render()[0].decode())


def test_each_metric_is_described_and_no_other(site: Site) -> None:
    assert METRICS.keys() == exposed(site.client.get("/metrics").text).keys()


def test_metrics_have_the_types_labels_and_texts_that_are_described(moved: dict[str, Metric]) -> None:
    for name, told in METRICS.items():
        family = moved[name]
        assert family.type == told.kind, name
        assert family.documentation == told.text, name
        assert family.samples, f"nothing has happened to {name}"
        assert {label for sample in family.samples for label in sample.labels} - {"le"} == {*told.labels}, name
        moves = [sample for sample in family.samples if sample.value > 0 or sample.labels not in AT_0.get(name, [])]
        assert all(sample.value > 0 for sample in moves if not sample.labels.get("le")), f"{name} did not move"


def test_what_alerts_wait_for_is_there_at_0_from_the_start() -> None:
    families = exposed(Metrics().render()[0].decode())
    found = {name: [s.labels for s in families[name].samples if s.value == 0] for name in AT_0}
    assert found == AT_0


def test_errors_of_the_servers_own_are_counted() -> None:
    metrics = Metrics()
    for status in (200, 429, 499, 500, 503, 507, 507):
        metrics.requested("/sample", status, 1.0)
    samples = exposed(metrics.render()[0].decode())["tminus_errors_total"].samples
    assert {sample.labels["status"]: sample.value for sample in samples} == {"500": 1, "507": 2}


# --- exemplars ---

OPENMETRICS = {"Accept": "application/openmetrics-text; version=1.0.0"}
# What Prometheus 3.5 sends.
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;"
    "version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
LATENCIES = ("tminus_request_duration_seconds", "tminus_queue_wait_seconds", "tminus_time_to_first_step_seconds")


def exemplars(text: str, name: str, **labels: str) -> dict[str, tuple[dict[str, str], float]]:
    """The exemplars of a histogram by upper bound, as prometheus_client's parser of OpenMetrics reads them."""
    (family,) = [each for each in openmetrics.text_string_to_metric_families(text) if each.name == name]
    return {
        sample.labels["le"]: (sample.exemplar.labels, sample.exemplar.value)
        for sample in family.samples
        if sample.exemplar is not None and labels.items() <= sample.labels.items()
    }


def test_the_exemplar_of_a_bucket_is_its_slowest_request_of_the_last_minute() -> None:
    now_s = 0.0
    metrics = Metrics(clock=lambda: now_s)

    def started(queue_s: float, name: str) -> None:
        metrics.job_started(queue_s=queue_s, first_step_s=queue_s, exemplar={"request_id": name} if name else {})

    def shown() -> dict[str, tuple[str, float]]:
        text = metrics.render(as_openmetrics=True)[0].decode()
        return {le: (labels["request_id"], s) for le, (labels, s) in exemplars(text, LATENCIES[1]).items()}

    for queue_s, name in ((0.3, "a"), (0.4, "b"), (0.35, "c"), (0.45, ""), (0.5, "at the bound"), (700.0, "slow")):
        started(queue_s, name)
    assert shown() == {"0.5": ("at the bound", 0.5), "+Inf": ("slow", 700.0)}
    now_s = EXEMPLAR_S
    started(0.3, "d")
    assert shown()["0.5"] == ("at the bound", 0.5)
    now_s += 1
    started(0.3, "e")
    assert shown() == {"0.5": ("e", 0.3), "+Inf": ("slow", 700.0)}


def test_slow_requests_are_named_by_their_trace_and_their_id(make_site: MakeSite) -> None:
    kept = Kept()
    site = make_site(app={"traces": kept.traces})
    own_id = "i" * 64  # with it the labels are as long as they get
    headers = {"X-Request-ID": own_id, "traceparent": f"00-{'a1' * 16}-{'b2' * 8}-01"}
    assert site.post(json={"steps": 2, "seed": 5}, headers=headers).status_code == 200
    text = site.client.get("/metrics", headers=OPENMETRICS).text
    for name in LATENCIES:
        (found,) = exemplars(text, name, **({"route": "/sample"} if "request" in name else {})).values()
        assert found[0] == {"request_id": own_id, "trace_id": "a1" * 16}, name
    unsampled = headers | {"traceparent": f"00-{'c3' * 16}-{'b2' * 8}-00"}
    site.client.get("/model", headers=unsampled)
    text = site.client.get("/metrics", headers=OPENMETRICS).text
    (found,) = exemplars(text, LATENCIES[0], route="/model").values()
    assert found[0] == {"request_id": own_id}, "no collector has this trace"
    kept.traces.close()


def test_without_traces_slow_requests_are_named_by_their_id(site: Site) -> None:
    site.post(json={"steps": 2, "seed": 5}, headers={"X-Request-ID": "mine"})
    text = site.client.get("/metrics", headers=OPENMETRICS).text
    for name in LATENCIES:
        labels = {"route": "/sample"} if "request" in name else {}
        assert [each for each, _ in exemplars(text, name, **labels).values()] == [{"request_id": "mine"}], name


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        (PROMETHEUS, True),
        ("application/openmetrics-text", True),
        ("application/openmetrics-text;version=1.0.0, text/plain;q=0.5", True),
        ("application/openmetrics-text;version=x.y", True),  # which choose_encoder of prometheus_client fails at
        ("application/openmetrics-text;q=0.2, text/plain", False),
        ("application/openmetrics-text;q=0", False),
        ("text/plain;version=0.0.4", False),
        ("*/*", False),
        ("", False),
        ("nonsense", False),
    ],
)
def test_openmetrics_is_for_those_who_ask(site: Site, accept: str, *, is_openmetrics: bool) -> None:
    response = site.client.get("/metrics", headers={"Accept": accept})
    assert response.status_code == 200
    assert response.headers["Vary"] == "Accept"
    if is_openmetrics:
        assert response.headers["Content-Type"] == "application/openmetrics-text; version=1.0.0; charset=utf-8"
        assert list(openmetrics.text_string_to_metric_families(response.text))
    else:
        assert response.headers["Content-Type"] == CONTENT_TYPE_LATEST
        assert " # {" not in response.text


def test_plain_text_is_what_it_is_without_exemplars(moved: dict[str, Metric]) -> None:
    plain, named = Metrics(), Metrics()
    for metrics, labels in ((plain, {}), (named, {"request_id": "a"})):
        metrics.job_started(queue_s=1.0, first_step_s=2.0, exemplar=labels)
    ours = [[line for line in each.render()[0].splitlines() if line.startswith(b"tminus_")] for each in (plain, named)]
    assert ours[0] == ours[1]
    body, _ = named.render(as_openmetrics=True)
    told = {family.name for family in openmetrics.text_string_to_metric_families(body.decode())}
    assert {name.removesuffix("_total").removesuffix("_info") for name in exposed(named.render()[0].decode())} == {
        name for name in told if name.startswith("tminus_")
    }
