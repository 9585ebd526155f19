"""The Prometheus metrics, in base units, with the prefix tminus_. docs/metrics.md explains each.

Each app has a registry of its own; there are no globals.
"""

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

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
EXEMPLAR_S = 60.0  # for so long the slowest observation of a bucket is its exemplar, whatever comes after it
BATCH_BUCKETS = tuple(float(2**i) for i in range(11))
ERRORS = ("500", "507")  # statuses that are the server's own fault
LOST = ("engine_failed", "not_finite")  # reasons for which no job should end


class Metrics:
    """Owns the registry. Methods are named for what happened, and may be called from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"tminus_{name}", text, labels, buckets=(*buckets, math.inf), registry=registry)

        def latency(name: str, text: str, *labels: str) -> _Latency:
            return _Latency(histogram(name, text, REQUEST_BUCKETS, *labels), clock)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tminus_{name}", text, labels, registry=registry)

        self._step = histogram("step_duration_seconds", "One tick: forward pass and update", TICK_BUCKETS, "model")
        self._batch = histogram("batch_rows", "Places in a tick; a guided row takes two", BATCH_BUCKETS, "model")
        self._row_steps = counter("row_steps_total", "Steps taken, of one row each", "model", "sampler")
        self._asked = counter(
            "sample_requests_total",
            "Requests for images that passed the checks, by the sampler they get and the settings they name",
            "model",
            "sampler",
            "named",
        )
        self._request = latency(
            "request_duration_seconds", "From the request's head to the response's end", "route", "status"
        )
        self._errors = counter("errors_total", "Requests answered by an error of the server's own", "status")
        self._queue = latency("queue_wait_seconds", "From acceptance to the start of the first step")
        self._first_step = latency("time_to_first_step_seconds", "From acceptance to the end of the first step")
        self._images = counter("images_total", "Images finished", "model")
        self._rejected = counter("rejected_total", "Requests refused, by problem code", "reason")
        self._charged = counter("key_row_steps_total", "Row-steps of accepted jobs, by the name of a key", "key")
        self._cancelled = counter("cancelled_total", "Accepted jobs that were not finished", "reason")
        self._saved = counter("row_steps_saved_total", "Steps not taken because their job was given up")
        self._unworked = counter("answered_without_work_total", "Repeats answered by 304 or from the cache", "how")
        self._snapshots = counter("snapshots_total", "Snapshots of durable jobs kept, of one job each")
        self._snapshot_at = Gauge(
            "tminus_last_snapshot_timestamp_seconds", "When snapshots were last kept, in Unix time", registry=registry
        )
        self._resumed = counter(
            "jobs_resumed_total", "Durable jobs that an earlier start accepted and this one went on with"
        )
        self._durable = counter(
            "durable_jobs_total", "Durable jobs that ended: done, failed, cancelled, or lost", "outcome"
        )
        self._encode = histogram(
            "encode_duration_seconds", "Pixels to bytes, off the worker's thread", ENCODE_BUCKETS, "kind"
        )
        self._coding = histogram(
            "autoencoder_duration_seconds",
            "One image through the autoencoder of a latent model, beside the ticks",
            AUTOENCODER_BUCKETS,
            "direction",
        )
        self._frames_sent = counter("frames_sent_total", "Previews sent, of one step each")
        self._frames_dropped = counter("frames_dropped_total", "Previews that a newer one overtook: a slow reader")
        self._model = Info("tminus_model", "A model that is loaded", ["name"], registry=registry)
        self._webhooks = counter(
            "webhooks_total", "Events that webhooks were to be told of: delivered, or given up", "outcome"
        )
        self._webhook_attempt = histogram(
            "webhook_duration_seconds", "One attempt to tell a webhook: delivered or failed", WEBHOOK_BUCKETS, "outcome"
        )
        self._loads = counter(
            "model_loads_total",
            "Models loaded while the server ran: done or refused; by an admin, or on demand",
            "outcome",
            "reason",
        )
        self._unloads = counter(
            "model_unloads_total", "Models that went out of memory and are still served: idle, room or admin", "reason"
        )
        # What alerts wait for is there at 0: to Prometheus, a series that begins at 1 has not increased.
        for status in ERRORS:
            self._errors.labels(status)
        for reason in LOST:
            self._cancelled.labels(reason)

    def model_loaded(self, info: ModelInfo) -> None:
        """Describe a model that is served from now on, in place of another of its name."""
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
        """Describe a model no more."""
        with suppress(KeyError):
            self._model.remove(name)

    def loaded_while_running(self, outcome: str, reason: str) -> None:
        """Record the outcome of loading a model while the server runs: done or refused; reason: admin or demand."""
        self._loads.labels(outcome, reason).inc()

    def unloaded_while_running(self, reason: str) -> None:
        """Record that a model that is served went out of memory: it was idle, for room, or by an admin."""
        self._unloads.labels(reason).inc()

    def watch(
        self,
        *,
        tasks: Callable[[], int],
        rows_active: Callable[[], int],
        rows_waiting: Callable[[], int],
        backlog_s: Callable[[], float],
        background_rows: Callable[[], int],
        background_backlog_s: Callable[[], float],
        device_memory_bytes: Callable[[], int | None],
        keys_up: Callable[[], bool],
        store_up: Callable[[], bool],
        streams_open: Callable[[], int],
        stalled_s: Callable[[], float],
        tick_time_ratio: Callable[[], float],
        waiting_in_store: Callable[[], tuple[int, float] | None],
        models: Callable[[], Mapping[str, int]],
    ) -> None:
        """Add the gauges whose values are read when /metrics is.

        waiting_in_store: the jobs of a shared store that nobody holds, and the seconds that one server would take for
        them; None without such a store, or while it does not answer. models: how many are in each state.
        """
        gauges: dict[str, tuple[str, Callable[[], float]]] = {
            "tasks": ("Tasks of the event loop", tasks),
            "rows_active": ("Rows in the last tick", rows_active),
            "rows_waiting": ("Rows accepted that were not in the last tick", rows_waiting),
            "backlog_seconds": ("Predicted seconds of accepted work, but for background jobs", backlog_s),
            "background_rows": ("Rows of background jobs, accepted and not finished", background_rows),
            "background_backlog_seconds": ("Predicted seconds of the work of background jobs", background_backlog_s),
            "keys_up": ("1 while the keys in force are what their file says, else 0", keys_up),
            "store_up": ("1 while the store of durable jobs can be written to, else 0", store_up),
            "streams_open": ("WebSockets and event streams that are open", streams_open),
            "tick_time_ratio": ("How much longer ticks take now than was measured at the start", tick_time_ratio),
            "stalled_seconds": ("How long the worker has been at one thing, far over its time, or 0", stalled_s),
            "device_memory_bytes": ("Memory of tensors on the GPU; 0 on a CPU", lambda: device_memory_bytes() or 0),
        }
        for name, (text, read) in gauges.items():
            Gauge(f"tminus_{name}", text, registry=self.registry).set_function(read)
        self.registry.register(_WaitingInStore(waiting_in_store))
        self.registry.register(_States(models))

    def ticked(self, model: str, seconds: float, places: int, row_steps: Mapping[str, int]) -> None:
        """Record a tick of a model; row_steps: how many steps of one row it took, by sampler."""
        self._step.labels(model).observe(seconds)
        self._batch.labels(model).observe(places)
        for sampler, count in row_steps.items():
            self._row_steps.labels(model, sampler).inc(count)

    def job_started(self, *, queue_s: float, first_step_s: float, exemplar: Mapping[str, str]) -> None:
        """Record that a job has taken its first step. exemplar: the labels that name its request."""
        self._queue.observe(queue_s, exemplar)
        self._first_step.observe(first_step_s, exemplar)

    def job_done(self, model: str, images: int) -> None:
        """Record that a job of a model has all its images."""
        self._images.labels(model).inc(images)

    def job_given_up(self, reason: str, row_steps_saved: int) -> None:
        """Record that an accepted job ended without images."""
        self._cancelled.labels(reason).inc()
        self._saved.inc(row_steps_saved)

    def snapshotted(self, jobs: int) -> None:
        """Record that snapshots of so many jobs were written to the store."""
        self._snapshots.inc(jobs)
        self._snapshot_at.set_to_current_time()

    def jobs_resumed(self, jobs: int) -> None:
        """Record that so many jobs of an earlier run of the server are continued."""
        self._resumed.inc(jobs)

    def durable_job_ended(self, outcome: str) -> None:
        """Record that a durable job ended, and its outcome is in the store."""
        self._durable.labels(outcome).inc()

    def webhook_attempted(self, outcome: str, seconds: float) -> None:
        """Record an attempt to tell a webhook of an event: delivered or failed."""
        self._webhook_attempt.labels(outcome).observe(seconds)

    def webhook_ended(self, outcome: str) -> None:
        """Record that a webhook was told of an event, delivered, or that this was given up, given_up."""
        self._webhooks.labels(outcome).inc()

    def frame_sent(self) -> None:
        """Record that a frame was sent to a viewer."""
        self._frames_sent.inc()

    def frame_dropped(self) -> None:
        """Record that a frame was not sent: a newer one replaced it, or its job ended."""
        self._frames_dropped.inc()

    def rejected(self, reason: str) -> None:
        """Record that a request was refused with this problem code."""
        self._rejected.labels(reason).inc()

    def asked_for(self, model: str, sampler: str, named: str) -> None:
        """Record a request for images of a model that passed the checks; named: see `named_by` in defaults.py."""
        self._asked.labels(model, sampler, named).inc()

    def charged(self, key: str, row_steps: int) -> None:
        """Record that a job of so many row-steps was accepted from a key; an empty name is whoever has none."""
        self._charged.labels(key).inc(row_steps)

    def answered_without_work(self, how: str) -> None:
        """Record that a repeated request needed no step; `how` is not_modified or cache_hit."""
        self._unworked.labels(how).inc()

    def encoded(self, kind: str, seconds: float) -> None:
        """Record that images were encoded."""
        self._encode.labels(kind).observe(seconds)

    def coded(self, direction: str, seconds: float) -> None:
        """Record that an image was encoded to latents (encode) or made of them (decode)."""
        self._coding.labels(direction).observe(seconds)

    def requested(self, route: str, status: int, seconds: float) -> None:
        """Record that a request was answered, in the task that answered it."""
        self._request.observe(seconds, exemplar_here(), route, str(status))
        if str(status) in ERRORS:
            self._errors.labels(str(status)).inc()

    def render(self, *, as_openmetrics: bool = False) -> tuple[bytes, str]:
        """Write all metrics in the Prometheus text format or as OpenMetrics, which alone has exemplars.

        The second value is the media type.
        """
        if as_openmetrics:
            text: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
            return text, openmetrics.CONTENT_TYPE_LATEST
        return generate_latest(self.registry), CONTENT_TYPE_LATEST


class _Latency:
    """A histogram that names slow requests: the exemplar of a bucket is the slowest observation of late.

    prometheus_client keeps the last exemplar that it is given, and the last request is hardly ever the one to look at.
    """

    def __init__(self, histogram: Histogram, clock: Callable[[], float]) -> None:
        self._histogram, self._clock = histogram, clock
        self._slowest: dict[tuple[tuple[str, ...], int], tuple[float, float]] = {}  # seconds, and when it was observed

    def observe(self, seconds: float, exemplar: Mapping[str, str], *labels: str) -> None:
        """Count an observation. exemplar: the labels that name its request; none where it has none."""
        series = self._histogram.labels(*labels) if labels else self._histogram
        bucket, now_s = (labels, bisect_left(REQUEST_BUCKETS, seconds)), self._clock()
        slowest, since_s = self._slowest.get(bucket, (-math.inf, -math.inf))
        if exemplar and (seconds > slowest or now_s - since_s > EXEMPLAR_S):
            self._slowest[bucket] = (seconds, now_s)
            series.observe(seconds, dict(exemplar))
        else:
            series.observe(seconds)


class _WaitingInStore(Collector):
    """Two gauges that have no series while nothing is known: 0 would say that nothing waits."""

    def __init__(self, read: Callable[[], tuple[int, float] | None]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the values once for both."""
        known = self._read() or (None, None)
        texts = ("Jobs of a shared store that no server holds", "Predicted seconds of those jobs on one server")
        for name, text, value in zip(("jobs_waiting", "backlog_seconds"), texts, known, strict=True):
            yield GaugeMetricFamily(f"tminus_store_{name}", text, value)


class _States(Collector):
    """How many models are in each state."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Count them."""
        gauge = GaugeMetricFamily("tminus_models", "Models that are served, by state", labels=["state"])
        for state, count in self._read().items():
            gauge.add_metric([state], count)
        yield gauge
