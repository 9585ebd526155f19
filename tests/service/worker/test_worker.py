"""The worker with its thread: how it begins and ends, hangs and crashes, and what other threads ask of it."""

import itertools
import queue
import random
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest

from tests.service.fakes import INFO, LIMITS, PATIENCE_S, FakeEngine, fake_pixels, make_spec, wait_until
from tests.service.worker.bench import LATENT, MakeBench, failure, images
from tminus.service.api.system import fatal_error
from tminus.service.errors import (
    DeadlinePassed,
    Draining,
    EngineFailed,
    JobCancelled,
    ModelUnloaded,
    NotReady,
    Overloaded,
    ServiceError,
    Stalled,
)
from tminus.service.preview import Pace, Watch
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler
from tminus.service.spec import Images, SampleSpec
from tminus.service.threads import STALL_S
from tminus.service.work import Batch, JobResult, Outlook
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.recording import TrajectoryRecorder

# --- the start ---


def test_a_worker_is_not_ready_before_its_warm_up(make_bench: MakeBench) -> None:
    bench = make_bench(cold=True)
    assert not bench.worker.state.ready
    assert not bench.worker.state.alive
    with pytest.raises(NotReady):
        bench.submit("a")
    bench.engine.gate.shut()
    bench.worker.start()
    bench.engine.next_begun()
    assert bench.worker.state.alive
    assert not bench.worker.state.ready
    with pytest.raises(NotReady) as caught:
        bench.submit("a")
    assert caught.value.headers["Retry-After"] == "1"
    bench.engine.gate.open()
    wait_until(lambda: bench.worker.state.ready)
    assert images(bench.submit("a")).shape == (1, 4, 6, 1)


def test_a_failing_warm_up_ends_the_worker_which_then_refuses_all(make_bench: MakeBench) -> None:
    bench = make_bench(cold=True)

    def fail(_batch: Batch) -> None:
        raise RuntimeError("no kernel image")

    bench.engine.on_step = fail
    bench.worker.start()
    wait_until(lambda: not bench.worker.state.alive)
    assert not bench.worker.state.ready
    with pytest.raises(ServiceError) as caught:
        bench.submit("a")
    assert caught.value.status in (500, 503)
    bench.engine.jobs.clear()  # the warm-up's own slots die with the worker


# --- cancelling ---


