"""Requested jobs, accepted jobs, and the collection of all accepted jobs. No torch."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from tminus.service.errors import ServiceError
from tminus.service.preview import Frame, Show, Watch
from tminus.service.scheduling.admission import Admission
from tminus.service.spec import Inputs, Pixels, SampleSpec, Snapshot
from tminus.service.tracing import REQUEST_ID, TRACER, JobSpan, exemplar, ids_of
from tminus.service.work import JobResult, JobStatus, Outlook, Work
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.recording import Recorder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job as requested by a client."""

    id: str  # never reused, so a late message about a deleted job cannot reach a new job
    spec: SampleSpec
    work: Work  # the cost of the job, and the number of its model
    owner: str = ""  # name of the API key
    deadline_s: float | None = None  # seconds from acceptance; a job with a later forecast is refused
    inputs: Inputs | None = None  # input pixels; the spec has only their hashes
    durable: bool = False  # True if snapshots of the job are stored
    watch: Watch | None = None  # the job's first viewer
    recording: Recorder[Any] | None = None
    snapshot: Snapshot | None = None  # the state to resume from, if an earlier process began the job
    is_repeatable: bool = True  # True if the client chose the seed; the same request then gives the same images
    best: Work | None = None  # the cost of an adaptive job at its best setting
    isolated: bool = False  # True if the job may have caused a crash; it then steps in ticks of its own

    def recorded_by(self, recording: Recorder[Any] | None) -> "NewJob":
        """Return a copy with a recorder. If `recording.until` is set, the job ends after that step."""
        if recording is None:
            return self
        return replace(self, recording=recording, work=self.work.ending_at(recording.until))


