"""Two ticks in flight: what ends one ends nothing of the other, and no slot is written once it is free."""

import random
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.fakes import LIMITS, PATIENCE_S, FakeEngine, fake_pixels, make_spec, wait_until
from tests.service.worker.bench import LATENT, Bench, MakeBench, failure, images
from tminus.service.errors import DeadlinePassed, Draining, EngineFailed, JobCancelled, ModelUnloaded, NotFinite
from tminus.service.preview import Frame, Pace, Watch
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler, TickTimes
from tminus.service.spec import Inputs, SampleSpec
from tminus.service.work import Batch, JobResult, JobRows
from tminus.service.worker.coding import Turnstile
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.recording import Recording, TrajectoryRecorder

TWO = replace(LIMITS, max_batch=2)
PATIENT = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_queue(make_bench: MakeBench, **kwargs: object) -> Bench:
    """A bench whose ticks have two places, and of which two may be in flight."""
    return make_bench(limits=TWO, queues=True, **kwargs)


def seeds_in_flight(bench: Bench) -> list[set[int]]:
    return [bench.engine.seeds(batch) for batch in bench.engine.in_flight]


def accept_all(bench: Bench, *jobs: SampleSpec, **kwargs: Any) -> "list[Future[JobResult]]":
    """Have jobs accepted, each under its seed as a name."""
    return [bench.accept_spec(str(spec.seed), spec, **kwargs) for spec in jobs]


def assert_images(future: "Future[JobResult]", spec: SampleSpec) -> None:
    np.testing.assert_array_equal(images(future), fake_pixels(spec, spec.steps))


def failing_for(bench: Bench, seed: int, times: int = 1) -> Callable[[Batch], None]:
    """What fails so many ticks that have rows of a job."""
    left = [None] * times

    def fail(batch: Batch) -> None:
        if left and seed in bench.engine.seeds(batch):
            left.pop()
            raise RuntimeError("out of memory")

    return fail


# --- when there are two ---


@pytest.mark.parametrize(
    ("jobs", "most"),
    [
        ([make_spec(seed=1, n=2, steps=4), make_spec(seed=2, n=2, steps=4)], 2),
        ([make_spec(seed=1, n=5, steps=4)], 2),
        ([make_spec(seed=1, n=2, steps=4)], 1),
        ([make_spec(seed=1, n=1, steps=4), make_spec(seed=2, n=2, steps=100)], 1),
    ],
)
def test_a_second_tick_begins_before_the_first_ends_where_rows_wait_for_throughput_alone(
    make_bench: MakeBench, jobs: list[SampleSpec], most: int
) -> None:
    bench, seen = make_queue(make_bench), list[int]()
    bench.engine.on_step = lambda _batch: seen.append(len(bench.engine.in_flight))
    futures = accept_all(bench, *jobs)
    bench.tick(3)
    assert max(seen) == most
    bench.finish()
    for future, spec in zip(futures, jobs, strict=True):
        assert_images(future, spec)


