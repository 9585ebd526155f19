"""The worker's thread. Other threads use it only through commands and futures.

This module has the queue of commands, the lock for accepting jobs, the worker's state, and the handlers of the loop's
events. loop.py runs the jobs.
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
    """Handles the loop's events, in the worker's thread."""

    def __init__(
        self, jobs: AcceptedJobs, admission: Admission, metrics: Metrics, on_device_lost: Callable[[str], None]
    ) -> None:
        """on_device_lost: called with the id of a job if its images cannot be read because the device is lost.

        The call may come from any thread.
        """
        self._jobs, self._admission, self._metrics, self._on_device_lost = jobs, admission, metrics, on_device_lost

    def act_on(self, events: deque[Event]) -> None:
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
        """Subtract a tick's work from the ledger of Admission, and record metrics."""
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
        if tick.model.watch is not None and end.is_measurement and end.error is None:
            tick.model.watch.ticked(tick.model.info.name, places, end.seconds, overlaps=tick.overlaps)
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
        """Read a job's images, in any thread. If the device is lost, end the worker.

        A GPU reports an error only when a thread waits for it, and this may be the first time. The job then fails with
        Draining, as if the server had shut down before the end of the job.
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
    """The state of a worker. The worker's threads set it, and any thread may read it."""

    def __init__(self, thread: threading.Thread, own: Sequence[Pulse], others: Sequence[Pulse]) -> None:
        """own: pulses of the worker's threads. others: pulses of other threads.

        While any of these threads hangs, no job is accepted.
        """
        self._thread, self._own, self._others = thread, own, others
        self.is_warm, self.is_draining, self.is_closed = (threading.Event() for _ in range(3))
        self.crashed = False  # True if an error has ended the thread
        self.jobs_of_the_crash = frozenset[str]()  # ids of the jobs that may have caused the crash
        self.autoencoder_hangs = False  # True if the autoencoder's thread did not end when it was closed

    @property
    def ready(self) -> bool:
        """True if jobs are accepted."""
        return self.is_warm.is_set() and self.alive and not self.draining and self.stall is None

    @property
    def draining(self) -> bool:
        """True if the worker is ending, and so refuses new jobs."""
        return self.is_draining.is_set()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.is_closed.is_set()

    @property
    def hangs(self) -> bool:
        """True if the worker was closed, but one of its threads still runs."""
        return self.is_closed.is_set() and (self._thread.is_alive() or self.autoencoder_hangs)

    @property
    def stall(self) -> Stalled | None:
        """The error for new jobs while a thread hangs; otherwise None. It names the longest hang."""
        stalled_s, name = max((pulse.stalled_s, pulse.name) for pulse in (*self._own, *self._others))
        return Stalled(stalled_s, name) if stalled_s else None

    @property
    def stalled_s(self) -> float:
        """How many seconds a tick, command or autoencoder task has hung; 0.0 if none hangs."""
        return max(pulse.stalled_s for pulse in self._own)

    def check_open(self) -> None:
        """Raise NotReady, Draining, Stalled or EngineFailed unless the worker accepts jobs."""
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
SPARE_S = 1.0  # idle seconds before a model's spare work begins
CLOSE_S = 10.0  # maximum seconds that `close` waits for the running tick


