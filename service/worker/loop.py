"""Runs accepted jobs in one thread: ticks, snapshots, deadlines and results. Has no queue and no lock.

The scheduler chooses each batch, and the engine computes it. The loop appends events to a list, which the worker reads.
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

# Reasons why a durable job stops running in this process:
SUSPENDED = "suspended"  # the server is shutting down; the next start resumes the job
LOST = "lost"  # another replica is running the job, or has ended it
# For each kind of failure: the message for the client, and the message for the log.
NOT_STEPPED = "a step of this job failed", "tick of %d rows failed"
NOT_RECORDED = "its steps could not be read", "job %s could not be recorded"
NOT_CODED = "its images could not be encoded or decoded", "an image of job %s could not be encoded or decoded"


class Ticked(NamedTuple):
    """Event: a tick has ended without an error."""

    end: TickEnd
    started: Sequence[RunningJob]  # jobs that took their first step in this tick


class ImageDecoded(NamedTuple):
    """Event: one image of a latent model's job has been decoded, but not the last one."""

    job: RunningJob


class Ended(NamedTuple):
    """Event: a job has ended, with a result or an error. Both are None if the client left before the job began."""

    job: RunningJob
    result: JobResult | None = None
    error: ServiceError | None = None
    reason: str | None = None  # why the job was given up; None if it finished, or never began


Event = Ticked | ImageDecoded | Ended


