"""A job: as it is asked for, and from its acceptance to its end; and the list of those that are accepted. No torch."""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from tminus.service.preview import Frame, Show, Watch
from tminus.service.request_id import REQUEST_ID
from tminus.service.scheduling.admission import Admission
from tminus.service.spec import Inputs, SampleSpec, Snapshot
from tminus.service.tracing import TRACER, JobSpan, exemplar, ids_of
from tminus.service.work import JobResult, JobStatus, Outlook, Work
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.recording import Recorder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NewJob:
    """A job that is wanted: made where a request is understood, and carried as it is to the engine."""

    id: str  # no other job ever has it: what is late, of a job that was deleted, must not meet another
    spec: SampleSpec
    work: Work  # what it costs, and the number of its model
    owner: str = ""  # the name of the key that it came with
    deadline_s: float | None = None  # from its acceptance; it is refused if this cannot be met
    inputs: Inputs | None = None  # the pixels whose hashes are in the spec
    durable: bool = False  # snapshots are kept of it
    watch: Watch | None = None  # its first viewer
    recording: Recorder[Any] | None = None  # is given the rows that it wants
    snapshot: Snapshot | None = None  # where it goes on from, if an earlier process began it
    is_repeatable: bool = True  # the same request makes the same images: its seed was given, not drawn
    alone: bool = False  # it steps in ticks of its own, as it may be what ends the server

    def recorded_by(self, recording: Recorder[Any] | None) -> "NewJob":
        """Return the job with what is recorded of it, which may end it before its images."""
        if recording is None:
            return self
        return replace(self, recording=recording, work=self.work.ending_at(recording.until))


