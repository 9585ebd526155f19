import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from service.errors import (
    DeadlinePassed,
    DeadlineUnmeetable,
    Draining,
    EngineFailed,
    InvalidField,
    JobCancelled,
    NotFinite,
    NotReady,
    Overloaded,
    ServiceError,
)
from service.metrics import Metrics
from service.model_info import Limits, ModelInfo
from service.preview import Frame, Pace, Watch
from service.scheduling.admission import Admission
from service.scheduling.scheduler import Scheduler, Sharing
from service.spec import SampleSpec, Snapshot
from service.work import Batch, JobResult, JobStatus, Ticket, Work
from service.worker.recording import Recording
from service.worker.worker import Worker
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, FakeEngine, fake_pixels, make_spec, wait_until


class Bench:
    """A worker on a fake engine, with what a test needs to look at."""

    def __init__(self, info: ModelInfo = INFO, limits: Limits = LIMITS) -> None:
        self.engine, self.limits = FakeEngine(info), limits
        sharing = Sharing.of(limits.max_batch)
        self.admission, self.metrics = Admission(limits, sharing), Metrics(info)
        self.now_s = 0.0
        self.engine.on_step = self.tick_takes_a_second
        scheduler = Scheduler(sharing)
        self.worker = Worker(self.engine, scheduler, self.admission, self.metrics, clock=lambda: self.now_s)

    def tick_takes_a_second(self, _batch: Batch) -> None:
        self.now_s += 1

    def start(self, *, shut: bool = False) -> "Bench":
        """Start, wait for the warm-up to pass, and shut the gate if the test wants to let each tick pass itself."""
        self.worker.start()
        self.engine.next_begun()
        wait_until(lambda: self.worker.ready)
        self.engine.batches.clear()
        if shut:
            self.engine.gate.shut()
        return self

    def ticket(self, name: str, *, deadline_s: float | None = None, **fields: object) -> Ticket:
        return self.worker.submit(name, make_spec(**fields), deadline_s)

    def submit(self, name: str, *, deadline_s: float | None = None, **fields: object) -> "Future[JobResult]":
        return self.ticket(name, deadline_s=deadline_s, **fields).future

    def a_tick_is_known_to_take_a_second(self) -> None:
        """Tell admission, which else knows of no time and refuses nothing for it."""
        self.admission.calibrate([(1, 1.0), (self.limits.max_batch, 1.0)])

    def status(self) -> dict[str, JobStatus]:
        return {status.id: status for status in self.worker.statuses()}

    def metric(self, name: str, **labels: str) -> float:
        value = self.metrics.registry.get_sample_value(f"tminus_{name}", labels)
        return 0.0 if value is None else value

    def assert_nothing_is_held(self) -> None:
        """No slot of the engine, and an admission ledger on which exactly max_jobs jobs fit."""
        if self.worker.crashed:
            return  # everybody was answered; engine and ledger are given up as they are
        assert self.engine.jobs == {}
        assert self.worker.statuses() == []
        assert (self.admission.backlog_s, self.admission.rows, self.admission.jobs) == (0, 0, 0)
        one, when_promises_are_forgotten_s = Work(1, 1, range(0)), 1e9
        for i in range(self.limits.max_jobs):
            self.admission.enter(f"filler {i}", one, now_s=when_promises_are_forgotten_s)
        with pytest.raises(Overloaded):
            self.admission.enter("one more", one, now_s=when_promises_are_forgotten_s)


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench() -> Iterator[MakeBench]:
    """Makes benches; at the end of the test each is closed, and must hold nothing."""
    benches: list[Bench] = []

    def make(**kwargs: object) -> Bench:
        benches.append(Bench(**kwargs))  # type: ignore[arg-type]
        return benches[-1]

    yield make
    for bench in benches:
        bench.engine.gate.open()
        bench.worker.close()
        assert not bench.worker.alive
        bench.assert_nothing_is_held()


def failure(future: "Future[JobResult]") -> BaseException:
    error = future.exception(PATIENCE_S)
    assert error is not None
    return error


def images(future: "Future[JobResult]") -> np.ndarray:
    return future.result(PATIENCE_S).read()


# --- the start ---


def test_a_worker_is_not_ready_before_its_warm_up(make_bench: MakeBench) -> None:
    bench = make_bench()
    assert not bench.worker.ready
    assert not bench.worker.alive
    with pytest.raises(NotReady):
        bench.submit("a")
    bench.engine.gate.shut()
    bench.worker.start()
    bench.engine.next_begun()
    assert bench.worker.alive
    assert not bench.worker.ready
    with pytest.raises(NotReady) as caught:
        bench.submit("a")
    assert caught.value.headers["Retry-After"] == "1"
    bench.engine.gate.open()
    wait_until(lambda: bench.worker.ready)
    assert images(bench.submit("a")).shape == (1, 4, 6, 1)


