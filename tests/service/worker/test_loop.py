"""What the worker does between two ticks and in one: the test is its thread."""

import gc
import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from tests.service.fakes import INFO, LIMITS, PATIENCE_S, FakeEngine, Gate, fake_pixels, make_spec, wait_until
from tests.service.worker.bench import LATENT, Bench, MakeBench, failure, images
from tminus.service.errors import DeadlinePassed, Draining, EngineFailed, InvalidField, JobCancelled, NotFinite
from tminus.service.model_info import ModelInfo
from tminus.service.preview import Frame, Pace, Watch
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler, TickTimes
from tminus.service.spec import Floats, Images, Inputs, SampleSpec, Snapshot
from tminus.service.work import Batch, JobResult
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.loop import LOST
from tminus.service.worker.recording import Recording, TrajectoryRecorder

# --- work ---


def test_when_the_result_is_told_the_job_is_forgotten_and_its_slots_are_free(make_bench: MakeBench) -> None:
    bench = make_bench()
    seen: list[tuple[object, ...]] = []
    future = bench.accept("a")
    future.add_done_callback(
        lambda _future: seen.append((bench.engine.jobs, bench.admission.rows, len(bench.worker.jobs)))
    )
    bench.finish()
    assert seen == [({}, 0, 0)]


def test_a_job_joins_at_the_next_tick_of_one_that_runs(make_bench: MakeBench) -> None:
    bench = make_bench()
    first = bench.accept("first", seed=1, steps=4, n=2)
    bench.tick()
    second = bench.accept("second", seed=2, steps=3)
    bench.tick()
    assert [sorted(batch.steps) for batch in bench.engine.batches] == [[0, 0], [0, 1, 1]]
    bench.finish()
    np.testing.assert_array_equal(images(first), fake_pixels(make_spec(seed=1, n=2), 4))
    np.testing.assert_array_equal(images(second), fake_pixels(make_spec(seed=2), 3))
    assert len(bench.engine.batches) == 4, "they shared every tick they could"


@pytest.mark.parametrize(
    ("info", "labels"),
    [
        (INFO, (0,)),
        (replace(INFO, num_timesteps=1), (0,)),
        (replace(INFO, conditional=False, class_names=(), null_class=None), None),
    ],
)
def test_a_model_that_comes_runs_a_tick_and_frees_its_slot(info: ModelInfo, labels: tuple[int, ...] | None) -> None:
    engine, added = FakeEngine(info), list[SampleSpec]()
    engine.on_add = added.append
    LoadedModel(0, engine, Scheduler(BatchPolicy.of(8))).warm_up()
    assert [(batch.places, batch.steps) for batch in engine.batches] == [(1, (0,))]
    assert [(spec.n, spec.class_labels, spec.sampler) for spec in added] == [(1, labels, "ddpm")]
    assert engine.jobs == {}


# --- giving up ---


def test_a_job_that_is_to_be_alone_shares_no_tick_and_holds_up_no_other(make_bench: MakeBench) -> None:
    bench = make_bench()
    suspects = [bench.accept_spec(name, make_spec(n=2, steps=6), isolated=True, durable=True) for name in ("s", "t")]
    others = [bench.accept(name, n=1, steps=4 + 2 * k) for k, name in enumerate("ab")]
    ticks = list[frozenset[str]]()
    bench.engine.on_step = lambda _: ticks.append(bench.loop.current.ids)
    bench.finish()
    for future in (*suspects, *others):
        images(future)
    assert {frozenset("s"), frozenset("t")} < set(ticks)
    assert {frozenset("st"), frozenset("sa")}.isdisjoint(ticks)
    assert ticks.count(frozenset("ab")) == 4, "the others share theirs"
    noted = [jobs for part, jobs in bench.notes if part == "steps"]
    for k, jobs in enumerate(noted[:-1]):
        assert jobs not in ({"s"}, {"t"}) or not noted[k + 1], "nobody is named with another's images afterwards"
    assert {job_id for taken in bench.keeper.rounds for job_id in taken} == {"s", "t"}, "it is kept whoever steps"
    bench.accept("next", steps=1)
    bench.finish()