@dataclass(slots=True, eq=False)
class RunningJob:
    """One job. Only the worker's thread changes it once it is queued; any thread may ask for its status."""

    new: NewJob  # as it was asked for; without its pixels once the engine has them
    model: LoadedModel
    submitted_s: float
    id: str = field(init=False)
    spec: SampleSpec = field(init=False)
    work: Work = field(init=False)
    created_us: int = field(default_factory=lambda: time.time_ns() // 1000)  # submitted_s is of another clock
    outlook: Outlook | None = None  # what was forecast when it was accepted
    future: "Future[JobResult]" = field(default_factory=Future)
    watches: list[Watch] = field(init=False)
    request_id: str = field(default_factory=REQUEST_ID.get)  # for the log
    rows: tuple[int, ...] = ()  # none until the engine has given them
    started_s: float | None = None
    first_step_s: float = 0.0
    denoised_s: float | None = None
    # Steps of all its rows, those before spec.start included. The scheduler has the steps of each row, but only for the
    # worker's thread, and a status is asked for in other threads.
    steps_taken: int = field(init=False)
    steps_kept: int = field(init=False)  # what steps_taken was at the last snapshot
    span: JobSpan | None = None  # while traces are on

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
        """End it with an error, unless its client was answered while the worker hung."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)
            self._end_span(error)

    def finish(self, result: JobResult) -> None:
        """End it with its images, unless its client was answered while the worker hung."""
        with suppress(InvalidStateError):
            self.future.set_result(result)
            self._end_span(None, result.decode_s)

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
        """Note when its first step began, and that it is over."""
        self.started_s, self.first_step_s = started_s, now_s - self.submitted_s

    @property
    def log_fields(self) -> dict[str, str]:
        """What a log of JSON has of it."""
        fields = {"job_id": self.id, "request_id": self.request_id, "key": self.new.owner}
        return fields if self.span is None else {**fields, **ids_of(self.span.span)}

    @property
    def exemplar(self) -> dict[str, str]:
        """The labels by which metrics name its request."""
        return exemplar(self.request_id, None if self.span is None else self.span.span)

    @property
    def needs_picture(self) -> bool:
        """Whether the engine will look at its inputs: a job that goes on from a snapshot only has those of a mask."""
        inputs = self.new.inputs
        return inputs is not None and (self.new.snapshot is None or inputs.mask is not None)

    @property
    def first_steps(self) -> Sequence[int]:
        """The first step of each row. Valid only until the engine has taken the snapshot."""
        return self.new.snapshot.steps if self.new.snapshot is not None else (self.spec.start,) * self.spec.n

    @property
    def step(self) -> int:
        """How many steps its rows have taken, on average; the scheduler keeps them nearly level."""
        return self.steps_taken // self.spec.n - self.spec.start

    def status(self, outlook: Outlook, now_s: float) -> JobStatus:
        """What clients are told of it."""
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
        """Tell its status by an earlier forecast; a job that came since has what it was told on acceptance."""
        told: JobStatus | Outlook | None = forecast.get(self.id, self.outlook)
        assert told is not None
        since_s = now_s - self.submitted_s - (told.age_s if isinstance(told, JobStatus) else 0.0)
        return self.status(Outlook(told.position, max(0.0, told.eta_s - since_s)), now_s)

    def show(self, now_s: float) -> None:
        """Give its viewers a frame where one is due. Viewers of the same images share it."""
        frames: dict[tuple[Show, ...], Frame] = {}
        for watch in self.watches:
            if not watch.due(self.step, now_s):
                continue
            try:
                if watch.show not in frames:
                    frames[watch.show] = Frame(self.step, self.model.engine.preview(self.rows, watch.show))
                watch.put(frames[watch.show])
            except Exception:  # a frame is not worth the job
                log.exception("job %s could not be shown", self.id, extra=self.log_fields)


class AcceptedJobs:
    """Owns the list of accepted jobs: those in the worker's queue, and those that the loop has.

    Any thread may call. `gate` is held by whoever adds a job, so that others can add or refuse under it.
    """

    def __init__(self, admission: Admission, clock: Callable[[], float]) -> None:
        self.gate = threading.Lock()
        self._admission, self._clock = admission, clock
        self._jobs: dict[str, RunningJob] = {}
        self._owners: Counter[tuple[str, bool]] = Counter()  # of those: the name of their key, and if they are durable

    def add(self, job: RunningJob) -> None:
        """Note a job. Call it with the gate held."""
        self._jobs[job.id] = job
        self._owners[job.new.owner, job.new.durable] += 1

    def remove(self, job_id: str) -> None:
        """Forget a job. It is not here if its client was answered while the worker hung."""
        with self.gate:
            if (job := self._jobs.pop(job_id, None)) is not None:
                self._owners[job.new.owner, job.new.durable] -= 1

    def remove_all(self) -> list[RunningJob]:
        """Forget all jobs, and return them."""
        with self.gate:
            jobs, self._jobs = self._jobs, {}
            self._owners.clear()
        return list(jobs.values())

    def number_of(self, owner: str, *, durable: bool | None = None) -> int:
        """How many of them came with a key of this name. durable: only those that are, or that are not."""
        with self.gate:
            return sum(self._owners[owner, each] for each in (True, False) if durable in (None, each))

    def __len__(self) -> int:
        with self.gate:
            return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        with self.gate:
            return job_id in self._jobs

    def statuses(self) -> list[JobStatus]:
        """Every job that is waiting or running, in order of arrival, with its position and when it should be done."""
        outlooks = self._admission.outlooks(self._clock())
        with self.gate:
            jobs, now_s = list(self._jobs.values()), self._clock()
        return [job.status(outlooks[job.id], now_s) for job in jobs if job.id in outlooks]

    def quick_statuses(self, forecast: Mapping[str, JobStatus]) -> list[JobStatus]:
        """Like `statuses`, with position and ETA from an earlier forecast, or from acceptance for newer jobs."""
        with self.gate:
            jobs, now_s = list(self._jobs.values()), self._clock()
        return [job.quick_status(forecast, now_s) for job in jobs]

    def quick_status(self, job_id: str, forecast: Mapping[str, JobStatus]) -> JobStatus | None:
        """One of them; None if it is not here (any more)."""
        with self.gate:
            job = self._jobs.get(job_id)
        return job.quick_status(forecast, self._clock()) if job is not None else None