class Loop:
    """Runs accepted jobs. All calls must come from one thread."""

    def __init__(
        self, *, clock: Callable[[], float], on_task_done: Callable[[TaskDone], None], report: ReportCurrentJobs
    ) -> None:
        """on_task_done: called in the autoencoder's thread after each task.

        If the task belongs to a job, the callback must arrange a call of `Loop.on_task_done` in the loop's thread.

        report: called in each of the two threads, with the ids of the durable jobs that the thread is working on.
        """
        self._models: dict[int, LoadedModel] = {}
        self._has_latent_model = False  # once True, the autoencoder's thread may be running
        self._clock = clock
        self.events: deque[Event] = deque()  # handled and removed by the worker
        # Jobs with rows in an engine, in order of arrival. `_durable` has the durable ones among them. While a job's
        # input is encoded or its output is decoded, the job is in `autoencoder.jobs` instead.
        self._jobs: dict[str, RunningJob] = {}
        self._durable: dict[str, RunningJob] = {}
        self._deadlines: dict[str, float] = {}  # clock time of each job's deadline, keyed by job id
        self.autoencoder = AutoencoderThread(on_task_done, partial(report, "codes"))
        self.ticks = Ticks(clock)
        self.current = CurrentJobs(self.ticks, self.autoencoder.turnstile, report)
        self.spare_work: dict[int, Iterator[None]] = {}  # keyed by model number

    @property
    def has_work(self) -> bool:
        return self.ticks.has_next or bool(self.autoencoder.jobs)

    # --- between ticks ---

    def load(self, model: LoadedModel) -> None:
        """Warm up a model. From now on, its jobs are accepted."""
        model.warm_up()
        log.info("%s is ready", model.info.name)
        self._models[model.number] = model
        self._has_latent_model |= model.info.latent is not None
        self.ticks.put(model)
        if model.spare_work is not None:
            self.spare_work[model.number] = model.spare_work

    def do_spare_work(self) -> None:
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
        """Start a job. Its rows step from the next tick on, or once its picture is encoded."""
        with self._working_on([job]):
            answered = job.future.done() and not job.future.cancelled()  # answered while the worker hung
            # The client cannot cancel a running future. From now on, only the worker ends the job.
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
        """Return a context for work on these jobs. An isolated job first waits for all other work."""
        if jobs[0].new.isolated:
            self._end_ticks()
        return self.current.working_on(jobs, autoencoder_may_run=self._has_latent_model)

    def _begin(self, job: RunningJob) -> None:
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
        """Continue a job after one of its autoencoder tasks. If the job has already ended, nothing happens."""
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
        return self._jobs.get(job_id) or self.autoencoder.jobs.get(job_id)

    def give_up(self, job_id: str, error: ServiceError, reason: str) -> None:
        """End a job with an error, and free its rows. Unknown job ids are ignored."""
        if (job := self.find(job_id)) is None:
            return
        self._end_ticks(job)  # these ticks write to the job's slots, which another job may get
        if self.find(job_id) is not job:
            return
        if job_id in self._jobs:
            job.model.scheduler.cancel(job_id)
            job.model.engine.remove(job.rows)
        else:
            self.autoencoder.drop(job_id)
        self._leave(Ended(job, error=error, reason=reason))

    def give_up_all(self, error: ServiceError, model: int | None = None) -> None:
        for job in [*self._jobs.values(), *self.autoencoder.jobs.values()]:
            if model in (None, job.model.number):
                self.give_up(job.id, error, error.code)

    def unload(self, number: int) -> None:
        """Give up the remaining jobs of a model, then remove the model."""
        self.give_up_all(ModelUnloaded(self._models[number].info.name), number)
        self.ticks.remove(self._models.pop(number))
        self.spare_work.pop(number, None)

    # --- shutdown ---

    def suspend_durable(self) -> None:
        """Take a last snapshot of each durable job, then give the jobs up. The next process resumes them."""
        if self._durable:
            self._end_ticks()
        for model in self._models.values():
            self._take_snapshots(model)
        for job in [*self._durable.values(), *(job for job in self.autoencoder.jobs.values() if job.new.durable)]:
            self.give_up(job.id, Draining(), SUSPENDED)

    def abandon(self) -> None:
        """Drop all jobs after a crash. The engine is not called, because its state is unknown."""
        self.ticks.abandon()
        for jobs in (self._jobs, self._durable, self.autoencoder.jobs, self._deadlines):
            jobs.clear()

    # --- ticks ---

    def end_overdue(self) -> None:
        if not self._deadlines:
            return
        now_s = self._clock()
        for job_id in [job_id for job_id, when_s in self._deadlines.items() if when_s <= now_s]:
            job = self.find(job_id)
            # `give_up` of an earlier job may have ended a tick in which this job finished. Then `job` is None.
            if job is not None and job.new.deadline_s is not None:
                self.give_up(job_id, DeadlinePassed.of(job.new.deadline_s), "deadline")

    def tick(self) -> bool:
        """Begin as many ticks as may be in flight, then end the oldest one. Returns False if there was none.

        If two ticks may be in flight, the network computes one while the results of the other are handled.
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
        """Begin the next tick if that is possible now. Returns True if yet another tick may begin."""
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
        """End the ticks in flight, oldest first. job: stop as soon as no tick in flight has rows of this job."""
        while self.ticks and (job is None or job in self.ticks.jobs_in_flight):
            self._end_tick()

    def _end_tick(self) -> None:
        """End the oldest tick in flight, and handle its results."""
        tick = self.ticks.oldest
        with tick.inside:
            end = self.ticks.end()
            if end.error is None:
                self._act_on(end)
            else:
                self._failed(end.error, tick.jobs, *NOT_STEPPED, len(tick.batch.rows))

    def _act_on(self, end: TickEnd) -> None:
        """Handle the results of a tick: record rows, deliver finished jobs, and send previews."""
        tick, now_s = end.tick, end.now_s
        for job, picked in zip(tick.jobs, tick.batch.jobs, strict=True):
            job.steps_taken += len(picked.steps)
            if job.span is not None:
                job.span.add_tick(end.seconds, tick.batch.places)
        started = [self._jobs[job_id] for job_id in end.advance.started]
        for job in started:
            job.start(tick.began_s, now_s)
        self.events.append(Ticked(end, started))
        # Record every job before giving any up: `give_up` may end another tick, and these jobs may finish in that tick.
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
        """Take a snapshot of each of a model's durable jobs that has moved since its last snapshot."""
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
        """Read a finished job's images, free its rows and end the job. A latent model's job is decoded first."""
        engine, latent = job.model.engine, job.model.info.latent is not None
        reads: list[Callable[[], Pixels]] = [lambda: np.empty(0, np.uint8)]
        wanted = job.work.steps == job.spec.end  # False if the client requested only the recording
        if wanted:
            try:
                # Read the latents one image at a time: the autoencoder can decode a shorter job's latents in between.
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

    # --- helpers ---

    def _leave(self, ended: Ended) -> None:
        """Forget a job that has no rows in an engine, and append its `Ended` event."""
        job = ended.job
        for jobs in (self._jobs, self._durable, self._deadlines):
            jobs.pop(job.id, None)
        if job.new.isolated and job.model is not self._models[job.model.number]:
            self.ticks.remove(job.model)
        self.events.append(ended)

    def _failed(self, error: Exception, jobs: Sequence[RunningJob], detail: str, log_line: str, *args: object) -> None:
        """Give up some jobs of one model after an error. Clients see the type of the error, but not its text."""
        self._note_error(error, jobs[0].model.engine, log_line, *args)
        for job in jobs:
            self.give_up(job.id, EngineFailed(f"{detail}: {type(error).__name__}"), EngineFailed.code)

    def _note_error(self, error: Exception, engine: RowEngine, log_line: str, *args: object) -> None:
        """Log an error. If the device is lost, raise it, which ends the worker: later jobs would fail too."""
        log.error(log_line, *args, exc_info=error)
        if engine.is_lost():
            raise error