@dataclass(slots=True, eq=False)
class RunningJob:
    """An accepted job. Only the worker's thread may change it once it is queued. Any thread may read its status."""

    new: NewJob  # its inputs and snapshot are dropped once the engine has them
    model: LoadedModel
    submitted_s: float
    id: str = field(init=False)
    spec: SampleSpec = field(init=False)
    work: Work = field(init=False)
    created_us: int = field(default_factory=lambda: time.time_ns() // 1000)  # Unix time, unlike submitted_s
    outlook: Outlook | None = None  # the forecast made when the job was accepted
    future: "Future[JobResult]" = field(default_factory=Future)
    watches: list[Watch] = field(init=False)
    request_id: str = field(default_factory=REQUEST_ID.get)
    rows: tuple[int, ...] = ()  # slots in the engine; empty until they are allocated
    started_s: float | None = None
    first_step_s: float = 0.0
    denoised_s: float | None = None
    # Total number of steps of all rows, including the steps before spec.start. The scheduler knows the step of each
    # row, but only the worker's thread may use the scheduler, and other threads need this number for the job's status.
    steps_taken: int = field(init=False)
    steps_kept: int = field(init=False)  # the value of steps_taken at the last snapshot
    span: JobSpan | None = None  # None if tracing is off

    def __post_init__(self) -> None:
        self.id, self.spec, self.work = self.new.id, self.new.spec, self.new.work
        self.watches = [self.new.watch] if self.new.watch is not None else []
        self.steps_taken = self.steps_kept = sum(self.first_steps)
        if (tracer := TRACER.get()) is not None:
            self.span = JobSpan(tracer, self.created_us * 1000, self._span_attributes)

    @property
    def _span_attributes(self) -> dict[str, str | bool | int | float]:
        spec, new = self.spec, self.new
        return {
            "tminus.job.id": self.id,
            "tminus.job.durable": new.durable,
            "tminus.job.resumed": new.snapshot is not None,
            "tminus.request.id": self.request_id,
            "tminus.model": self.model.info.name,
            "tminus.images": spec.n,
            "tminus.passes": spec.num_passes,
            "tminus.sampler": spec.sampler,
            "tminus.guidance": spec.guidance,
            **({"tminus.key": new.owner} if new.owner else {}),
        }

    def fail(self, error: Exception) -> None:
        """End the job with an error. Does nothing if the client got an error while the worker hung."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)
            self._end_span(error)

    def finish(self, result: JobResult) -> None:
        """End the job with its images. Does nothing if the client got an error while the worker hung."""
        with suppress(InvalidStateError):
            self.future.set_result(result)
            self._end_span(None, result.decode_s)

    def result(self, read: Callable[[], Pixels], now_s: float) -> JobResult:
        """Make the job's result, with the duration of each phase. read: a function that returns the images."""
        assert self.started_s is not None
        assert self.denoised_s is not None
        queue_s, denoise_s = self.started_s - self.submitted_s, self.denoised_s - self.started_s
        return JobResult(read, queue_s, self.first_step_s, denoise_s, now_s - self.denoised_s)

    def _end_span(self, error: Exception | None, decode_s: float = 0.0) -> None:
        if self.span is None:
            return
        decoded = self.spec.n if self.model.info.latent is not None else 0
        started_s, denoised_s = (
            None if moment_s is None else moment_s - self.submitted_s for moment_s in (self.started_s, self.denoised_s)
        )
        ended_s = None
        if error is None and denoised_s is not None:
            ended_s = denoised_s + (decode_s if decoded else 0.0)
        self.span.end(started_s, self.first_step_s, denoised_s, ended_s, decoded=decoded, error=error)

    def start(self, started_s: float, now_s: float) -> None:
        self.started_s, self.first_step_s = started_s, now_s - self.submitted_s

    @property
    def log_fields(self) -> dict[str, str]:
        fields = {"job_id": self.id, "request_id": self.request_id, "key": self.new.owner}
        return fields if self.span is None else {**fields, **ids_of(self.span.span)}

    @property
    def exemplar(self) -> dict[str, str]:
        """Labels that link a metric to this job's request."""
        return exemplar(self.request_id, None if self.span is None else self.span.span)

    @property
    def needs_picture(self) -> bool:
        """True if the engine needs the input picture. A resumed job needs it only if there is a mask."""
        inputs = self.new.inputs
        return inputs is not None and (self.new.snapshot is None or inputs.mask is not None)

    @property
    def first_steps(self) -> Sequence[int]:
        """First step of each row. Valid only while `new.snapshot` is still set."""
        return self.new.snapshot.steps if self.new.snapshot is not None else (self.spec.start,) * self.spec.n

    @property
    def step(self) -> int:
        """Average number of steps taken per row. The scheduler keeps all rows at nearly the same step."""
        return self.steps_taken // self.spec.n - self.spec.start

    def status(self, outlook: Outlook, now_s: float) -> JobStatus:
        return JobStatus(
            id=self.id,
            state="waiting" if self.started_s is None else "running",
            position=outlook.position,
            eta_s=outlook.eta_s,
            step=self.step,
            spec=self.spec,
            durable=self.new.durable,
            owner=self.new.owner,
            age_s=now_s - self.submitted_s,
            created_us=self.created_us,
            model=self.model.number,
            model_name=self.model.info.name,
        )

    def quick_status(self, forecast: Mapping[str, JobStatus], now_s: float) -> JobStatus:
        """Return the job's status, based on an earlier forecast.

        A job that arrived after that forecast uses the forecast from its acceptance.
        """
        told: JobStatus | Outlook | None = forecast.get(self.id, self.outlook)
        assert told is not None
        since_s = now_s - self.submitted_s - (told.age_s if isinstance(told, JobStatus) else 0.0)
        return self.status(Outlook(told.position, max(0.0, told.eta_s - since_s)), now_s)

    def record(self, next_steps: Sequence[tuple[int, int]]) -> Exception | None:
        """Record the rows that are due. If this fails, return the error.

        next_steps: for each row, its next step and its index in the job.
        """
        assert self.new.recording is not None
        taken = [(step - self.spec.start, index) for step, index in next_steps]
        try:
            self.new.recording.record(self.model.engine, self.rows, taken)
        except Exception as error:
            return error
        return None

    def show(self, now_s: float) -> None:
        """Send a frame to each viewer that is due for one. Viewers with the same `show` get the same frame."""
        frames: dict[tuple[Show, ...], Frame] = {}
        for watch in self.watches:
            if not watch.due(self.step, now_s):
                continue
            try:
                if watch.show not in frames:
                    frames[watch.show] = Frame(self.step, self.model.engine.preview(self.rows, watch.show))
                watch.put(frames[watch.show])
            except Exception:  # a preview that fails must not end the job
                log.exception("job %s could not be shown", self.id, extra=self.log_fields)


class AcceptedJobs:
    """All accepted jobs that have not ended. Thread-safe, but the caller of `add` must hold `gate`."""

    def __init__(self, admission: Admission, clock: Callable[[], float]) -> None:
        self.gate = threading.Lock()
        self._admission, self._clock = admission, clock
        self._jobs: dict[str, RunningJob] = {}
        self._owners: Counter[tuple[str, bool]] = Counter()  # number of jobs, keyed by (owner, durable)

    def add(self, job: RunningJob) -> None:
        self._jobs[job.id] = job
        self._owners[job.new.owner, job.new.durable] += 1

    def remove(self, job_id: str) -> None:
        """Remove a job. Does nothing if `fail_all` has already removed it."""
        with self.gate:
            if (job := self._jobs.pop(job_id, None)) is not None:
                self._owners[job.new.owner, job.new.durable] -= 1

    def fail_all(self, failure: ServiceError) -> None:
        """Remove all jobs, and fail them without calling the engine."""
        with self.gate:
            jobs, self._jobs = self._jobs, {}
            self._owners.clear()
        for job in jobs.values():
            job.fail(failure)

    def number_of(self, owner: str, *, durable: bool | None = None) -> int:
        """Count the jobs of one API key. durable: count only durable jobs (True) or only the others (False)."""
        with self.gate:
            return sum(self._owners[owner, each] for each in (True, False) if durable in (None, each))

    def __len__(self) -> int:
        with self.gate:
            return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        with self.gate:
            return job_id in self._jobs

    def statuses(self) -> list[JobStatus]:
        """Make a new forecast, and return the status of each job in order of arrival."""
        outlooks = self._admission.outlooks(self._clock())
        with self.gate:
            jobs, now_s = list(self._jobs.values()), self._clock()
        return [job.status(outlooks[job.id], now_s) for job in jobs if job.id in outlooks]

    def quick_statuses(self, forecast: Mapping[str, JobStatus]) -> list[JobStatus]:
        """Return the status of each job without a new forecast: see `RunningJob.quick_status`."""
        with self.gate:
            jobs, now_s = list(self._jobs.values()), self._clock()
        return [job.quick_status(forecast, now_s) for job in jobs]

    def quick_status(self, job_id: str, forecast: Mapping[str, JobStatus]) -> JobStatus | None:
        """Return the status of one job without a new forecast; None if the job has ended."""
        with self.gate:
            job = self._jobs.get(job_id)
        return job.quick_status(forecast, self._clock()) if job is not None else None
