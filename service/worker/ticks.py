"""Ticks: which model steps next, which batches of it are in flight, and for which jobs. No job is failed here."""

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
    """A tick in flight: its network runs, and its rows are not updated yet."""

    turn: Turn[LoadedModel]
    batch: Batch
    jobs: Sequence[RunningJob]  # of the batch, in its order
    began_s: float
    overlaps: bool  # whether it began while another one was in flight
    finish: Callable[[], None]
    inside: ExitStack  # closed when it ends

    @property
    def model(self) -> LoadedModel:
        """The model of its rows."""
        return self.turn.model


@dataclass(frozen=True, slots=True)
class TickEnd:
    """A tick that has ended: the rows of its jobs have stepped, unless it failed."""

    tick: Tick
    advance: Advance
    now_s: float = 0.0
    seconds: float = 0.0  # from its beginning, or the end of the tick before it if that is later
    is_measurement: bool = False  # whether the seconds are how long such a batch takes
    broken: frozenset[int] = frozenset()  # rows that are not finite any more
    error: Exception | None = None


class Ticks:
    """Owns the ticks in flight, all of one model. They end in the order in which they began."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._model_scheduler: ModelScheduler[LoadedModel] = ModelScheduler()
        self._in_flight: deque[Tick] = deque()
        self._ended_s = 0.0  # when the last tick ended
        self._on_device: Sequence[RunningJob] = ()  # jobs of the last tick, if a GPU may still run it, or break there
        self._running: set[int] = set()  # models whose last tick the device may still run when the next is launched
        self.rows_active = 0  # rows in the last tick

    # --- models ---

    def put(self, model: LoadedModel) -> None:
        """Give a model its turns."""
        self._model_scheduler.put(model, model.scheduler)

    def remove(self, model: LoadedModel) -> None:
        """Forget a model that has no jobs, so that nothing here keeps its memory."""
        self._model_scheduler.remove(model)
        self._on_device = [job for job in self._on_device if job.model.number != model.number]

    def device_idles(self, model: LoadedModel) -> None:
        """Note that the device has nothing of a model to do until its next tick."""
        self._running.discard(model.number)

    # --- ticks ---

    @property
    def has_next(self) -> bool:
        """Whether a model has rows to step."""
        return self._model_scheduler.has_work

    @property
    def jobs_in_flight(self) -> list[RunningJob]:
        """Jobs of all ticks in flight."""
        return [job for tick in self._in_flight for job in tick.jobs]

    @property
    def jobs_on_device(self) -> Sequence[RunningJob]:
        """Jobs of the last tick, if a GPU may still run it."""
        return self._on_device

    @property
    def oldest(self) -> Tick:
        """The tick that ends next."""
        return self._in_flight[0]

    def __len__(self) -> int:
        return len(self._in_flight)

    def next(self) -> tuple[Turn[LoadedModel], Batch] | None:
        """Return the next batch, unless it has to wait for the ticks in flight."""
        turn = self._model_scheduler.next()
        if turn is None or (self._in_flight and self._in_flight[0].model is not turn.model):
            return None
        batch = turn.model.scheduler.next_batch()
        return None if batch is None else (turn, batch)

    def begin(self, turn: Turn[LoadedModel], batch: Batch, jobs: Sequence[RunningJob], inside: ExitStack) -> bool:
        """Begin a tick; return whether one more may begin. Raises what the engine raises, and then nothing has begun.

        inside: closed when the tick ends.
        """
        began_s = self._clock()
        finish = turn.model.engine.begin(batch)
        may_overlap = turn.model.scheduler.begin(batch)
        self._in_flight.append(Tick(turn, batch, jobs, began_s, bool(self._in_flight), finish, inside.pop_all()))
        return may_overlap

    def end(self) -> TickEnd:
        """End the oldest tick. The caller closes its `inside`."""
        tick = self._in_flight.popleft()
        model, batch, engine = tick.model, tick.batch, tick.model.engine
        # If the engine runs ahead, a tick is waited for while the next is launched. The seconds of the first are those
        # of its launch.
        is_measurement = not engine.runs_ahead or model.number in self._running
        self._running.add(model.number)
        self.rows_active = len(batch.rows)
        isolated = tick.jobs[0].new.isolated
        try:
            tick.finish()
            engine.wait()
            if engine.runs_ahead and isolated:  # or the next job would be blamed too
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
        """Wait for the ticks that a GPU still runs before an isolated job begins one. Raises if the GPU is lost."""
        if self._on_device:
            try:
                self._wait_for_device(job)
            except Exception:  # an error of the ticks before
                if job.model.engine.is_lost():
                    raise
            self._on_device = ()

    def _wait_for_device(self, job: RunningJob) -> None:
        """Wait until a GPU has done all its ticks, by reading a job's rows. Raises their error.

        The device as a whole may not be waited for: another thread may be recording a CUDA graph.
        """
        self._running.clear()
        job.model.engine.latents(job.rows)

    def rest(self) -> None:
        """Note that no model has rows to step, so errors of the last tick were reported."""
        self._on_device = ()

    def abandon(self) -> None:
        """Drop the ticks in flight without a call of the engine."""
        for tick in self._in_flight:
            tick.inside.close()
        self._in_flight.clear()


WorkerThread = Literal["steps", "codes"]  # the worker's own thread, or the one that encodes and decodes latents
ReportCurrentJobs = Callable[[WorkerThread, Collection[str]], None]


def report_nothing(_thread: WorkerThread, _jobs: Collection[str]) -> None:
    """Report to nobody: no process takes over what this one worked on."""


class CurrentJobs:
    """Owns the jobs that the worker's thread works on, and reports the durable ones.

    While an isolated job is worked on, nothing else steps, is encoded or decoded, so no other job can cause a crash.
    """

    def __init__(self, ticks: Ticks, turnstile: Turnstile, report: ReportCurrentJobs) -> None:
        self._ticks, self._turnstile, self._report = ticks, turnstile, report
        self._jobs: Sequence[RunningJob] = ()  # those of the last tick, or accepted last
        self._reported = frozenset[str]()

    @property
    def ids(self) -> frozenset[str]:
        """Ids of the jobs that may cause a crash: in flight, in the last tick, or accepted since."""
        return frozenset(job.id for job in (*self._ticks.jobs_on_device, *self._jobs))

    def set(self, jobs: Sequence[RunningJob]) -> None:
        """Work on these jobs now, and on those of the ticks in flight."""
        self._jobs = [*jobs, *self._ticks.jobs_in_flight] if self._ticks else jobs
        self._report_steps(frozenset(job.id for job in self._jobs if job.new.durable))

    def working_on(self, jobs: Sequence[RunningJob], *, autoencoder_may_run: bool) -> AbstractContextManager[None]:
        """Work on jobs of one model. Waits for the autoencoder's thread if either has an isolated job.

        autoencoder_may_run: whether the autoencoder's thread may have tasks.
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
            if isolated:  # but it may still cause a crash of the worker before the next tick
                report_none()

    def _report_steps(self, jobs: frozenset[str]) -> None:
        if jobs != self._reported:
            self._reported = jobs
            self._report("steps", jobs)
