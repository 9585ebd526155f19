"""The worker's thread, and the calls of other threads, which reach it by commands and futures only.

Here are the queue of commands, the lock under which jobs are accepted or refused, the worker's state, and what follows
from the loop's events. loop.py runs the jobs.
"""

import logging
import queue
import threading
import time
from collections import deque
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
from tminus.service.worker.coding import TaskDone
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.loop import LOST, SUSPENDED, Ended, Event, ImageDecoded, Loop, Ticked
from tminus.service.worker.running_job import AcceptedJobs, NewJob, RunningJob
from tminus.service.worker.ticks import ReportCurrentJobs, report_nothing

log = logging.getLogger(__name__)


class Outcomes:
    """Acts on events, in the worker's thread."""

    def __init__(
        self, jobs: AcceptedJobs, admission: Admission, metrics: Metrics, on_device_lost: Callable[[str], None]
    ) -> None:
        """on_device_lost: called in any thread with a job's id, if its images cannot be read for a lost device."""
        self._jobs, self._admission, self._metrics, self._on_device_lost = jobs, admission, metrics, on_device_lost

    def act_on(self, events: deque[Event]) -> None:
        """Take all events from a queue, and act on each."""
        while events:
            match event := events.popleft():
                case Ticked():
                    self._count(event)
                case ImageDecoded(job):
                    self._admission.decoded(job.id)
                case Ended(job):
                    self._jobs.remove(job.id)
                    self._admission.leave(job.id)
                    if event.error is not None:
                        self._fail(job, event.error, event.reason)
                    elif event.result is not None:
                        self._finish(job, event.result)

    def _count(self, ticked: Ticked) -> None:
        """Take a tick's work off admission's ledger, and record its metrics."""
        end, tick, row_steps = ticked.end, ticked.end.tick, dict[str, int]()
        for job, picked in zip(tick.jobs, tick.batch.jobs, strict=True):
            row_steps[job.spec.sampler] = row_steps.get(job.spec.sampler, 0) + len(picked.steps)
        places = tick.batch.places
        self._admission.stepped(
            tick.model.number,
            tick.batch.jobs,
            places if end.is_measurement else 0,
            end.seconds,
            overlaps=tick.overlaps,
        )
        self._metrics.ticked(tick.model.engine.info.name, end.seconds, places, row_steps)
        for job in ticked.started:
            assert job.started_s is not None
            queue_s = job.started_s - job.submitted_s
            self._metrics.job_started(queue_s=queue_s, first_step_s=job.first_step_s, exemplar=job.exemplar)

    def _fail(self, job: RunningJob, error: ServiceError, reason: str | None) -> None:
        if reason in (SUSPENDED, LOST):
            log.info("job %s of request %s is %s", job.id, job.request_id, reason, extra=job.log_fields)
        elif reason is not None:
            saved = job.spec.n * job.spec.end - job.steps_taken
            self._metrics.count("tminus_jobs_aborted_total", reason)
            self._metrics.count("tminus_row_steps_saved_total", by=saved)
            what = "job %s of request %s given up (%s), %d row-steps saved"
            log.info(what, job.id, job.request_id, reason, saved, extra=job.log_fields)
        job.fail(error)

    def _finish(self, job: RunningJob, result: JobResult) -> None:
        images = job.spec.n if job.work.steps == job.spec.end else 0
        self._metrics.count("tminus_images_total", job.model.info.name, by=images)
        what = "job %s of request %s done: queued %.3f s, denoised %.3f s"
        log.info(what, job.id, job.request_id, result.queue_s, result.denoise_s, extra=job.log_fields)
        job.finish(replace(result, read=partial(self._read, result.read, job)))

    def _read(self, read: Callable[[], Pixels], job: RunningJob) -> Pixels:
        """Read a job's images in another thread, and end the worker if the device is lost.

        A GPU reports an error only when it is waited for, which may first happen here. The job is then unfinished, as
        if the server had ended before.
        """
        try:
            return read()
        except ServiceError:
            raise
        except Exception as error:
            if not job.model.engine.is_lost():
                raise
            log.exception("the images of job %s could not be read", job.id)
            self._on_device_lost(job.id)
            raise Draining from error


