"""Begins and ends ticks, and chooses the model of each tick. The loop handles failed ticks."""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

from tminus.service.scheduling.scheduler import Advance, ModelScheduler, Turn
from tminus.service.work import Batch
from tminus.service.worker.coding import Turnstile
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.running_job import RunningJob


@dataclass(frozen=True, slots=True, eq=False)
class Tick:
    """A tick in flight. Its network pass has begun, but its rows are not updated yet."""

    turn: Turn[LoadedModel]
    batch: Batch
    jobs: Sequence[RunningJob]  # in the same order as batch.jobs
    began_s: float
    overlaps: bool  # True if another tick was in flight when this tick began
    finish: Callable[[], None]
    inside: ExitStack  # closed when the tick ends

    @property
    def model(self) -> LoadedModel:
        return self.turn.model


@dataclass(frozen=True, slots=True)
class TickEnd:
    """A tick that has ended. Its rows have stepped, unless `error` is set."""

    tick: Tick
    advance: Advance
    now_s: float = 0.0
    seconds: float = 0.0  # from the start of this tick or the end of the last, whichever is later
    is_measurement: bool = False  # True if `seconds` is how long such a batch takes
    broken: frozenset[int] = frozenset()  # rows that have NaN or infinite values
    error: Exception | None = None


class Ticks:
    """The ticks in flight, all of the same model. They end in the order in which they began."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._model_scheduler: ModelScheduler[LoadedModel] = ModelScheduler()
        self._in_flight: deque[Tick] = deque()
        self._ended_s = 0.0
        self._on_device: Sequence[RunningJob] = ()  # jobs of the last tick, while a GPU may still be running it
        self._running: set[int] = set()  # models whose last tick may still run on the GPU when the next begins
        self.rows_active = 0

    # --- models ---

    def put(self, model: LoadedModel) -> None:
        self._model_scheduler.put(model, model.scheduler)

    def remove(self, model: LoadedModel) -> None:
        """Remove a model that has no jobs. Drops every reference to the model, so its memory can be freed."""
        self._model_scheduler.remove(model)
        self._on_device = [job for job in self._on_device if job.model.number != model.number]

    def device_idles(self, model: LoadedModel) -> None:
        """Record that the device has no work for a model before the model's next tick."""
        self._running.discard(model.number)

    # --- ticks ---

    @property
    def has_next(self) -> bool:
        """True if any model has unfinished rows."""
        return self._model_scheduler.has_work

    @property
    def jobs_in_flight(self) -> list[RunningJob]:
        return [job for tick in self._in_flight for job in tick.jobs]

    @property
    def jobs_on_device(self) -> Sequence[RunningJob]:
        """Jobs of the last tick, while a GPU may still be running it; otherwise empty."""
        return self._on_device

    @property
    def oldest(self) -> Tick:
        return self._in_flight[0]

    def __len__(self) -> int:
        return len(self._in_flight)

    def next(self) -> tuple[Turn[LoadedModel], Batch] | None:
        """Choose the next batch. Returns None if no tick can begin until a tick in flight has ended."""
        turn = self._model_scheduler.next()
        if turn is None or (self._in_flight and self._in_flight[0].model is not turn.model):
            return None
        batch = turn.model.scheduler.next_batch()
        return None if batch is None else (turn, batch)

    def begin(self, turn: Turn[LoadedModel], batch: Batch, jobs: Sequence[RunningJob], inside: ExitStack) -> bool:
        """Begin a tick. Returns True if another tick may begin. If the engine raises, the tick has not begun.

        inside: a context that must stay open until the tick ends.
        """
        began_s = self._clock()
        finish = turn.model.engine.begin(batch)
        may_overlap = turn.model.scheduler.begin(batch)
        self._in_flight.append(Tick(turn, batch, jobs, began_s, bool(self._in_flight), finish, inside.pop_all()))
        return may_overlap

    def end(self) -> TickEnd:
        """End the oldest tick. The caller must then close `Tick.inside`."""
        tick = self._in_flight.popleft()
        model, batch, engine = tick.model, tick.batch, tick.model.engine
        # If the engine runs ahead, `wait` returns while the GPU may still be running this tick. If the device was idle
        # before this tick, `seconds` is then only the time to launch it.
        is_measurement = not engine.runs_ahead or model.number in self._running
        self._running.add(model.number)
        self.rows_active = len(batch.rows)
        isolated = tick.jobs[0].new.isolated
        try:
            tick.finish()
            engine.wait()
            if engine.runs_ahead and isolated:  # otherwise the next job would be blamed for an error of this tick
                self._wait_for_device(tick.jobs[0])
            broken = engine.broken(batch.rows)
        except Exception as error:
            self._ended_s = self._clock()
            return TickEnd(tick, model.scheduler.advance(batch), error=error)
        self._on_device = tick.jobs if engine.runs_ahead and not isolated else ()
        now_s = self._clock()
        seconds = now_s - max(tick.began_s, self._ended_s)
        self._ended_s = now_s
        self._model_scheduler.stepped(tick.turn, seconds)
        return TickEnd(tick, model.scheduler.advance(batch), now_s, seconds, is_measurement, frozenset(broken))

    def settle(self, job: RunningJob) -> None:
        """Wait until the GPU has run all ticks before the tick of an isolated job. Raises if the GPU is lost."""
        if self._on_device:
            try:
                self._wait_for_device(job)
            except Exception:  # an earlier tick has failed
                if job.model.engine.is_lost():
                    raise
            self._on_device = ()

    def _wait_for_device(self, job: RunningJob) -> None:
        """Wait until the GPU has run all ticks, by reading the rows of a job. Raises the error of a failed tick.

        Synchronizing the whole device is not an option, because another thread may be capturing a CUDA graph.
        """
        self._running.clear()
        job.model.engine.latents(job.rows)

    def rest(self) -> None:
        """Record that no model has unfinished rows. Errors of the last tick have already been reported."""
        self._on_device = ()

    def abandon(self) -> None:
        """Drop the ticks in flight without calling the engine."""
        for tick in self._in_flight:
            tick.inside.close()
        self._in_flight.clear()