def test_a_job_that_is_to_be_alone_can_be_given_up(make_bench: MakeBench) -> None:
    bench = make_bench()
    future = bench.accept_spec("s", make_spec(n=2, steps=9), isolated=True, durable=True)
    assert bench.loop.current.ids == {"s"}, "what breaks before its first tick may be its doing"
    bench.tick()
    bench.cancel("s", "deleted")
    assert isinstance(failure(future), JobCancelled)
    assert not bench.loop.has_work


def test_a_job_given_up_frees_its_rows_before_the_next_tick(make_bench: MakeBench) -> None:
    bench = make_bench()
    stepped = bench.accept("stepped", seed=1, n=2, steps=10, guidance=2.0)
    other = bench.accept("other", seed=2, steps=6)
    bench.tick(2)
    waiting = bench.accept("waiting", seed=3, n=4, steps=10)
    for name in ("stepped", "waiting"):
        bench.cancel(name)
    assert isinstance(failure(stepped), JobCancelled)
    assert isinstance(failure(waiting), JobCancelled)
    assert {spec.seed for spec, _ in bench.engine.jobs.values()} == {2}
    assert bench.metric("row_steps_saved_total") == 20 - 2 * 2 + 40, "row-steps, not places"
    assert bench.metric("jobs_aborted_total", reason="client_gone") == 2
    bench.finish()
    images(other)
    assert [len(batch.rows) for batch in bench.engine.batches] == [3, 3, 1, 1, 1, 1]


# --- failures ---


def test_an_exception_in_a_tick_fails_the_jobs_of_that_tick_only(make_bench: MakeBench) -> None:
    bench = make_bench()
    in_tick = [bench.accept("a", seed=1, n=2, steps=1), bench.accept("b", seed=2, n=6, steps=2)]
    bystander = bench.accept("c", seed=3, n=8, steps=50)

    def fail(_batch: Batch) -> None:
        raise RuntimeError("secret: CUDA out of memory at 0xdeadbeef")

    bench.engine.on_step = fail
    bench.tick()
    bench.engine.on_step = bench.tick_takes_a_second
    for future in in_tick:
        error = failure(future)
        assert isinstance(error, EngineFailed)
        assert (error.status, error.code) == (500, "engine_failed")
        assert "RuntimeError" in error.detail
        assert "secret" not in error.detail
    assert bench.metric("jobs_aborted_total", reason="engine_failed") == 2
    bench.finish()
    np.testing.assert_array_equal(images(bystander), fake_pixels(make_spec(seed=3, n=8), 50))


def test_a_spec_the_model_cannot_do_fails_that_job_only(make_bench: MakeBench) -> None:
    bench = make_bench()
    running = bench.accept("running", seed=1)
    bench.tick()

    def refuse(_spec: SampleSpec) -> None:
        raise ValueError("prediction_type epsilon cannot start from alpha_bar = 0")

    bench.engine.on_add = refuse
    error = failure(bench.accept("bad", seed=666, sampler="ddim"))
    assert isinstance(error, InvalidField)
    assert (error.status, error.field, error.value) == (422, "sampler", "ddim")
    assert "alpha_bar = 0" in error.detail
    bench.cancel("bad")  # the client went at that moment
    bench.finish()
    images(running)


def test_images_that_cannot_be_read_fail_their_own_job_only(make_bench: MakeBench) -> None:
    bench = make_bench()
    broken, whole = bench.accept("broken", seed=1, steps=1), bench.accept("whole", seed=2, steps=2)
    (broken_rows,) = (rows for spec, rows in bench.engine.jobs.values() if spec.seed == 1)

    def break_(rows: Sequence[int]) -> None:
        if rows == broken_rows:
            raise RuntimeError("the device hiccups")

    bench.engine.on_images = break_
    bench.finish()
    assert isinstance(failure(broken), EngineFailed)
    np.testing.assert_array_equal(images(whole), fake_pixels(make_spec(seed=2, steps=2), 2))


# --- rows that are not finite ---