@pytest.mark.parametrize(
    ("info", "labels"),
    [
        (INFO, (0,)),
        (replace(INFO, num_timesteps=1), (0,)),
        (replace(INFO, conditional=False, class_names=(), null_class=None), None),
    ],
)
def test_the_warm_up_runs_a_tick_and_frees_its_slot(
    make_bench: MakeBench, info: ModelInfo, labels: tuple[int, ...] | None
) -> None:
    bench = make_bench(info=info)
    added: list[SampleSpec] = []
    bench.engine.on_add = added.append
    bench.worker.start()
    wait_until(lambda: bench.worker.ready)
    assert [(batch.places, batch.steps) for batch in bench.engine.batches] == [(1, (0,))]
    assert [(spec.n, spec.class_labels, spec.sampler) for spec in added] == [(1, labels, "ddpm")]
    assert bench.engine.jobs == {}


@pytest.mark.parametrize("error", [RuntimeError("no kernel image"), ValueError("bad config")])
def test_a_failing_warm_up_ends_the_worker_which_then_refuses_all(make_bench: MakeBench, error: Exception) -> None:
    bench = make_bench()

    def fail(_batch: Batch) -> None:
        raise error

    bench.engine.on_step = fail
    bench.worker.start()
    wait_until(lambda: not bench.worker.alive)
    assert not bench.worker.ready
    with pytest.raises(ServiceError) as caught:
        bench.submit("a")
    assert caught.value.status in (500, 503)
    bench.engine.jobs.clear()  # the warm-up's own slots die with the worker


# --- work ---


def test_results_are_delivered_with_their_times(make_bench: MakeBench) -> None:
    bench = make_bench().start()
    spec = make_spec(n=3, steps=5, seed=77, index=2)
    result = bench.worker.submit("a", spec).future.result(PATIENCE_S)
    np.testing.assert_array_equal(result.read(), fake_pixels(spec, 5))
    assert (result.queue_s, result.first_step_s, result.denoise_s) == (0, 1, 5)
    assert bench.engine.jobs == {}, "its slots are free before the result is told"
    assert bench.admission.rows == 0


