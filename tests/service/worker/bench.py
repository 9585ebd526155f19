"""A worker on a fake engine whose ticks take a second, with what a test needs to look at."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import pytest

from tests.service.fakes import INFO, LIMITS, PATIENCE_S, FakeEngine, FakeKeeper, make_spec, wait_until
from tminus.service.errors import Overloaded
from tminus.service.metrics import Metrics
from tminus.service.model_info import LatentInfo, Limits, ModelInfo
from tminus.service.preview import Watch
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler, TickTimes
from tminus.service.spec import Images, SampleSpec
from tminus.service.work import Batch, JobResult, JobStatus, Ticket, Work, work_of
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.running_job import NewJob
from tminus.service.worker.worker import Worker

LATENT = replace(INFO, latent=LatentInfo("AutoencoderKL", 4, 2, 3, 0.18))


class Bench:
    """The test is the worker's thread, unless it starts one."""

    def __init__(
        self,
        info: ModelInfo = INFO,
        limits: Limits = LIMITS,
        *,
        cold: bool = False,
        queues: bool = False,
        spare_work: Iterator[None] | None = None,
    ) -> None:
        """cold: whether it is not ready yet. queues: whether two ticks may be in flight, which a second one halves."""
        self.engine, self.keeper, self.limits = FakeEngine(info), FakeKeeper(), limits
        self.admission, self.metrics = Admission(limits), Metrics()
        self.measured([])
        self.now_s = 0.0
        self.on_clock: Callable[[], None] = lambda: None
        self.notes: list[tuple[str, set[str]]] = []
        self.engine.on_step = self.tick_takes_a_second
        self.engine.queues = queues
        times = TickTimes(((1, 1.0), (limits.max_batch, 1.0)), 0.5) if queues else TickTimes()
        scheduler = Scheduler(BatchPolicy.of(limits.max_batch, times=times))
        self.model = LoadedModel(0, self.engine, scheduler, self.keeper, spare_work)
        self.worker = Worker([self.model], self.admission, self.metrics, clock=self.clock, report=self.note)
        self.loop = self.worker._loop
        if not cold:
            self.worker.warm_up()
            self.now_s = 0.0
            self.engine.batches.clear()
            self.engine.inputs.clear()
            self.engine.next_begun()

    def clock(self) -> float:
        self.on_clock()
        return self.now_s

    def note(self, part: str, ids: object) -> None:
        self.notes.append((part, set(ids)))  # type: ignore[call-overload]

    def tick_takes_a_second(self, _batch: Batch) -> None:
        self.now_s += 1

    def measured(self, points: Sequence[tuple[int, float]], decode_s: float = 0.0) -> None:
        """Tell admission how long ticks take. Without points it refuses nothing for its time."""
        policy = BatchPolicy.of(self.limits.max_batch, times=TickTimes(tuple(points)))
        self.admission.put(0, Speed(policy, self.limits.max_rows, decode_s))

    def a_tick_is_known_to_take_a_second(self) -> None:
        self.measured([(1, 1.0), (self.limits.max_batch, 1.0)])

    # --- jobs ---

    def submit_spec(self, name: str, spec: SampleSpec, deadline_s: float | None = None, **kwargs: object) -> Ticket:
        """Have a job accepted, which the worker's thread will take up."""
        model, recording = kwargs.pop("model", 0), kwargs.pop("recording", None)
        work = work_of(spec, self.engine.info, model)  # type: ignore[arg-type]
        new = NewJob(name, spec, work, deadline_s=deadline_s, **kwargs).recorded_by(recording)  # type: ignore[arg-type]
        return self.worker.resume(new) if kwargs.keys() & {"isolated", "snapshot"} else self.worker.submit(new)

    def submit(self, name: str, *, deadline_s: float | None = None, **fields: object) -> "Future[JobResult]":
        return self.submit_spec(name, make_spec(**fields), deadline_s).future

    def accept_spec(
        self, name: str, spec: SampleSpec, deadline_s: float | None = None, **kwargs: object
    ) -> "Future[JobResult]":
        """Have a job accepted, and take it up."""
        future = self.submit_spec(name, spec, deadline_s, **kwargs).future
        self.do_commands()
        return future

    def accept(self, name: str, *, deadline_s: float | None = None, **fields: object) -> "Future[JobResult]":
        return self.accept_spec(name, make_spec(**fields), deadline_s)

    def cancel(self, name: str, reason: str = "client_gone") -> None:
        self.worker.cancel(name, reason)
        self.do_commands()

    def watch(self, name: str, watch: Watch) -> None:
        self.worker.watch(name, watch)
        self.do_commands()

    def unwatch(self, name: str, watch: Watch) -> None:
        self.worker.unwatch(name, watch)
        self.do_commands()

    # --- the worker's thread, played by the test ---

    def tick(self, times: int = 1) -> None:
        for _ in range(times):
            self.worker.step()

    def act_on_events(self) -> None:
        """Do what follows from the loop's events, as the worker does after each command and tick."""
        self.worker._outcomes.act_on(self.worker._loop.events)

    def do_commands(self) -> None:
        """Do what was asked for until now. What the coding thread asks for meanwhile is left to `next_command`."""
        for _ in range(self.worker._commands.qsize()):
            self.next_command()

    def next_command(self) -> None:
        """Do what the coding thread asks for, as the worker does between two ticks."""
        self.worker._commands.get(timeout=PATIENCE_S)()
        self.act_on_events()

    def finish(self) -> None:
        while self.loop.has_work:
            self.tick()

    # --- the worker's thread, a real one ---

    def start(self, *, shut: bool = False) -> "Bench":
        """Start it. shut: each tick waits until the test lets it pass."""
        if shut:
            self.engine.gate.shut()
        self.worker.start()
        wait_until(lambda: self.worker.state.ready)
        return self

    def close(self) -> None:
        """End it, whoever it is. Nothing may be held then."""
        self.engine.gate.open()
        self.worker.close()
        if self.worker._thread.ident is None:
            self.worker.start()
            self.worker.join()
        assert not self.worker.state.alive
        if self.worker.state.crashed:
            return  # everybody was answered; engine and ledger are given up as they are
        assert self.engine.jobs == {}
        assert self.worker.jobs.statuses() == []
        assert (self.admission.backlog_s, self.admission.rows, len(self.admission.outlooks(0.0))) == (0, 0, 0)
        one = Work(1, 1, range(0))
        for k in range(self.limits.max_jobs):
            self.admission.enter(f"filler {k}", one, now_s=0.0)
        with pytest.raises(Overloaded):
            self.admission.enter("one more", one, now_s=0.0)

    # --- what came of it ---

    def status(self) -> dict[str, JobStatus]:
        return {status.id: status for status in self.worker.jobs.statuses()}

    def metric(self, name: str, **labels: str) -> float:
        if name.startswith(("row_steps_total", "images_total", "tick_places", "tick_duration")):
            labels["model"] = INFO.name
        value = self.metrics.registry.get_sample_value(f"tminus_{name}", labels)
        return 0.0 if value is None else value


MakeBench = Callable[..., Bench]


def failure(future: "Future[JobResult]") -> BaseException:
    error = future.exception(PATIENCE_S)
    assert error is not None
    return error


def images(future: "Future[JobResult]") -> Images:
    return future.result(PATIENCE_S).read()