def test_a_row_that_is_not_finite_fails_its_own_job_only(make_bench: MakeBench) -> None:
    bench = make_bench()
    sick, well = bench.accept("sick", seed=1, n=3, steps=10), bench.accept("well", seed=2, n=2, steps=5)
    bench.tick()
    (sick_rows,) = (rows for spec, rows in bench.engine.jobs.values() if spec.seed == 1)
    bench.engine.nan.add(sick_rows[1])  # one of three rows
    bench.tick()
    error = failure(sick)
    assert isinstance(error, NotFinite)
    assert (error.status, error.code) == (500, "not_finite")
    assert {spec.seed for spec, _ in bench.engine.jobs.values()} == {2}, "the job's other rows are gone too"
    assert bench.metric("jobs_aborted_total", reason="not_finite") == 1
    assert bench.metric("row_steps_saved_total") == 30 - 2 * 3
    bench.finish()
    np.testing.assert_array_equal(images(well), fake_pixels(make_spec(seed=2, n=2), 5))


def test_a_row_that_breaks_in_its_last_step_fails_its_job_and_no_other(make_bench: MakeBench) -> None:
    bench = make_bench()
    sick, well = bench.accept("sick", seed=1, steps=1), bench.accept("well", seed=2, steps=1)
    bench.engine.on_step = lambda batch: bench.engine.nan.update(
        rows[0] for spec, rows in bench.engine.jobs.values() if spec.seed == 1
    )
    bench.tick()
    assert isinstance(failure(sick), NotFinite)
    np.testing.assert_array_equal(images(well), fake_pixels(make_spec(seed=2), 1))


def test_a_row_that_breaks_after_the_last_look_is_told_when_the_images_are_read(make_bench: MakeBench) -> None:
    """As on a GPU, where the flags of a tick come one tick late."""
    bench = make_bench()
    bench.engine.on_images = bench.engine.nan.update
    future = bench.accept("a", n=2)
    bench.finish()
    with pytest.raises(NotFinite):
        images(future)


def test_a_job_that_is_taken_up_is_ended_by_the_worker_alone_and_one_cancelled_before_is_forgotten(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()
    running, dropped = bench.accept("running"), bench.submit("dropped")
    assert not running.cancel()
    assert dropped.cancel()
    bench.do_commands()
    assert list(bench.status()) == ["running"]
    bench.finish()
    images(running)


# --- deadlines ---


def test_a_deadline_that_passes_while_waiting_ends_the_job_and_no_other(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2))
    running = bench.accept("running", seed=1, n=2, steps=4)
    bench.tick()
    late = bench.accept("late", seed=2, n=2, steps=5, deadline_s=2.0)
    patient = bench.accept("patient", seed=3, n=2, steps=6, deadline_s=1000.0)
    bench.tick(2)
    assert not late.done(), "not a tick too early"
    bench.loop.end_overdue()
    bench.act_on_events()
    error = failure(late)
    assert isinstance(error, DeadlinePassed)
    assert (error.status, error.code, error.field, error.value) == (504, "deadline_passed", "deadline_s", 2.0)
    assert error.problem()["bound"] == "a longer time"
    bench.finish()
    np.testing.assert_array_equal(images(running), fake_pixels(make_spec(seed=1, n=2), 4))
    np.testing.assert_array_equal(images(patient), fake_pixels(make_spec(seed=3, n=2), 6))
    assert bench.metric("jobs_aborted_total", reason="deadline") == 1
    assert bench.metric("row_steps_saved_total") == 10


def test_a_deadline_that_passes_while_stepping_frees_the_rows(make_bench: MakeBench) -> None:
    bench = make_bench()
    late = bench.accept("late", seed=1, n=3, steps=50, deadline_s=4.0)
    other = bench.accept("other", seed=2, steps=10)
    bench.tick(4)
    answered: list[bool] = []

    def step(batch: Batch) -> None:
        answered.append(late.done())
        bench.tick_takes_a_second(batch)

    bench.engine.on_step = step
    bench.tick()
    assert answered == [True], "before the tick, which may be long"
    assert isinstance(failure(late), DeadlinePassed)
    assert [len(batch.rows) for batch in bench.engine.batches] == [4, 4, 4, 4, 1]
    assert bench.metric("row_steps_saved_total") == 150 - 4 * 3
    bench.finish()
    np.testing.assert_array_equal(images(other), fake_pixels(make_spec(seed=2), 10))


