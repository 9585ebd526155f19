"""What the worker does with accepted jobs: ticks, snapshots, deadlines, deliveries. No queue, no lock.

A plain object: the worker calls it in its thread, a test in its own. Decide, then act: the scheduler chooses a batch,
the engine steps it, and the jobs that are done are delivered.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Literal, TypeVar

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
from tminus.service.metrics import Metrics
from tminus.service.preview import Watch
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.deadlines import Deadlines
from tminus.service.spec import Images, Inputs
from tminus.service.work import Batch, JobResult
from tminus.service.worker.coded_jobs import CodedJobs
from tminus.service.worker.errors_to import errors_to, reading
from tminus.service.worker.loaded_models import LoadedModel, LoadedModels
from tminus.service.worker.running_job import RunningJob
from tminus.service.worker.snapshots import take_snapshots

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Part = Literal["steps", "codes"]  # of the server: the worker's thread, and the one that encodes and decodes latents
Note = Callable[[Part, Collection[str]], None]


def note_nothing(_part: Part, _jobs: Collection[str]) -> None:
    """Where nobody wants to know after the end of the process what it worked on."""


SUSPENDED = "suspended"  # why durable jobs are given up on SIGTERM; the next start goes on with them
LOST = "lost"  # why one is that another server works on by now, or has ended: tminus_durable_jobs_total counts it


class Loop:
    """Runs the jobs that were accepted. Only one thread may call it."""

    def __init__(
        self,
        admission: Admission,
        metrics: Metrics,
        *,
        clock: Callable[[], float],
        on_end: Callable[[str], None],
        post: Callable[[Callable[[], None]], None],
        note: Note = note_nothing,
    ) -> None:
        """Take what belongs to the worker's thread.

        on_end: is called with the id of each job that ends, before its future has the result. post: has something done
        in the worker's thread, between two ticks. note: is told what a thread works on from now on, by that thread.
        """
        self.models = LoadedModels(clock)
        self._admission, self._metrics, self._clock = admission, metrics, clock
        self._on_end, self._post, self._note = on_end, post, note
        # The jobs whose rows an engine holds, in order of arrival. This loop is their owner.
        self._jobs: dict[str, RunningJob] = {}
        # Of a latent model, those whose picture is being encoded or whose images are being decoded.
        self.coded = CodedJobs(
            metrics.coded, post, self._fail, one_done=lambda job: admission.decoded(job.id), blame=self._now_at,
            note=partial(note, "codes"),
        )  # fmt: skip
        self.coding_hangs = False  # when it was closed
        self._deadlines = Deadlines()
        self.current_jobs = frozenset[str]()  # of the last tick, or accepted last: possible causes of a crash
        self._noted = frozenset[str]()  # what `note` was told last
        self.rows_active = 0  # rows in the last tick
        self._idle: set[int] = set()  # models that had nothing to step before what they have now

    @property
    def has_work(self) -> bool:
        """Whether a job has not ended."""
        return self.models.has_ticks or bool(self.coded)

    # --- between ticks ---

    def accept(self, job: RunningJob) -> None:
        """Take a job on: its rows step from the next tick on, or once its picture is encoded."""
        with self._at([job]):
            self._accept(job)

    def _accept(self, job: RunningJob) -> None:
        answered = job.future.done() and not job.future.cancelled()  # while the worker hung
        if answered or not job.future.set_running_or_notify_cancel():  # from here on only the loop ends it
            self._leave(job)
            return
        if job.new.deadline_s is not None:
            self._deadlines.add(job.submitted_s + job.new.deadline_s, job.id, self._ids)
        if job.model.info.latent and job.new.inputs is not None and job.needs_picture:
            self.coded.put(job, "encode", [job.model.engine.encoder(job.new.inputs)], self._encoded)
        else:
            self._begin(job)

    def _now_at(self, jobs: Sequence[RunningJob]) -> None:
        self.current_jobs = frozenset(job.id for job in jobs)
        self._note_steps(self.current_jobs)

    def _note_steps(self, jobs: frozenset[str]) -> None:
        if jobs != self._noted:
            self._noted = jobs
            self._note("steps", jobs)

    @contextmanager
    def _at(self, jobs: Sequence[RunningJob]) -> Iterator[None]:
        """Work on jobs. While one is to be alone, nothing is encoded or decoded meanwhile, and nobody else is named."""
        alone = any(job.new.alone for job in jobs)
        with self.coded.turnstile.enter(alone=alone, before_wait=lambda: self._note_steps(frozenset())):
            self._now_at(jobs)
            yield
            if alone:  # but if the worker crashes before its next tick, that may be its doing
                self._note_steps(frozenset())

    def _encoded(self, job: RunningJob, inputs: Sequence[Inputs]) -> None:
        with self._at([job]):
            job.new = replace(job.new, inputs=inputs[0])
            self._begin(job)

    def _begin(self, job: RunningJob) -> None:
        """Give a job to its model's engine and scheduler."""
        engine, fail = job.model.engine, partial(self._fail, job)
        with errors_to(fail, engine, "this job could not be started", "job %s could not be added", job.id):
            try:
                job.rows = engine.add(job.spec, job.new.snapshot, job.new.inputs)
            except ValueError as error:
                self._leave(job)
                job.fail(InvalidField(str(error), field="sampler", value=job.spec.sampler))
        if not job.rows:
            return
        if not job.model.scheduler.has_work:
            self._idle.add(job.model.number)
        self._jobs[job.id] = job
        if job.new.alone:
            job.model = self.models.put_apart(job.model)
        steps = job.new.snapshot.steps if job.new.snapshot is not None else None
        job.model.scheduler.add(job.id, job.rows, job.work, steps, job.new.owner)
        if job.new.recording is not None:
            self._record(job, [(step, index) for index, step in enumerate(job.first_steps)])
        job.new = replace(job.new, snapshot=None, inputs=None)
        log.info("job %s of request %s accepted: %s", job.id, job.request_id, job.spec, extra=job.log_fields)

    def run(self, act: Callable[[], Result], future: "Future[Result]") -> None:
        """Do something short with an engine; the future, which is running, gets the result."""
        self._now_at([])
        failed = "what was asked of the engine failed"
        with errors_to(future.set_exception, None, "the engine could not do it", failed):
            future.set_result(act())

    def watch(self, job_id: str, watch: Watch) -> None:
        """Show a job to one more viewer. Nothing happens if it is not here (any more)."""
        if (job := self._find(job_id)) is not None:
            job.watches.append(watch)

    def unwatch(self, job_id: str, watch: Watch) -> None:
        """Stop showing a job to a viewer."""
        if (job := self._find(job_id)) is not None:
            job.unwatch(watch)

    def give_up(self, job_id: str, error: ServiceError, reason: str) -> None:
        """End a job with an error and free its rows. Nothing happens if it is not here (any more)."""
        job = self._jobs.get(job_id)
        if job is not None:
            job.model.scheduler.cancel(job_id)
            job.model.engine.remove(job.rows)
        else:
            job = self.coded.drop(job_id)
        if job is not None:
            self._end(job, error, reason)

    def _fail(self, job: RunningJob, error: ServiceError) -> None:
        self._end(job, error, error.code)

    def _end(self, job: RunningJob, error: ServiceError, reason: str) -> None:
        """End a job that has no rows with an error."""
        saved = job.spec.n * job.spec.end - job.steps_taken
        self._leave(job)
        if reason in (SUSPENDED, LOST):
            log.info("job %s of request %s is %s", job.id, job.request_id, reason, extra=job.log_fields)
        else:
            self._metrics.job_given_up(reason, saved)
            what = "job %s of request %s given up (%s), %d row-steps saved"
            log.info(what, job.id, job.request_id, reason, saved, extra=job.log_fields)
        job.fail(error)

    def unload(self, number: int) -> None:
        """Forget a model, and give up the jobs that it still has."""
        for job in [job for job in map(self._find, self._ids) if job is not None and job.model.number == number]:
            self.give_up(job.id, ModelUnloaded(job.model.info.name), ModelUnloaded.code)
        self.models.remove(number)

    # --- the end ---

    def suspend_durable(self) -> None:
        """Give up the durable jobs with a last snapshot; the next start of the server finishes them."""
        for model in self.models:
            take_snapshots(model, self._jobs.values(), self._clock)
        for job in [job for job in (*self._jobs.values(), *self.coded.durable()) if job.new.durable]:
            self.give_up(job.id, Draining(), SUSPENDED)

    def give_up_all(self, error: ServiceError) -> None:
        """End every job that is left."""
        for job_id in list(self._ids):
            self.give_up(job_id, error, error.code)
        self.coding_hangs = not self.coded.close()

    def abandon(self) -> None:
        """Drop every job without a call of the engine, which is not to be trusted after a crash."""
        self._jobs.clear()
        self.coding_hangs = not self.coded.close()

    # --- a tick ---

    def end_overdue(self) -> None:
        """Give up the jobs whose deadline has passed."""
        for job_id in self._deadlines.passed(self._clock()):
            if (job := self._find(job_id)) is not None:
                assert job.new.deadline_s is not None
                self.give_up(job_id, DeadlinePassed.of(job.new.deadline_s), "deadline")

    def tick(self) -> None:
        """Step the next batch, if there is one, and do what follows from it."""
        if not self.models.has_ticks:
            self._now_at([])
            return
        model = self.models.next()
        assert model is not None
        batch = model.scheduler.next_batch()
        assert batch is not None
        jobs = [self._jobs[picked.job_id] for picked in batch.jobs]
        with self._at(jobs):
            self._tick(model, batch, jobs)

    def _tick(self, model: LoadedModel, batch: Batch, jobs: Sequence[RunningJob]) -> None:
        started_s = self._clock()
        self.rows_active = len(batch.rows)
        broken = self._step(model.engine, batch, jobs)
        if broken is None:
            return
        now_s = self._clock()
        self._count(model, batch, jobs, now_s - started_s)
        advance = model.scheduler.advance(batch)
        for job_id in advance.started:
            queue_s, first_step_s = self._jobs[job_id].start(started_s, now_s)
            self._metrics.job_started(queue_s=queue_s, first_step_s=first_step_s)
        for job in jobs if broken else ():
            if not broken.isdisjoint(job.rows):
                self.give_up(job.id, NotFinite(), NotFinite.code)
        for job, picked in zip(jobs, batch.jobs, strict=True):  # before the rows of those that are done are freed
            if job.new.recording is not None and job.id in self._jobs:
                self._record(job, [(step + 1, index) for step, index in picked.steps])
        for job_id in advance.finished:
            if job_id in self._jobs:
                self._deliver(self._jobs[job_id])
        for job in jobs:
            if job.id in self._jobs:
                job.show(now_s)
        if model.keeper is not None and model.keeper.due(now_s):
            take_snapshots(model, self._jobs.values(), self._clock)

    def _step(self, engine: RowEngine, batch: Batch, jobs: Sequence[RunningJob]) -> frozenset[int] | None:
        """Step a batch; returns the rows that are not finite, or None if it failed and its jobs are given up."""
        with self._giving_up(jobs, "a step of this job failed", "tick of %d rows failed", len(batch.rows)):
            engine.step(batch)
            engine.wait()
            return frozenset(engine.broken(batch.rows))
        return None

    def _count(self, model: LoadedModel, batch: Batch, jobs: Sequence[RunningJob], seconds: float) -> None:
        """Take a tick's work off the ledger of admission, and count its steps."""
        self.models.stepped(model, seconds)
        places = {picked.job_id: picked.places for picked in batch.jobs}
        # Where the engine runs ahead, a tick is waited for while the next is launched: the first tells no more than how
        # long it took to launch.
        tells = not (model.number in self._idle and model.engine.runs_ahead)
        self._idle.discard(model.number)
        self._admission.stepped(model.number, places, batch.places if tells else 0, seconds)
        row_steps: dict[str, int] = {}
        for job, picked in zip(jobs, batch.jobs, strict=True):
            count = len(picked.steps)
            job.stepped(count, seconds, batch.places)
            row_steps[job.spec.sampler] = row_steps.get(job.spec.sampler, 0) + count
        self._metrics.ticked(model.info.name, seconds, batch.places, row_steps)

    def _record(self, job: RunningJob, next_steps: Sequence[tuple[int, int]]) -> None:
        """Give the recording of a job the rows that it wants, by the steps that they take next and their indices."""
        with self._giving_up([job], "its steps could not be read", "job %s could not be recorded", job.id):
            job.record(next_steps)

    def _deliver(self, job: RunningJob) -> None:
        """Free a job's rows, and end it with its images; those of a latent model are decoded first."""
        if job.work.steps < job.spec.end:  # only what was recorded on the way is wanted
            job.model.engine.remove(job.rows)
            self._finish(job, lambda: np.empty(0, np.uint8), self._clock())
            return
        reads: list[Callable[[], Images]] = []
        with self._giving_up([job], "its images could not be read", "job %s could not be read", job.id):
            # Of a latent model one by one, so that a shorter job may come between them.
            parts = [(row,) for row in job.rows] if job.model.info.latent else [job.rows]
            reads = [job.model.engine.images(rows) for rows in parts]
        if not reads:
            return
        job.model.engine.remove(job.rows)
        now_s = self._clock()
        if job.model.info.latent is None:
            self._finish(job, reads[0], now_s)
        else:
            self.coded.put(self._jobs.pop(job.id), "decode", reads, partial(self._decoded, now_s))

    def _decoded(self, denoised_s: float, job: RunningJob, images: Sequence[Images]) -> None:
        all_images: Images = np.concatenate(images)
        self._finish(job, lambda: all_images, denoised_s)

    def _finish(self, job: RunningJob, read: Callable[[], Images], denoised_s: float) -> None:
        assert job.started_s is not None
        self._leave(job)
        self._metrics.job_done(job.model.info.name, job.spec.n if job.work.steps == job.spec.end else 0)
        queue_s, denoise_s = job.started_s - job.submitted_s, denoised_s - job.started_s
        what = "job %s of request %s done: queued %.3f s, denoised %.3f s"
        log.info(what, job.id, job.request_id, queue_s, denoise_s, extra=job.log_fields)
        read = reading(read, job.model.engine, self._post)
        job.finish(JobResult(read, queue_s, job.first_step_s, denoise_s, self._clock() - denoised_s))

    # --- for all of these ---

    @property
    def _ids(self) -> Collection[str]:
        return {*self._jobs, *self.coded.ids} if self.coded else self._jobs

    def _find(self, job_id: str) -> RunningJob | None:
        return self._jobs.get(job_id) or self.coded.get(job_id)

    def _leave(self, job: RunningJob) -> None:
        """Remove a job from this loop, the worker and admission."""
        self._jobs.pop(job.id, None)
        if job.new.alone:
            self.models.remove_apart(job.model)
        self._on_end(job.id)
        self._admission.leave(job.id)

    def _giving_up(
        self, jobs: Sequence[RunningJob], detail: str, log_line: str, *args: object
    ) -> AbstractContextManager[None]:
        """Give jobs of one model up with EngineFailed if the block raises; see errors_to."""

        def fail(error: EngineFailed) -> None:
            for job in jobs:
                self.give_up(job.id, error, error.code)

        return errors_to(fail, jobs[0].model.engine, detail, log_line, *args)
