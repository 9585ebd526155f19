"""What the worker does with accepted jobs: ticks, snapshots, deadlines, deliveries. No queue, no lock.

A plain object: the worker calls it in its thread, a test in its own. Decide, then act: the scheduler chooses a batch,
and the engine steps it. What came of it is a list of events, which the worker acts on.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import (
    DeadlinePassed,
    Draining,
    EngineFailed,
    InvalidField,
    ModelUnloaded,
    NotFinite,
    ServiceError,
)
from tminus.service.preview import Watch
from tminus.service.scheduling.scheduler import Turns
from tminus.service.spec import Pixels
from tminus.service.work import Batch, JobResult
from tminus.service.worker.coding import Coded, Coding
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.running_job import RunningJob

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Part = Literal[
    "steps", "codes"
]  # a part of the server: the worker's thread, or the one that encodes and decodes latents
Note = Callable[[Part, Collection[str]], None]


def note_nothing(_part: Part, _jobs: Collection[str]) -> None:
    """Note nothing: after the end of the process nobody wants to know what it worked on."""


SUSPENDED = "suspended"  # why durable jobs are given up on SIGTERM; the next start goes on with them
LOST = "lost"  # why one is that another server works on by now, or has ended: tminus_durable_jobs_ended_total counts it


@dataclass(frozen=True, slots=True, eq=False)
class Tick:
    """A tick in flight: its network runs, and its rows are not updated yet."""

    model: LoadedModel
    batch: Batch
    jobs: Sequence[RunningJob]  # of the batch, in its order
    began_s: float
    overlaps: bool  # whether it began while another one was in flight
    finish: Callable[[], None]
    inside: ExitStack  # closed when it ends


class Ticked(NamedTuple):
    """A batch has stepped."""

    tick: Tick
    started: Sequence[RunningJob]  # the jobs that took their first step in it
    seconds: float  # from its beginning, or the end of the tick before it if that is later, to its end
    tells: bool  # whether the seconds are how long such a batch takes


class ImageDecoded(NamedTuple):
    """An image of a latent model's job is there, and others of it are not yet."""

    job: RunningJob


class Ended(NamedTuple):
    """A job has left, with its images or an error. With neither, nobody waits for it any more."""

    job: RunningJob
    result: JobResult | None = None
    error: ServiceError | None = None
    reason: str | None = None  # why it was given up; None for a job that has never begun


Event = Ticked | ImageDecoded | Ended