def test_a_job_done_in_the_tick_in_which_its_deadline_passes_is_delivered(make_bench: MakeBench) -> None:
    bench = make_bench()
    future = bench.accept("a", steps=3, deadline_s=3.0)
    bench.finish()
    images(future)


# --- metrics ---


def test_ticks_jobs_and_images_are_counted(make_bench: MakeBench) -> None:
    bench = make_bench()
    first = bench.accept("first", n=2, steps=3, seed=1, guidance=2.0)
    bench.now_s += 1  # while a tick would run
    second = bench.accept("second", n=1, steps=2, seed=2, sampler="ddim")
    bench.finish()
    results = [first.result(timeout=0), second.result(timeout=0)]
    assert bench.metric("row_steps_total", sampler="ddpm") == 6
    assert bench.metric("row_steps_total", sampler="ddim") == 2
    assert bench.metric("images_total") == 3
    assert bench.metric("tick_places_count") == len(bench.engine.batches) == 3
    assert bench.metric("tick_places_sum") == 2 * 6 + 2
    assert bench.metric("tick_duration_seconds_sum") == 3
    times = [(result.queue_s, result.first_step_s, result.denoise_s) for result in results]
    assert times == [(1, 2, 3), (0, 1, 2)]
    assert bench.metric("queue_wait_seconds_count") == bench.metric("time_to_first_step_seconds_count") == 2
    assert bench.metric("queue_wait_seconds_sum") == 1 + 0
    assert bench.metric("time_to_first_step_seconds_sum") == 2 + 1
    assert bench.metric("row_steps_saved_total") == 0
    assert bench.notes == [], "jobs that are not durable are named to nobody"


# --- snapshots ---


def test_snapshots_are_taken_of_durable_jobs_that_have_stepped(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2))
    durable = bench.accept_spec("durable", make_spec(n=2, steps=3), durable=True)
    waiting = bench.accept_spec("waiting", make_spec(n=2, steps=5), durable=True)
    passing = bench.accept("passing", n=2, steps=4)
    bench.tick()
    steps = [{name: each.steps for name, each in taken.items()} for taken in bench.keeper.rounds]
    assert steps == [{"durable": (1, 1)}]
    bench.finish()
    for future in (durable, waiting, passing):
        images(future)
    assert [set(taken) for taken in bench.keeper.rounds] == [{"durable"}] * 2 + [{"waiting"}] * 4, "none at the end"


