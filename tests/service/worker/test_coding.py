"""The thread that encodes and decodes: fewest left first, one thing at a time, errors that end one job."""

import queue
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.service.fakes import PATIENCE_S, FakeEngine, Gate, make_spec, wait_until
from tminus.service.errors import Draining
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler
from tminus.service.work import work_of
from tminus.service.worker.coding import AutoencoderThread, TaskDone
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.running_job import NewJob, RunningJob


class Bench:
    """A coding thread whose tasks wait at a gate and note that they were done."""

    def __init__(self) -> None:
        self.gate, self.done = Gate(), queue.SimpleQueue[tuple[str, list[Any], Exception | None]]()
        self.order: list[str] = []
        self.told: list[TaskDone] = []
        self.coding = AutoencoderThread(self.tell, lambda _ids: None)

    def tell(self, coded: TaskDone) -> None:
        self.told.append(coded)
        if coded.results is not None and coded.job is not None:
            self.done.put((coded.job.id, list(coded.results), coded.error))

    def put(
        self,
        name: str,
        count: int,
        fails: Exception | None = None,
        *,
        isolated: bool = False,
        owner: str = "",
    ) -> None:
        def task(number: int) -> Callable[[], str]:
            def act() -> str:
                self.order.append(name)
                self.gate.enter()
                if fails is not None:
                    raise fails
                return f"{name}{number}"

            return act

        self.coding.put(make_job(name, isolated=isolated, owner=owner), "decode", [task(k) for k in range(count)])

    def next_done(self) -> tuple[str, list[Any], Exception | None]:
        return self.done.get(timeout=PATIENCE_S)


def make_job(name: str, *, isolated: bool, owner: str) -> RunningJob:
    model = LoadedModel(0, FakeEngine(), Scheduler(BatchPolicy.of(8)))
    spec = make_spec()
    return RunningJob(NewJob(name, spec, work_of(spec, model.info), isolated=isolated, owner=owner), model, 0.0)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.gate.open()
    made.coding.close()


def test_a_job_gets_its_results_in_order(bench: Bench) -> None:
    bench.put("a", 3)
    assert bench.next_done() == ("a", ["a0", "a1", "a2"], None)
    assert [(each.kind, each.results is None) for each in bench.told] == [("decode", k < 2) for k in range(3)]


def test_a_short_job_does_not_wait_for_a_long_one(bench: Bench) -> None:
    bench.gate.shut()
    bench.put("long", 5)
    wait_until(lambda: bench.order == ["long"])
    bench.put("short", 2)
    bench.gate.open()
    assert [bench.next_done()[0] for _ in range(2)] == ["short", "long"]
    assert bench.order[:3] == ["long", "short", "short"]


def test_a_job_that_is_to_be_alone_holds_up_no_tick_before_its_turn_and_waits_for_no_more_than_one(
    bench: Bench,
) -> None:
    bench.gate.shut()
    bench.put("first", 1)
    wait_until(lambda: bench.order == ["first"])
    bench.put("isolated", 1, isolated=True)
    turnstile = bench.coding.turnstile
    with turnstile.enter(isolated=False):  # a tick
        bench.gate.open()
        assert bench.next_done()[0] == "first"
        wait_until(lambda: bool(turnstile._waiting))
        assert bench.order == ["first"]
    with turnstile.enter(isolated=False):
        assert bench.order == ["first", "isolated"]


def test_an_error_ends_its_job_alone(bench: Bench) -> None:
    error = ValueError("broken")
    bench.gate.shut()
    bench.put("bad", 3, fails=error)
    bench.put("good", 1)
    bench.gate.open()
    assert sorted([bench.next_done(), bench.next_done()]) == [("bad", [], error), ("good", ["good0"], None)]
    assert bench.order.count("bad") == 1


def test_a_job_that_is_dropped_is_not_done(bench: Bench) -> None:
    bench.gate.shut()
    bench.put("dropped", 3)
    wait_until(lambda: bench.order == ["dropped"])
    bench.coding.drop("dropped")
    bench.coding.drop("nobody")
    bench.put("kept", 1)
    bench.gate.open()
    assert bench.next_done()[0] == "kept"
    assert bench.order == ["dropped", "kept"]
    assert [each.job and each.job.id for each in bench.told] == ["dropped", "kept"]
    assert bench.done.empty()


def test_owners_take_turns_however_many_short_jobs_one_has(bench: Bench) -> None:
    bench.gate.shut()
    bench.put("flood0", 1, owner="flood")
    wait_until(lambda: bench.order == ["flood0"])
    for number in range(1, 9):
        bench.put(f"flood{number}", 1, owner="flood")
    bench.put("other", 3, owner="other")
    bench.gate.open()
    for _ in range(10):
        bench.next_done()
    assert bench.order.index("other") == 1, "the flood has had the time of a task by then"


def test_a_long_job_moves_however_many_short_ones_come(bench: Bench) -> None:
    bench.gate.shut()
    bench.put("long", 4)
    wait_until(lambda: bench.order == ["long"])
    for k in range(12):
        bench.put(f"short{k}", 1)
    bench.gate.open()
    for _ in range(13):
        bench.next_done()
    assert [k for k, name in enumerate(bench.order) if name == "long"] == [0, 4, 8, 9]


def test_a_thread_is_there_only_once_it_is_needed_and_ends(bench: Bench) -> None:
    assert bench.coding._thread is None
    bench.put("a", 1)
    bench.next_done()
    thread = bench.coding._thread
    assert thread is not None
    bench.coding.close()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert isinstance(bench.coding.run("noise", lambda: 7).exception(PATIENCE_S), Draining)
    assert bench.order == ["a"]


def test_who_waits_when_it_is_closed_is_told_and_a_task_that_hangs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tminus.service.worker.coding.JOIN_S", 0.05)
    monkeypatch.setattr("tminus.service.threads.STALL_S", 0.0)
    bench = Bench()
    bench.gate.shut()
    bench.put("runs", 1)
    wait_until(lambda: bench.order == ["runs"])
    assert bench.coding.pulse.stalled_s > 0
    waits = bench.coding.run("noise", lambda: 7)
    assert not bench.coding.close()
    assert isinstance(waits.exception(PATIENCE_S), Draining)
    bench.gate.open()
    wait_until(lambda: bench.coding.close())
    assert bench.coding.pulse.stalled_s == 0