@pytest.mark.parametrize("fails", [False, True])
def test_seconds_of_a_tick_count_from_the_end_of_the_one_in_flight_before_it(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    bench, told = make_queue(make_bench), list[tuple[float, bool]]()
    stepped = bench.admission.stepped

    def note(model: int, jobs: Iterable[JobRows], places: int, seconds: float, *, overlaps: bool = False) -> None:
        told.append((seconds, overlaps))
        stepped(model, jobs, places, seconds, overlaps=overlaps)

    monkeypatch.setattr(bench.admission, "stepped", note)
    fail = failing_for(bench, 1, times=int(fails))

    def step(batch: Batch) -> None:
        bench.tick_takes_a_second(batch)
        fail(batch)

    bench.engine.on_step = step
    accept_all(bench, make_spec(seed=1, n=2, steps=3), make_spec(seed=2, n=2, steps=3))
    bench.finish()
    assert [seconds for seconds, _ in told] == [1.0] * (3 if fails else 6)
    assert [overlaps for _, overlaps in told][:2] == ([True, False] if fails else [False, True])


# --- failures ---


@pytest.mark.parametrize("at", ["begin", "step"])
@pytest.mark.parametrize("seed", [1, 2])
def test_an_error_of_a_tick_fails_its_jobs_and_the_other_tick_ends_well(
    make_bench: MakeBench, at: str, seed: int
) -> None:
    bench = make_queue(make_bench)
    jobs = make_spec(seed=1, n=2, steps=4), make_spec(seed=2, n=2, steps=4)
    futures = accept_all(bench, *jobs)
    bench.tick()
    assert len(bench.engine.in_flight) == 1
    setattr(bench.engine, f"on_{at}", failing_for(bench, seed))
    bench.finish()
    for future, spec in zip(futures, jobs, strict=True):
        if spec.seed == seed:
            assert isinstance(failure(future), EngineFailed)
        else:
            assert_images(future, spec)
    assert bench.metric("jobs_aborted_total", reason="engine_failed") == 1


@pytest.mark.parametrize("times", [1, 2])
def test_a_job_with_rows_in_both_ticks_fails_once(make_bench: MakeBench, times: int) -> None:
    bench, failed = make_queue(make_bench), set[int]()
    jobs = make_spec(seed=1, n=3, steps=4), make_spec(seed=2, n=3, steps=4)
    futures = accept_all(bench, *jobs)

    def fail(batch: Batch) -> None:
        both = all(1 in seeds for seeds in seeds_in_flight(bench)) and len(bench.engine.in_flight) == 2
        if 0 < len(failures) < times or (not failures and both):
            failures.append(batch)
            failed.update(bench.engine.seeds(batch))
            raise RuntimeError("out of memory")

    failures: list[Batch] = []
    bench.engine.on_step = fail
    bench.finish()
    assert len(failures) == times
    assert 1 in failed
    for future, spec in zip(futures, jobs, strict=True):
        if spec.seed in failed:
            assert isinstance(failure(future), EngineFailed)
        else:
            assert_images(future, spec)
    assert bench.metric("jobs_aborted_total", reason="engine_failed") == len(failed)


def test_a_job_that_cannot_be_added_is_answered(make_bench: MakeBench) -> None:
    bench = make_queue(make_bench)

    def fail(_spec: SampleSpec) -> None:
        raise RuntimeError("out of memory")

    job = make_spec(seed=1, n=5, steps=4)
    (running,) = accept_all(bench, job)
    bench.tick()
    bench.engine.on_add = fail
    (refused,) = accept_all(bench, make_spec(seed=2))
    assert isinstance(failure(refused), EngineFailed)
    bench.engine.on_add = lambda _spec: None
    bench.finish()
    assert_images(running, job)


def test_a_row_that_is_not_finite_ends_the_other_tick_of_its_job_first(make_bench: MakeBench) -> None:
    bench = make_queue(make_bench)
    sick, well = accept_all(bench, make_spec(seed=1, n=5, steps=6), make_spec(seed=2, n=1, steps=6), durable=True)
    bench.tick()
    bench.engine.nan.add(bench.engine.in_flight[0].rows[0])
    bench.finish()
    assert isinstance(failure(sick), NotFinite)
    assert_images(well, make_spec(seed=2, n=1, steps=6))
    assert bench.metric("jobs_aborted_total", reason="not_finite") == 1


# --- what is asked for while ticks are in flight ---


def test_a_job_cancelled_in_flight_ends_its_ticks_before_its_slots_are_free(make_bench: MakeBench) -> None:
    bench = make_queue(make_bench)
    jobs = [make_spec(seed=seed, n=2, steps=4) for seed in (1, 2, 3)]
    futures = accept_all(bench, *jobs)
    bench.tick()
    (seed,) = bench.engine.seeds(bench.engine.in_flight[0])
    bench.cancel(str(seed))
    assert bench.engine.in_flight == []
    assert isinstance(failure(futures[seed - 1]), JobCancelled)
    (next_one,) = accept_all(bench, spec := make_spec(seed=4, n=2, steps=4))  # in these slots
    bench.finish()
    for future, job in zip([*futures, next_one], [*jobs, spec], strict=True):
        if job.seed != seed:
            assert_images(future, job)


def test_a_job_cancelled_while_another_s_tick_is_in_flight_waits_for_nothing(make_bench: MakeBench) -> None:
    bench = make_queue(make_bench)
    futures = accept_all(bench, *(make_spec(seed=seed, n=2, steps=4) for seed in (1, 2)))
    bench.tick()
    (seed,) = bench.engine.seeds(bench.engine.in_flight[0])
    bench.cancel(str(3 - seed))
    assert len(bench.engine.in_flight) == 1
    assert isinstance(failure(futures[2 - seed]), JobCancelled)
    bench.finish()
    images(futures[seed - 1])


def with_a_last_step_in_flight(bench: Bench, **kwargs: Any) -> "list[Future[JobResult]]":
    """Two jobs: the last step of the second is in flight, beside a row of the first."""
    futures = accept_all(bench, make_spec(seed=1, n=3, steps=9), make_spec(seed=2, n=1, steps=4), **kwargs)
    (last_row,) = (rows[0] for spec, rows in bench.engine.jobs.values() if spec.seed == 2)

    def is_last(batch: Batch) -> bool:
        return (last_row, 3) in zip(batch.rows, batch.steps, strict=True)

    while not any(is_last(batch) for batch in bench.engine.in_flight):
        bench.tick()
        assert not futures[1].done()
    assert seeds_in_flight(bench) == [{1, 2}]
    return futures


def test_jobs_that_end_with_the_tick_of_another_one_that_is_overdue_are_answered_once(make_bench: MakeBench) -> None:
    bench = make_queue(make_bench)
    late, done = with_a_last_step_in_flight(bench, deadline_s=100.0)
    bench.now_s = 101.0
    bench.loop.end_overdue()
    bench.act_on_events()
    assert isinstance(failure(late), DeadlinePassed)
    assert_images(done, make_spec(seed=2, n=1, steps=4))
    assert bench.metric("jobs_aborted_total", reason="deadline") == 1


def test_a_job_whose_last_step_ends_with_a_row_that_is_not_finite_is_done_and_has_no_snapshot(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture
) -> None:
    bench = make_queue(make_bench)
    sick, done = with_a_last_step_in_flight(bench, durable=True)
    bench.keeper.rounds.clear()
    (sick_rows,) = (rows for spec, rows in bench.engine.jobs.values() if spec.seed == 1)
    bench.engine.nan |= set(sick_rows) & set(bench.engine.in_flight[0].rows)
    bench.tick()
    assert isinstance(failure(sick), NotFinite)
    assert_images(done, make_spec(seed=2, n=1, steps=4))
    assert [set(taken) for taken in bench.keeper.rounds] == [{"1"}], "of the tick in flight, which ended first"
    assert "no snapshot could be taken" not in caplog.text


def test_a_job_that_is_to_be_alone_is_alone_in_flight(make_bench: MakeBench) -> None:
    bench, ticks = make_queue(make_bench), list[tuple[list[set[int]], frozenset[str]]]()
    look = lambda _batch: ticks.append((seeds_in_flight(bench), bench.loop.current.ids))  # noqa: E731
    bench.engine.on_step = look
    others = [make_spec(seed=seed, n=2, steps=6) for seed in (1, 2)]
    futures = accept_all(bench, *others)
    bench.tick()
    assert len(bench.engine.in_flight) == 1
    spec = make_spec(seed=666, n=5, steps=6)
    suspect = bench.accept_spec("666", spec, isolated=True, durable=True)
    assert bench.engine.in_flight == []
    assert bench.loop.current.ids == {"666"}
    bench.finish()
    assert {len(seeds) for seeds, _ in ticks} == {1, 2}
    with_it = [tick for tick in ticks if any(666 in seeds for seeds in tick[0]) or "666" in tick[1]]
    assert with_it == [([{666}], frozenset({"666"}))] * 15
    for future, job in zip([suspect, *futures], [spec, *others], strict=True):
        assert_images(future, job)


def test_the_jobs_of_all_ticks_in_flight_may_be_the_cause_of_a_crash(make_bench: MakeBench) -> None:
    bench, seen = make_queue(make_bench), list[tuple[set[str], set[str], frozenset[str]]]()

    def look(_batch: Batch) -> None:
        here = {str(seed) for seeds in seeds_in_flight(bench) for seed in seeds}
        seen.append((here, bench.notes[-1][1], bench.loop.current.ids))

    bench.engine.on_begin = bench.engine.on_step = look
    accept_all(bench, *(make_spec(seed=seed, n=2, steps=4) for seed in (1, 2, 3)), durable=True)
    bench.tick()
    assert all(here <= noted == current for here, noted, current in seen)
    assert any(len(here) == 2 for here, *_ in seen)
    (accepted,) = accept_all(bench, make_spec(seed=4), durable=True)
    assert bench.notes[-1][1] == {"4"} | {str(seed) for seeds in seeds_in_flight(bench) for seed in seeds}
    bench.finish()
    assert all(here <= noted == current for here, noted, current in seen)
    images(accepted)


def test_a_model_that_goes_with_a_tick_in_flight_ends_it(make_bench: MakeBench) -> None:
    bench, engine = make_queue(make_bench), FakeEngine()
    engine.queues = True
    policy = BatchPolicy.of(2, times=TickTimes(((1, 1.0), (2, 1.0)), 0.5))
    bench.admission.put(1, Speed(policy, LIMITS.max_rows))
    bench.worker.load(LoadedModel(1, engine, Scheduler(policy)))
    bench.do_commands()
    futures = [bench.accept_spec(str(seed), make_spec(seed=seed, n=2, steps=4), model=1) for seed in (1, 2)]
    bench.tick()
    assert len(engine.in_flight) == 1
    bench.worker.unload(1)
    bench.do_commands()
    assert engine.in_flight == []
    assert engine.jobs == {}
    for future in futures:
        assert isinstance(failure(future), ModelUnloaded)
    (other,) = accept_all(bench, make_spec(seed=3))
    bench.finish()
    images(other)


def test_a_drain_ends_the_ticks_in_flight_and_a_suspended_job_goes_on_from_there(make_bench: MakeBench) -> None:
    bench = make_queue(make_bench)
    jobs = [make_spec(seed=1, n=3, steps=5), make_spec(seed=2, n=2, steps=6)]
    futures = accept_all(bench, *jobs, durable=True)
    bench.tick(3)
    assert len(bench.engine.in_flight) == 1
    rows = {str(spec.seed): its_rows for spec, its_rows in bench.engine.jobs.values()}
    done = dict(bench.engine.steps_done)
    for batch in bench.engine.in_flight:
        done |= {row: step + 1 for row, step in zip(batch.rows, batch.steps, strict=True)}
    bench.loop.suspend_durable()
    bench.act_on_events()
    last = {name: snapshot for taken in bench.keeper.rounds for name, snapshot in taken.items()}
    assert {name: last[name].steps for name in rows} == {
        name: tuple(done[row] for row in its_rows) for name, its_rows in rows.items()
    }
    second = make_queue(make_bench)
    for future, spec in zip(futures, jobs, strict=True):
        assert isinstance(failure(future), Draining)
        ticket = second.submit_spec(str(spec.seed), spec, snapshot=last[str(spec.seed)], durable=True)
        second.do_commands()
        second.finish()
        assert_images(ticket.future, spec)


def test_recordings_and_frames_have_each_row_at_its_own_steps_while_others_are_in_flight(make_bench: MakeBench) -> None:
    bench, frames = make_queue(make_bench), list[Frame]()
    spec, of_path = make_spec(n=5, steps=7, seed=40), make_spec(n=3, steps=6, seed=80)
    recording, path = Recording(2, ("x_t",), spec.n, spec.steps), TrajectoryRecorder(of_path)
    futures = [
        bench.accept_spec("a", spec, recording=recording, watch=Watch(Pace(every=1), ("x_t",), frames.append)),
        bench.accept_spec("b", of_path, recording=path),
    ]
    in_flight = set[int]()
    bench.engine.on_preview = lambda _rows: in_flight.add(len(bench.engine.in_flight))
    bench.finish()
    for future, job in zip(futures, (spec, of_path), strict=True):
        assert_images(future, job)
    assert in_flight == {0, 1}
    assert [frame.step for frame in frames] == [1, 2, 3, 4, 5, 6]
    for step, frame in recording.frames().items():
        np.testing.assert_array_equal(frame["x_t"], fake_pixels(spec, step))
    for step, x in enumerate(path.trajectory().x_t):
        np.testing.assert_array_equal(x, fake_pixels(of_path, step).transpose(0, 3, 1, 2))


# --- latent models: a thread that waits to be alone ---


@pytest.mark.parametrize("comes", ["a job", "a job that is to be alone", "nothing", "it as a tick begins"])
def test_a_thread_that_waits_to_be_alone_is_let_in_while_ticks_overlap_and_jobs_come(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, comes: str
) -> None:
    """Neither waits for the other: the tick in flight is inside, and the coding thread waits for it to leave."""
    bench, entered = make_queue(make_bench, info=LATENT), threading.Event()
    futures = accept_all(bench, *(make_spec(seed=seed, n=2, steps=5) for seed in (1, 2)))
    bench.tick()
    assert len(bench.engine.in_flight) == 1
    turnstile = bench.loop.autoencoder.turnstile

    def code() -> None:
        with turnstile.enter(isolated=True):
            assert bench.engine.in_flight == []
            entered.set()

    def work() -> None:
        if comes.startswith("a job"):
            more = {"isolated": True} if comes != "a job" else {}
            futures.append(bench.accept_spec("3", make_spec(seed=3, steps=2), **more))
        bench.tick()
        monkeypatch.undo()
        bench.tick(2)

    if comes == "it as a tick begins":
        monkeypatch.setattr(Turnstile, "is_open", True)
    threads = [threading.Thread(target=target, daemon=True) for target in (code, work)]
    threads[0].start()
    wait_until(lambda: bool(turnstile._waiting))
    threads[1].start()
    assert entered.wait(PATIENCE_S)
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    while not all(future.done() for future in futures):
        if not bench.worker.step():
            bench.next_command()


def test_a_job_that_is_to_be_alone_begins_after_its_picture_though_a_tick_is_in_flight(make_bench: MakeBench) -> None:
    bench, inputs = make_queue(make_bench, info=LATENT), Inputs(np.zeros((4, 6, 1), np.uint8))
    futures = accept_all(bench, *(make_spec(seed=seed, n=2, steps=5) for seed in (1, 2)))
    spec = make_spec(seed=3, steps=2, strength=1.0, image_sha256=inputs.image_sha256)
    futures.append(bench.accept_spec("3", spec, inputs=inputs, isolated=True))
    wait_until(lambda: not bench.worker._commands.empty() and bench.loop.autoencoder.turnstile.is_open)
    bench.tick()
    assert len(bench.engine.in_flight) == 1
    encoded = threading.Thread(target=bench.next_command, daemon=True)
    encoded.start()
    encoded.join(PATIENCE_S)
    assert not encoded.is_alive()
    assert bench.engine.in_flight == []
    while not all(future.done() for future in futures):
        if not bench.worker.step():
            bench.next_command()


# --- the end ---


@pytest.mark.parametrize("info", [LATENT, replace(LATENT, latent=None)])
def test_a_lost_device_with_a_tick_in_flight_ends_the_worker_and_all_are_answered(
    make_bench: MakeBench, info: object
) -> None:
    bench = make_queue(make_bench, info=info).start(shut=True)
    futures = [bench.submit(str(seed), seed=seed, n=2, steps=9) for seed in (1, 2)]
    bench.engine.next_begun()
    bench.engine.gate.let(2)
    wait_until(lambda: len(bench.engine.in_flight) == 2)
    ticks = list(bench.loop.ticks._in_flight)  # as whoever looks at the error may hold them

    def fail(_batch: Batch) -> None:
        bench.engine.lost = True
        raise RuntimeError("the device is lost")

    bench.engine.on_step = fail
    bench.engine.gate.open()
    for future in futures:
        assert isinstance(failure(future), EngineFailed)
    wait_until(lambda: not bench.worker.state.alive)
    assert bench.worker.state.jobs_of_the_crash == {"1", "2"}
    assert bench.loop.autoencoder.turnstile._inside == [], f"{len(ticks)} are inside"


def test_closing_gives_up_what_is_in_flight(make_bench: MakeBench) -> None:
    bench = make_queue(make_bench).start(shut=True)
    futures = [bench.submit(str(seed), seed=seed, n=2, steps=900) for seed in (1, 2)]
    wait_until(lambda: len(bench.engine.in_flight) == 2)
    bench.engine.gate.open()
    bench.worker.close()
    for future in futures:
        assert isinstance(failure(future), Draining)
    assert bench.engine.in_flight == []


# --- all of it, by chance ---


@PATIENT
@given(seed=st.integers(0, 2**32))
def test_whatever_fails_comes_and_goes_every_job_is_answered_once_and_rightly(make_bench: MakeBench, seed: int) -> None:
    rng = random.Random(seed)
    limits = replace(LIMITS, max_batch=rng.choice([2, 3, 4]))
    bench = make_bench(limits=limits, queues=True)
    engine, failed, sick = bench.engine, set[int](), set[int]()
    chance = rng.choice([0, 0.05, 0.2])

    def maybe(batch: Batch) -> None:
        if rng.random() < chance:
            failed.update(engine.seeds(batch))
            raise RuntimeError("by chance")

    def step(batch: Batch) -> None:
        maybe(batch)
        bench.now_s += 1
        if rng.random() < chance / 2:
            row = rng.choice(batch.rows)
            engine.nan.add(row)
            sick.update(spec.seed for spec, rows in engine.jobs.values() if row in rows)

    engine.on_begin, engine.on_step = maybe, step
    jobs: dict[int, tuple[SampleSpec, Future[JobResult]]] = {}
    gone, deadlines, paths = set[int](), set[int](), dict[int, TrajectoryRecorder]()
    while len(jobs) < 12 or bench.loop.has_work:
        if len(jobs) < 12 and rng.random() < 0.5:
            spec = make_spec(
                seed=len(jobs), n=rng.randint(1, 5), steps=rng.choice([1, 3, 5, 20]), guidance=rng.choice([1.0, 2.0])
            )
            more: dict[str, object] = {"durable": rng.random() < 0.4}
            if rng.random() < 0.1:
                more["isolated"] = True
            if rng.random() < 0.3:
                more["recording"] = paths[spec.seed] = TrajectoryRecorder(spec)
            if rng.random() < 0.3:
                more["deadline_s"] = rng.uniform(1, 40)
                deadlines.add(spec.seed)
            jobs[spec.seed] = spec, bench.accept_spec(str(spec.seed), spec, **more)  # type: ignore[arg-type]
        if rng.random() < 0.1 and jobs:
            name = rng.choice(list(jobs))
            gone.add(name)
            bench.cancel(str(name))
        bench.tick()
    assert engine.in_flight == []
    assert engine.jobs == {}
    for name, (spec, future) in jobs.items():
        error = failure(future) if future.exception(0) else None
        match error:
            case None if name in sick:  # its last rows were in flight: as on a GPU, it is told when they are read
                with pytest.raises(NotFinite):
                    images(future)
            case None:
                assert_images(future, spec)
                if name in paths:
                    for k, x in enumerate(paths[name].trajectory().x_t):
                        np.testing.assert_array_equal(x, fake_pixels(spec, k).transpose(0, 3, 1, 2))
            case EngineFailed():
                assert name in failed, f"its ticks ended well: {error.detail}"
            case NotFinite():
                assert name in sick
            case JobCancelled():
                assert name in gone
            case DeadlinePassed():
                assert name in deadlines
            case _:
                raise AssertionError(error)