def test_a_job_goes_on_from_its_snapshot(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.a_tick_is_known_to_take_a_second()
    zeros = np.zeros((2, 1, 4, 6), np.float32)
    snapshot = Snapshot((7, 10), zeros, zeros, zeros[:, None][:, :0])  # the second row has taken them all
    spec = make_spec(n=2, steps=10)
    ticket = bench.submit_spec("a", spec, snapshot=snapshot, durable=True)
    bench.do_commands()
    assert bench.admission.backlog_s == pytest.approx(3 / LIMITS.max_batch), "it counts from there"
    assert bench.status()["a"].step == 8
    bench.tick()
    assert bench.engine.batches[0].steps == (7,)
    bench.finish()
    np.testing.assert_array_equal(images(ticket.future), fake_pixels(spec, 10))
    assert bench.metric("row_steps_total", sampler="ddpm") == 3


def test_a_job_that_another_server_has_by_now_saves_no_steps(make_bench: MakeBench) -> None:
    bench = make_bench()
    lost = bench.accept_spec("lost", make_spec(steps=900), durable=True)
    bench.tick(2)
    bench.cancel("lost", LOST)
    assert isinstance(failure(lost), JobCancelled)
    assert bench.metric("row_steps_saved_total") == bench.metric("jobs_aborted_total", reason=LOST) == 0
    assert bench.engine.jobs == {}


# --- viewers and recordings ---


def test_viewers_of_the_same_images_share_one_frame(make_bench: MakeBench) -> None:
    bench = make_bench()
    seen: list[list[Frame]] = [[], [], []]
    bench.accept("a", steps=4)
    for frames, show in zip(seen, (("x_t",), ("x_t",), ("x_0",)), strict=True):
        bench.watch("a", Watch(Pace(every=1), show, frames.append))  # type: ignore[arg-type]
    read: list[Sequence[int]] = []
    bench.engine.on_preview = read.append
    bench.finish()
    assert seen[0] == seen[1] != seen[2]
    assert len(read) == 2 * len(seen[0]) == 2 * 3


def test_viewers_may_come_and_go(make_bench: MakeBench) -> None:
    bench = make_bench()
    frames: dict[str, list[int]] = {"one": [], "two": []}
    watches = {
        name: Watch(Pace(every=1), ("x_t",), lambda frame, name=name: frames[name].append(frame.step))  # type: ignore[misc]
        for name in frames
    }
    bench.accept_spec("a", make_spec(steps=6), watch=watches["one"])
    bench.tick()
    bench.watch("a", watches["two"])
    bench.watch("nobody", watches["two"])
    bench.tick(2)
    bench.unwatch("a", watches["one"])
    bench.unwatch("nobody", watches["one"])
    bench.finish()
    assert frames == {"one": [1, 2, 3], "two": [2, 3, 4, 5]}


@pytest.mark.parametrize("broken", ["preview", "put", "snapshot"])
def test_a_frame_or_snapshot_that_fails_costs_no_job(make_bench: MakeBench, broken: str) -> None:
    bench = make_bench()

    def fail(_argument: object) -> None:
        raise RuntimeError("no room")

    if broken != "put":
        setattr(bench.engine, f"on_{broken}", fail)
    watch = Watch(Pace(every=1), ("x_t",), fail if broken == "put" else lambda frame: None)
    future = bench.accept_spec("a", make_spec(steps=4), watch=watch, durable=True)
    bench.finish()
    images(future)
    assert len(bench.keeper.rounds) == (0 if broken == "snapshot" else 3)


def test_recordings_have_each_row_at_its_own_steps(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2))  # so that the three rows are not level
    spec, spec_of_path = make_spec(n=3, steps=7, seed=40), make_spec(n=3, steps=4, seed=80)
    recording, path = Recording(2, ("x_t",), spec.n, spec.steps), TrajectoryRecorder(spec_of_path)
    futures = [
        bench.accept_spec("a", spec, recording=recording),
        bench.accept_spec("b", spec_of_path, recording=path),
        bench.accept("c", n=2, steps=9),
    ]
    bench.finish()
    for future in futures:
        images(future)
    frames = recording.frames()
    assert len(frames) == 3
    for step, frame in frames.items():
        np.testing.assert_array_equal(frame["x_t"], fake_pixels(spec, step))
    x_t = path.trajectory().x_t
    assert len(x_t) == 5, "before the first step, and after each"
    for step, x in enumerate(x_t):
        np.testing.assert_array_equal(x, fake_pixels(spec_of_path, step).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("reads", [0, 2])
def test_a_path_that_fails_costs_its_own_job_only(make_bench: MakeBench, reads: int) -> None:
    """Before the first step, and between two."""
    bench = make_bench()
    spec = make_spec(seed=1, steps=3)
    calls = iter(range(10))

    def fail(_rows: object) -> None:
        if next(calls) == reads:
            raise RuntimeError("out of memory")

    bench.engine.on_preview = fail
    recorded = bench.accept_spec("recorded", spec, recording=TrajectoryRecorder(spec))
    other = bench.accept("other", seed=2)
    bench.finish()
    error = failure(recorded)
    assert isinstance(error, EngineFailed)
    assert error.detail == "its steps could not be read: RuntimeError"
    images(other)


# --- a GPU that is lost, and one that runs ahead ---


@pytest.mark.parametrize("lost", [False, True])
def test_images_that_cannot_be_read_end_the_worker_where_the_device_is_lost(make_bench: MakeBench, lost: bool) -> None:
    """A GPU tells it when it is waited for, which is in the thread that reads."""
    bench = make_bench()

    def read() -> Images:
        bench.engine.lost = lost
        raise RuntimeError("an illegal memory access was encountered")

    bench.engine.images = lambda *_: read  # type: ignore[method-assign]
    future = bench.accept("job", steps=1)
    bench.tick()
    with pytest.raises(Draining if lost else RuntimeError):  # a durable one waits for the next start
        images(future)
    if lost:
        with pytest.raises(RuntimeError, match="lost"):
            bench.next_command()
    assert bench.worker._commands.empty()


def test_the_first_tick_of_a_model_tells_nothing_though_another_has_been_stepped(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.measured([(1, 1.0), (LIMITS.max_batch, 1.0)])
    busy = FakeEngine()
    policy = BatchPolicy.of(LIMITS.max_batch, times=TickTimes(((1, 1.0), (LIMITS.max_batch, 1.0))))
    other = LoadedModel(1, busy, Scheduler(policy))
    bench.admission.put(1, Speed(policy, LIMITS.max_rows))
    loading = bench.worker.load(other)
    bench.do_commands()
    loading.result(timeout=0)
    bench.engine.runs_ahead = busy.runs_ahead = True
    busy.on_step = bench.tick_takes_a_second
    bench.engine.on_step = lambda batch: setattr(bench, "now_s", bench.now_s + (1.0 if batch.steps[0] else 0.01))
    spec = make_spec(steps=40)
    bench.accept_spec("busy", spec, model=1)
    bench.tick()
    for name in ("a", "b", "c"):
        future = bench.accept(name, n=1, steps=4)
        while not future.done():
            bench.tick()
    assert bench.admission.tick_time_ratio == 1.0
    bench.finish()


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_where_the_host_runs_ahead_the_tick_before_may_be_the_cause_of_a_crash(
    make_bench: MakeBench, runs_ahead: bool
) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2))
    bench.engine.runs_ahead = runs_ahead
    last, seen = bench.accept("last", n=2, steps=1), list[frozenset[str]]()
    next_one = bench.accept("next", n=2, steps=2)
    bench.engine.on_step = lambda _batch: seen.append(bench.loop.current.ids)
    bench.finish()
    assert seen[0] == {"last"}
    assert seen[1] == ({"last", "next"} if runs_ahead else {"next"})
    assert bench.loop.current.ids == {"next"}
    bench.tick()
    assert bench.loop.current.ids == set()
    images(last), images(next_one)


