"""The one thread that owns the scheduler and the engine. The edge talks to it by commands and futures, never directly.

Decide, then act: take commands, ask the scheduler for a batch, let the engine step it, deliver what is done.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

from service.engine.protocol import RowEngine
from service.errors import (
    DeadlinePassed,
    Draining,
    EngineFailed,
    InvalidField,
    JobCancelled,
    NotFinite,
    NotReady,
    ServiceError,
)
from service.metrics import Metrics
from service.preview import Watch
from service.scheduling.admission import Admission, Entry
from service.scheduling.deadlines import Deadlines
from service.scheduling.scheduler import Scheduler
from service.spec import Inputs, SampleSpec, Snapshot, trial_spec
from service.work import Batch, JobResult, JobStatus, Ticket, work_of
from service.worker.recording import Recording
from service.worker.running_job import RunningJob
from service.worker.snapshot_pace import Keeper

log = logging.getLogger(__name__)

Result = TypeVar("Result")
SUSPENDED = "suspended"  # durable jobs on SIGTERM: the next start goes on with them
CRASHED = "the worker has stopped; the server's log says why"


class Worker:
    """Runs ticks until closed. `submit`, `cancel`, `drain` and `close` may be called from any thread."""

    def __init__(
        self,
        engine: RowEngine,
        scheduler: Scheduler,
        admission: Admission,
        metrics: Metrics,
        *,
        keeper: Keeper | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """keeper: takes the snapshots of durable jobs."""
        self._engine, self._scheduler, self._admission, self._metrics = engine, scheduler, admission, metrics
        self._keeper, self._clock = keeper, clock
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate = threading.Lock()  # a job is either queued before the thread ends, or refused
        self._jobs: dict[str, RunningJob] = {}  # changed under the gate
        self._deadlines = Deadlines()
        self._rows_active = 0
        self._crashed = False
        self._in_hand = self._suspects = frozenset[str]()  # the jobs that are being worked on; those of a crash
        self._ready, self._draining, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tminus-worker", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        """Start the thread; its first act is the warm-up, after which it is ready."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether a tick has run and work is taken."""
        return self._ready.is_set() and self.alive and not self._draining.is_set()

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused because the end is near."""
        return self._draining.is_set()

    @property
    def crashed(self) -> bool:
        """Whether the thread ended by an error of its own."""
        return self._crashed

    @property
    def jobs_of_the_crash(self) -> frozenset[str]:
        """The jobs that the worker was working on when it crashed."""
        return self._suspects

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._closed.is_set()

    @property
    def rows_active(self) -> int:
        """Rows in the last tick, 0 when idle."""
        return self._rows_active

    def submit(
        self,
        job_id: str,
        spec: SampleSpec,
        deadline_s: float | None = None,
        watch: Watch | None = None,
        *,
        inputs: Inputs | None = None,
        durable: bool = False,
        recording: Recording | None = None,
    ) -> Ticket:
        """Accept a job; its rows step from the next tick on. Raises NotReady, Draining, Overloaded, …

        deadline_s counts from now: one that cannot be met is refused, one that passes ends the job in DeadlinePassed.
        watch is shown the job as it goes; inputs are what its spec has the hashes of. Of a durable job snapshots are
        kept. A recording is given the rows at the steps that it wants.
        """
        self._check_open()
        work, now_s = work_of(spec, self._engine.info), self._clock()
        # Outside the gate: this may take milliseconds, and the worker passes the gate with every job that ends.
        entry = self._admission.enter(job_id, work, now_s=now_s, deadline_s=deadline_s)
        job = RunningJob(
            job_id, spec, work, Future(), now_s, deadline_s, durable=durable, inputs=inputs, recording=recording
        )
        job.steps_taken = job.steps_kept = spec.n * spec.start
        if watch is not None:
            job.watches.append(watch)
        return self._let_in(job, entry)

    def resume(
        self, job_id: str, spec: SampleSpec, deadline_s: float | None, inputs: Inputs | None, snapshot: Snapshot | None
    ) -> Ticket:
        """Take on a durable job that an earlier process accepted, where its snapshot left it.

        Raises NotReady, Draining, and Overloaded while there are no slots; nothing else refuses it.
        """
        self._check_open()
        work = work_of(spec, self._engine.info)
        steps = snapshot.steps if snapshot is not None else (spec.start,) * spec.n
        entry = self._admission.readmit(job_id, work, places_left=sum(map(work.places_left, steps)))
        job = RunningJob(job_id, spec, work, Future(), self._clock(), deadline_s, durable=True, inputs=inputs)
        job.snapshot = snapshot
        job.steps_taken = job.steps_kept = sum(steps)
        return self._let_in(job, entry)

    def _let_in(self, job: RunningJob, entry: Entry) -> Ticket:
        job.entry = entry
        with self._gate:
            try:
                self._check_open()
            except ServiceError:
                self._admission.leave(job.id)
                raise
            self._jobs[job.id] = job
            self._commands.put(lambda: self._accept(job))
        return Ticket(job.future, entry.position, entry.eta_s)

    def run(self, act: Callable[[RowEngine], Result]) -> "Future[Result]":
        """Do something short with the engine between two ticks. Raises NotReady, Draining, …"""
        future: Future[Result] = Future()
        with self._gate:
            self._check_open()
            self._commands.put(lambda: self._act(act, future))
        return future

    def _check_open(self) -> None:
        if self._crashed:
            raise EngineFailed(CRASHED)
        if self._draining.is_set() or self._closed.is_set():
            raise Draining
        if not self._ready.is_set():
            raise NotReady

    def statuses(self) -> list[JobStatus]:
        """Every job that is waiting or running, in order of arrival, with its place and when it should be done."""
        outlooks = {outlook.job_id: outlook for outlook in self._admission.outlooks()}
        with self._gate:
            jobs, now_s = list(self._jobs.values()), self._clock()
        return [job.status(outlooks[job.id], now_s) for job in jobs if job.id in outlooks]

    def status(self, job_id: str) -> JobStatus | None:
        """One of them; None if it is not here (any more)."""
        outlook = self._admission.outlook(job_id)
        with self._gate:
            job = self._jobs.get(job_id)
        return job.status(outlook, self._clock()) if job is not None and outlook is not None else None

    def quick_statuses(self, forecast: Mapping[str, JobStatus]) -> list[JobStatus]:
        """As `statuses`, with position and ETA of an earlier forecast, or of its acceptance if a job came since."""
        with self._gate:
            jobs, now_s = list(self._jobs.values()), self._clock()
        return [job.quick_status(forecast, now_s) for job in jobs]

    def quick_status(self, job_id: str, forecast: Mapping[str, JobStatus]) -> JobStatus | None:
        """One of them; None if it is not here (any more)."""
        with self._gate:
            job = self._jobs.get(job_id)
        return job.quick_status(forecast, self._clock()) if job is not None else None

    def watch(self, job_id: str, watch: Watch) -> None:
        """Show a job to one more; nothing happens if it is not here (any more)."""
        self._commands.put(lambda: job.watches.append(watch) if (job := self._jobs.get(job_id)) else None)

    def unwatch(self, job_id: str, watch: Watch) -> None:
        """Show it no more to somebody who was."""
        self._commands.put(lambda: job.unwatch(watch) if (job := self._jobs.get(job_id)) else None)

    def cancel(self, job_id: str, reason: str) -> bool:
        """Free a job's rows before the next tick; False if there is no such job (any more)."""
        with self._gate:
            known = job_id in self._jobs
        self._commands.put(lambda: self._give_up(job_id, JobCancelled(f"cancelled: {reason}"), reason))
        return known

    def drain(self) -> None:
        """Take no more jobs; the thread ends when the accepted ones are done. Signal handlers may call it: no lock.

        Durable jobs are not waited for: a last snapshot is taken, and they end in Draining.
        """
        self._draining.set()
        self._commands.put(lambda: None)  # wakes it if it sleeps

    def join(self) -> None:
        """Wait until the thread has ended: drained, closed or crashed."""
        self._thread.join()

    def close(self) -> None:
        """Give up what is left and end the thread."""
        self._draining.set()
        self._closed.set()
        self._commands.put(lambda: None)  # wakes it if it sleeps
        if self._thread.ident is not None:
            self._thread.join()

    # --- in the worker's thread ---

    def _run(self) -> None:
        try:
            self._warm_up()
            self._ready.set()
            while not self._closed.is_set() and not (self._draining.is_set() and not self._scheduler.has_work):
                self._take_commands()
                self._end_overdue()
                if self._draining.is_set():
                    self._suspend_durable()
                batch = self._scheduler.next_batch()
                if batch is not None and not self._closed.is_set():
                    self._tick(batch)
            failure: ServiceError = Draining()
        except Exception:
            log.exception("the worker stopped")
            self._suspects = self._in_hand
            failure = EngineFailed(CRASHED)
        with self._gate:
            self._crashed = isinstance(failure, EngineFailed)
            self._closed.set()
        if self._crashed:  # the engine is not to be trusted any more, but everybody gets an answer
            for job in self._jobs.values():
                if not job.future.done():
                    job.future.set_exception(failure)
            self._jobs.clear()
        self._take_commands(wait=False)
        for job_id in list(self._jobs):
            self._give_up(job_id, failure, failure.code)

    def _warm_up(self) -> None:
        """Run one job of one step in this thread, so that the first request finds warm code."""
        rows = self._engine.add(trial_spec(self._engine.info, n=1, steps=1))
        started_s = self._clock()
        self._engine.step(Batch(rows, (0,), ()))
        self._engine.wait()
        self._engine.images(rows)
        self._engine.remove(rows)
        log.info("ready: a tick of one row takes %.1f ms", 1e3 * (self._clock() - started_s))

    def _take_commands(self, wait: bool = True) -> None:
        """Do what other threads asked for. With nothing to step, sleep until somebody asks."""
        if wait and not self._scheduler.has_work:
            self._rows_active = 0
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _act(self, act: Callable[[RowEngine], Result], future: "Future[Result]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        if self._crashed:
            future.set_exception(EngineFailed(CRASHED))
            return
        try:
            future.set_result(act(self._engine))
        except Exception as error:
            log.exception("what was asked of the engine failed")
            future.set_exception(EngineFailed(f"the engine could not do it: {type(error).__name__}"))

    def _accept(self, job: RunningJob) -> None:
        self._in_hand = frozenset({job.id})
        if job.id not in self._jobs:  # the thread is ending, and has answered it
            return
        if not job.future.set_running_or_notify_cancel():  # from here on only the worker ends it
            self._forget(job)
            return
        try:
            job.rows = self._engine.add(job.spec, job.snapshot, job.inputs)
        except ValueError as error:
            self._forget(job)
            job.future.set_exception(InvalidField(str(error), field="sampler", value=job.spec.sampler))
            return
        except Exception as error:
            log.exception("job %s could not be added", job.id)
            self._forget(job)
            job.future.set_exception(EngineFailed(f"this job could not be started: {type(error).__name__}"))
            return
        self._scheduler.add(job.id, job.rows, job.work, job.snapshot.steps if job.snapshot is not None else None)
        job.snapshot = job.inputs = None
        if job.deadline_s is not None:
            self._deadlines.add(job.submitted_s + job.deadline_s, job.id, self._jobs)
        log.info("job %s accepted: %s", job.id, job.spec)

    def _end_overdue(self) -> None:
        for job_id in self._deadlines.passed(self._clock()):
            if (job := self._jobs.get(job_id)) is not None:
                detail = f"deadline_s={job.deadline_s:g} passed before the job was done"
                error = DeadlinePassed(detail, field="deadline_s", value=job.deadline_s, bound="a longer time")
                self._give_up(job_id, error, "deadline")

    def _tick(self, batch: Batch) -> None:
        started_s = self._clock()
        self._rows_active = len(batch.rows)
        by_job = self._scheduler.places_by_job(batch)
        self._in_hand = frozenset(by_job)
        try:
            self._engine.step(batch)
            self._engine.wait()
            broken = self._engine.broken(batch.rows)
        except Exception as error:  # whatever the network raised: these jobs are lost, the server is not
            log.exception("tick of %d rows failed", len(batch.rows))
            for job_id in by_job:
                failure = EngineFailed(f"a step of this job failed: {type(error).__name__}")
                self._give_up(job_id, failure, failure.code)
            return
        now_s = self._clock()
        self._admission.stepped(by_job, batch.places, now_s - started_s)
        row_steps: dict[str, int] = {}
        for job_id, count in self._scheduler.rows_by_job(batch).items():
            job = self._jobs[job_id]
            job.steps_taken += count
            sampler = job.spec.sampler
            row_steps[sampler] = row_steps.get(sampler, 0) + count
        self._metrics.ticked(now_s - started_s, batch.places, row_steps)
        advance = self._scheduler.advance(batch)
        for job_id in advance.started:
            job = self._jobs[job_id]
            job.started_s, job.first_step_s = started_s, now_s - job.submitted_s
            self._metrics.job_started(queue_s=started_s - job.submitted_s, first_step_s=job.first_step_s)
        for job_id in {job.id for job in self._all() if set(job.rows) & set(broken)} if broken else ():
            self._give_up(job_id, NotFinite(), NotFinite.code)
        for job_id in advance.finished:
            if job_id in self._jobs:
                self._deliver(self._jobs[job_id])
        for job_id in by_job:
            if job_id in self._jobs:
                self._jobs[job_id].show(self._engine, now_s)
                self._record(self._jobs[job_id], batch)
        if self._keeper is not None and self._keeper.due(now_s):
            self._keep_snapshots([job for job in self._all() if job.durable])

    def _all(self) -> list[RunningJob]:
        """The jobs as they are now: others are let in at any time."""
        return list(self._jobs.values())

    def _record(self, job: RunningJob, batch: Batch) -> None:
        try:
            job.record(self._engine, batch)
        except Exception as error:  # a frame would be missing; nobody else's work is
            log.exception("job %s could not be recorded", job.id)
            failure = EngineFailed(f"its frames could not be read: {type(error).__name__}")
            self._give_up(job.id, failure, failure.code)

    def _keep_snapshots(self, jobs: Sequence[RunningJob]) -> None:
        """Hand the keeper what those of the jobs need to go on that have stepped since it was last asked."""
        moved = [job for job in jobs if job.rows and job.steps_taken > job.steps_kept]
        if self._keeper is None or not moved:
            return
        began_s = self._clock()
        try:
            snapshots = {job.id: self._engine.snapshot(job.rows, self._scheduler.steps(job.id)) for job in moved}
        except Exception:  # it is not worth the jobs
            log.exception("no snapshot could be taken")
            return
        for job in moved:
            job.steps_kept = job.steps_taken
        self._keeper.keep(snapshots, began_s, self._clock() - began_s)

    def _suspend_durable(self) -> None:
        """Give up the durable jobs, which the next start of the server finishes."""
        durable = [job for job in self._all() if job.durable]
        self._keep_snapshots(durable)
        for job in durable:
            self._give_up(job.id, Draining(), SUSPENDED)

    def _deliver(self, job: RunningJob) -> None:
        assert job.started_s is not None
        try:
            read = self._engine.images(job.rows)
        except Exception as error:
            log.exception("job %s could not be read", job.id)
            failure = EngineFailed(f"its images could not be read: {type(error).__name__}")
            self._give_up(job.id, failure, failure.code)
            return
        self._engine.remove(job.rows)
        self._forget(job)
        now_s = self._clock()
        self._metrics.job_done(job.spec.n)
        queue_s, denoise_s = job.started_s - job.submitted_s, now_s - job.started_s
        log.info("job %s done: queued %.3f s, denoised %.3f s", job.id, queue_s, denoise_s)
        job.future.set_result(JobResult(read, queue_s, job.first_step_s, denoise_s))

    def _forget(self, job: RunningJob) -> None:
        """Take a job off the books."""
        with self._gate:
            del self._jobs[job.id]
        self._admission.leave(job.id)

    def _give_up(self, job_id: str, error: ServiceError, reason: str) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        if not job.rows and not job.future.set_running_or_notify_cancel():
            self._forget(job)
            return
        saved = job.spec.n * job.spec.steps - job.steps_taken
        self._scheduler.cancel(job_id)
        if job.rows:
            self._engine.remove(job.rows)
        self._forget(job)
        if reason == SUSPENDED:
            log.info("job %s is suspended", job_id)
        else:
            self._metrics.job_given_up(reason, saved)
            log.info("job %s given up (%s), %d row-steps saved", job_id, reason, saved)
        job.future.set_exception(error)
