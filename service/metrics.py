"""The Prometheus metrics. Each has the prefix tminus_ and uses base units. METRICS documents them.

Each app has its own registry instead of prometheus_client's global one. The docs' page of metrics is generated from
METRICS.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    Info,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from tminus.service.model_info import ModelInfo
from tminus.service.tracing import exemplar as exemplar_here

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each counter and histogram, which nobody asks for

TICK_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
REQUEST_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 1.5, 2.5, 4, 6, 10, 15, 20, 30, 60, 120, 300, 600)
ENCODE_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)
AUTOENCODER_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
WEBHOOK_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
EXEMPLAR_S = 60.0  # seconds after which any new observation may replace the exemplar of its bucket
PLACES_BUCKETS = tuple(float(2**i) for i in range(11))
ERRORS = ("500", "507")  # HTTP statuses of failures of the server
LOST = ("engine_failed", "not_finite")  # abort reasons that indicate a fault in the server or the checkpoint
MODEL_LABELS = {
    "weights": "first 16 characters of the hash of its weights",
    "parameters": "number of its parameters",
    "fingerprint": "fingerprint of what makes its bytes",
    "device": "`cpu` or the GPU",
    "executor": "what runs the network",
    "precision": "number format of the forward pass",
}


@dataclass(frozen=True, slots=True)
class MetricDoc:
    """A metric: its HELP text in /metrics, what its labels mean, and the upper bounds of its buckets."""

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: Mapping[str, str] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()
    more: str = ""  # page of docs/ that explains the metric


MODEL = {"model": "name of the model"}
# Headings in the docs, keyed by the first metric of each group in METRICS.
GROUPS = {
    "tminus_tick_duration_seconds": "Ticks and rows",
    "tminus_backlog_seconds": "Waiting work",
    "tminus_request_duration_seconds": "Requests",
    "tminus_queue_wait_seconds": "Jobs",
    "tminus_store_up": "Durable jobs",
    "tminus_webhook_events_total": "Webhooks",
    "tminus_model_info": "Models",
    "tminus_key_places_total": "Keys",
    "tminus_encode_duration_seconds": "Encoding and previews",
    "tminus_stalled_seconds": "The process",
}
METRICS = {
    "tminus_tick_duration_seconds": MetricDoc(
        "histogram",
        "How long a tick took: one forward pass and the update that follows. Observed after each tick.",
        MODEL,
        TICK_BUCKETS,
        more="rows-and-ticks.md",
    ),
    "tminus_tick_places": MetricDoc(
        "histogram",
        "How many places of the forward pass a tick filled. A row takes one place, a row with guidance two. Observed "
        "after each tick.",
        MODEL,
        PLACES_BUCKETS,
        more="rows-and-ticks.md",
    ),
    "tminus_row_steps_total": MetricDoc(
        "counter",
        "Steps taken, of one row each. A step with guidance counts once, although it takes two places. Counted after "
        "each tick.",
        MODEL | {"sampler": "sampler of the job"},
    ),
    "tminus_rows_active": MetricDoc("gauge", "Rows in the last tick; 0 while there is no work."),
    "tminus_rows_waiting": MetricDoc("gauge", "Rows of accepted jobs that were not in the last tick."),
    "tminus_tick_time_ratio": MetricDoc(
        "gauge",
        "How long ticks take now, as a slow average, divided by what was measured at the start. With several models, "
        "it is that of the model where it is highest. A value far from 1 means that the machine is busy now, or was "
        "busy at the start.",
    ),
    "tminus_backlog_seconds": MetricDoc(
        "gauge",
        "Predicted seconds until all accepted work is done. --max-backlog-s limits this value.",
        more="scheduling.md",
    ),
    "tminus_request_duration_seconds": MetricDoc(
        "histogram",
        "From the head of a request to the end of its response. A WebSocket counts when it closes.",
        {
            "route": "pattern of the path, or `unmatched`",
            "status": "status of the response; 499 if the client disconnected first; of a WebSocket 101, or that of "
            "its refusal",
        },
        REQUEST_BUCKETS,
    ),
    "tminus_sample_requests_total": MetricDoc(
        "counter",
        "Requests for images with valid parameters. Those that are then refused for lack of room, or answered from the "
        "cache, count too. Those with `quality=adaptive` that no setting answers in time do not.",
        MODEL
        | {
            "sampler": "sampler that the request gets",
            "named": "which settings the request gave: `none`, `sampler`, `steps`, `both` or `table`",
        },
        more="api.md",
    ),
    "tminus_quality_total": MetricDoc(
        "counter",
        "Requests with `quality=adaptive`, by the setting that was chosen. Those that no setting answers in "
        "time are left out.",
        MODEL | {"rung": "place of the setting in the ladder, such as `2/5`; `other` if the ladder does not have it"},
    ),
    "tminus_rejected_total": MetricDoc(
        "counter",
        "Refused requests.",
        {"reason": "code of the error"},
        more="reference/errors.md",
    ),
    "tminus_errors_total": MetricDoc(
        "counter",
        "Requests that failed by the server's own fault. Both series exist from the start.",
        {"status": "500 or 507"},
    ),
    "tminus_answered_without_work_total": MetricDoc(
        "counter",
        "Repeated requests that needed no step.",
        {"how": "`not_modified` (the answer was 304, or 412 to a POST) or `cache_hit` (the answer was in memory)"},
    ),
    "tminus_queue_wait_seconds": MetricDoc(
        "histogram",
        "From the acceptance of a job to the start of its first step. Observed once for each job, after that step.",
        buckets=REQUEST_BUCKETS,
    ),
    "tminus_time_to_first_step_seconds": MetricDoc(
        "histogram",
        "From the acceptance of a job to the end of its first step. Observed once for each job, after that step.",
        buckets=REQUEST_BUCKETS,
    ),
    "tminus_images_total": MetricDoc("counter", "Finished images. Counted when a job has all of its images.", MODEL),
    "tminus_jobs_aborted_total": MetricDoc(
        "counter",
        "Accepted jobs that ended without images. The series of engine_failed and not_finite exist from the start.",
        {
            "reason": "`client_gone` (the client disconnected), `client_cancelled` (a WebSocket client cancelled the "
            "job), `deleted` (a request cancelled or deleted the job), `not_kept` (the store did not take the job), "
            "`deadline`, `draining`, `model_unloaded`, `engine_failed` or `not_finite`"
        },
    ),
    "tminus_row_steps_saved_total": MetricDoc(
        "counter",
        "Row-steps that were not computed because their job was aborted. A step with guidance counts once.",
    ),
    "tminus_store_up": MetricDoc("gauge", "1 while the store of durable jobs can be written to, else 0."),
    "tminus_durable_jobs_ended_total": MetricDoc(
        "counter",
        "Durable jobs that ended on this server. A waiting job counts on the server where it was cancelled.",
        {
            "outcome": "`done`, `failed` (also if the record of the job is damaged), `cancelled`, or `lost` (another "
            "server took the job over, or ended it)"
        },
        more="jobs.md",
    ),
    "tminus_jobs_resumed_total": MetricDoc(
        "counter",
        "Durable jobs that this server took over from the store: at its start those of an earlier run, later those of "
        "other servers.",
        more="jobs.md",
    ),
    "tminus_snapshots_total": MetricDoc(
        "counter", "Snapshots written to the store. Each is of one durable job.", more="jobs.md"
    ),
    "tminus_last_snapshot_timestamp_seconds": MetricDoc(
        "gauge", "Unix time at which snapshots were last written; 0 if never."
    ),
    "tminus_store_jobs_waiting": MetricDoc(
        "gauge",
        "Jobs in a shared store that no server holds. Every server that shares the store reports the same number, "
        "which it reads when it renews its leases. There is no series without a shared store, or while the store does "
        "not answer.",
        more="scaling.md#how-jobs-are-shared",
    ),
    "tminus_store_backlog_seconds": MetricDoc(
        "gauge",
        "Predicted seconds that one server of average speed would need for tminus_store_jobs_waiting. It has a series "
        "when that has one.",
        more="scaling.md#how-jobs-are-shared",
    ),
    "tminus_webhook_events_total": MetricDoc(
        "counter",
        "Events for webhooks that were delivered or given up.",
        {"outcome": "`delivered` or `given_up`"},
        more="webhooks.md",
    ),
    "tminus_webhook_attempt_duration_seconds": MetricDoc(
        "histogram",
        "How long one attempt to deliver an event took, at most ten seconds.",
        {"outcome": "`delivered` or `failed`"},
        WEBHOOK_BUCKETS,
        more="webhooks.md",
    ),
    "tminus_model_info": MetricDoc(
        "gauge",
        "Always 1. There is one series for each model in memory, and its labels describe the model.",
        {"name": "name of the model", **MODEL_LABELS},
        more="models.md",
    ),
    "tminus_models": MetricDoc(
        "gauge", "Models that are served.", {"state": "`loaded` (in memory) or `unloaded`"}, more="models.md"
    ),
    "tminus_model_loads_total": MetricDoc(
        "counter",
        "Models that were loaded or reloaded while the server ran.",
        {
            "outcome": "`done` or `refused`",
            "reason": "`admin` (a request of an admin) or `demand` (a request for images)",
        },
        more="models.md",
    ),
    "tminus_model_unloads_total": MetricDoc(
        "counter",
        "Models that left memory and are still served.",
        {"reason": "`idle`, `room` (for another model) or `admin`"},
        more="models.md",
    ),
    "tminus_key_places_total": MetricDoc(
        "counter",
        "Cost of accepted jobs, in places: a row-step counts once, with guidance twice, as in the quota of a key. "
        "Counted when a job is accepted.",
        {"key": "name of the key; empty for requests without one"},
        more="security.md",
    ),
    "tminus_keys_up": MetricDoc(
        "gauge",
        "1 while the keys in force are those in the file of keys; 0 while that file cannot be read or is wrong.",
    ),
    "tminus_encode_duration_seconds": MetricDoc(
        "histogram",
        "How long it took to encode pixels, outside the thread of the ticks.",
        {
            "kind": "`png`, `zip`, `json`, `npy`, `jpeg`, `webp`, `tensors`, `animation`, `trajectory`, `path` (frames "
            "as JSON) or `frame` (a preview)"
        },
        ENCODE_BUCKETS,
    ),
    "tminus_autoencoder_duration_seconds": MetricDoc(
        "histogram",
        "How long one image took in the autoencoder of a latent model, in a thread beside that of the ticks.",
        {"direction": "`encode`, `decode`, or `noise` (both, for `POST /noise`)"},
        AUTOENCODER_BUCKETS,
        more="latent-models.md",
    ),
    "tminus_frames_sent_total": MetricDoc(
        "counter", "Previews sent to viewers. Each shows one step of one job.", more="streaming.md"
    ),
    "tminus_frames_dropped_total": MetricDoc(
        "counter",
        "Previews that were not sent because the viewer reads too slowly: a newer preview replaced them, or their job "
        "ended.",
        more="streaming.md#slow-readers",
    ),
    "tminus_streams_open": MetricDoc("gauge", "Open WebSockets and event streams."),
    "tminus_stalled_seconds": MetricDoc(
        "gauge",
        "How long a thread has been busy with one thing that should have ended long ago; 0 while nothing hangs. A "
        "tick or a command hangs when it takes over a minute and over twenty times the longest tick; an animation "
        "after seven minutes; an image in an autoencoder, anything else that is encoded, an upload and the event loop "
        "after one minute.",
    ),
    "tminus_device_memory_bytes": MetricDoc("gauge", "Memory of tensors on the GPU; 0 on a CPU."),
    "tminus_asyncio_tasks": MetricDoc("gauge", "Asyncio tasks of the server."),
}


class Metrics:
    """Owns the registry. The methods may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        self._counters: dict[str, Counter] = {}
        self._histograms: dict[str, Histogram] = {}
        for name, told in METRICS.items():
            if told.kind == "counter":
                self._counters[name] = Counter(name, told.text, tuple(told.labels), registry=registry)
            elif told.kind == "histogram":
                buckets = (*told.buckets, math.inf)
                self._histograms[name] = Histogram(
                    name, told.text, tuple(told.labels), buckets=buckets, registry=registry
                )
        self._request, self._queue, self._first_step = (
            _Latency(self._histograms[name], clock)
            for name in (
                "tminus_request_duration_seconds",
                "tminus_queue_wait_seconds",
                "tminus_time_to_first_step_seconds",
            )
        )
        at = "tminus_last_snapshot_timestamp_seconds"
        self._snapshot_at = Gauge(at, METRICS[at].text, registry=registry)
        self._model = Info("tminus_model", METRICS["tminus_model_info"].text, ["name"], registry=registry)
        # Create these series at 0, because alerts use them. Prometheus does not see an increase in a series that starts
        # at 1.
        for status in ERRORS:
            self._counters["tminus_errors_total"].labels(status)
        for reason in LOST:
            self._counters["tminus_jobs_aborted_total"].labels(reason)

    def count(self, name: str, *labels: str, by: int = 1) -> None:
        """Increase a counter of METRICS. labels: label values, in the order that METRICS has them."""
        counter = self._counters[name]
        (counter.labels(*labels) if labels else counter).inc(by)

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Add an observation to a histogram of METRICS. labels: label values, in the order that METRICS has them."""
        self._histograms[name].labels(*labels).observe(value)

    def model_loaded(self, info: ModelInfo) -> None:
        """Add the info series of a model, and remove that of an earlier model with the same name."""
        self.model_gone(info.name)
        self._model.labels(info.name).info(
            {
                "weights": info.weights_hash[:16],
                "parameters": str(info.num_parameters),
                "fingerprint": info.fingerprint,
                "device": info.device,
                "executor": info.executor,
                "precision": info.precision,
            }
        )

    def model_gone(self, name: str) -> None:
        """Remove the info series of a model."""
        with suppress(KeyError):
            self._model.remove(name)

    def watch(
        self,
        gauges: Mapping[str, Callable[[], float]],
        models: Mapping[str, Callable[[], float]],
        waiting_in_store: Callable[[], tuple[int, float] | None],
    ) -> None:
        """Add the gauges whose values are read at each scrape of /metrics.

        gauges: keyed by metric name. models: the number of models, keyed by state. waiting_in_store: the number of jobs
        in shared stores that no server holds, and the seconds that one server would need for them; None if unknown.
        """
        for name, read in gauges.items():
            Gauge(name, METRICS[name].text, registry=self.registry).set_function(read)
        name = "tminus_models"
        of_state = Gauge(name, METRICS[name].text, tuple(METRICS[name].labels), registry=self.registry)
        for state, read in models.items():
            of_state.labels(state).set_function(read)
        self.registry.register(_WaitingInStore(waiting_in_store))

    def ticked(self, model: str, seconds: float, places: int, row_steps: Mapping[str, int]) -> None:
        """Record a tick (one batched step) of a model. row_steps: number of rows in the tick, keyed by sampler."""
        self.observe("tminus_tick_duration_seconds", seconds, model)
        self.observe("tminus_tick_places", places, model)
        for sampler, count in row_steps.items():
            self.count("tminus_row_steps_total", model, sampler, by=count)

    def job_started(self, *, queue_s: float, first_step_s: float, exemplar: Mapping[str, str]) -> None:
        """Record that a job has taken its first step. exemplar: labels that identify the job's request."""
        self._queue.observe(queue_s, exemplar)
        self._first_step.observe(first_step_s, exemplar)

    def snapshotted(self, jobs: int) -> None:
        """Record that snapshots of this many jobs were written to the store."""
        self.count("tminus_snapshots_total", by=jobs)
        self._snapshot_at.set_to_current_time()

    def requested(self, route: str, status: int, seconds: float) -> None:
        """Record a response. Call this in the request's task, because the exemplar comes from context variables."""
        self._request.observe(seconds, exemplar_here(), route, str(status))
        if str(status) in ERRORS:
            self.count("tminus_errors_total", str(status))

    def render(self, *, as_openmetrics: bool = False) -> tuple[bytes, str]:
        """Return all metrics and their media type. Only the OpenMetrics format includes exemplars."""
        if as_openmetrics:
            text: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _Latency:
    """A histogram with exemplars: each bucket's exemplar is its slowest recent observation.

    prometheus_client would keep the most recent observation, which is rarely the interesting one.
    """

    def __init__(self, histogram: Histogram, clock: Callable[[], float]) -> None:
        self._histogram, self._clock = histogram, clock
        self._slowest: dict[tuple[tuple[str, ...], int], tuple[float, float]] = {}  # (seconds, time observed)

    def observe(self, seconds: float, exemplar: Mapping[str, str], *labels: str) -> None:
        """Add an observation. exemplar: labels that identify the request; empty without a request."""
        series = self._histogram.labels(*labels) if labels else self._histogram
        bucket, now_s = (labels, bisect_left(REQUEST_BUCKETS, seconds)), self._clock()
        slowest, since_s = self._slowest.get(bucket, (-math.inf, -math.inf))
        if exemplar and (seconds > slowest or now_s - since_s > EXEMPLAR_S):
            self._slowest[bucket] = (seconds, now_s)
            series.observe(seconds, dict(exemplar))
        else:
            series.observe(seconds)


class _WaitingInStore(Collector):
    """Two gauges that are left out while their values are unknown. A value of 0 would mean that no job waits."""

    def __init__(self, read: Callable[[], tuple[int, float] | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        known = self._read() or (None, None)
        for name, value in zip(("tminus_store_jobs_waiting", "tminus_store_backlog_seconds"), known, strict=True):
            yield GaugeMetricFamily(name, METRICS[name].text, value)