WorkerThread = Literal["steps", "codes"]  # "steps": the worker's thread; "codes": the autoencoder's thread
ReportCurrentJobs = Callable[[WorkerThread, Collection[str]], None]


def report_nothing(_thread: WorkerThread, _jobs: Collection[str]) -> None:
    """Do nothing. Only a crash file needs the current jobs."""


class CurrentJobs:
    """The jobs that the worker's thread is working on. Reports the durable ones among them.

    While the thread works on an isolated job, no other job runs, so no other job can cause a crash.
    """

    def __init__(self, ticks: Ticks, turnstile: Turnstile, report: ReportCurrentJobs) -> None:
        self._ticks, self._turnstile, self._report = ticks, turnstile, report
        self._jobs: Sequence[RunningJob] = ()  # jobs of the last tick, or the last job accepted
        self._reported = frozenset[str]()

    @property
    def ids(self) -> frozenset[str]:
        """Ids of the jobs that could cause a crash now: in flight, in the last tick, or accepted since."""
        return frozenset(job.id for job in (*self._ticks.jobs_on_device, *self._jobs))

    def set(self, jobs: Sequence[RunningJob]) -> None:
        """Replace the current jobs. Jobs of ticks in flight are always added."""
        self._jobs = [*jobs, *self._ticks.jobs_in_flight] if self._ticks else jobs
        self._report_steps(frozenset(job.id for job in self._jobs if job.new.durable))

    def working_on(self, jobs: Sequence[RunningJob], *, autoencoder_may_run: bool) -> AbstractContextManager[None]:
        """Return a context for work on some jobs of one model.

        If one of these jobs or the autoencoder's current job is isolated, entering the context waits until the
        autoencoder's thread is idle. autoencoder_may_run: True if that thread may have tasks.
        """
        if autoencoder_may_run or jobs[0].new.isolated:
            return self._with_turnstile(jobs)
        self.set(jobs)
        return nullcontext()

    @contextmanager
    def _with_turnstile(self, jobs: Sequence[RunningJob]) -> Iterator[None]:
        isolated = jobs[0].new.isolated

        def report_none() -> None:
            self._report_steps(frozenset())

        with self._turnstile.enter(isolated=isolated, again=bool(self._ticks), before_wait=report_none):
            self.set(jobs)
            yield
            if isolated:  # `ids` still has the job, because it may yet crash the worker before the next tick
                report_none()

    def _report_steps(self, jobs: frozenset[str]) -> None:
        if jobs != self._reported:
            self._reported = jobs
            self._report("steps", jobs)