class Loop:
    """Runs the jobs that were accepted. Only one thread may call it."""

    def __init__(self, *, clock: Callable[[], float], tell: Callable[[Coded], None], note: Note) -> None:
        """Take what belongs to the worker's thread.

        tell: is called in the coding thread after each of its tasks; those of jobs are to be handed to `coded`. note:
        is told which durable jobs a thread works on from now on, by that thread.
        """
        self._models: dict[int, LoadedModel] = {}
        self._turns: Turns[LoadedModel] = Turns()
        self._ever_latent = False  # whether a latent model was among them: something may be encoded or decoded
        self._clock, self._note = clock, note
        self.events: deque[Event] = deque()  # what has happened, until somebody acts on it
        # The jobs whose rows an engine holds, in order of arrival, and of these the durable ones. This loop is their
        # owner.
        self._jobs: dict[str, RunningJob] = {}
        self._durable: dict[str, RunningJob] = {}
        # Of a latent model, those whose picture is being encoded or whose images are being decoded.
        self._being_coded: dict[str, RunningJob] = {}
        self.coding = Coding(tell, partial(note, "codes"))
        self.coding_hangs = False  # when it was closed
        self._deadlines: dict[str, float] = {}  # when that of each job passes which has one
        self._current: Sequence[RunningJob] = ()  # those of the last tick, or accepted last: possible causes of a crash
        self._ahead_of: Sequence[RunningJob] = ()  # of the tick before, which may still run on a GPU, or break there
        self._noted = frozenset[str]()  # what `note` was told last
        self._in_flight: deque[Tick] = deque()  # all of one model; they end in the order in which they began
        self._ended_s = 0.0  # when the last tick ended
        self.rows_active = 0  # rows in the last tick
        self._spare_work: dict[int, Iterator[None]] = {}  # of each model that has any
        self._idle: set[int] = set()  # models whose next tick is launched on a device that has nothing of them to do

    @property
    def has_work(self) -> bool:
        """Whether a job has not ended."""
        return self.has_ticks or bool(self._being_coded)

    @property
    def has_ticks(self) -> bool:
        """Whether there is a next tick."""
        return self._turns.has_work

    @property
    def current_jobs(self) -> frozenset[str]:
        """The jobs of the ticks in flight, of the last tick or accepted since: the possible causes of a crash."""
        return frozenset(job.id for job in (*self._ahead_of, *self._current))

    # --- between ticks ---

    def load(self, model: LoadedModel) -> None:
        """Take on a model, which is warmed up."""
        began_s = self._clock()
        model.warm_up()
        log.info("%s is ready: a tick of one row takes %.1f ms", model.info.name, 1e3 * (self._clock() - began_s))
        self._models[model.number] = model
        self._ever_latent |= model.info.latent is not None
        self._turns.put(model, model.scheduler)
        if model.spare_work is not None:
            self._spare_work[model.number] = model.spare_work

    @property
    def has_spare_work(self) -> bool:
        """Whether there is something to do that no job waits for, and no job to do it before."""
        return bool(self._spare_work) and not self.has_work

    def do_spare_work(self) -> None:
        """Do one portion of what a model has to do while no job runs."""
        number, work = next(iter(self._spare_work.items()))
        self._now_at([])
        try:
            next(work)
        except StopIteration:
            del self._spare_work[number]
        except Exception:
            log.exception("%s: what was begun while no job ran has failed", self._models[number].info.name)
            del self._spare_work[number]

    def accept(self, job: RunningJob) -> None:
        """Take a job on: its rows step from the next tick on, or once its picture is encoded."""
        with self._at([job]):
            answered = job.future.done() and not job.future.cancelled()  # while the worker hung
            if answered or not job.future.set_running_or_notify_cancel():  # from here on only the worker ends it
                self.events.append(Ended(job))
                return
            if job.new.deadline_s is not None:
                self._deadlines[job.id] = job.submitted_s + job.new.deadline_s
            if job.model.info.latent and job.new.inputs is not None and job.needs_picture:
                self._code(job, "encode", [job.model.engine.encoder(job.new.inputs)])
            else:
                self._begin(job)

    def _at(self, jobs: Sequence[RunningJob]) -> AbstractContextManager[None]:
        """Work on jobs. While one is to be alone, nothing else is in flight or coded, and nobody else is named."""
        if jobs[0].new.alone:
            self._end_ticks()
        if self._ever_latent or jobs[0].new.alone:
            return self._in_turn(jobs)
        self._now_at(jobs)
        return nullcontext()

    @contextmanager
    def _in_turn(self, jobs: Sequence[RunningJob]) -> Iterator[None]:
        alone = jobs[0].new.alone
        again, before_wait = bool(self._in_flight), lambda: self._note_steps(frozenset())
        with self.coding.turnstile.enter(alone=alone, again=again, before_wait=before_wait):
            self._now_at(jobs)
            yield
            if alone:  # but if the worker crashes before its next tick, that may be its doing
                self._note_steps(frozenset())

    def _now_at(self, jobs: Sequence[RunningJob]) -> None:
        self._current = [*jobs, *(job for tick in self._in_flight for job in tick.jobs)] if self._in_flight else jobs
        self._note_steps(frozenset([job.id for job in self._current if job.new.durable]))

    def _note_steps(self, jobs: frozenset[str]) -> None:
        if jobs != self._noted:
            self._noted = jobs
            self._note("steps", jobs)

    def _begin(self, job: RunningJob) -> None:
        """Give a job to its model's engine and scheduler."""
        engine = job.model.engine
        try:
            job.rows = engine.add(job.spec, job.new.snapshot, job.new.inputs)
        except ValueError as error:
            self._leave(Ended(job, error=InvalidField(str(error), field="sampler", value=job.spec.sampler)))
            return
        except Exception as error:
            self._note_error(error, engine, "job %s could not be added", job.id)
            failure = EngineFailed(f"this job could not be started: {type(error).__name__}")
            self._leave(Ended(job, error=failure, reason=failure.code))
            return
        if not job.model.scheduler.has_work:
            self._idle.add(job.model.number)
        self._jobs[job.id] = job
        if job.new.durable:
            self._durable[job.id] = job
        if job.new.alone:
            job.model = replace(job.model, scheduler=job.model.scheduler.beside())
            self._turns.put(job.model, job.model.scheduler)
        steps = job.new.snapshot.steps if job.new.snapshot is not None else None
        job.model.scheduler.add(job.id, job.rows, job.work, steps, job.new.owner)
        if job.new.recording is not None:
            self._act_on_record(job, self._record(job, [(step, index) for index, step in enumerate(job.first_steps)]))
        job.new = replace(job.new, snapshot=None, inputs=None)
        log.info("job %s of request %s accepted: %s", job.id, job.request_id, job.spec, extra=job.log_fields)

    def _code(self, job: RunningJob, kind: str, tasks: Sequence[Callable[[], object]]) -> None:
        self._being_coded[job.id] = job
        if job.span is not None:
            job.span.span.add_event(f"{kind} begins")
        self.coding.put(job, kind, tasks)

    def coded(self, coded: Coded) -> None:
        """Go on with a job of which the coding thread has done a task, unless it has left meanwhile."""
        job = coded.job
        if job is None or self._being_coded.get(job.id) is not job:
            return
        if coded.results is None:
            self.events.append(ImageDecoded(job))
            return
        if isinstance(coded.error, ServiceError):
            self._give_up(job, coded.error, coded.error.code)
            return
        if coded.error is not None:
            self._now_at([job])
            detail, told = "its images could not be encoded or decoded", "an image of job %s could not be coded"
            self._failed(coded.error, [job], detail, told, job.id)
            return
        del self._being_coded[job.id]
        if coded.kind == "encode":
            with self._at([job]):
                job.new = replace(job.new, inputs=coded.results[0])
                self._begin(job)
        else:
            images: Pixels = np.concatenate(coded.results)
            self._finish(job, lambda: images)

    def run(self, act: Callable[[], Result], future: "Future[Result]") -> None:
        """Do something short with an engine; the future, which is running, gets the result."""
        self._now_at([])
        try:
            future.set_result(act())
        except Exception as error:
            log.exception("what was asked of the engine failed")
            future.set_exception(EngineFailed(f"the engine could not do it: {type(error).__name__}"))

    def watch(self, job_id: str, watch: Watch) -> None:
        """Show a job to one more viewer. Nothing happens if it is not here (any more)."""
        if (job := self._find(job_id)) is not None:
            job.watches.append(watch)

    def unwatch(self, job_id: str, watch: Watch) -> None:
        """Stop showing a job to a viewer."""
        if (job := self._find(job_id)) is not None and watch in job.watches:
            job.watches.remove(watch)

    def give_up(self, job_id: str, error: ServiceError, reason: str) -> None:
        """End a job with an error and free its rows. Nothing happens if it is not here (any more)."""
        if (job := self._find(job_id)) is not None:
            self._give_up(job, error, reason)

    def _give_up(self, job: RunningJob, error: ServiceError, reason: str) -> None:
        """End a job with an error, unless it has left, and free its rows."""
        self._end_ticks(job)  # or they would overwrite slots that another job has by then
        if self._find(job.id) is not job:
            return
        if job.id in self._jobs:
            job.model.scheduler.cancel(job.id)
            job.model.engine.remove(job.rows)
        else:
            self.coding.drop(job.id)
        self._leave(Ended(job, error=error, reason=reason))

    def unload(self, number: int) -> None:
        """Forget a model, and give up the jobs that it still has."""
        for job in [*self._jobs.values(), *self._being_coded.values()]:
            if job.model.number == number:
                self._give_up(job, ModelUnloaded(job.model.info.name), ModelUnloaded.code)
        self._turns.remove(self._models.pop(number))
        self._spare_work.pop(number, None)
        self._ahead_of = [job for job in self._ahead_of if job.model.number != number]  # or they would hold its memory

    # --- the end ---

    def suspend_durable(self) -> None:
        """Give up the durable jobs with a last snapshot; the next start of the server finishes them."""
        if self._durable:
            self._end_ticks()
        for model in self._models.values():
            self._take_snapshots(model)
        for job in [*self._durable.values(), *(job for job in self._being_coded.values() if job.new.durable)]:
            self._give_up(job, Draining(), SUSPENDED)

    def give_up_all(self, error: ServiceError) -> None:
        """End every job that is left."""
        for job in [*self._jobs.values(), *self._being_coded.values()]:
            self._give_up(job, error, error.code)

    def abandon(self) -> None:
        """Drop every job without a call of the engine, which is not to be trusted after a crash."""
        for tick in self._in_flight:
            tick.inside.close()
        for jobs in (self._in_flight, self._jobs, self._durable, self._being_coded):
            jobs.clear()
        self._deadlines.clear()

    def close(self) -> None:
        """End the coding thread, when all jobs have their answers: it waits for the image that is being made."""
        self.coding_hangs = not self.coding.close()

    # --- a tick ---

    def end_overdue(self) -> None:
        """Give up the jobs whose deadline has passed."""
        if not self._deadlines:
            return
        now_s = self._clock()
        for job_id in [job_id for job_id, when_s in self._deadlines.items() if when_s <= now_s]:
            job = self._find(job_id)
            # A job may have ended with the ticks of one that was given up before it.
            if job is not None and job.new.deadline_s is not None:
                self._give_up(job, DeadlinePassed.of(job.new.deadline_s), "deadline")

    def tick(self) -> bool:
        """Begin as many ticks as may be in flight, then end the oldest; False if there is none.

        The work after a tick is done while the network runs for the next one.
        """
        while self._begin_next():
            pass
        if not self._in_flight:
            self._now_at([])
            self._ahead_of = ()
            return False
        self._end(self._in_flight.popleft())
        return True

    def _begin_next(self) -> bool:
        """Begin the next tick, if there is one that need not wait for those in flight; return whether to try again."""
        model = self._turns.next()
        if model is None or (self._in_flight and self._in_flight[0].model is not model):
            return False
        batch = model.scheduler.next_batch()
        if batch is None:
            return False
        jobs = [self._jobs[picked.job_id] for picked in batch.jobs]
        if self._in_flight and not self.coding.turnstile.is_open:
            return False
        if jobs[0].new.alone and self._ahead_of:
            try:
                self._wait_for_device(model.engine, jobs[0])
            except Exception:  # it is of the ticks before
                if model.engine.is_lost():
                    raise
            self._ahead_of = ()
        with ExitStack() as inside:
            inside.enter_context(self._at(jobs))
            began_s = self._clock()
            try:
                finish = model.engine.begin(batch)
            except Exception as error:
                self._failed(error, jobs, "a step of this job failed", "tick of %d rows failed", len(batch.rows))
                return True
            may_overlap = model.scheduler.begin(batch)
            tick = Tick(model, batch, jobs, began_s, bool(self._in_flight), finish, inside.pop_all())
            self._in_flight.append(tick)
        return may_overlap

    def _end_ticks(self, job: RunningJob | None = None) -> None:
        """End the ticks in flight, the oldest first. job: stop when none has rows of this job."""
        while any(job is None or job in tick.jobs for tick in self._in_flight):
            self._end(self._in_flight.popleft())

    def _wait_for_device(self, engine: RowEngine, job: RunningJob) -> None:
        """Wait until a GPU has done all ticks that it was given, by reading a job's rows. Raises what they have broken.

        The device as a whole may not be waited for: another thread may be recording a CUDA graph.
        """
        self._idle.update(self._models)  # the next tick is launched on a device that does nothing
        engine.latents(job.rows)

    def _end(self, tick: Tick) -> None:
        with tick.inside:
            model, batch, jobs, engine = tick.model, tick.batch, tick.jobs, tick.model.engine
            # Where the engine runs ahead, a tick is waited for while the next is launched: the first tells no more than
            # how long it took to launch.
            tells = not (engine.runs_ahead and model.number in self._idle)
            self._idle.discard(model.number)
            self.rows_active = len(batch.rows)
            alone_ahead = engine.runs_ahead and jobs[0].new.alone
            try:
                tick.finish()
                engine.wait()
                if alone_ahead:  # or the next job would be named with it
                    self._wait_for_device(engine, jobs[0])
                broken = engine.broken(batch.rows)
            except Exception as error:
                self._ended_s = self._clock()
                self._failed(error, jobs, "a step of this job failed", "tick of %d rows failed", len(batch.rows))
                model.scheduler.advance(batch)  # of jobs that are gone
                return
            self._ahead_of = jobs if engine.runs_ahead and not alone_ahead else ()
            now_s = self._clock()
            seconds = now_s - max(tick.began_s, self._ended_s)
            self._ended_s = now_s
            self._turns.stepped(model, seconds)
            for job, picked in zip(jobs, batch.jobs, strict=True):
                job.steps_taken += len(picked.steps)
                if job.span is not None:
                    job.span.add_tick(seconds, batch.places)
            advance = model.scheduler.advance(batch)
            started = [self._jobs[job_id] for job_id in advance.started] if advance.started else []
            for job in started:
                job.start(tick.began_s, now_s)
            self.events.append(Ticked(tick, started, seconds, tells))
            # All rows are recorded first: to give a job up may end another tick, with which jobs of this one are done.
            recorded = [
                (job, self._record(job, [(step + 1, index) for step, index in picked.steps]))
                for job, picked in zip(jobs, batch.jobs, strict=True)
                if job.new.recording is not None
            ]
            for job in jobs if broken else ():
                if not set(job.rows).isdisjoint(broken):
                    self.give_up(job.id, NotFinite(), NotFinite.code)
            for job, failure in recorded:
                self._act_on_record(job, failure)
            for job_id in advance.finished:
                if job_id in self._jobs:
                    self._deliver(self._jobs[job_id])
            for job in jobs:
                if job.watches and job.id in self._jobs:
                    job.show(now_s)
            if self._durable and model.keeper is not None and model.keeper.due(now_s):
                self._take_snapshots(model)

    def _record(self, job: RunningJob, next_steps: Sequence[tuple[int, int]]) -> Exception | None:
        """Give a recording its job's rows, by the steps that they take next and their indices; return what failed."""
        assert job.new.recording is not None
        taken = [(step - job.spec.start, index) for step, index in next_steps]
        try:
            job.new.recording.record(job.model.engine, job.rows, taken)
        except Exception as error:
            return error
        return None

    def _act_on_record(self, job: RunningJob, error: Exception | None) -> None:
        if error is not None:
            self._failed(error, [job], "its steps could not be read", "job %s could not be recorded", job.id)

    def _take_snapshots(self, model: LoadedModel) -> None:
        """Hand a model's keeper snapshots of durable jobs that have stepped since their last one, and are not done."""
        jobs = [job for job in self._durable.values() if job.model.number == model.number]
        moved = [job for job in jobs if job.steps_kept < job.steps_taken < job.spec.n * job.work.steps]
        if model.keeper is None or not moved:
            return
        began_s = self._clock()
        try:
            snapshots = {job.id: model.engine.snapshot(job.rows, job.model.scheduler.steps(job.id)) for job in moved}
        except Exception:  # a snapshot is not worth the jobs
            log.exception("no snapshot could be taken")
            return
        for job in moved:
            job.steps_kept = job.steps_taken
        model.keeper.keep(snapshots, began_s, self._clock() - began_s)

    def _deliver(self, job: RunningJob) -> None:
        """Free a job's rows, and end it with its images; those of a latent model are decoded first."""
        engine, latent = job.model.engine, job.model.info.latent is not None
        reads: list[Callable[[], Pixels]] = [lambda: np.empty(0, np.uint8)]
        wanted = job.work.steps == job.spec.end  # or else only what was recorded on the way
        if wanted:
            try:
                # Of a latent model one by one, so that a shorter job may come between them.
                reads = [
                    engine.images(rows, job.spec.depth)
                    for rows in ([(row,) for row in job.rows] if latent else [job.rows])
                ]
            except Exception as error:
                self._failed(error, [job], "its images could not be read", "job %s could not be read", job.id)
                return
        engine.remove(job.rows)
        job.denoised_s = self._clock()
        if latent and wanted:
            self._forget(job)
            self._code(job, "decode", reads)
        else:
            self._finish(job, reads[0])

    def _finish(self, job: RunningJob, read: Callable[[], Pixels]) -> None:
        assert job.started_s is not None
        assert job.denoised_s is not None
        queue_s, denoise_s = job.started_s - job.submitted_s, job.denoised_s - job.started_s
        decode_s = self._clock() - job.denoised_s
        self._leave(Ended(job, JobResult(read, queue_s, job.first_step_s, denoise_s, decode_s)))

    # --- for all of these ---

    def _find(self, job_id: str) -> RunningJob | None:
        return self._jobs.get(job_id) or self._being_coded.get(job_id)

    def _leave(self, ended: Ended) -> None:
        """Forget a job that has no rows."""
        job = ended.job
        self._deadlines.pop(job.id, None)
        self._forget(job)
        if job.new.alone and job.model is not self._models[job.model.number]:
            self._turns.remove(job.model)
        self.events.append(ended)

    def _forget(self, job: RunningJob) -> None:
        for jobs in (self._jobs, self._durable, self._being_coded):
            jobs.pop(job.id, None)

    def _failed(self, error: Exception, jobs: Sequence[RunningJob], detail: str, log_line: str, *args: object) -> None:
        """Give up jobs of one model after an error; clients see its type, not its text."""
        self._note_error(error, jobs[0].model.engine, log_line, *args)
        for job in jobs:
            self._give_up(job, EngineFailed(f"{detail}: {type(error).__name__}"), EngineFailed.code)

    def _note_error(self, error: Exception, engine: RowEngine, log_line: str, *args: object) -> None:
        """Log an error, which fails the jobs involved and not the server.

        But where the engine's device is lost it is raised, so that it ends the worker: every further job would fail
        too, and this is no fault of theirs.
        """
        log.error(log_line, *args, exc_info=error)
        if engine.is_lost():
            raise error
