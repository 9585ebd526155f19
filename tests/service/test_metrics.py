"""docs/metrics.md has every metric of tminus that /metrics exposes, with its type and labels, and no other."""

import re
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from tests.service.conftest import Site
from tests.service.fakes import INFO
from tminus.service.metrics import Metrics

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text("utf-8")
ROW = re.compile(r"^\| `(tminus_\w+)` \| (\w+) \|([^|]*)\|([^|]*)\|([^|]+)\|$", re.MULTILINE)
DOCUMENTED = {
    name: (kind, frozenset(re.findall(r"`(\w+)`", labels)), unit.strip(), text.strip())
    for name, kind, labels, unit, text in ROW.findall(PAGE)
}
AT_0 = {  # with labels, and there from the start
    "tminus_errors_total": [{"status": "500"}, {"status": "507"}],
    "tminus_cancelled_total": [{"reason": "engine_failed"}, {"reason": "not_finite"}],
}


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
    metrics.loaded_while_running("done", "demand")
    metrics.unloaded_while_running("idle")
    metrics.watch(
        tasks=lambda: 1,
        rows_active=lambda: 1,
        rows_waiting=lambda: 1,
        backlog_s=lambda: 1.0,
        device_memory_bytes=lambda: 1,
        keys_up=lambda: True,
        store_up=lambda: True,
        streams_open=lambda: 1,
        stalled_s=lambda: 1.0,
        tick_time_ratio=lambda: 1.0,
        waiting_in_store=lambda: (1, 1.0),
        models=lambda: {"loaded": 1},
    )
    metrics.ticked("fake", 1.0, 1, {"ddpm": 1})
    metrics.job_started(queue_s=1.0, first_step_s=1.0)
    metrics.job_done("fake", 1)
    metrics.job_given_up("deadline", 1)
    metrics.snapshotted(1)
    metrics.jobs_resumed(1)
    metrics.durable_job_ended("done")
    metrics.webhook_attempted("delivered", 1.0)
    metrics.webhook_ended("delivered")
    metrics.frame_sent()
    metrics.frame_dropped()
    metrics.rejected("overloaded")
    metrics.charged("studio", 1)
    metrics.asked_for("fake", "ddpm", "steps")
    metrics.answered_without_work("cache_hit")
    metrics.encoded("png", 1.0)
    metrics.coded("decode", 1.0)
    metrics.requested("/sample", 200, 1.0)
    metrics.requested("/sample", 500, 1.0)
    return exposed(metrics.render().decode())


def test_the_page_has_each_metric_and_no_other(site: Site) -> None:
    rows = re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)
    assert len(rows) == len(DOCUMENTED), "a row cannot be read, or is there twice"
    assert DOCUMENTED.keys() == exposed(site.client.get("/metrics").text).keys()


def test_the_page_has_their_types_and_labels(moved: dict[str, Metric]) -> None:
    for name, (kind, labels, unit, text) in DOCUMENTED.items():
        family = moved[name]
        assert family.type == kind, name
        assert family.samples, f"nothing has happened to {name}"
        assert {label for sample in family.samples for label in sample.labels} - {"le"} == labels, name
        moves = [sample for sample in family.samples if sample.value > 0 or sample.labels not in AT_0.get(name, [])]
        assert all(sample.value > 0 for sample in moves if not sample.labels.get("le")), f"{name} did not move"
        assert text, name
        for suffix in ("seconds", "bytes"):
            assert (unit == suffix) == (f"_{suffix}" in name), name


def test_what_alerts_wait_for_is_there_at_0_from_the_start() -> None:
    families = exposed(Metrics().render().decode())
    found = {name: [s.labels for s in families[name].samples if s.value == 0] for name in AT_0}
    assert found == AT_0


def test_errors_of_the_servers_own_are_counted() -> None:
    metrics = Metrics()
    for status in (200, 429, 499, 500, 503, 507, 507):
        metrics.requested("/sample", status, 1.0)
    samples = exposed(metrics.render().decode())["tminus_errors_total"].samples
    assert {sample.labels["status"]: sample.value for sample in samples} == {"500": 1, "507": 2}


def test_queries_and_text_name_existing_series_and_labels(moved: dict[str, Metric]) -> None:
    samples = [sample for family in moved.values() for sample in family.samples]
    assert set(re.findall(r"\btminus_\w*[a-z]\b", PAGE)) <= {sample.name for sample in samples} | moved.keys()
    for name, label in re.findall(r"(tminus_\w+)\{(\w+)=", PAGE):
        assert any(label in sample.labels for sample in samples if sample.name == name)
