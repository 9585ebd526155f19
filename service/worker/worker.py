"""The worker's thread, and what other threads call: they talk to it by commands and futures, never directly.

What the thread does with jobs is in loop.py. Here are the queue of commands, and the lock under which jobs are let in
or refused.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import TypeVar

from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import Draining, EngineFailed, JobCancelled, NotReady, ServiceError, Stalled
from tminus.service.metrics import Metrics
from tminus.service.preview import Watch
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.spec import Inputs, SampleSpec, Snapshot
from tminus.service.work import JobStatus, Outlook, Ticket, work_of
from tminus.service.worker.loop import Loop
from tminus.service.worker.recording import Recording
from tminus.service.worker.running_job import RunningJob
from tminus.service.worker.snapshot_pace import Keeper

log = logging.getLogger(__name__)

Result = TypeVar("Result")
STALL_S, STALL_TICKS = 60.0, 20.0  # a tick that takes longer than both has stalled: the server is not ready
CLOSE_S = 10.0  # for the tick that runs to end, when the worker is closed
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
        """Take what it works with. keeper: takes the snapshots of durable jobs."""
        self._model, self._admission, self._clock = engine.info, admission, clock
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._gate = threading.Lock()  # a job is either queued before the thread ends, or refused
        # Every job that was accepted and has not ended, for all threads: changed and read under the gate. The loop owns
        # the jobs of which the engine holds rows; here are also those whose command is still in the queue.
        self._jobs: dict[str, RunningJob] = {}
        self._loop = Loop(
            engine,
            scheduler,
            admission,
            metrics,
            keeper=keeper,
            clock=clock,
            on_end=self._remove,
            post=self._commands.put,
        )
        self._crashed = False
        self._jobs_of_the_crash = frozenset[str]()
        self._ready, self._draining, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tminus-worker", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        """Start the thread. It is ready after its warm-up."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the warm-up is over and jobs are accepted."""
        return self._ready.is_set() and self.alive and not self._draining.is_set() and not self.stalled_s

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused because the worker is ending."""
        return self._draining.is_set()

    @property
    def crashed(self) -> bool:
        """Whether the thread ended by an error of its own."""
        return self._crashed

    @property
    def jobs_of_the_crash(self) -> frozenset[str]:
        """The jobs that were being worked on when it crashed."""
        return self._jobs_of_the_crash

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._closed.is_set()

    @property
    def rows_active(self) -> int:
        """Rows in the last tick, 0 when idle."""
        return self._loop.rows_active if self._loop.has_ticks else 0

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

        deadline_s: counts from now; one that cannot be met is refused, one that passes ends the job in DeadlinePassed.
        watch: is given frames of the job. inputs: the pixels whose hashes are in the spec. durable: whether snapshots
        are kept of the job. recording: is given the rows at the steps that it wants.
        """
        self._check_open()
        work, now_s = work_of(spec, self._model), self._clock()
        # Outside the gate: this may take milliseconds, and the worker's thread needs the gate for every job that ends.
        outlook = self._admission.enter(
            job_id, work, now_s=now_s, deadline_s=deadline_s, has_picture=inputs is not None
        )
        job = RunningJob(
            job_id,
            spec,
            work,
            now_s,
            deadline_s,
            durable=durable,
            inputs=inputs,
            recording=recording,
            watches=[] if watch is None else [watch],
        )
        return self._let_in(job, outlook)

    def resume(
        self, job_id: str, spec: SampleSpec, deadline_s: float | None, inputs: Inputs | None, snapshot: Snapshot | None
    ) -> Ticket:
        """Take on a durable job that an earlier process accepted, where its snapshot left it.

        Raises NotReady, Draining, and Overloaded while there are no slots; nothing else refuses it.
        """
        self._check_open()
        work = work_of(spec, self._model)
        job = RunningJob(job_id, spec, work, self._clock(), deadline_s, durable=True, inputs=inputs, snapshot=snapshot)
        outlook = self._admission.readmit(job_id, work, places_left=sum(map(work.places_left, job.first_steps)))
        return self._let_in(job, outlook)

    def _let_in(self, job: RunningJob, outlook: Outlook) -> Ticket:
        job.outlook = outlook
        with self._gate:
            try:
                self._check_open()
            except ServiceError:
                self._admission.leave(job.id)
                raise
            self._jobs[job.id] = job
            self._commands.put(lambda: self._accept(job))
        return Ticket(job.future, outlook)

    def run(self, act: Callable[[RowEngine], Result]) -> "Future[Result]":
        """Do something short with the engine between two ticks. Raises NotReady, Draining, …"""
        future: Future[Result] = Future()
        with self._gate:
            self._check_open()
            self._commands.put(lambda: self._act(act, future))
        return future

    def run_beside(self, kind: str, task: Callable[[], Result]) -> "Future[Result]":
        """Do something of a latent model's autoencoder, in the thread that does it for jobs."""
        self._check_open()
        return self._loop.coded.run(kind, task)

    def _check_open(self) -> None:
        if self._crashed:
            raise EngineFailed(CRASHED)
        if self._draining.is_set() or self._closed.is_set():
            raise Draining
        if not self._ready.is_set():
            raise NotReady
        if stalled_s := self.stalled_s:
            raise Stalled(stalled_s)

    def statuses(self) -> list[JobStatus]:
        """Every job that is waiting or running, in order of arrival, with its position and when it should be done."""
        outlooks = self._admission.outlooks(self._clock())
        with self._gate:
            jobs, now_s = list(self._jobs.values()), self._clock()
        return [job.status(outlooks[job.id], now_s) for job in jobs if job.id in outlooks]

    def quick_statuses(self, forecast: Mapping[str, JobStatus]) -> list[JobStatus]:
        """Like `statuses`, with position and ETA from an earlier forecast, or from acceptance for newer jobs."""
        with self._gate:
            jobs, now_s = list(self._jobs.values()), self._clock()
        return [job.quick_status(forecast, now_s) for job in jobs]

    def quick_status(self, job_id: str, forecast: Mapping[str, JobStatus]) -> JobStatus | None:
        """One of them; None if it is not here (any more)."""
        with self._gate:
            job = self._jobs.get(job_id)
        return job.quick_status(forecast, self._clock()) if job is not None else None

    def watch(self, job_id: str, watch: Watch) -> None:
        """Show a job to one more viewer. Nothing happens if it is not here (any more)."""
        self._commands.put(lambda: self._loop.watch(job_id, watch))

    def unwatch(self, job_id: str, watch: Watch) -> None:
        """Stop showing a job to a viewer."""
        self._commands.put(lambda: self._loop.unwatch(job_id, watch))

    def cancel(self, job_id: str, reason: str) -> bool:
        """Free a job's rows before the next tick; False if there is no such job (any more)."""
        with self._gate:
            known = job_id in self._jobs
        self._commands.put(lambda: self._loop.give_up(job_id, JobCancelled(f"cancelled: {reason}"), reason))
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

    def close(self) -> bool:
        """Give up what is left and end the thread; False if it hangs in a step, and goes on hanging."""
        self._draining.set()
        self._closed.set()
        self._commands.put(lambda: None)  # wakes it if it sleeps
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)
        if self.hangs:
            self._answer_all(Draining())
        return not self.hangs

    @property
    def hangs(self) -> bool:
        """Whether it was closed and its thread, or that of the autoencoder, still runs."""
        return self._closed.is_set() and (self._thread.is_alive() or self._loop.coding_hangs)

    @property
    def stalled_s(self) -> float:
        """For how long a tick, or one image of an autoencoder, has run that is far over its time; 0.0 where none is."""
        began_s = self._loop.tick_began_s
        took_s = 0.0 if began_s is None else self._clock() - began_s
        if took_s <= max(STALL_S, STALL_TICKS * self._admission.longest_tick_s):
            took_s = 0.0
        coding_began_s = self._loop.coded.task_began_s
        coding_s = 0.0 if coding_began_s is None else time.perf_counter() - coding_began_s
        return max(took_s, coding_s if coding_s > STALL_S else 0.0)

    # --- in the worker's thread ---

    def _run(self) -> None:
        loop = self._loop
        try:
            loop.warm_up()
            self._ready.set()
            while not self._closed.is_set() and not (self._draining.is_set() and not loop.has_work):
                self._take_commands()
                loop.end_overdue()
                if self._draining.is_set():
                    loop.suspend_durable()
                if not self._closed.is_set():
                    loop.tick()
            failure: ServiceError = Draining()
        except BaseException:  # also SystemExit, which would end the thread and nothing else
            log.exception("the worker stopped")
            self._jobs_of_the_crash = loop.current_jobs
            failure = EngineFailed(CRASHED)
        with self._gate:
            self._crashed = isinstance(failure, EngineFailed)
            drained = not self._crashed and not self._closed.is_set()
            self._closed.set()
        if self._crashed:  # the engine is not to be trusted any more, but every job gets an answer
            self._loop.abandon()
            self._answer_all(failure)
        self._take_commands(wait=False)
        if drained:  # a durable job may have been queued since the last look
            loop.suspend_durable()
        loop.give_up_all(failure)

    def _take_commands(self, wait: bool = True) -> None:
        """Do what other threads asked for. With nothing to step, sleep until a command comes."""
        if wait and not self._loop.has_ticks:
            self._commands.get()()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _accept(self, job: RunningJob) -> None:
        if not self._crashed:  # or else the job has its answer
            self._loop.accept(job)

    def _act(self, act: Callable[[RowEngine], Result], future: "Future[Result]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        if self._crashed:
            future.set_exception(EngineFailed(CRASHED))
            return
        self._loop.run(act, future)

    def _remove(self, job_id: str) -> None:
        with self._gate:
            self._jobs.pop(job_id, None)  # it is not here if its client was answered while the worker hung

    def _answer_all(self, failure: ServiceError) -> None:
        """End every job for its clients, without a call of the engine."""
        with self._gate:
            jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            job.fail(failure)