@pytest.mark.parametrize("whose", ["s", "ab"])
def test_where_the_host_runs_ahead_a_job_that_is_to_be_alone_is_waited_for_and_so_are_those_before(
    make_bench: MakeBench, whose: str
) -> None:
    bench, seen, broken = make_bench(), list[frozenset[str]](), frozenset(whose)
    bench.engine.runs_ahead = True
    for name in "ab":
        bench.accept(name, n=2, steps=6)
    bench.accept_spec("s", make_spec(n=2, steps=6), isolated=True, durable=True)
    bench.engine.on_step = lambda _batch: seen.append(bench.loop.current.ids)

    def latents(_rows: Sequence[int]) -> Floats:
        bench.engine.lost = bench.loop.current.ids == broken and len(seen) >= 3  # not by the first ticks
        if bench.engine.lost or bench.loop.current.ids == frozenset("ab"):
            raise RuntimeError("the device is lost, or has no memory for the copy")
        return np.zeros((2, 1, 4, 6), np.float32)

    bench.engine.latents = latents  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="lost"):
        bench.finish()
    assert broken in seen
    assert set(seen) <= {frozenset("ab"), frozenset("s")}, "nobody is named with it"
    assert bench.loop.current.ids == broken


def test_a_model_that_goes_is_held_by_no_tick_of_which_the_end_is_not_known(make_bench: MakeBench) -> None:
    bench = make_bench()
    ahead = FakeEngine()
    ahead.runs_ahead = True
    bench.admission.put(1, Speed(BatchPolicy.of(8), LIMITS.max_rows))
    bench.worker.load(LoadedModel(1, ahead, Scheduler(BatchPolicy.of(8))))
    bench.do_commands()
    bench.accept_spec("job", make_spec(steps=4), model=1)
    bench.tick()
    bench.worker.unload(1)
    bench.do_commands()
    engine = weakref.ref(ahead)
    del ahead
    gc.collect()
    assert engine() is None


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_of_an_engine_that_runs_ahead_the_first_tick_of_a_burst_tells_nothing(
    make_bench: MakeBench, runs_ahead: bool
) -> None:
    """It takes as long as a launch: the ticks that follow wait for the one before."""
    bench = make_bench()
    bench.measured([(1, 1.0), (LIMITS.max_batch, 1.0)])
    bench.engine.runs_ahead = runs_ahead
    bench.engine.on_step = lambda batch: setattr(bench, "now_s", bench.now_s + (1.0 if batch.steps[0] else 0.01))
    for name in ("a", "b", "c"):
        bench.accept(name, n=1, steps=4)
        bench.finish()
    assert (bench.admission.tick_time_ratio == 1.0) is runs_ahead


