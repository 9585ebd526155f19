"""The worker's loop over accepted jobs: ticks, snapshots, deadlines, deliveries. No queue, no lock.

The scheduler chooses a batch, and the engine steps it. The loop appends events to a list, and the worker acts on them.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from functools import partial
from typing import NamedTuple

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
from tminus.service.spec import Pixels
from tminus.service.work import JobResult
from tminus.service.worker.coding import AutoencoderThread, TaskDone
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.running_job import RunningJob
from tminus.service.worker.ticks import CurrentJobs, ReportCurrentJobs, TickEnd, Ticks

log = logging.getLogger(__name__)

# Reasons for which a durable job leaves this process:
SUSPENDED = "suspended"  # SIGTERM came; the next start resumes it
LOST = "lost"  # another server runs it now, or has ended it
# The messages for clients of failed jobs, which are also logged:
NOT_STEPPED = "a step of this job failed", "tick of %d rows failed"
NOT_RECORDED = "its steps could not be read", "job %s could not be recorded"
NOT_CODED = "its images could not be encoded or decoded", "an image of job %s could not be encoded or decoded"


class Ticked(NamedTuple):
    """A batch has stepped."""

    end: TickEnd
    started: Sequence[RunningJob]  # jobs that took their first step in it


class ImageDecoded(NamedTuple):
    """One image of a latent model's job is decoded; others are left."""

    job: RunningJob


class Ended(NamedTuple):
    """A job has ended, with its images or an error. Without both, its client is gone."""

    job: RunningJob
    result: JobResult | None = None
    error: ServiceError | None = None
    reason: str | None = None  # the reason, if it was given up; None if it never began


Event = Ticked | ImageDecoded | Ended