class Worker:
    """Runs ticks until closed. Any thread may call `submit`, `cancel`, `drain` and `close`."""

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
        """models: the models to load at the start. Admission must already know their speeds. report: see Loop.

        other_pulses: pulses of other threads. While one of these threads hangs, no job is accepted.
        """
        self._models = {model.number: model for model in models}  # hold `_gate` to use it, except during the warm-up
        self._admission, self._metrics, self._clock = admission, metrics, clock
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.jobs = AcceptedJobs(admission, clock)
        self._gate = self.jobs.gate  # held so that no job is queued after the thread has ended
        self._loop = Loop(clock=clock, on_task_done=self._on_task_done, report=report)
        self._outcomes = Outcomes(self.jobs, admission, metrics, self._on_device_lost)
        self._pulse = Pulse("the worker", lambda: admission.longest_tick_s, clock)  # restarted by each command and tick
        self._thread = threading.Thread(target=self._run, name="tminus-worker", daemon=True)
        self.state = WorkerState(self._thread, (self._pulse, self._loop.autoencoder.pulse), other_pulses)

    # --- from any thread ---

    def start(self) -> None:
        """Start the thread. It accepts jobs once it has warmed up."""
        self._thread.start()

    @property
    def rows_active(self) -> int:
        """Number of rows in the last tick; 0 if the worker is idle."""
        return self._loop.ticks.rows_active if self._loop.ticks.has_next else 0

    def submit(self, new: NewJob) -> Ticket:
        """Accept a job. Its rows step from the next tick on.

        Raises NotReady, Draining, Stalled, EngineFailed, ModelUnloaded, Overloaded, DeadlineUnmeetable or InvalidField.
        """
        self.state.check_open()
        model, now_s = self._model(new.work.model), self._clock()
        # Do not hold `_gate` during this call. It can take milliseconds, and the worker needs `_gate` to end a job.
        outlook = self._admission.enter(
            new.id,
            new.work,
            new.owner,
            now_s=now_s,
            deadline_s=new.deadline_s,
            has_picture=new.inputs is not None,
            best=new.best,
        )
        return self._let_in(RunningJob(new, model, now_s), outlook)

    def best_in_time(self, choices: Sequence[NewJob]) -> int:
        """Return the index of the best of several versions of a job that meets its deadline. Submits nothing.

        choices: from the best setting to the fastest. Raises the errors of Admission.best_in_time.
        """
        first = choices[0]
        assert first.deadline_s is not None
        return self._admission.best_in_time(
            [new.work for new in choices],
            first.owner,
            now_s=self._clock(),
            deadline_s=first.deadline_s,
            has_picture=first.inputs is not None,
        )

    def resume(self, new: NewJob) -> Ticket:
        """Resume a durable job from its snapshot. The job was accepted by an earlier process.

        Raises ModelUnloaded, Overloaded if no slots are free, and the errors of `WorkerState.check_open`.
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
            if not self.state.crashed:  # a crash has already failed the job
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
        """Call a function with a model's engine, between two ticks. The function must be short.

        Raises ModelUnloaded, and the errors of `WorkerState.check_open`.
        """
        engine = self._model(model).engine
        return self._post(lambda: act(engine))

    def load(self, model: LoadedModel) -> "Future[None]":
        """Add a model between two ticks. Admission must already know the model's speed.

        Raises the errors of `WorkerState.check_open`.
        """

        def put() -> None:
            self._loop.load(model)
            with self._gate:
                self._models[model.number] = model

        return self._post(put)

    def unload(self, number: int) -> "Future[None]":
        """Remove a model between two ticks, and give up its remaining jobs.

        Once the future is done, Admission has no job of the model. Raises the errors of `WorkerState.check_open`.
        """
        self.state.check_open()
        with self._gate:
            self._models.pop(number, None)  # from now on, no job can be queued for the model
        return self._post(lambda: self._loop.unload(number))

    def _model(self, number: int) -> LoadedModel:
        with self._gate:
            if (model := self._models.get(number)) is None:
                raise ModelUnloaded
            return model

    def _post(self, act: Callable[[], Result]) -> "Future[Result]":
        """Call a function in the worker's thread between two ticks."""
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
        """Run a task in the autoencoder's thread. Raises the errors of `WorkerState.check_open`."""
        self.state.check_open()
        return self._loop.autoencoder.run(kind, task)

    def watch(self, job_id: str, watch: Watch) -> None:
        """Add a viewer to a job. Unknown job ids are ignored."""

        def add() -> None:
            if (job := self._loop.find(job_id)) is not None:
                job.watches.append(watch)

        self._commands.put(add)

    def unwatch(self, job_id: str, watch: Watch) -> None:
        def remove() -> None:
            if (job := self._loop.find(job_id)) is not None and watch in job.watches:
                job.watches.remove(watch)

        self._commands.put(remove)

    def cancel(self, job_id: str, reason: str) -> bool:
        """Cancel a job, and free its rows before the next tick. Returns False if no such job is accepted."""
        known = job_id in self.jobs
        self._commands.put(lambda: self._loop.give_up(job_id, JobCancelled(f"cancelled: {reason}"), reason))
        return known

    def drain(self) -> None:
        """Refuse new jobs, and end the thread once the accepted jobs are done.

        Durable jobs end before the next tick, with a last snapshot and the error Draining. This method does not take
        `_gate`, so a signal handler may call it.
        """
        self.state.is_draining.set()
        self._commands.put(lambda: None)  # wakes the thread if it is waiting for a command

    def join(self) -> None:
        self._thread.join()

    def close(self) -> bool:
        """Give up the unfinished jobs, and end the thread. Returns False if one of the worker's threads hangs."""
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
        except BaseException:  # includes SystemExit, which would end this thread silently
            log.exception("the worker stopped")
            state.jobs_of_the_crash |= self._loop.current.ids
            failure = EngineFailed(CRASHED)
        with self._gate:
            state.crashed = isinstance(failure, EngineFailed)
            drained = not state.crashed and not state.is_closed.is_set()
            state.is_closed.set()
        try:
            self._outcomes.act_on(self._loop.events)  # jobs may have finished before a crash
        finally:
            if state.crashed:  # the engine's state is unknown, so answer every job without it
                self._loop.abandon()
                self.jobs.fail_all(failure)
        self.take_commands(wait=False)
        if drained:  # the commands above may have accepted durable jobs
            self._loop.suspend_durable()
        self._loop.give_up_all(failure)
        self._outcomes.act_on(self._loop.events)
        state.autoencoder_hangs = not self._loop.autoencoder.close()  # comes last because it can take JOIN_S
        self._pulse.rest()

    def warm_up(self) -> None:
        """Warm up all models. Only the worker's thread may call this method, `take_commands` and `step`."""
        for number in tuple(self._models):  # a loop variable for the model would keep it in memory
            self._pulse.begin()
            self._loop.load(self._models[number])
        self.state.is_warm.set()

    def take_commands(self, *, wait: bool) -> None:
        """Run the commands that other threads have queued. wait: if there are none, wait for one."""
        while wait or not self._commands.empty():
            command = self._wait_for_command() if wait else self._commands.get()
            self._pulse.begin()
            command()
            self._outcomes.act_on(self._loop.events)
            wait = False

    def _wait_for_command(self) -> Callable[[], object]:
        """Wait for a command. Until one arrives, run the models' spare work, one item at a time."""
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
        """Give up overdue jobs, then run a tick. Return False if no tick ran."""
        self._pulse.begin()
        self._loop.end_overdue()
        if self.state.draining:
            self._loop.suspend_durable()
        if self._loop.events:
            self._outcomes.act_on(self._loop.events)  # tell the clients of overdue jobs before the tick runs
        ticked = not self.state.is_closed.is_set() and self._loop.tick()
        self._outcomes.act_on(self._loop.events)
        return ticked

    def _on_task_done(self, done: TaskDone) -> None:
        """Record a finished autoencoder task. Runs in the autoencoder's thread."""
        self._metrics.observe("tminus_autoencoder_duration_seconds", done.seconds, done.kind)
        if done.job is not None:
            self._commands.put(lambda: self._loop.on_task_done(done))

    def _on_device_lost(self, job_id: str) -> None:
        """End the worker because the device is lost. Runs in the thread that was reading a job's images."""

        def end() -> None:
            self.state.jobs_of_the_crash |= {job_id}  # the last step of this job may be the cause
            # Several threads may report the loss. Only the first report ends the worker's thread.
            if not self.state.is_closed.is_set():
                raise RuntimeError("the device is lost")

        self._commands.put(end)