CRASHED = "the worker has stopped; the server's log says why"


class WorkerState:
    """Owns the flags of a worker; its threads set them."""

    def __init__(self, thread: threading.Thread, own: Sequence[Pulse], others: Sequence[Pulse]) -> None:
        """own: pulses of the worker's threads. others: of other threads; no job is taken while one of them hangs."""
        self._thread, self._own, self._others = thread, own, others
        self.is_warm, self.is_draining, self.is_closed = (threading.Event() for _ in range(3))
        self.crashed = False  # whether an error ended the thread
        self.jobs_of_the_crash = frozenset[str]()  # jobs that may have caused it
        self.autoencoder_hangs = False  # whether the autoencoder's thread still ran after it was closed

    @property
    def ready(self) -> bool:
        """Whether the warm-up is over and jobs are accepted."""
        return self.is_warm.is_set() and self.alive and not self.draining and self.stall is None

    @property
    def draining(self) -> bool:
        """Whether new jobs are refused because the worker is ending."""
        return self.is_draining.is_set()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self.is_closed.is_set()

    @property
    def hangs(self) -> bool:
        """Whether the worker was closed and a thread of it still runs."""
        return self.is_closed.is_set() and (self._thread.is_alive() or self.autoencoder_hangs)

    @property
    def stall(self) -> Stalled | None:
        """The longest hang, as the error by which jobs are refused; None while nothing hangs."""
        stalled_s, name = max((pulse.stalled_s, pulse.name) for pulse in (*self._own, *self._others))
        return Stalled(stalled_s, name) if stalled_s else None

    @property
    def stalled_s(self) -> float:
        """How long a step, a command or an image of an autoencoder has hung; 0.0 while none does."""
        return max(pulse.stalled_s for pulse in self._own)

    def check_open(self) -> None:
        """Raise the error that would refuse a job now: NotReady, Draining, Stalled or EngineFailed."""
        if self.crashed:
            raise EngineFailed(CRASHED)
        if self.draining or self.is_closed.is_set():
            raise Draining
        if not self.is_warm.is_set():
            raise NotReady
        if stall := self.stall:
            raise stall


log = logging.getLogger(__name__)

Result = TypeVar("Result")
SPARE_S = 1.0  # without a job or a command, until models do what no job waits for
CLOSE_S = 10.0  # for the tick that runs to end, when the worker is closed