class Loop:
    """Runs accepted jobs. Only one thread may call it."""

    def __init__(
        self, *, clock: Callable[[], float], on_task_done: Callable[[TaskDone], None], report: ReportCurrentJobs
    ) -> None:
        """on_task_done: called in the autoencoder's thread after each task; pass the tasks of jobs to `on_task_done`.

        report: called in each thread with the durable jobs that the thread is working on.
        """
        self._models: dict[int, LoadedModel] = {}
        self._has_latent_model = False  # whether one was ever loaded: then the autoencoder's thread may run
        self._clock = clock
        self.events: deque[Event] = deque()  # events that the worker has not handled yet
        # The jobs with rows in an engine, in order of arrival, and the durable ones among them. Jobs whose picture is
        # being encoded or whose images are being decoded are in `autoencoder`.
        self._jobs: dict[str, RunningJob] = {}
        self._durable: dict[str, RunningJob] = {}
        self._deadlines: dict[str, float] = {}  # deadlines of the jobs that have one
        self.autoencoder = AutoencoderThread(on_task_done, partial(report, "codes"))
        self.ticks = Ticks(clock)
        self.current = CurrentJobs(self.ticks, self.autoencoder.turnstile, report)
        self.spare_work: dict[int, Iterator[None]] = {}  # keyed by model

    @property
    def has_work(self) -> bool:
        """Whether any job has not ended."""
        return self.ticks.has_next or bool(self.autoencoder.jobs)

    # --- between ticks ---

    def load(self, model: LoadedModel) -> None:
        """Warm a model up, and accept jobs for it from now on."""
        began_s = self._clock()
        model.warm_up()
        log.info("%s is ready: a tick of one row takes %.1f ms", model.info.name, 1e3 * (self._clock() - began_s))
        self._models[model.number] = model
        self._has_latent_model |= model.info.latent is not None
        self.ticks.put(model)
        if model.spare_work is not None:
            self.spare_work[model.number] = model.spare_work

    def do_spare_work(self) -> None:
        """Do one item of the spare work of a model."""
        number, work = next(iter(self.spare_work.items()))
        self.current.set([])
        try:
            next(work)
        except StopIteration:
            del self.spare_work[number]
        except Exception:
            log.exception("%s: spare work has failed", self._models[number].info.name)
            del self.spare_work[number]

    def accept(self, job: RunningJob) -> None:
        """Begin a job: its rows step from the next tick, or as soon as its picture is encoded."""
        with self._working_on([job]):
            answered = job.future.done() and not job.future.cancelled()  # the client was answered while the worker hung
            # From here on only the worker can end the job.
            if answered or not job.future.set_running_or_notify_cancel():
                self.events.append(Ended(job))
                return
            if job.new.deadline_s is not None:
                self._deadlines[job.id] = job.submitted_s + job.new.deadline_s
            if job.model.info.latent and job.new.inputs is not None and job.needs_picture:
                self.autoencoder.put(job, "encode", [job.model.engine.encoder(job.new.inputs)])
            else:
                self._begin(job)

    def _working_on(self, jobs: Sequence[RunningJob]) -> AbstractContextManager[None]:
        """Enter the turnstile to work on jobs. An isolated job waits until no tick and no autoencoder task runs."""
        if jobs[0].new.isolated:
            self._end_ticks()
        return self.current.working_on(jobs, autoencoder_may_run=self._has_latent_model)

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
            self.ticks.device_idles(job.model)
        self._jobs[job.id] = job
        if job.new.durable:
            self._durable[job.id] = job
        if job.new.isolated:
            job.model = replace(job.model, scheduler=job.model.scheduler.isolated_scheduler())
            self.ticks.put(job.model)
        steps = job.new.snapshot.steps if job.new.snapshot is not None else None
        job.model.scheduler.add(job.id, job.rows, job.work, steps, job.new.owner)
        if job.new.recording is not None:
            not_read = job.record([(step, index) for index, step in enumerate(job.first_steps)])
            if not_read is not None:
                self._failed(not_read, [job], *NOT_RECORDED, job.id)
        job.new = replace(job.new, snapshot=None, inputs=None)
        log.info("job %s of request %s accepted: %s", job.id, job.request_id, job.spec, extra=job.log_fields)

    def on_task_done(self, done: TaskDone) -> None:
        """Continue a job after one of its autoencoder tasks, unless it has left."""
        job = done.job
        if job is None or self.autoencoder.jobs.get(job.id) is not job:
            return
        if done.results is None:
            self.events.append(ImageDecoded(job))
        elif isinstance(done.error, ServiceError):
            self.give_up(job.id, done.error, done.error.code)
        elif done.error is not None:
            self.current.set([job])
            self._failed(done.error, [job], *NOT_CODED, job.id)
        elif done.kind == "encode":
            self.autoencoder.drop(job.id)
            with self._working_on([job]):
                job.new = replace(job.new, inputs=done.results[0])
                self._begin(job)
        else:
            self.autoencoder.drop(job.id)
            images: Pixels = np.concatenate(done.results)
            self._leave(Ended(job, job.result(lambda: images, self._clock())))

    def find(self, job_id: str) -> RunningJob | None:
        """Return an unfinished job."""
        return self._jobs.get(job_id) or self.autoencoder.jobs.get(job_id)

    def give_up(self, job_id: str, error: ServiceError, reason: str) -> None:
        """End a job with an error and free its rows. An unknown job is ignored."""
        if (job := self.find(job_id)) is None:
            return
        self._end_ticks(job)  # later ends of ticks would overwrite slots that another job has by then
        if self.find(job_id) is not job:
            return
        if job_id in self._jobs:
            job.model.scheduler.cancel(job_id)
            job.model.engine.remove(job.rows)
        else:
            self.autoencoder.drop(job_id)
        self._leave(Ended(job, error=error, reason=reason))

    def give_up_all(self, error: ServiceError, model: int | None = None) -> None:
        """Give up every job, or those of one model."""
        for job in [*self._jobs.values(), *self.autoencoder.jobs.values()]:
            if model in (None, job.model.number):
                self.give_up(job.id, error, error.code)

    def unload(self, number: int) -> None:
        """Forget a model, and give up its remaining jobs."""
        self.give_up_all(ModelUnloaded(self._models[number].info.name), number)
        self.ticks.remove(self._models.pop(number))
        self.spare_work.pop(number, None)

    # --- the end ---

    def suspend_durable(self) -> None:
        """Take a last snapshot of the durable jobs and give them up; the next start finishes them."""
        if self._durable:
            self._end_ticks()
        for model in self._models.values():
            self._take_snapshots(model)
        for job in [*self._durable.values(), *(job for job in self.autoencoder.jobs.values() if job.new.durable)]:
            self.give_up(job.id, Draining(), SUSPENDED)

    def abandon(self) -> None:
        """Drop every job without calling the engine, whose state is unknown after a crash."""
        self.ticks.abandon()
        for jobs in (self._jobs, self._durable, self.autoencoder.jobs, self._deadlines):
            jobs.clear()

    # --- a tick ---

    def end_overdue(self) -> None:
        """Give up the jobs whose deadline has passed."""
        if not self._deadlines:
            return
        now_s = self._clock()
        for job_id in [job_id for job_id, when_s in self._deadlines.items() if when_s <= now_s]:
            job = self.find(job_id)
            # Ending the ticks of a job that was given up may have ended this one.
            if job is not None and job.new.deadline_s is not None:
                self.give_up(job_id, DeadlinePassed.of(job.new.deadline_s), "deadline")

    def tick(self) -> bool:
        """Begin as many ticks as may be in flight, then end the oldest; return False if none is in flight.

        The work after a tick is done while the network runs the next one.
        """
        while self._begin_next():
            pass
        if not self.ticks:
            self.current.set([])
            self.ticks.rest()
            return False
        self._end_tick()
        return True

    def _begin_next(self) -> bool:
        """Begin the next tick, unless it must wait for ticks in flight; return whether another may begin."""
        if (chosen := self.ticks.next()) is None or (self.ticks and not self.autoencoder.turnstile.is_open):
            return False
        turn, batch = chosen
        jobs = [self._jobs[picked.job_id] for picked in batch.jobs]
        if jobs[0].new.isolated:
            self.ticks.settle(jobs[0])
        with ExitStack() as inside:
            inside.enter_context(self._working_on(jobs))
            try:
                return self.ticks.begin(turn, batch, jobs, inside)
            except Exception as error:
                self._failed(error, jobs, *NOT_STEPPED, len(batch.rows))
                return True

    def _end_ticks(self, job: RunningJob | None = None) -> None:
        """End the ticks in flight, the oldest first. job: stop when none has rows of this job."""
        while self.ticks and (job is None or job in self.ticks.jobs_in_flight):
            self._end_tick()

    def _end_tick(self) -> None:
        """End the oldest tick in flight, and handle the results for its jobs."""
        tick = self.ticks.oldest
        with tick.inside:
            end = self.ticks.end()
            if end.error is None:
                self._act_on(end)
            else:
                self._failed(end.error, tick.jobs, *NOT_STEPPED, len(tick.batch.rows))

    def _act_on(self, end: TickEnd) -> None:
        """Record, fail, deliver and show the jobs of a tick that has ended."""
        tick, now_s = end.tick, end.now_s
        for job, picked in zip(tick.jobs, tick.batch.jobs, strict=True):
            job.steps_taken += len(picked.steps)
            if job.span is not None:
                job.span.add_tick(end.seconds, tick.batch.places)
        started = [self._jobs[job_id] for job_id in end.advance.started]
        for job in started:
            job.start(tick.began_s, now_s)
        self.events.append(Ticked(end, started))
        # All rows are recorded first: giving up a job may end another tick, which finishes jobs of this one.
        recorded = [
            (job, job.record([(step + 1, index) for step, index in picked.steps]))
            for job, picked in zip(tick.jobs, tick.batch.jobs, strict=True)
            if job.new.recording is not None
        ]
        for job in tick.jobs if end.broken else ():
            if not end.broken.isdisjoint(job.rows):
                self.give_up(job.id, NotFinite(), NotFinite.code)
        for job, failure in recorded:
            if failure is not None:
                self._failed(failure, [job], *NOT_RECORDED, job.id)
        for job_id in end.advance.finished:
            if job_id in self._jobs:
                self._deliver(self._jobs[job_id])
        for job in tick.jobs:
            if job.watches and job.id in self._jobs:
                job.show(now_s)
        if self._durable and tick.model.keeper is not None and tick.model.keeper.due(now_s):
            self._take_snapshots(tick.model)

    def _take_snapshots(self, model: LoadedModel) -> None:
        """Give a model's keeper snapshots of unfinished durable jobs that have stepped since their last one."""
        jobs = [job for job in self._durable.values() if job.model.number == model.number]
        moved = [job for job in jobs if job.steps_kept < job.steps_taken < job.spec.n * job.work.steps]
        if model.keeper is None or not moved:
            return
        began_s = self._clock()
        try:
            snapshots = {job.id: model.engine.snapshot(job.rows, job.model.scheduler.steps(job.id)) for job in moved}
        except Exception:  # a failed snapshot must not end the jobs
            log.exception("no snapshot could be taken")
            return
        for job in moved:
            job.steps_kept = job.steps_taken
        model.keeper.keep(snapshots, began_s, self._clock() - began_s)

    def _deliver(self, job: RunningJob) -> None:
        """Free the rows of a finished job, and end it with its images. Latents are decoded first."""
        engine, latent = job.model.engine, job.model.info.latent is not None
        reads: list[Callable[[], Pixels]] = [lambda: np.empty(0, np.uint8)]
        wanted = job.work.steps == job.spec.end  # otherwise the request asked only for the recording
        if wanted:
            try:
                # Latents are read one by one, so that a shorter job's latents may be decoded in between.
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
            del self._jobs[job.id]
            self._durable.pop(job.id, None)
            self.autoencoder.put(job, "decode", reads)
        else:
            self._leave(Ended(job, job.result(reads[0], job.denoised_s)))

    # --- for all of these ---

    def _leave(self, ended: Ended) -> None:
        """Forget a job that has no rows, and report its end."""
        job = ended.job
        for jobs in (self._jobs, self._durable, self._deadlines):
            jobs.pop(job.id, None)
        if job.new.isolated and job.model is not self._models[job.model.number]:
            self.ticks.remove(job.model)
        self.events.append(ended)

    def _failed(self, error: Exception, jobs: Sequence[RunningJob], detail: str, log_line: str, *args: object) -> None:
        """Give up jobs of one model after an error; clients see the error's type, not its text."""
        self._note_error(error, jobs[0].model.engine, log_line, *args)
        for job in jobs:
            self.give_up(job.id, EngineFailed(f"{detail}: {type(error).__name__}"), EngineFailed.code)

    def _note_error(self, error: Exception, engine: RowEngine, log_line: str, *args: object) -> None:
        """Log an error that fails its jobs. Re-raises it if the device is lost, which ends the worker.

        On a lost device every further job would fail through no fault of its own.
        """
        log.error(log_line, *args, exc_info=error)
        if engine.is_lost():
            raise error