# --- latent models: encoded before, decoded after ---


def picture() -> Inputs:
    return Inputs(np.zeros((4, 6, 1), np.uint8))


def test_images_are_decoded_one_by_one_while_others_step(make_bench: MakeBench) -> None:
    bench, decoded = make_bench(info=LATENT), list[int]()
    bench.measured([(1, 1.0), (8, 1.0)], 0.5)
    bench.engine.on_decode = lambda spec: decoded.append(spec.seed)
    a, b = bench.accept("a", n=3, steps=1, seed=1), bench.accept("b", n=1, steps=3, seed=2)
    bench.tick()
    assert not a.done()
    assert [spec.seed for spec, _ in bench.engine.jobs.values()] == [2], "the slots of the first are free"
    bench.tick()
    backlogs = []
    for _ in range(3):
        assert not a.done()
        backlogs.append(bench.admission.backlog_s)
        bench.next_command()
    assert np.diff(backlogs).tolist() == [-0.5, -0.5], "they leave the ledger one by one"
    assert decoded == [1, 1, 1]
    assert bench.metric("autoencoder_duration_seconds_count", direction="decode") == 3
    np.testing.assert_array_equal(images(a), fake_pixels(make_spec(n=3, steps=1, seed=1), 1, LATENT))
    assert a.result(0).decode_s == 1.0, "the tick that ran meanwhile"
    assert (list(bench.status()), b.done()) == (["b"], False)


def tick_that_waits(bench: Bench) -> threading.Thread:
    """Begin a tick in a thread, and return when it waits for what the coding thread does."""
    thread = threading.Thread(target=bench.tick)
    thread.start()
    wait_until(lambda: bool(bench.loop.autoencoder.turnstile._waiting))
    return thread


def test_while_an_image_of_a_job_that_is_to_be_alone_is_decoded_nothing_steps(make_bench: MakeBench) -> None:
    bench, gate = make_bench(info=LATENT), Gate()
    gate.shut()
    bench.engine.on_decode = lambda _spec: gate.enter()
    bench.accept_spec("s", make_spec(steps=1), isolated=True, durable=True)
    bench.accept("a", steps=3)
    while not bench.loop.autoencoder.jobs:
        bench.tick()
    wait_until(lambda: ("codes", {"s"}) in bench.notes)
    stepped = len(bench.engine.batches)
    tick = tick_that_waits(bench)
    assert len(bench.engine.batches) == stepped
    assert [jobs for part, jobs in bench.notes if part == "steps"][-1] == set(), "nobody else is named meanwhile"
    gate.open()
    tick.join(PATIENCE_S)
    assert len(bench.engine.batches) == stepped + 1
    bench.next_command()


def test_a_job_that_is_to_be_alone_steps_only_while_nothing_is_decoded(make_bench: MakeBench) -> None:
    bench, gate = make_bench(info=LATENT), Gate()
    gate.shut()
    bench.engine.on_decode = lambda _spec: gate.enter()
    bench.accept_spec("s", make_spec(steps=3), isolated=True, durable=True)
    bench.accept_spec("a", make_spec(steps=1), durable=True)
    while not bench.loop.autoencoder.jobs:
        bench.tick()
    wait_until(lambda: ("codes", {"a"}) in bench.notes)
    del bench.notes[:]
    tick = tick_that_waits(bench)
    gate.open()
    tick.join(PATIENCE_S)
    assert [each for each in bench.notes if each[1]] == [("steps", {"s"})]
    assert bench.notes.index(("codes", set())) < bench.notes.index(("steps", {"s"}))
    bench.next_command()


