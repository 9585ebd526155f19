"""The one thread that owns the scheduler and the engine. The edge talks to it by commands and futures, never directly.

Decide, then act: take commands, ask the scheduler for a batch, let the engine step it, deliver what is done.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from service.admission import Admission
from service.errors import Draining, EngineFailed, InvalidField, JobCancelled, NotReady, ServiceError
from service.job import Batch, Images, JobResult, ModelInfo, SampleSpec
from service.metrics import Metrics
from service.scheduler import Scheduler

log = logging.getLogger(__name__)

WARM_UP_STEPS = 3
CRASHED = "the worker has stopped; the server's log says why"


class RowEngine(Protocol):
    """What the worker needs of an engine."""

    info: ModelInfo

    def add(self, spec: SampleSpec) -> tuple[int, ...]:
        """Give a job's rows slots and x_T. Raises ValueError for a spec the model cannot do."""

    def step(self, batch: Batch) -> None:
        """Run one tick."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def images(self, rows: Sequence[int]) -> Images:
        """Read finished rows."""

    def remove(self, rows: Sequence[int]) -> None:
        """Free one job's slots."""

    def memory_bytes(self) -> int | None:
        """Memory on the device, where that is not the process's own."""


@dataclass(slots=True)
class _Job:
    """A job in the worker's hands. Touched by its thread only, but for the future."""

    id: str
    spec: SampleSpec
    future: "Future[JobResult]"
    submitted_s: float
    rows: tuple[int, ...] = ()
    started_s: float = 0.0


