"""The worker's thread, and what other threads call: they talk to it by commands and futures, never directly.

What the thread does with jobs is in loop.py. Here are the queue of commands, the lock under which jobs are let in or
refused, and what is done about the events of the loop: whoever waits is answered, admission and metrics are told.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TypeVar

from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import Draining, EngineFailed, JobCancelled, ModelUnloaded, NotReady, ServiceError, Stalled
from tminus.service.metrics import Metrics
from tminus.service.preview import Watch
from tminus.service.scheduling.admission import Admission
from tminus.service.spec import Pixels
from tminus.service.threads import Pulse
from tminus.service.work import JobResult, Outlook, Ticket
from tminus.service.worker.coding import Coded
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.loop import LOST, SUSPENDED, Ended, ImageDecoded, Loop, Note, Ticked, note_nothing
from tminus.service.worker.running_job import AcceptedJobs, NewJob, RunningJob

log = logging.getLogger(__name__)

Result = TypeVar("Result")
SPARE_S = 1.0  # without a job or a command, until models do what no job waits for
CLOSE_S = 10.0  # for the tick that runs to end, when the worker is closed
CRASHED = "the worker has stopped; the server's log says why"


class Worker:
    """Runs ticks until closed. `submit`, `cancel`, `drain` and `close` may be called from any thread."""

    def __init__(
        self,
        models: Sequence[LoadedModel],
        admission: Admission,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.perf_counter,
        note: Note = note_nothing,
        beside: Sequence[Pulse] = (),
    ) -> None:
        """Take what it works with. models: those that it begins with; admission knows their speeds. note: as Loop's.

        beside: of other threads; while one of these hangs, no job is taken either.
        """
        self._models = {model.number: model for model in models}  # changed and read under the gate
        self._admission, self._metrics, self._clock = admission, metrics, clock
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.jobs = AcceptedJobs(admission, clock)
        self._gate = self.jobs.gate  # a job is either queued before the thread ends, or refused
        self._loop = Loop(clock=clock, tell=self._coded, note=note)
        self.crashed = False  # whether the thread ended by an error of its own
        self.jobs_of_the_crash = frozenset[str]()  # those that were being worked on then
        self._pulse = Pulse("the worker", lambda: admission.longest_tick_s, clock)  # one thing is a turn of the thread
        self._pulses = (self._pulse, self._loop.coding.pulse, *beside)
        self._ready, self._draining, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tminus-worker", daemon=True)

    # --- from any thread ---

    def start(self) -> None:
        """Start the thread. It is ready after its warm-up."""
        self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether the warm-up is over and jobs are accepted."""
        return self._ready.is_set() and self.alive and not self._draining.is_set() and self.stall is None

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused because the worker is ending."""
        return self._draining.is_set()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._closed.is_set()

    @property
    def rows_active(self) -> int:
        """Rows in the last tick, 0 when idle."""
        return self._loop.rows_active if self._loop.has_ticks else 0

    def submit(self, new: NewJob) -> Ticket:
        """Accept a job; its rows step from the next tick on. Raises NotReady, Draining, ModelUnloaded, Overloaded, …"""
        self.check_open()
        model, now_s = self._model(new.work.model), self._clock()
        # Outside the gate: this may take milliseconds, and the worker's thread needs the gate for every job that ends.
        outlook = self._admission.enter(
            new.id, new.work, new.owner, now_s=now_s, deadline_s=new.deadline_s, has_picture=new.inputs is not None
        )
        return self._let_in(RunningJob(new, model, now_s), outlook)

    def resume(self, new: NewJob) -> Ticket:
        """Take on a durable job that an earlier process accepted, where its snapshot left it.

        Raises NotReady, Draining, and Overloaded while there are no slots.
        """
        self.check_open()
        now_s = self._clock()
        job = RunningJob(new, self._model(new.work.model), now_s)
        places_left = sum(map(new.work.places_left, job.first_steps))
        outlook = self._admission.readmit(new.id, new.work, new.owner, places_left=places_left)
        return self._let_in(job, outlook)

    def _let_in(self, job: RunningJob, outlook: Outlook) -> Ticket:
        job.outlook = outlook
        with self._gate:
            try:
                self.check_open()
                if job.model.number not in self._models:
                    raise ModelUnloaded(job.model.info.name)
            except ServiceError:
                self._admission.leave(job.id)
                raise
            self.jobs.add(job)
            self._commands.put(lambda: self._accept(job))
        return Ticket(job.future, outlook)

    def run(self, act: Callable[[RowEngine], Result], *, model: int = 0) -> "Future[Result]":
        """Do something short with an engine between two ticks. Raises NotReady, Draining, ModelUnloaded, …"""
        engine = self._model(model).engine
        return self._post(lambda: act(engine))

    def load(self, model: LoadedModel) -> "Future[None]":
        """Take on one more model, between two ticks; admission knows its speed. Raises NotReady, Draining, …"""

        def put() -> None:
            self._loop.load(model)
            with self._gate:
                self._models[model.number] = model

        return self._post(put)

    def unload(self, number: int) -> "Future[None]":
        """Forget a model, between two ticks; jobs that it still has are given up. Raises NotReady, Draining, …"""

        def forget() -> None:
            self._loop.unload(number)
            self._act_on_events()  # whoever waits for the future has admission forget the model, which must be empty

        self.check_open()
        with self._gate:
            self._models.pop(number, None)  # a job that came behind this would be given to no model
        return self._post(forget)

    def _model(self, number: int) -> LoadedModel:
        with self._gate:
            if (model := self._models.get(number)) is None:
                raise ModelUnloaded
            return model

    def _post(self, act: Callable[[], Result]) -> "Future[Result]":
        """Have something done in the worker's thread between two ticks."""
        future: Future[Result] = Future()
        with self._gate:
            self.check_open()
            self._commands.put(lambda: self._act(act, future))
        return future

    def run_beside(self, kind: str, task: Callable[[], Result]) -> "Future[Result]":
        """Do something of a latent model's autoencoder, in the thread that does it for jobs."""
        self.check_open()
        return self._loop.coding.run(kind, task)

    def check_open(self) -> None:
        """Raise what a job would be refused with now: NotReady, Draining, Stalled or EngineFailed."""
        if self.crashed:
            raise EngineFailed(CRASHED)
        if self._draining.is_set() or self._closed.is_set():
            raise Draining
        if not self._ready.is_set():
            raise NotReady
        if stall := self.stall:
            raise stall

    def watch(self, job_id: str, watch: Watch) -> None:
        """Show a job to one more viewer. Nothing happens if it is not here (any more)."""
        self._commands.put(lambda: self._loop.watch(job_id, watch))

    def unwatch(self, job_id: str, watch: Watch) -> None:
        """Stop showing a job to a viewer."""
        self._commands.put(lambda: self._loop.unwatch(job_id, watch))

    def cancel(self, job_id: str, reason: str) -> bool:
        """Free a job's rows before the next tick; False if there is no such job (any more)."""
        known = job_id in self.jobs
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
    def stall(self) -> Stalled | None:
        """What has hung for longest, as the error by which jobs are refused; None while nothing hangs.

        One thing of the worker's thread is a command, or a tick with all that follows from it.
        """
        stalled_s, name = max((pulse.stalled_s, pulse.name) for pulse in self._pulses)
        return Stalled(stalled_s, name) if stalled_s else None

    @property
    def stalled_s(self) -> float:
        """How long a step, a command or an image of an autoencoder has hung; 0.0 while none does."""
        return max(self._pulse.stalled_s, self._loop.coding.pulse.stalled_s)

    # --- in the worker's thread ---

    def _run(self) -> None:
        try:
            if not self._ready.is_set():
                self.warm_up()
            idle = True
            while not self._closed.is_set() and not (self._draining.is_set() and not self._loop.has_work):
                self.take_commands(wait=idle)
                idle = not self.step()
            failure: ServiceError = Draining()
        except BaseException:  # also SystemExit, which would end the thread and nothing else
            log.exception("the worker stopped")
            self.jobs_of_the_crash |= self._loop.current_jobs
            failure = EngineFailed(CRASHED)
        with self._gate:
            self.crashed = isinstance(failure, EngineFailed)
            drained = not self.crashed and not self._closed.is_set()
            self._closed.set()
        try:
            self._act_on_events()  # some jobs may have had their last step before a crash
        finally:
            if self.crashed:  # the engine is not to be trusted any more, but every job gets an answer
                self._loop.abandon()
                self._answer_all(failure)
        self.take_commands(wait=False)
        if drained:  # a durable job may have been queued since the last look
            self._loop.suspend_durable()
        self._loop.give_up_all(failure)
        self._act_on_events()
        self._loop.close()
        self._pulse.rest()

    def warm_up(self) -> None:
        """Have each model do a tick. Whoever calls this, and the two below, is the worker's thread."""
        for number in tuple(self._models):  # a variable with the last model would hold it after it is unloaded
            self._pulse.begin()
            self._loop.load(self._models[number])
        self._ready.set()

    def take_commands(self, *, wait: bool) -> None:
        """Do what other threads asked for. wait: whether to sleep until there is something."""
        while wait or not self._commands.empty():
            command = self._wait_for_command() if wait else self._commands.get()
            self._pulse.begin()
            command()
            self._act_on_events()
            wait = False

    def _wait_for_command(self) -> Callable[[], None]:
        """Sleep until there is something to do; models that have spare work do it meanwhile, a portion at a time."""
        patience_s = SPARE_S
        while self._loop.has_spare_work:
            self._pulse.rest()
            with suppress(queue.Empty):
                return self._commands.get(timeout=patience_s)
            self._pulse.begin()
            self._loop.do_spare_work()
            patience_s = 0.0
        self._pulse.rest()
        return self._commands.get()

    def step(self) -> bool:
        """Do a tick, and what is due before it; False if there was none to do."""
        self._pulse.begin()
        self._loop.end_overdue()
        if self._draining.is_set():
            self._loop.suspend_durable()
        if self._loop.events:
            self._act_on_events()  # whoever was given up does not wait for the tick
        ticked = not self._closed.is_set() and self._loop.tick()
        self._act_on_events()
        return ticked

    def _accept(self, job: RunningJob) -> None:
        if not self.crashed:  # or else the job has its answer
            self._loop.accept(job)

    def _act(self, act: Callable[[], Result], future: "Future[Result]") -> None:
        if not future.set_running_or_notify_cancel():
            return
        if self.crashed:
            future.set_exception(EngineFailed(CRASHED))
            return
        self._loop.run(act, future)

    def _coded(self, coded: Coded) -> None:
        """Note that a task of the coding thread is done. Called in that thread."""
        self._metrics.coded(coded.kind, coded.seconds)
        if coded.job is not None:
            self._commands.put(lambda: self._loop.coded(coded))

    # --- what came of it ---

    def _act_on_events(self) -> None:
        events = self._loop.events
        while events:
            match event := events.popleft():
                case Ticked():
                    self._count(event)
                case ImageDecoded(job):
                    self._admission.decoded(job.id)
                case Ended(job):
                    self.jobs.remove(job.id)
                    self._admission.leave(job.id)
                    if event.error is not None:
                        self._tell_failed(job, event.error, event.reason)
                    elif event.result is not None:
                        self._tell_done(job, event.result)

    def _count(self, ticked: Ticked) -> None:
        """Take a tick's work off the ledger of admission, and count its steps."""
        tick, row_steps = ticked.tick, dict[str, int]()
        for job, picked in zip(tick.jobs, tick.batch.jobs, strict=True):
            row_steps[job.spec.sampler] = row_steps.get(job.spec.sampler, 0) + len(picked.steps)
        places = tick.batch.places
        self._admission.stepped(
            tick.model.number,
            tick.batch.jobs,
            places if ticked.tells else 0,
            ticked.seconds,
            overlaps=tick.overlaps,
        )
        self._metrics.ticked(tick.model.engine.info.name, ticked.seconds, places, row_steps)
        for job in ticked.started:
            assert job.started_s is not None
            queue_s = job.started_s - job.submitted_s
            self._metrics.job_started(queue_s=queue_s, first_step_s=job.first_step_s, exemplar=job.exemplar)

    def _tell_failed(self, job: RunningJob, error: ServiceError, reason: str | None) -> None:
        if reason in (SUSPENDED, LOST):
            log.info("job %s of request %s is %s", job.id, job.request_id, reason, extra=job.log_fields)
        elif reason is not None:
            saved = job.spec.n * job.spec.end - job.steps_taken
            self._metrics.job_given_up(reason, saved)
            what = "job %s of request %s given up (%s), %d row-steps saved"
            log.info(what, job.id, job.request_id, reason, saved, extra=job.log_fields)
        job.fail(error)

    def _tell_done(self, job: RunningJob, result: JobResult) -> None:
        self._metrics.job_done(job.model.info.name, job.spec.n if job.work.steps == job.spec.end else 0)
        what = "job %s of request %s done: queued %.3f s, denoised %.3f s"
        log.info(what, job.id, job.request_id, result.queue_s, result.denoise_s, extra=job.log_fields)
        job.finish(replace(result, read=partial(self._read, result.read, job)))

    def _read(self, read: Callable[[], Pixels], job: RunningJob) -> Pixels:
        """Read a job's images in another thread, and end the worker where the device is lost.

        A GPU tells of an error when it is waited for, which may be here first. What was to be read is then as
        unfinished as if the server had ended before.
        """
        try:
            return read()
        except ServiceError:
            raise
        except Exception as error:
            if not job.model.engine.is_lost():
                raise
            log.exception("what was made could not be read")
            self._commands.put(lambda: self._end_for_lost_device(job.id))
            raise Draining from error

    def _end_for_lost_device(self, job_id: str) -> None:
        self.jobs_of_the_crash |= {job_id}  # its last step may have been the cause
        if not self._closed.is_set():  # several may have read; what waits behind their commands gets an answer too
            raise RuntimeError("the device is lost")

    def _answer_all(self, failure: ServiceError) -> None:
        """End every job for its clients, without a call of the engine."""
        for job in self.jobs.remove_all():
            job.fail(failure)