@pytest.mark.parametrize("suspended", [False, True])
def test_a_job_that_ends_while_it_is_decoded_is_answered_once(make_bench: MakeBench, suspended: bool) -> None:
    bench, gate = make_bench(info=LATENT), Gate()
    gate.shut()
    bench.engine.on_decode = lambda spec: gate.enter()
    a, b = bench.accept_spec("a", make_spec(steps=1, n=2), durable=suspended), bench.accept("b", steps=1)
    bench.tick()
    if suspended:
        bench.loop.suspend_durable()
        bench.act_on_events()
    else:
        bench.cancel("a", "cancelled")
    assert isinstance(failure(a), Draining if suspended else JobCancelled)
    gate.open()
    while not b.done():
        bench.next_command()
    assert bench.worker._commands.empty()


@pytest.mark.parametrize(("raised", "told"), [(NotFinite(), NotFinite), (RuntimeError("secret"), EngineFailed)])
def test_what_fails_to_decode_fails_alone(make_bench: MakeBench, raised: Exception, told: type[Exception]) -> None:
    bench = make_bench(info=LATENT)

    def decode(spec: SampleSpec) -> None:
        if spec.seed == 1:
            raise raised

    bench.engine.on_decode = decode
    bad, good = bench.accept("bad", steps=1, seed=1), bench.accept("good", steps=1, seed=2)
    bench.tick()
    bench.next_command()
    bench.next_command()
    assert isinstance(error := failure(bad), told)
    assert "secret" not in str(error)
    assert good.result(0)


def accept_picture(bench: Bench, **kwargs: object) -> "Future[JobResult]":
    inputs = picture()
    spec = make_spec(steps=2, strength=1.0, image_sha256=inputs.image_sha256)
    return bench.accept_spec("a", spec, inputs=inputs, **kwargs)


def test_a_picture_is_encoded_before_its_job_begins_and_a_viewer_may_come_meanwhile(make_bench: MakeBench) -> None:
    bench, frames = make_bench(info=LATENT), list[Frame]()
    future = accept_picture(bench)
    assert bench.engine.inputs == []
    bench.worker.watch("a", Watch(Pace(every=1), ("x_t",), frames.append))
    for _ in range(2):
        bench.next_command()
    (given,) = bench.engine.inputs
    assert given is not None
    assert given.latents is not None
    assert bench.metric("autoencoder_duration_seconds_count", direction="encode") == 1
    bench.tick(2)
    bench.next_command()
    assert future.done()
    assert [frame.step for frame in frames] == [1]


def test_a_job_whose_picture_cannot_be_encoded_never_begins(make_bench: MakeBench) -> None:
    bench = make_bench(info=LATENT)

    def fail(_: Inputs) -> None:
        raise RuntimeError("secret")

    bench.engine.on_encode = fail
    future = accept_picture(bench)
    bench.next_command()
    assert isinstance(failure(future), EngineFailed)
    assert bench.engine.inputs == []


def test_a_job_that_goes_on_from_a_snapshot_is_encoded_only_for_its_mask(make_bench: MakeBench) -> None:
    bench, inputs = make_bench(info=LATENT), picture()
    shape = (1, 1, 4, 6)
    snapshot = Snapshot((1,), *(np.zeros(each, np.float32) for each in (shape, shape, (1, 0, 1, 4, 6))))
    spec = make_spec(steps=2, strength=1.0, image_sha256=inputs.image_sha256)
    bench.accept_spec("a", spec, inputs=inputs, snapshot=snapshot, durable=True)
    assert bench.engine.inputs == [inputs], "as it came"


def test_what_is_no_jobs_is_done_beside_too(make_bench: MakeBench) -> None:
    bench = make_bench(info=LATENT)
    assert bench.worker.run_autoencoder("noise", lambda: 7).result(PATIENCE_S) == 7

    def fail() -> None:
        raise RuntimeError("secret")

    error = bench.worker.run_autoencoder("noise", fail).exception(PATIENCE_S)
    assert isinstance(error, EngineFailed)
    assert "secret" not in str(error)
    gate = Gate()
    gate.shut()
    left = bench.worker.run_autoencoder("noise", gate.enter)
    assert not left.cancel(), "its client may go away, and the thread goes on"
    gate.open()
    assert bench.worker.run_autoencoder("noise", lambda: 8).result(PATIENCE_S) == 8
    bench.loop.autoencoder.close()
    assert isinstance(bench.loop.autoencoder.run("noise", lambda: 7).exception(PATIENCE_S), Draining)