class Worker:
    """Runs ticks until closed. `submit`, `cancel`, `drain` and `close` may be called from any thread."""

    def __init__(
        self,
        engine: RowEngine,
        scheduler: Scheduler,
        admission: Admission,
        metrics: Metrics,
        *,
        max_batch: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._scheduler, self._admission, self._metrics = engine, scheduler, admission, metrics
        self._max_batch, self._clock = max_batch, clock
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate = threading.Lock()  # a job is either queued before the thread ends, or refused
        self._jobs: dict[str, _Job] = {}
        self._rows_active = 0
        self._crashed = False
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
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._closed.is_set()

    @property
    def rows_active(self) -> int:
        """Rows in the last tick, 0 when idle."""
        return self._rows_active

    def submit(self, job_id: str, spec: SampleSpec) -> "Future[JobResult]":
        """Accept a job; its rows step from the next tick on. Raises NotReady, Draining, Overloaded."""
        with self._gate:
            if self._crashed:
                raise EngineFailed(CRASHED)
            if self._draining.is_set() or self._closed.is_set():
                raise Draining
            if not self._ready.is_set():
                raise NotReady
            self._admission.enter(spec)
            job = _Job(job_id, spec, Future(), self._clock())
            self._commands.put(lambda: self._accept(job))
        return job.future

    def cancel(self, job_id: str, reason: str) -> None:
        """Free a job's rows before the next tick. A job that is done or unknown is left as it is."""
        self._commands.put(lambda: self._give_up(job_id, JobCancelled(f"cancelled: {reason}"), reason))

    def drain(self) -> None:
        """Take no more jobs; the thread ends when the accepted ones are done. Signal handlers may call it: no lock."""
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
            while not self._closed.is_set() and not (self._draining.is_set() and self._scheduler.num_rows == 0):
                self._take_commands()
                batch = self._scheduler.next_batch()
                if batch is not None and not self._closed.is_set():
                    self._tick(batch)
            failure: ServiceError = Draining()
        except Exception:
            log.exception("the worker stopped")
            failure = EngineFailed(CRASHED)
        with self._gate:
            self._crashed = isinstance(failure, EngineFailed)
            self._closed.set()
        if self._crashed:  # the engine is not to be trusted any more, but everybody gets an answer
            for job in self._jobs.values():
                job.future.set_exception(failure)
            self._jobs.clear()
        self._take_commands(wait=False)
        for job_id in list(self._jobs):
            self._give_up(job_id, failure, failure.code)

    def _warm_up(self) -> None:
        """Run a few full ticks, so that the first request finds warm code and admission knows what a place costs."""
        info = self._engine.info
        labels = (0,) * self._max_batch if info.conditional else None
        spec = SampleSpec(
            n=self._max_batch,
            steps=min(WARM_UP_STEPS, info.num_timesteps),
            sampler=info.default_sampler,
            eta=0.0,
            seed=0,
            index=0,
            class_labels=labels,
            guidance=1.0,
            clip=info.clip,
        )
        rows = self._engine.add(spec)
        seconds = []
        for step in range(spec.steps):
            started = self._clock()
            self._engine.step(Batch(rows, (step,) * len(rows), ()))
            self._engine.synchronize()
            seconds.append(self._clock() - started)
        self._engine.remove(rows)
        self._admission.calibrate(min(seconds) / len(rows))
        log.info("ready: a full tick of %d places takes %.1f ms", len(rows), min(seconds) * 1e3)

    def _take_commands(self, wait: bool = True) -> None:
        """Do what other threads asked for. With nothing to step, sleep until somebody asks."""
        if wait and self._scheduler.num_rows == 0:
            self._rows_active = 0
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _accept(self, job: _Job) -> None:
        if not job.future.set_running_or_notify_cancel():  # from here on only the worker ends it
            self._admission.leave(job.spec, job.spec.work)
            return
        if self._crashed:
            job.future.set_exception(EngineFailed(CRASHED))
            return
        try:
            job.rows = self._engine.add(job.spec)
        except ValueError as error:
            self._admission.leave(job.spec, job.spec.work)
            job.future.set_exception(InvalidField(str(error), field="sampler", value=job.spec.sampler))
            return
        except Exception as error:
            log.exception("job %s could not be added", job.id)
            self._admission.leave(job.spec, job.spec.work)
            job.future.set_exception(EngineFailed(f"this job could not be started: {type(error).__name__}"))
            return
        self._jobs[job.id] = job
        self._scheduler.add(job.id, job.rows, job.spec.steps, job.spec.places_per_row)
        log.info("job %s accepted: %s", job.id, job.spec)

    def _tick(self, batch: Batch) -> None:
        started_s = self._clock()
        self._rows_active = len(batch.rows)
        try:
            self._engine.step(batch)
            self._engine.synchronize()
        except Exception as error:  # whatever the network raised: these jobs are lost, the server is not
            log.exception("tick of %d rows failed", len(batch.rows))
            for job_id in self._scheduler.rows_by_job(batch):
                failure = EngineFailed(f"a step of this job failed: {type(error).__name__}")
                self._give_up(job_id, failure, "engine_failed")
            return
        now_s = self._clock()
        self._admission.stepped(batch.places, now_s - started_s)
        row_steps: dict[str, int] = {}
        for job_id, count in self._scheduler.rows_by_job(batch).items():
            sampler = self._jobs[job_id].spec.sampler
            row_steps[sampler] = row_steps.get(sampler, 0) + count
        self._metrics.ticked(now_s - started_s, batch.places, row_steps)
        advance = self._scheduler.advance(batch)
        for job_id in advance.started:
            job = self._jobs[job_id]
            job.started_s = started_s
            self._metrics.job_started(queue_s=started_s - job.submitted_s, first_step_s=now_s - job.submitted_s)
        for job_id in advance.finished:
            self._deliver(self._jobs[job_id])

    def _deliver(self, job: _Job) -> None:
        try:
            images = self._engine.images(job.rows)
        except Exception as error:
            log.exception("job %s could not be read", job.id)
            self._give_up(
                job.id, EngineFailed(f"its images could not be read: {type(error).__name__}"), "engine_failed"
            )
            return
        self._engine.remove(job.rows)
        self._admission.leave(job.spec)
        del self._jobs[job.id]
        now_s = self._clock()
        self._metrics.job_done(job.spec.n)
        queue_s, denoise_s = job.started_s - job.submitted_s, now_s - job.started_s
        log.info("job %s done: queued %.3f s, denoised %.3f s", job.id, queue_s, denoise_s)
        job.future.set_result(JobResult(images, queue_s, denoise_s))

    def _give_up(self, job_id: str, error: ServiceError, reason: str) -> None:
        job = self._jobs.get(job_id)
        if job is None:
            return
        work_left = self._scheduler.cancel(job_id)
        self._engine.remove(job.rows)
        self._admission.leave(job.spec, work_left)
        del self._jobs[job_id]
        self._metrics.job_given_up(reason, work_left // job.spec.places_per_row)
        log.info("job %s given up (%s), %d row-steps saved", job_id, reason, work_left // job.spec.places_per_row)
        job.future.set_exception(error)