def test_cancelling_twice_an_unknown_or_a_finished_job_does_nothing(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    cancelled, finished = bench.submit("cancelled", steps=500), bench.submit("finished", steps=1)
    assert not bench.worker.cancel("nobody", "client_gone")
    bench.engine.gate.let(2)
    images(finished)
    assert bench.worker.cancel("cancelled", "client_gone")
    assert not bench.worker.cancel("finished", "client_gone")
    for name in ("cancelled", "finished", "cancelled"):
        bench.worker.cancel(name, "client_gone")
    bench.engine.gate.open()
    assert isinstance(failure(cancelled), JobCancelled)
    assert not bench.worker.cancel("cancelled", "client_gone")
    images(bench.submit("after"))
    assert bench.metric("jobs_aborted_total", reason="client_gone") == 1
    assert bench.metric("images_total") == 2


# --- failures ---


def test_a_worker_that_dies_answers_every_job_and_is_not_alive(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    removed: list[Sequence[int]] = []
    queued: list[Future[JobResult]] = []

    def break_(rows: Sequence[int]) -> None:
        removed.append(rows)
        queued.extend(bench.submit(name, steps=5) for name in ("queued", "given up", "also queued"))
        assert queued[1].cancel()
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
    wait_until(lambda: bench.worker.state.crashed)
    bench.worker.join()
    for future in queued[::2]:
        assert isinstance(failure(future), EngineFailed)
    assert bench.worker.jobs.statuses() == []
    assert not bench.worker.state.ready
    assert len(removed) == 1, "the engine is called no more"
    with pytest.raises(EngineFailed):
        bench.submit("after")


def test_what_was_done_in_the_tick_in_which_a_worker_dies_is_delivered(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    bench.submit("busy", steps=1)
    bench.engine.next_begun()
    done, other = bench.submit("done", steps=1), bench.submit("other", steps=1)

    def break_(rows: Sequence[int]) -> None:
        if other_rows[0] in rows:
            raise RuntimeError("the device is gone")

    bench.engine.gate.let(1)
    other_rows = bench.engine.next_begun().rows[1:]
    bench.engine.on_remove = break_
    bench.engine.gate.open()
    assert images(done).shape == (1, 4, 6, 1)
    assert isinstance(failure(other), EngineFailed)


@pytest.mark.parametrize("where", ["on_add", "on_step", "on_preview", "on_images", "on_decode"])
def test_a_lost_device_ends_the_worker_and_tells_whose_doing_it_may_be(make_bench: MakeBench, where: str) -> None:
    bench = make_bench(info=LATENT).start()

    def fail(_asked: object) -> None:
        bench.engine.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    setattr(bench.engine, where, fail)
    spec = make_spec(steps=1)
    future = bench.submit_spec("job", spec, recording=TrajectoryRecorder(spec)).future
    assert isinstance(failure(future), EngineFailed)
    wait_until(lambda: bench.worker.state.crashed)
    assert bench.worker.state.jobs_of_the_crash == {"job"}


def test_a_device_whose_loss_several_readers_find_ends_the_worker_and_all_who_wait_get_an_answer(
    make_bench: MakeBench,
) -> None:
    bench = make_bench()

    def lost() -> Images:
        bench.engine.lost = True
        raise RuntimeError("an illegal memory access was encountered")

    bench.engine.images = lambda *_: lost  # type: ignore[method-assign]
    done, running = [bench.submit(name, steps=1) for name in "ab"], bench.submit("running", steps=5)
    bench.start(shut=True)  # now, so that the first tick has all three
    assert len(bench.engine.next_begun().rows) == 3
    bench.engine.gate.let(1)
    bench.engine.next_begun()
    for future in done:
        with pytest.raises(Draining):
            images(future)
    asked = bench.worker.run(lambda _engine: "not done")
    bench.engine.gate.open()
    assert isinstance(failure(running), EngineFailed)
    assert isinstance(asked.exception(PATIENCE_S), EngineFailed)
    assert {"a", "running"} <= bench.worker.state.jobs_of_the_crash, (
        "the last step of one that is read may be the cause"
    )


def test_who_is_given_up_at_the_end_does_not_wait_for_an_image_that_is_decoded(make_bench: MakeBench) -> None:
    bench, decoding, answered = make_bench(info=LATENT).start(), threading.Event(), threading.Event()

    def decode(_: SampleSpec) -> None:
        decoding.set()
        assert answered.wait(PATIENCE_S)

    bench.engine.on_decode = decode
    future = bench.submit("a", n=2, steps=1)
    future.add_done_callback(lambda _: answered.set())
    assert decoding.wait(PATIENCE_S)
    assert bench.worker.close(), "it would wait for as long as an image may take"
    assert isinstance(failure(future), Draining)


# --- what others ask of the engine ---


def test_what_is_asked_of_the_engine_is_done_in_the_workers_thread_between_two_ticks_and_fails_no_job(
    make_bench: MakeBench,
) -> None:
    bench = make_bench().start(shut=True)
    job = bench.submit("job", steps=2)
    bench.engine.next_begun()
    asked = bench.worker.run(lambda engine: (engine.info, len(bench.engine.batches), threading.current_thread().name))
    wrong = bench.worker.run(lambda engine: 1 / 0)
    given_up = bench.worker.run(lambda engine: pytest.fail("its future is cancelled"))
    assert given_up.cancel()
    assert not asked.done()
    bench.engine.gate.let()
    assert asked.result(PATIENCE_S) == (INFO, 1, "tminus-worker")
    assert isinstance(failure(wrong), EngineFailed)
    bench.engine.gate.open()
    job.result(PATIENCE_S)
    assert bench.worker.run(lambda engine: 5).result(PATIENCE_S) == 5, "an idle worker wakes for it"


def test_what_is_asked_before_the_warm_up_or_while_draining_is_refused(make_bench: MakeBench) -> None:
    with pytest.raises(NotReady):
        make_bench(cold=True).worker.run(lambda engine: 1)
    bench = make_bench().start(shut=True)
    job = bench.submit("job", steps=1)
    bench.engine.next_begun()
    asked = bench.worker.run(lambda engine: 1)
    bench.worker.drain()
    with pytest.raises(Draining):
        bench.worker.run(lambda engine: 1)
    bench.engine.gate.open()
    assert asked.result(PATIENCE_S) == 1, "what was taken is done"
    job.result(PATIENCE_S)


# --- what is done while nobody asks ---


def test_spare_work_is_done_while_no_job_runs_and_a_job_waits_for_one_portion_of_it(make_bench: MakeBench) -> None:
    begun, gate, events = queue.SimpleQueue[None](), threading.Semaphore(0), list[str]()

    def work() -> Iterator[None]:
        for _ in range(3):
            begun.put(None)
            assert gate.acquire(timeout=PATIENCE_S)
            events.append(threading.current_thread().name)
            yield

    bench = make_bench(spare_work=work())
    bench.engine.on_step = lambda _: events.append("step")
    bench.start()
    begun.get(timeout=PATIENCE_S)
    job = bench.submit("a", steps=2)
    gate.release()
    job.result(PATIENCE_S)
    gate.release(2)
    wait_until(lambda: not bench.loop.spare_work)
    assert events == ["tminus-worker", "step", "step", "tminus-worker", "tminus-worker"]


def test_a_worker_with_endless_spare_work_ends_when_it_is_asked_to(make_bench: MakeBench) -> None:
    bench = make_bench(spare_work=itertools.repeat(None)).start()
    bench.worker.drain()
    bench.worker.join()
    assert not bench.worker.state.alive


def test_spare_work_that_fails_is_told_in_the_log_and_jobs_go_on(
    make_bench: MakeBench, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.worker.worker.SPARE_S", 0.0)
    bench = make_bench(spare_work=(1 / number for number in [1, 0, 1])).start()  # type: ignore[arg-type]
    wait_until(lambda: not bench.loop.spare_work)
    assert "spare work has failed" in caplog.text
    assert images(bench.submit("a")).shape == (1, 4, 6, 1)


# --- what clients are told ---


def test_statuses_say_of_each_job_whether_it_waits_or_runs_and_how_far_it_is(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2)).start(shut=True)
    bench.a_tick_is_known_to_take_a_second()
    assert bench.worker.jobs.statuses() == []
    first = bench.submit_spec("first", make_spec(seed=7, n=2, steps=4, sampler="ddim"))
    bench.engine.next_begun()
    second = bench.submit_spec("second", make_spec(seed=8, n=2, steps=10))
    assert first.outlook == Outlook(0, 4.0)
    assert second.outlook == Outlook(1, 14.0)
    assert [status.id for status in bench.worker.jobs.statuses()] == ["first", "second"]
    assert {status.state for status in bench.worker.jobs.statuses()} == {"waiting"}, "no step is over"
    assert bench.worker.rows_active == 2
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
    assert bench.worker.jobs.statuses() == []
    wait_until(lambda: bench.worker.rows_active == 0)


def test_statuses_may_be_asked_from_any_thread_at_any_time(make_bench: MakeBench) -> None:
    bench = make_bench().start()
    stop, seen, errors = threading.Event(), [0], []

    def ask() -> None:
        while not stop.is_set():
            try:
                for status in bench.worker.jobs.statuses():
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
    assert bench.worker.state.draining
    assert bench.worker.state.alive
    assert not bench.worker.state.ready
    with pytest.raises(Draining) as caught:
        bench.submit("late")
    assert "Retry-After" in caught.value.headers
    bench.engine.gate.open()
    np.testing.assert_array_equal(images(running), fake_pixels(make_spec(seed=1), 3))
    np.testing.assert_array_equal(images(queued), fake_pixels(make_spec(seed=2), 3))
    bench.worker.join()
    assert not bench.worker.state.crashed


def test_closing_gives_up_what_is_left_after_the_running_tick(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    running = bench.submit("running", seed=1, n=2, steps=10)
    bench.engine.next_begun()
    queued = bench.submit("queued", seed=2, n=3, steps=10)
    closing = threading.Thread(target=bench.worker.close)
    closing.start()
    wait_until(lambda: not bench.worker.state.alive)
    with pytest.raises(Draining):
        bench.submit("late")
    bench.engine.gate.let()
    assert isinstance(failure(running), Draining)
    assert isinstance(failure(queued), Draining)
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert len(bench.engine.batches) == 1
    assert bench.metric("row_steps_saved_total") == 2 * 9 + 3 * 10
    assert bench.metric("jobs_aborted_total", reason="draining") == 2


def test_a_job_whose_last_step_runs_at_closing_is_delivered(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    future = bench.submit("a", steps=1)
    bench.engine.next_begun()
    closing = threading.Thread(target=bench.worker.close)
    closing.start()
    wait_until(lambda: not bench.worker.state.alive)
    bench.engine.gate.let()
    images(future)
    closing.join(PATIENCE_S)


def test_a_worker_may_be_closed_during_its_warm_up(make_bench: MakeBench) -> None:
    bench = make_bench(cold=True)
    bench.engine.gate.shut()
    bench.worker.start()
    bench.engine.next_begun()
    closing = threading.Thread(target=bench.worker.close)
    closing.start()
    wait_until(lambda: bench.worker.state.draining)
    bench.engine.gate.open()
    closing.join(PATIENCE_S)
    assert not closing.is_alive()
    assert not bench.worker.state.ready


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
                future = bench.submit_spec(name, spec).future
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
    assert bench.metric("jobs_aborted_total", reason="client_gone") == answers.count("cancelled")


# --- durable jobs ---


def test_a_queued_job_that_begins_late_in_its_plan_is_not_snapshotted_before_it_has_rows(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    first = bench.submit_spec("first", make_spec(steps=4), durable=True).future
    bench.engine.next_begun()
    sha = "0" * 64
    late = bench.submit_spec("late", make_spec(steps=4, strength=0.5, image_sha256=sha), durable=True).future
    bench.engine.gate.let()
    bench.engine.next_begun()
    assert [set(round) for round in bench.keeper.rounds] == [{"first"}]
    bench.engine.gate.open()
    images(first)
    late.exception(PATIENCE_S)


def test_draining_suspends_durable_jobs_with_a_last_snapshot_and_finishes_the_others(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.keeper.ready = False
    bench.start(shut=True)
    durable = bench.submit_spec("durable", make_spec(steps=900), durable=True).future
    passing = bench.submit("passing", steps=4)
    bench.engine.next_begun()
    bench.worker.drain()
    bench.engine.gate.open()
    assert images(passing).shape == (1, 4, 6, 1)
    assert isinstance(failure(durable), Draining)
    (last,) = bench.keeper.rounds
    assert set(last) == {"durable"}
    assert 1 <= last["durable"].steps[0] < 10
    wait_until(lambda: not bench.worker.state.alive)


def test_a_resumed_job_is_refused_for_lack_of_slots_and_for_nothing_else(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_jobs=2, max_rows=8, max_backlog_s=3)).start(shut=True)
    bench.a_tick_is_known_to_take_a_second()
    bench.submit("running", steps=90)
    with pytest.raises(Overloaded):
        bench.submit("new", steps=100)
    spec = make_spec(n=2, steps=100)
    late = bench.submit_spec("late", spec, 0.5, snapshot=None).future
    with pytest.raises(Overloaded) as caught:
        bench.submit_spec("third", spec, snapshot=None)
    assert caught.value.field == "jobs"
    bench.now_s += 1
    bench.engine.gate.open()
    assert isinstance(failure(late), DeadlinePassed), "the deadline still ends it"
    bench.submit_spec("third", spec, snapshot=None).future.result(PATIENCE_S)


def test_a_durable_job_queued_just_before_the_drain_is_suspended(make_bench: MakeBench) -> None:
    bench = make_bench().start()
    futures: list[Future[JobResult]] = []

    def submit_and_drain() -> None:
        bench.on_clock = lambda: None
        futures.append(bench.submit_spec("durable", make_spec(), durable=True).future)
        bench.worker.drain()

    bench.on_clock = submit_and_drain  # after the commands were taken, when the step begins
    bench.worker.run(lambda engine: None).result(PATIENCE_S)
    bench.worker.join()
    assert isinstance(failure(futures[0]), Draining)
    assert bench.metric("row_steps_saved_total") == bench.metric("jobs_aborted_total", reason="draining") == 0


def test_the_jobs_of_a_crash_are_those_that_were_being_worked_on(make_bench: MakeBench) -> None:
    bench = make_bench(limits=replace(LIMITS, max_batch=2)).start(shut=True)

    def crash(_rows: object) -> None:
        raise RuntimeError("nobody catches this")

    bench.submit("short", n=2, steps=1)
    bench.engine.next_begun()
    long = bench.submit("long", n=2, steps=50)
    assert bench.worker.state.jobs_of_the_crash == frozenset()
    bench.engine.on_remove = crash
    bench.engine.gate.open()
    assert isinstance(failure(long), EngineFailed)
    wait_until(lambda: bench.worker.state.crashed)
    assert bench.worker.state.jobs_of_the_crash == {"short"}


# --- a worker that hangs ---


@pytest.mark.parametrize(
    "at",
    ["engine.add", "engine.begin", "engine.broken", "engine.images", "engine.preview", "engine.remove",
     "engine.snapshot", "engine.is_lost", "scheduler.next_batch", "scheduler.advance", "scheduler.cancel"],
)  # fmt: skip
def test_a_hang_anywhere_in_the_loop_fails_both_probes_until_it_ends(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    bench, hangs, go_on = make_bench().start(shut=True), threading.Event(), threading.Event()
    owner, _, name = at.partition(".")
    part = bench.engine if owner == "engine" else bench.model.scheduler
    whole = getattr(part, name)

    def hang(*given: object) -> object:
        hangs.set()
        assert go_on.wait(PATIENCE_S)
        return whole(*given)

    monkeypatch.setattr(part, name, hang)
    watch = Watch(Pace(every=1), ("x_t",), lambda _frame: None)
    try:
        running = bench.submit_spec("running", make_spec(steps=2), watch=watch, durable=True).future
        asked = bench.worker.run(lambda engine: engine.is_lost())
        if at == "scheduler.cancel":
            bench.engine.next_begun()
            bench.worker.cancel("running", "the test")
        bench.engine.gate.open()
        assert hangs.wait(PATIENCE_S)
        bench.now_s += STALL_S - 1
        assert fatal_error(bench.worker) is None
        assert bench.worker.state.ready
        bench.now_s += 3
        assert isinstance(fatal_error(bench.worker), Stalled)
        assert not bench.worker.state.ready
        with pytest.raises(Stalled):
            bench.submit("late")
    finally:
        go_on.set()
    wait_until(running.done)
    wait_until(lambda: bench.worker.state.ready)
    asked.result(PATIENCE_S)


def test_a_worker_that_waits_for_work_does_not_hang(make_bench: MakeBench) -> None:
    bench = make_bench().start()
    images(bench.submit("a", steps=2))
    for _ in range(2):
        wait_until(lambda: bench.worker.state.ready)  # at the end of the turn that it is in
        bench.now_s += 10 * STALL_S
    wait_until(lambda: bench.worker.state.ready)
    images(bench.submit("b", steps=2))


def test_a_tick_is_given_twenty_times_what_it_should_take(make_bench: MakeBench) -> None:
    bench = make_bench().start(shut=True)
    bench.measured([(1, 10.0), (bench.limits.max_batch, 10.0)])
    running = bench.submit("running", steps=1)
    bench.engine.next_begun()
    bench.now_s += 199
    assert bench.worker.state.ready
    bench.now_s += 2
    assert not bench.worker.state.ready
    bench.engine.gate.open()
    images(running)


def test_closing_does_not_wait_for_a_step_that_hangs_and_its_jobs_get_an_answer(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.worker.worker.CLOSE_S", 0.05)
    bench = make_bench().start(shut=True)
    running = bench.submit("running", steps=2)
    bench.engine.next_begun()
    queued = bench.submit("queued", steps=2)
    assert not bench.worker.close()
    assert bench.worker.state.hangs
    assert isinstance(failure(running), Draining)
    assert isinstance(failure(queued), Draining)


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()])
def test_an_exit_in_the_worker_s_thread_is_a_crash(make_bench: MakeBench, error: BaseException) -> None:
    bench = make_bench().start()

    def leave(_rows: object) -> None:
        raise error

    bench.engine.on_remove = leave
    running = bench.submit("running", steps=1)
    wait_until(lambda: bench.worker.state.crashed)
    assert running.done()


def test_a_deadline_passes_while_images_are_decoded_and_nothing_else_runs(make_bench: MakeBench) -> None:
    """The worker sleeps while there is no tick; each image that is decoded wakes it."""
    bench = make_bench(info=LATENT).start()
    futures: list[Future[JobResult]] = []

    def decode(_: SampleSpec) -> None:
        if bench.now_s > 5:  # the image before has passed the deadline
            wait_until(lambda: bool(futures) and futures[0].done())
        bench.now_s += 3

    bench.engine.on_decode = decode
    futures.append(bench.submit("a", n=4, steps=1, deadline_s=5.0))
    assert isinstance(failure(futures[0]), DeadlinePassed)


def test_a_job_that_comes_behind_the_unloading_of_its_model_is_refused(make_bench: MakeBench) -> None:
    bench = make_bench().start()
    other = LoadedModel(1, FakeEngine(), Scheduler(BatchPolicy.of(LIMITS.max_batch)), None)
    bench.admission.put(1, Speed(BatchPolicy.of(LIMITS.max_batch), LIMITS.max_rows))
    bench.worker.load(other).result(PATIENCE_S)
    bench.engine.gate.shut()
    busy = bench.submit("busy", steps=2)
    bench.engine.next_begun()
    before = bench.submit_spec("before", make_spec(steps=2), model=1)
    unloaded = bench.worker.unload(1)  # waits for the tick
    counted: list[set[str]] = []
    unloaded.add_done_callback(lambda _: counted.append(set(bench.admission.outlooks(0.0))))
    with pytest.raises(ModelUnloaded):
        bench.submit_spec("behind", make_spec(steps=2), model=1)
    bench.engine.gate.open()
    unloaded.result(PATIENCE_S)
    assert isinstance(before.future.exception(PATIENCE_S), ModelUnloaded)
    busy.result(PATIENCE_S)
    assert counted == [{"busy"}], "admission can forget the model at once"
    bench.admission.remove(1)