def test_a_job_joins_at_the_next_tick_of_one_that_runs(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    first = bench.submit("first", seed=1, steps=4, n=2)
    assert bench.engine.next_begun().steps == (0, 0)
    second = bench.submit("second", seed=2, steps=3)
    bench.engine.gate.let()
    both = bench.engine.next_begun()
    assert bench.engine.seeds(both) == {1, 2}
    assert sorted(both.steps) == [0, 1, 1]
    bench.engine.gate.open()
    np.testing.assert_array_equal(images(first), fake_pixels(make_spec(seed=1, n=2), 4))
    np.testing.assert_array_equal(images(second), fake_pixels(make_spec(seed=2), 3))
    assert len(bench.engine.batches) == 4, "they shared every tick they could"


def test_a_short_job_is_delivered_while_a_long_one_runs(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    long = bench.submit("long", n=8, steps=1000, seed=1)
    bench.engine.next_begun()
    short = bench.submit("short", n=1, steps=5, seed=2)
    bench.engine.gate.let(6)
    images(short)
    assert not long.done()
    bench.engine.gate.open()
    images(long)


def test_rows_active_are_those_of_the_tick_and_none_when_idle(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    assert bench.worker.rows_active == 0
    future = bench.submit("a", n=3, guidance=2.0)
    bench.engine.next_begun()
    assert bench.worker.rows_active == 3
    bench.engine.gate.open()
    images(future)
    wait_until(lambda: bench.worker.rows_active == 0)


def test_an_overloaded_worker_refuses_and_goes_on(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_jobs=1)).start(shut=True)
    future = bench.submit("a")
    with pytest.raises(Overloaded):
        bench.submit("b")
    bench.engine.gate.open()
    images(future)
    images(bench.submit("c"))


# --- cancelling ---


def test_a_job_cancelled_before_its_first_tick_never_steps(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    running = bench.submit("running", seed=1)
    bench.engine.next_begun()
    waiting = bench.submit("waiting", seed=2, n=4, steps=10)
    bench.worker.cancel("waiting", "client_gone")
    bench.engine.gate.let()
    assert isinstance(failure(waiting), JobCancelled)
    assert bench.engine.seeds(bench.engine.next_begun()) == {1}
    assert bench.metric("row_steps_saved_total") == 40
    assert bench.metric("cancelled_total", reason="client_gone") == 1
    bench.engine.gate.open()
    images(running)
    assert all(len(batch.rows) == 1 for batch in bench.engine.batches)


def test_a_job_cancelled_while_it_runs_is_gone_at_the_next_tick(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    doomed = bench.submit("doomed", seed=1, n=2, steps=10, guidance=2.0)
    other = bench.submit("other", seed=2, steps=6)
    bench.engine.next_begun()
    bench.engine.gate.let()
    bench.engine.next_begun()
    bench.worker.cancel("doomed", "client_gone")
    bench.engine.gate.let()
    assert isinstance(failure(doomed), JobCancelled)
    assert bench.engine.seeds(bench.engine.next_begun()) == {2}
    steps_taken = sum(len(batch.guided) for batch in bench.engine.batches)
    assert bench.metric("row_steps_saved_total") == 20 - steps_taken, "row-steps, not places"
    bench.engine.gate.open()
    images(other)


def test_cancelling_twice_an_unknown_or_a_finished_job_does_nothing(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    doomed, finished = bench.submit("doomed", steps=500), bench.submit("finished", steps=1)
    assert not bench.worker.cancel("nobody", "client_gone")
    bench.engine.gate.let(2)
    images(finished)
    assert bench.worker.cancel("doomed", "client_gone")
    assert not bench.worker.cancel("finished", "client_gone")
    for name in ("doomed", "finished", "doomed"):
        bench.worker.cancel(name, "client_gone")
    bench.engine.gate.open()
    assert isinstance(failure(doomed), JobCancelled)
    assert not bench.worker.cancel("doomed", "client_gone")
    images(bench.submit("after"))
    assert bench.metric("cancelled_total", reason="client_gone") == 1
    assert bench.metric("images_total") == 2


def test_the_last_job_cancelled_leaves_the_worker_idle_and_willing(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    doomed = bench.submit("doomed", steps=500)
    bench.engine.next_begun()
    bench.worker.cancel("doomed", "client_gone")
    bench.engine.gate.open()
    failure(doomed)
    wait_until(lambda: bench.worker.rows_active == 0)
    ticks = len(bench.engine.batches)
    images(bench.submit("after", steps=2))
    assert len(bench.engine.batches) == ticks + 2


def test_a_future_its_caller_cancels_while_it_runs_is_the_workers_to_end(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    future = bench.submit("a")
    bench.engine.next_begun()
    assert not future.cancel()
    bench.engine.gate.open()
    images(future)


def test_a_future_cancelled_before_it_is_taken_up_does_not_kill_the_worker(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    running = bench.submit("running")
    bench.engine.next_begun()
    dropped = bench.submit("dropped", seed=9)
    assert dropped.cancel()
    bench.engine.gate.open()
    images(running)
    images(bench.submit("after"))
    assert bench.worker.alive


# --- failures ---


def test_an_exception_in_a_tick_fails_the_jobs_of_that_tick_only(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    in_tick = [bench.submit("a", seed=1, n=2, steps=1), bench.submit("b", seed=2, n=6, steps=2)]
    bench.engine.next_begun()  # of "a", and perhaps "b"
    bystander = bench.submit("c", seed=3, n=8, steps=50)
    failed: list[set[int]] = []

    def fail_once(batch: Batch) -> None:
        if not failed:
            failed.append(bench.engine.seeds(batch))
            raise RuntimeError("secret: CUDA out of memory at 0xdeadbeef")

    bench.engine.on_step = fail_once
    bench.engine.gate.open()
    np.testing.assert_array_equal(images(bystander), fake_pixels(make_spec(seed=3, n=8), 50))
    for future, seed in zip(in_tick, (1, 2), strict=True):
        if seed in failed[0]:
            error = failure(future)
            assert isinstance(error, EngineFailed)
            assert (error.status, error.code) == (500, "engine_failed")
            assert "RuntimeError" in error.detail
            assert "secret" not in error.detail
        else:
            images(future)
    assert 1 in failed[0]
    assert 3 not in failed[0]
    assert bench.worker.ready
    assert bench.metric("cancelled_total", reason="engine_failed") == len(failed[0])
    images(bench.submit("after"))


def test_a_tick_that_fails_every_time_still_answers_every_job(make_bench: MakeBench) -> None:
    bench = make_bench().start()

    def fail(_batch: Batch) -> None:
        raise RuntimeError("always")

    bench.engine.on_step = fail
    futures = [bench.submit(f"job{i}", n=3, steps=20) for i in range(10)]
    assert all(isinstance(failure(future), EngineFailed) for future in futures)
    assert bench.worker.ready


def test_a_spec_the_model_cannot_do_fails_that_job_only(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    running = bench.submit("running", seed=1)
    bench.engine.next_begun()

    def refuse(spec: SampleSpec) -> None:
        if spec.seed == 666:
            raise ValueError("prediction_type epsilon cannot start from alpha_bar = 0")

    bench.engine.on_add = refuse
    bad, good = bench.submit("bad", seed=666, sampler="ddim"), bench.submit("good", seed=3)
    bench.engine.gate.open()
    error = failure(bad)
    assert isinstance(error, InvalidField)
    assert (error.status, error.field, error.value) == (422, "sampler", "ddim")
    assert "alpha_bar = 0" in error.detail
    images(good)
    images(running)
    bench.worker.cancel("bad", "client_gone")  # as the route does, if the client went at that moment
    images(bench.submit("after"))


def test_an_engine_that_breaks_in_add_leaves_no_job_unanswered(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    running = bench.submit("running", seed=1, steps=5)
    bench.engine.next_begun()

    def break_(spec: SampleSpec) -> None:
        if spec.seed == 666:
            raise RuntimeError("CUDA out of memory")

    bench.engine.on_add = break_
    broken = bench.submit("broken", seed=666)
    bench.engine.gate.open()
    assert isinstance(failure(broken), ServiceError)
    running.exception(PATIENCE_S)


def test_a_worker_that_dies_answers_every_job_and_is_not_alive(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)

    def break_(_rows: Sequence[int]) -> None:
        raise RuntimeError("the device is gone")

    bench.engine.on_remove = break_
    finishing = [bench.submit("a", steps=1), bench.submit("b", steps=1)]
    others = [bench.submit("c", steps=5), bench.submit("d", n=8, steps=50)]
    bench.engine.gate.open()
    for future in finishing + others:
        error = failure(future)
        assert isinstance(error, ServiceError)
        assert error.status in (500, 503)
        assert "the device is gone" not in error.detail
    wait_until(lambda: bench.worker.crashed)
    assert not bench.worker.ready
    with pytest.raises(EngineFailed):
        bench.submit("after")


# --- what others ask of the engine ---


def test_what_is_asked_of_the_engine_is_done_in_the_workers_thread_between_two_ticks(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    job = bench.submit("job", steps=2)
    bench.engine.next_begun()
    asked = bench.worker.run(lambda engine: (engine.info, len(bench.engine.batches), threading.current_thread().name))
    assert not asked.done()
    bench.engine.gate.let()
    assert asked.result(PATIENCE_S) == (INFO, 1, "tminus-worker")
    bench.engine.gate.open()
    job.result(PATIENCE_S)
    assert bench.worker.run(lambda engine: 5).result(PATIENCE_S) == 5, "an idle worker wakes for it"


def test_an_error_in_what_is_asked_is_told_to_who_asked_and_to_nobody_else(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    job = bench.submit("job", steps=2)
    bench.engine.next_begun()
    asked = bench.worker.run(lambda engine: 1 / 0)
    given_up = bench.worker.run(lambda engine: pytest.fail("nobody wants it"))
    assert given_up.cancel()
    bench.engine.gate.open()
    assert isinstance(failure(asked), EngineFailed)
    job.result(PATIENCE_S)


def test_nothing_is_asked_of_an_engine_that_is_not_there_for_it(make_bench: MakeBench) -> None:
    bench = make_bench()
    with pytest.raises(NotReady):
        bench.worker.run(lambda engine: 1)
    bench.start(shut=True)
    job = bench.submit("job", steps=1)
    bench.engine.next_begun()
    asked = bench.worker.run(lambda engine: 1)
    bench.worker.drain()
    with pytest.raises(Draining):
        bench.worker.run(lambda engine: 1)
    bench.engine.gate.open()
    assert asked.result(PATIENCE_S) == 1, "what was taken is done"
    job.result(PATIENCE_S)


def test_images_that_cannot_be_read_fail_their_own_job_only(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)

    def break_(rows: Sequence[int]) -> None:
        if rows == broken_rows:
            raise RuntimeError("the device hiccups")

    broken, whole = bench.submit("broken", seed=1, steps=1), bench.submit("whole", seed=2, steps=2)
    broken_rows = bench.engine.next_begun().rows[:1]
    bench.engine.on_images = break_
    bench.engine.gate.open()
    assert isinstance(failure(broken), EngineFailed)
    np.testing.assert_array_equal(images(whole), fake_pixels(make_spec(seed=2, steps=2), 2))
    assert bench.worker.alive


# --- rows that are not finite ---


def test_a_broken_row_fails_its_own_job_only(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    sick, well = bench.submit("sick", seed=1, n=3, steps=10), bench.submit("well", seed=2, n=2, steps=5)
    bench.engine.next_begun()
    bench.engine.gate.let()
    wait_until(lambda: len(bench.engine.jobs) == 2)
    shared = bench.engine.next_begun()
    assert bench.engine.seeds(shared) == {1, 2}
    (sick_rows,) = (rows for spec, rows in bench.engine.jobs.values() if spec.seed == 1)
    bench.engine.nan.add(sick_rows[1])  # one of three rows, in this tick
    bench.engine.gate.let()
    error = failure(sick)
    assert isinstance(error, NotFinite)
    assert (error.status, error.code) == (500, "not_finite")
    assert bench.engine.seeds(bench.engine.next_begun()) == {2}, "the sick job's other rows are gone too"
    bench.engine.gate.open()
    np.testing.assert_array_equal(images(well), fake_pixels(make_spec(seed=2, n=2), 5))
    assert bench.metric("cancelled_total", reason="not_finite") == 1
    sick_steps = sum(row in sick_rows for batch in bench.engine.batches for row in batch.rows)
    assert bench.metric("row_steps_saved_total") == 30 - sick_steps
    images(bench.submit("after", n=3))


def test_a_row_that_breaks_in_its_last_step_fails_its_job_and_no_other(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    sick, well = bench.submit("sick", seed=1, steps=1), bench.submit("well", seed=2, steps=1)
    wait_until(lambda: len(bench.engine.jobs) >= 1)
    bench.engine.on_step = lambda batch: bench.engine.nan.update(
        rows[0] for spec, rows in bench.engine.jobs.values() if spec.seed == 1
    )
    bench.engine.gate.open()
    assert isinstance(failure(sick), NotFinite)
    np.testing.assert_array_equal(images(well), fake_pixels(make_spec(seed=2), 1))


def test_what_broke_unseen_is_told_when_the_images_are_read(make_bench: MakeBench) -> None:
    """As on a GPU, where a tick's flags come one tick late."""
    bench = make_bench().start()
    bench.engine.on_images = bench.engine.nan.update  # after the last look at the rows
    result = bench.submit("a", n=2).result(PATIENCE_S)
    with pytest.raises(NotFinite):
        result.read()


# --- deadlines ---


def test_a_deadline_that_passes_while_waiting_ends_the_job_and_no_other(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2)).start(shut=True)
    running = bench.submit("running", seed=1, n=2, steps=4)
    bench.engine.next_begun()
    late = bench.submit("late", seed=2, n=2, steps=5, deadline_s=2.0)
    patient = bench.submit("patient", seed=3, n=2, steps=6, deadline_s=1000.0)
    bench.engine.gate.let(2)
    error = failure(late)
    assert isinstance(error, DeadlinePassed)
    assert (error.status, error.code, error.field, error.value) == (504, "deadline_passed", "deadline_s", 2.0)
    assert error.problem()["bound"] == "a longer time"
    assert bench.now_s == 3, "not a tick too early, not a tick too late: the warm-up's and two"
    assert "late" not in bench.status()
    bench.engine.gate.open()
    np.testing.assert_array_equal(images(running), fake_pixels(make_spec(seed=1, n=2), 4))
    np.testing.assert_array_equal(images(patient), fake_pixels(make_spec(seed=3, n=2), 6))
    assert bench.metric("cancelled_total", reason="deadline") == 1
    assert bench.metric("row_steps_saved_total") == 10


def test_a_deadline_that_passes_while_stepping_frees_the_rows(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    late = bench.submit("late", seed=1, n=3, steps=50, deadline_s=4.0)
    other = bench.submit("other", seed=2, steps=10)
    bench.engine.gate.let(4)
    assert isinstance(failure(late), DeadlinePassed)
    for _ in range(5):
        last = bench.engine.next_begun()
    assert bench.engine.seeds(last) == {2}
    late_steps = sum(len(batch.rows) // 3 * 3 for batch in bench.engine.batches)  # the other job has one row
    assert 0 < late_steps <= 12
    assert bench.metric("row_steps_saved_total") == 150 - late_steps
    bench.engine.gate.open()
    np.testing.assert_array_equal(images(other), fake_pixels(make_spec(seed=2), 10))
    images(bench.submit("after", n=3))


def test_a_job_done_in_time_has_no_deadline_any_more(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    done = bench.submit("done", steps=2, deadline_s=5.0)
    bench.engine.gate.let(2)
    images(done)
    long = bench.submit("long", steps=20)
    bench.engine.gate.open()
    images(long)
    assert bench.metric("cancelled_total", reason="deadline") == 0


def test_a_job_done_in_the_tick_in_which_its_deadline_passes_is_delivered(make_bench: MakeBench) -> None:
    bench = make_bench().start()
    images(bench.submit("a", steps=3, deadline_s=3.0))


def test_a_deadline_that_load_forbids_is_refused_at_once_and_holds_nothing(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2)).start(shut=True)
    bench.a_tick_is_known_to_take_a_second()
    running = bench.submit("running", n=2, steps=10)
    with pytest.raises(DeadlineUnmeetable) as caught:
        bench.submit("a", n=2, steps=10, deadline_s=12.0)
    assert int(caught.value.headers["Retry-After"]) >= 1
    with pytest.raises(InvalidField) as impossible:
        bench.submit("b", n=2, steps=10, deadline_s=9.0)
    assert (impossible.value.field, impossible.value.value) == ("deadline_s", 9.0)
    assert bench.admission.jobs == len(bench.status()) == 1
    bench.engine.gate.open()
    images(running)


# --- what clients are told ---


def test_statuses_tell_who_waits_who_runs_and_where_each_is(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2)).start(shut=True)
    bench.a_tick_is_known_to_take_a_second()
    assert bench.worker.statuses() == []
    first = bench.ticket("first", seed=7, n=2, steps=4, sampler="ddim")
    bench.engine.next_begun()
    second = bench.ticket("second", seed=8, n=2, steps=10)
    assert (first.position, first.eta_s) == (0, 4.0)
    assert (second.position, second.eta_s) == (1, 14.0)
    assert [status.id for status in bench.worker.statuses()] == ["first", "second"]
    assert {status.state for status in bench.worker.statuses()} == {"waiting"}, "no step is over"
    bench.engine.gate.let()
    bench.engine.next_begun()
    status = bench.status()
    assert (status["first"].state, status["first"].step, status["first"].position) == ("running", 1, 0)
    assert status["first"].spec == make_spec(seed=7, n=2, steps=4, sampler="ddim")
    assert (status["first"].age_s, status["first"].eta_s) == (1.0, 3.0)
    assert (status["second"].state, status["second"].step, status["second"].position) == ("waiting", 0, 1)
    assert status["second"].eta_s == 13.0
    bench.engine.gate.let(3)
    images(first.future)
    bench.engine.gate.let(1)
    for _ in range(4):  # the third to the sixth, so the fifth is over
        bench.engine.next_begun()
    status = bench.status()
    assert status.keys() == {"second"}
    assert (status["second"].state, status["second"].step, status["second"].position) == ("running", 1, 0)
    assert status["second"].eta_s == 9.0
    bench.engine.gate.open()
    images(second.future)
    assert bench.worker.statuses() == []


def test_the_status_of_one_job_is_that_in_the_list(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2)).start(shut=True)
    bench.a_tick_is_known_to_take_a_second()
    assert bench.worker.status("first") is None
    first = bench.submit("first", seed=7, n=2, steps=4)
    second = bench.submit("second", seed=8, n=2, steps=10)
    bench.engine.next_begun()
    bench.engine.gate.let()
    bench.engine.next_begun()
    statuses = bench.status()
    assert statuses.keys() == {"first", "second"}
    assert {name: bench.worker.status(name) for name in statuses} == statuses
    assert bench.worker.status("third") is None
    bench.worker.cancel("second", "deleted")
    bench.engine.gate.let()
    assert isinstance(failure(second), JobCancelled)
    assert bench.worker.status("second") is None
    assert bench.worker.status("first") is not None
    bench.engine.gate.open()
    images(first)
    assert bench.worker.status("first") is None


def test_a_quick_status_has_the_facts_of_now_and_what_was_foreseen(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2)).start(shut=True)
    bench.a_tick_is_known_to_take_a_second()
    assert bench.worker.quick_status("first", {}) is None
    first = bench.submit("first", n=2, steps=4)
    bench.engine.next_begun()
    second = bench.submit("second", n=2, steps=10)
    forecast = {"second": replace(bench.status()["second"], position=7, eta_s=70.0)}
    assert bench.worker.quick_statuses({}) == bench.worker.statuses()
    bench.engine.gate.let()
    bench.engine.next_begun()
    one, two = bench.worker.quick_statuses(forecast)
    assert one == bench.status()["first"], "what was foreseen when it was accepted, counted down"
    assert two == replace(bench.status()["second"], position=7, eta_s=69.0), "what the forecast says, counted down"
    assert [bench.worker.quick_status(name, forecast) for name in ("first", "second")] == [one, two]
    bench.engine.gate.open()
    images(first)
    images(second)
    assert bench.worker.quick_statuses(forecast) == []


def test_statuses_may_be_asked_from_any_thread_at_any_time(make_bench: MakeBench) -> None:
    bench = make_bench().start()
    stop, seen, errors = threading.Event(), [0], []

    def ask() -> None:
        while not stop.is_set():
            try:
                for status in bench.worker.statuses():
                    assert 0 <= status.step <= status.spec.steps
                    assert status.position >= 0
                    assert status.age_s >= 0
                    seen[0] += 1
            except Exception as error:
                errors.append(error)
                return

    asking = threading.Thread(target=ask)
    asking.start()
    futures = [bench.submit(f"job {i}", n=1 + i % 3, steps=1 + i % 40, guidance=1.0 + i % 2) for i in range(14)]
    for future in futures:
        images(future)
    stop.set()
    asking.join()
    assert not errors


# --- the end ---


def test_draining_refuses_new_jobs_and_finishes_the_old(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    running, queued = bench.submit("running", seed=1), bench.submit("queued", seed=2)
    bench.engine.next_begun()
    bench.worker.drain()
    assert bench.worker.draining
    assert bench.worker.alive
    assert not bench.worker.ready
    with pytest.raises(Draining) as caught:
        bench.submit("late")
    assert "Retry-After" in caught.value.headers
    bench.engine.gate.open()
    np.testing.assert_array_equal(images(running), fake_pixels(make_spec(seed=1), 3))
    np.testing.assert_array_equal(images(queued), fake_pixels(make_spec(seed=2), 3))
    bench.worker.join()
    assert not bench.worker.crashed


def test_closing_gives_up_what_is_left_after_the_running_tick(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    running = bench.submit("running", seed=1, n=2, steps=10)
    bench.engine.next_begun()
    queued = bench.submit("queued", seed=2, n=3, steps=10)
    closing = threading.Thread(target=bench.worker.close)
    closing.start()
    wait_until(lambda: not bench.worker.alive)
    with pytest.raises(Draining):
        bench.submit("late")
    bench.engine.gate.let()
    assert isinstance(failure(running), Draining)
    assert isinstance(failure(queued), Draining)
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert len(bench.engine.batches) == 1
    assert bench.metric("row_steps_saved_total") == 2 * 9 + 3 * 10
    assert bench.metric("cancelled_total", reason="draining") == 2


def test_a_tick_that_was_a_jobs_last_still_delivers_it_at_closing(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    future = bench.submit("a", steps=1)
    bench.engine.next_begun()
    closing = threading.Thread(target=bench.worker.close)
    closing.start()
    wait_until(lambda: not bench.worker.alive)
    bench.engine.gate.let()
    images(future)
    closing.join(PATIENCE_S)


def test_an_idle_worker_closes_at_once_and_twice_does_no_harm(make_bench: MakeBench) -> None:
    bench = make_bench().start()
    bench.worker.close()
    bench.worker.close()
    assert not bench.worker.alive
    with pytest.raises(Draining):
        bench.submit("late")


def test_a_worker_that_never_started_can_be_closed(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.worker.close()
    with pytest.raises(Draining):
        bench.submit("late")


def test_a_worker_may_be_closed_during_its_warm_up(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.engine.gate.shut()
    bench.worker.start()
    bench.engine.next_begun()
    closing = threading.Thread(target=bench.worker.close)
    closing.start()
    wait_until(lambda: bench.worker.draining)
    bench.engine.gate.open()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert not bench.worker.ready


# --- metrics ---


def test_ticks_jobs_and_images_are_counted(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    first = bench.submit("first", n=2, steps=3, seed=1, guidance=2.0)
    bench.engine.next_begun()
    second = bench.submit("second", n=1, steps=2, seed=2, sampler="ddim")
    bench.engine.gate.open()
    results = [first.result(PATIENCE_S), second.result(PATIENCE_S)]
    assert bench.metric("row_steps_total", sampler="ddpm") == 6
    assert bench.metric("row_steps_total", sampler="ddim") == 2
    assert bench.metric("images_total") == 3
    assert bench.metric("batch_rows_count") == len(bench.engine.batches) == 3
    assert bench.metric("batch_rows_sum") == 2 * 6 + 2
    assert bench.metric("step_duration_seconds_sum") == 3
    times = [(result.queue_s, result.first_step_s, result.denoise_s) for result in results]
    assert times == [(0, 1, 3), (1, 2, 2)]
    assert bench.metric("queue_wait_seconds_count") == bench.metric("time_to_first_step_seconds_count") == 2
    assert bench.metric("queue_wait_seconds_sum") == 0 + 1
    assert bench.metric("time_to_first_step_seconds_sum") == 1 + 2
    assert bench.metric("row_steps_saved_total") == 0


def test_the_backlog_shrinks_with_each_tick(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2)).start(shut=True)
    bench.a_tick_is_known_to_take_a_second()
    future = bench.submit("a", n=2, steps=3)
    seen = []
    for _ in range(3):
        bench.engine.next_begun()
        seen.append(bench.admission.backlog_s)
        bench.engine.gate.let()
    images(future)
    assert seen == [3.0, 2.0, 1.0]
    assert bench.admission.backlog_s == 0


# --- all at once ---


def test_many_threads_submitting_and_cancelling_are_all_answered(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_jobs=12, max_rows=40)).start()
    answers: list[str] = []

    def client(number: int) -> None:
        rng = random.Random(number)
        for i in range(25):
            name = f"{number}-{i}"
            spec = make_spec(
                n=rng.randint(1, 5),
                steps=rng.randint(1, 12),
                seed=number,
                guidance=rng.choice([1.0, 2.0]),
                guidance_interval=rng.choice([None, (0, 300), (400, 700)]),
            )
            try:
                future = bench.worker.submit(name, spec).future
            except Overloaded:
                answers.append("refused")
                continue
            if rng.random() < 0.4:
                bench.worker.cancel(name, "client_gone")
            try:
                result = future.result(PATIENCE_S)
            except JobCancelled:
                answers.append("cancelled")
            else:
                np.testing.assert_array_equal(result.read(), fake_pixels(spec, spec.steps))
                answers.append("done")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6 * 25
    assert answers.count("done") > 0
    assert answers.count("cancelled") > 0
    assert bench.metric("cancelled_total", reason="client_gone") == answers.count("cancelled")


# --- durable jobs ---


class Kept:
    """A keeper that is always ready, and remembers."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Snapshot]] = []
        self.ready = True

    def due(self, now_s: float) -> bool:
        return self.ready

    def keep(self, snapshots: Mapping[str, Callable[[], Snapshot]], began_s: float, cost_s: float) -> None:
        self.rounds.append({name: read() for name, read in snapshots.items()})


def test_snapshots_are_taken_of_durable_jobs_that_have_stepped(make_bench: MakeBench) -> None:
    bench, kept = make_bench(), Kept()
    bench.worker._keeper = kept
    bench.start(shut=True)
    spec = make_spec(n=2, steps=3)
    durable = bench.worker.submit("durable", spec, durable=True).future
    passing = bench.submit("passing", steps=3)
    bench.engine.gate.let(1)
    bench.engine.next_begun()
    bench.engine.next_begun()
    assert [{name: each.steps for name, each in round.items()} for round in kept.rounds] == [{"durable": (1, 1)}]
    bench.engine.gate.open()
    images(durable), images(passing)
    assert len(kept.rounds) == 2, "none after the last step"


def test_a_job_that_begins_late_in_its_plan_and_waits_for_its_rows_is_in_nobodys_way(make_bench: MakeBench) -> None:
    bench, kept = make_bench(), Kept()
    bench.worker._keeper = kept
    bench.start(shut=True)
    first = bench.worker.submit("first", make_spec(steps=4), durable=True).future
    bench.engine.next_begun()
    sha = "0" * 64
    late = bench.worker.submit("late", make_spec(steps=4, strength=0.5, image_sha256=sha), durable=True).future
    bench.engine.gate.let()
    bench.engine.next_begun()
    assert [set(round) for round in kept.rounds] == [{"first"}]
    bench.engine.gate.open()
    images(first)
    late.exception(PATIENCE_S)


def test_a_snapshot_that_fails_costs_no_job(make_bench: MakeBench) -> None:
    bench, kept = make_bench(), Kept()
    bench.worker._keeper = kept

    def fail(_rows: Sequence[int]) -> None:
        raise RuntimeError("no room")

    bench.engine.on_snapshot = fail
    bench.start()
    assert images(bench.worker.submit("a", make_spec(steps=5), durable=True).future).shape == (1, 4, 6, 1)
    assert kept.rounds == []


def test_a_job_goes_on_from_its_snapshot_and_is_counted_from_there(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    bench.a_tick_is_known_to_take_a_second()
    zeros = np.zeros((2, 1, 4, 6), np.float32)
    snapshot = Snapshot((7, 10), zeros, zeros)  # the second row has taken them all
    spec = make_spec(n=2, steps=10)
    ticket = bench.worker.resume("a", spec, 3.5, None, snapshot)
    assert ticket.eta_s <= 3
    assert bench.admission.backlog_s == pytest.approx(3 / LIMITS.max_batch)
    assert bench.engine.next_begun().steps == (7,)
    bench.engine.gate.open()
    np.testing.assert_array_equal(images(ticket.future), fake_pixels(spec, 10))
    assert bench.metric("row_steps_total", sampler="ddpm") == 3


def test_draining_suspends_durable_jobs_with_a_last_snapshot_and_finishes_the_others(make_bench: MakeBench) -> None:
    bench, kept = make_bench(), Kept()
    bench.worker._keeper = kept
    kept.ready = False
    bench.start(shut=True)
    durable = bench.worker.submit("durable", make_spec(steps=900), durable=True).future
    passing = bench.submit("passing", steps=4)
    bench.engine.next_begun()
    bench.worker.drain()
    bench.engine.gate.open()
    assert images(passing).shape == (1, 4, 6, 1)
    assert isinstance(failure(durable), Draining)
    (last,) = kept.rounds
    assert set(last) == {"durable"}
    assert 1 <= last["durable"].steps[0] < 10
    wait_until(lambda: not bench.worker.alive)


def test_neither_backlog_nor_deadline_refuses_a_job_that_goes_on_but_slots_may(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_jobs=2, max_rows=8, max_backlog_s=3)).start(shut=True)
    bench.a_tick_is_known_to_take_a_second()
    bench.submit("running", steps=90)
    with pytest.raises(Overloaded):
        bench.submit("new", steps=100)
    spec = make_spec(n=2, steps=100)
    late = bench.worker.resume("late", spec, 0.5, None, None).future
    with pytest.raises(Overloaded) as caught:
        bench.worker.resume("third", spec, None, None, None)
    assert caught.value.field == "jobs"
    bench.now_s += 1
    bench.engine.gate.open()
    assert isinstance(failure(late), DeadlinePassed), "the deadline still ends it"
    bench.worker.resume("third", spec, None, None, None).future.result(PATIENCE_S)


def test_those_who_see_the_same_share_one_frame(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    seen: list[list[Frame]] = [[], [], []]
    future = bench.submit("a", steps=4)
    bench.engine.next_begun()
    for frames, show in zip(seen, (("x_t",), ("x_t",), ("x_0",)), strict=True):
        bench.worker.watch("a", Watch(Pace(every=1), show, frames.append))  # type: ignore[arg-type]
    read: list[Sequence[int]] = []
    bench.engine.on_preview = read.append
    bench.engine.gate.open()
    images(future)
    assert seen[0] == seen[1] != seen[2]
    assert len(read) == 2 * len(seen[0]) > 0


def test_a_crash_has_those_for_suspects_that_were_in_hand(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2)).start(shut=True)

    def crash(_rows: object) -> None:
        raise RuntimeError("nobody catches this")

    bench.submit("short", n=2, steps=1)
    bench.engine.next_begun()
    long = bench.submit("long", n=2, steps=50)
    assert bench.worker.jobs_of_the_crash == frozenset()
    bench.engine.on_remove = crash
    bench.engine.gate.open()
    assert isinstance(failure(long), EngineFailed)
    wait_until(lambda: bench.worker.crashed)
    assert bench.worker.jobs_of_the_crash == {"short"}


def test_a_recording_has_each_row_at_its_own_steps(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2)).start()  # so that the three rows are not level
    spec = make_spec(n=3, steps=7, seed=40)
    recording = Recording(2, "x_t", spec.n, spec.steps)
    images(bench.worker.submit("a", spec, recording=recording).future)
    frames = recording.frames()
    assert len(frames) == 3
    for number, frame in enumerate(frames, 1):
        np.testing.assert_array_equal(frame, fake_pixels(spec, 2 * number))


def test_several_may_look_on_and_leave(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    frames: dict[str, list[int]] = {"one": [], "two": []}
    watches = {
        name: Watch(Pace(every=1), ("x_t",), lambda frame, name=name: frames[name].append(frame.step))  # type: ignore[misc]
        for name in frames
    }
    future = bench.worker.submit("a", make_spec(steps=6), None, watches["one"]).future
    bench.engine.next_begun()
    bench.worker.watch("a", watches["two"])
    bench.worker.watch("nobody", watches["two"])
    bench.engine.gate.let(2)
    for _ in range(2):
        bench.engine.next_begun()
    bench.worker.unwatch("a", watches["one"])
    bench.worker.unwatch("nobody", watches["one"])
    bench.engine.gate.open()
    images(future)
    assert frames["one"] in ([1, 2], [1, 2, 3])
    assert frames["two"] == [2, 3, 4, 5]