class Worker:
    """Runs ticks until closed. `submit`, `cancel`, `drain` and `close` may be called from any thread."""

    def __init__(
        self,
        models: Sequence[LoadedModel],
        admission: Admission,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.perf_counter,
        report: ReportCurrentJobs = report_nothing,
        other_pulses: Sequence[Pulse] = (),
    ) -> None:
        """models: loaded at the start; admission knows their speeds. report: see Loop.

        other_pulses: of other threads; while one of them hangs, no job is taken either.
        """
        self._models = {model.number: model for model in models}  # changed and read under the gate
        self._admission, self._metrics, self._clock = admission, metrics, clock
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.jobs = AcceptedJobs(admission, clock)
        self._gate = self.jobs.gate  # a job is either queued before the thread ends, or refused
        self._loop = Loop(clock=clock, on_task_done=self._on_task_done, report=report)
        self._outcomes = Outcomes(self.jobs, admission, metrics, self._on_device_lost)
        self._pulse = Pulse("the worker", lambda: admission.longest_tick_s, clock)  # one thing is a turn of the thread
        self._thread = threading.Thread(target=self._run, name="tminus-worker", daemon=True)
        self.state = WorkerState(self._thread, (self._pulse, self._loop.autoencoder.pulse), other_pulses)

    # --- from any thread ---

    def start(self) -> None:
        """Start the thread. It is ready after its warm-up."""
        self._thread.start()

    @property
    def rows_active(self) -> int:
        """Rows in the last tick, 0 when idle."""
        return self._loop.ticks.rows_active if self._loop.ticks.has_next else 0

    def submit(self, new: NewJob) -> Ticket:
        """Accept a job; its rows step from the next tick on. Raises NotReady, Draining, ModelUnloaded, Overloaded, …"""
        self.state.check_open()
        model, now_s = self._model(new.work.model), self._clock()
        # Outside the gate: this may take milliseconds, and the worker's thread needs the gate for each job that ends.
        outlook = self._admission.enter(
            new.id, new.work, new.owner, now_s=now_s, deadline_s=new.deadline_s, has_picture=new.inputs is not None
        )
        return self._let_in(RunningJob(new, model, now_s), outlook)

    def resume(self, new: NewJob) -> Ticket:
        """Take on a durable job that an earlier process accepted, where its snapshot left it.

        Raises NotReady, Draining, and Overloaded while there are no slots.
        """
        self.state.check_open()
        now_s = self._clock()
        job = RunningJob(new, self._model(new.work.model), now_s)
        places_left = sum(map(new.work.places_left, job.first_steps))
        outlook = self._admission.readmit(new.id, new.work, new.owner, places_left=places_left)
        return self._let_in(job, outlook)

    def _let_in(self, job: RunningJob, outlook: Outlook) -> Ticket:
        job.outlook = outlook

        def accept() -> None:
            if not self.state.crashed:  # or else the job has its answer
                self._loop.accept(job)

        with self._gate:
            try:
                self.state.check_open()
                if job.model.number not in self._models:
                    raise ModelUnloaded(job.model.info.name)
            except ServiceError:
                self._admission.leave(job.id)
                raise
            self.jobs.add(job)
            self._commands.put(accept)
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
        """Forget a model, between two ticks; jobs that it still has are given up. Raises NotReady, Draining, …

        When the future has its result, admission knows no job of the model.
        """
        self.state.check_open()
        with self._gate:
            self._models.pop(number, None)  # a job that came behind this would be given to no model
        return self._post(lambda: self._loop.unload(number))

    def _model(self, number: int) -> LoadedModel:
        with self._gate:
            if (model := self._models.get(number)) is None:
                raise ModelUnloaded
            return model

    def _post(self, act: Callable[[], Result]) -> "Future[Result]":
        """Have something done in the worker's thread between two ticks."""
        future: Future[Result] = Future()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            if self.state.crashed:
                future.set_exception(EngineFailed(CRASHED))
                return
            self._loop.current.set([])
            try:
                result = act()
            except Exception as error:
                log.exception("what was asked of the engine failed")
                future.set_exception(EngineFailed(f"the engine could not do it: {type(error).__name__}"))
            else:
                self._outcomes.act_on(self._loop.events)
                future.set_result(result)

        with self._gate:
            self.state.check_open()
            self._commands.put(do)
        return future

    def run_autoencoder(self, kind: str, task: Callable[[], Result]) -> "Future[Result]":
        """Run a task of a latent model's autoencoder in its thread."""
        self.state.check_open()
        return self._loop.autoencoder.run(kind, task)

    def watch(self, job_id: str, watch: Watch) -> None:
        """Show a job to one more viewer. Nothing happens if it is not here (any more)."""

        def add() -> None:
            if (job := self._loop.find(job_id)) is not None:
                job.watches.append(watch)

        self._commands.put(add)

    def unwatch(self, job_id: str, watch: Watch) -> None:
        """Stop showing a job to a viewer."""

        def remove() -> None:
            if (job := self._loop.find(job_id)) is not None and watch in job.watches:
                job.watches.remove(watch)

        self._commands.put(remove)

    def cancel(self, job_id: str, reason: str) -> bool:
        """Free a job's rows before the next tick; False if there is no such job (any more)."""
        known = job_id in self.jobs
        self._commands.put(lambda: self._loop.give_up(job_id, JobCancelled(f"cancelled: {reason}"), reason))
        return known

    def drain(self) -> None:
        """Take no more jobs; the thread ends when the accepted ones are done. Signal handlers may call it: no lock.

        Durable jobs are not waited for: a last snapshot is taken, and they end in Draining.
        """
        self.state.is_draining.set()
        self._commands.put(lambda: None)  # wakes it if it sleeps

    def join(self) -> None:
        """Wait until the thread has ended: drained, closed or crashed."""
        self._thread.join()

    def close(self) -> bool:
        """Give up what is left and end the thread; False if it hangs in a step, and goes on hanging."""
        self.state.is_closed.set()
        self.drain()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_S)
        if self.state.hangs:
            self.jobs.fail_all(Draining())
        return not self.state.hangs

    # --- in the worker's thread ---

    def _run(self) -> None:
        state = self.state
        try:
            if not state.is_warm.is_set():
                self.warm_up()
            idle = True
            while not state.is_closed.is_set() and not (state.draining and not self._loop.has_work):
                self.take_commands(wait=idle)
                idle = not self.step()
            failure: ServiceError = Draining()
        except BaseException:  # also SystemExit, which would end the thread and nothing else
            log.exception("the worker stopped")
            state.jobs_of_the_crash |= self._loop.current.ids
            failure = EngineFailed(CRASHED)
        with self._gate:
            state.crashed = isinstance(failure, EngineFailed)
            drained = not state.crashed and not state.is_closed.is_set()
            state.is_closed.set()
        try:
            self._outcomes.act_on(self._loop.events)  # some jobs may have had their last step before a crash
        finally:
            if state.crashed:  # the engine is not to be trusted any more, but every job gets an answer
                self._loop.abandon()
                self.jobs.fail_all(failure)
        self.take_commands(wait=False)
        if drained:  # a durable job may have been queued since the last look
            self._loop.suspend_durable()
        self._loop.give_up_all(failure)
        self._outcomes.act_on(self._loop.events)
        state.autoencoder_hangs = not self._loop.autoencoder.close()  # all jobs have their answers
        self._pulse.rest()

    def warm_up(self) -> None:
        """Have each model do a tick. The thread that calls this and the two methods below is the worker's."""
        for number in tuple(self._models):  # a variable with the last model would hold it after it is unloaded
            self._pulse.begin()
            self._loop.load(self._models[number])
        self.state.is_warm.set()

    def take_commands(self, *, wait: bool) -> None:
        """Run the commands of other threads. wait: whether to sleep until there is one."""
        while wait or not self._commands.empty():
            command = self._wait_for_command() if wait else self._commands.get()
            self._pulse.begin()
            command()
            self._outcomes.act_on(self._loop.events)
            wait = False

    def _wait_for_command(self) -> Callable[[], object]:
        """Sleep until there is a command. Meanwhile models do their spare work, an item at a time."""
        patience_s = SPARE_S
        while self._loop.spare_work and not self._loop.has_work:
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
        if self.state.draining:
            self._loop.suspend_durable()
        if self._loop.events:
            self._outcomes.act_on(self._loop.events)  # clients of jobs given up do not wait for the tick
        ticked = not self.state.is_closed.is_set() and self._loop.tick()
        self._outcomes.act_on(self._loop.events)
        return ticked

    def _on_task_done(self, done: TaskDone) -> None:
        """Note that an autoencoder task is done. Called in the autoencoder's thread."""
        self._metrics.observe("tminus_autoencoder_duration_seconds", done.seconds, done.kind)
        if done.job is not None:
            self._commands.put(lambda: self._loop.on_task_done(done))

    def _on_device_lost(self, job_id: str) -> None:
        """End the worker. Called in a thread that could not read a job's images."""

        def end() -> None:
            self.state.jobs_of_the_crash |= {job_id}  # its last step may have been the cause
            # Several threads may have called this: only the first command ends the thread.
            if not self.state.is_closed.is_set():
                raise RuntimeError("the device is lost")

        self._commands.put(end)
