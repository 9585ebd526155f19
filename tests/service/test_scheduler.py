import math
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.job import Batch
from service.scheduler import Scheduler


def tick(scheduler: Scheduler) -> Batch:
    batch = scheduler.next_batch()
    assert batch is not None
    scheduler.advance(batch)
    return batch


def drain(scheduler: Scheduler) -> list[Batch]:
    batches = []
    while (batch := scheduler.next_batch()) is not None:
        scheduler.advance(batch)
        batches.append(batch)
    return batches


# --- one by one ---


def test_without_jobs_there_is_no_batch() -> None:
    scheduler = Scheduler(4)
    assert scheduler.next_batch() is None
    assert scheduler.num_rows == 0


def test_one_row_steps_from_the_first_step_to_the_last() -> None:
    scheduler = Scheduler(4)
    scheduler.add("a", [7], steps=3, places_per_row=1)
    assert drain(scheduler) == [Batch((7,), (step,), ()) for step in range(3)]
    assert scheduler.num_rows == 0


def test_choosing_a_batch_changes_nothing() -> None:
    scheduler = Scheduler(4)
    scheduler.add("a", [0, 1], steps=2, places_per_row=2)
    assert scheduler.next_batch() == scheduler.next_batch()


def test_late_job_joins_at_the_next_tick() -> None:
    scheduler = Scheduler(8)
    scheduler.add("early", [0, 1], steps=10, places_per_row=1)
    assert set(tick(scheduler).rows) == {0, 1}
    scheduler.add("late", [2, 3], steps=10, places_per_row=1)
    batch = tick(scheduler)
    assert dict(zip(batch.rows, batch.steps, strict=True)) == {0: 1, 1: 1, 2: 0, 3: 0}


def test_a_long_job_does_not_hold_up_a_short_one() -> None:
    scheduler = Scheduler(8)
    scheduler.add("long", range(8), steps=1000, places_per_row=1)
    tick(scheduler)
    scheduler.add("short", [8], steps=20, places_per_row=1)
    for step in range(20):
        batch = tick(scheduler)
        assert dict(zip(batch.rows, batch.steps, strict=True))[8] == step
        assert batch.places == 8


def test_shortest_remaining_work_goes_first() -> None:
    scheduler = Scheduler(4, reserved_share=0)
    scheduler.add("oldest", range(4), steps=100, places_per_row=1)
    scheduler.add("middle", range(4, 8), steps=10, places_per_row=1)
    scheduler.add("shortest", range(8, 12), steps=5, places_per_row=1)
    order = [batch.rows[0] // 4 for batch in drain(scheduler)]
    assert order == [2] * 5 + [1] * 10 + [0] * 100


def test_guidance_counts_double_in_remaining_work() -> None:
    scheduler = Scheduler(2, reserved_share=0)
    scheduler.add("guided", [0], steps=6, places_per_row=2)
    scheduler.add("plain", [1, 2], steps=5, places_per_row=1)
    assert tick(scheduler).rows == (1, 2)


def test_equal_jobs_go_in_order_of_arrival() -> None:
    scheduler = Scheduler(2, reserved_share=0)
    for name, rows in (("b", [0, 1]), ("a", [2, 3]), ("c", [4, 5])):
        scheduler.add(name, rows, steps=1, places_per_row=1)
    assert [batch.rows for batch in drain(scheduler)] == [(0, 1), (2, 3), (4, 5)]


def test_the_oldest_job_keeps_its_share_under_a_stream_of_short_ones() -> None:
    scheduler = Scheduler(8, reserved_share=0.25)
    scheduler.add("long", range(4), steps=100, places_per_row=1)
    for round_ in range(20):
        scheduler.add(f"short{round_}", range(100 + 8 * round_, 108 + 8 * round_), steps=1, places_per_row=1)
        assert sum(row < 4 for row in tick(scheduler).rows) == 2
    assert scheduler.cancel("long") == 4 * 100 - 20 * 2


def test_the_reserve_of_a_small_batch_still_fits_a_guided_row() -> None:
    scheduler = Scheduler(4, reserved_share=0.25)
    scheduler.add("guided", [0], steps=50, places_per_row=2)
    scheduler.add("short", [1, 2, 3, 4], steps=1, places_per_row=1)
    assert 0 in tick(scheduler).rows


def test_a_guided_row_takes_two_places_and_says_where_it_stands() -> None:
    scheduler = Scheduler(5, reserved_share=0)
    scheduler.add("plain", [0], steps=1, places_per_row=1)
    scheduler.add("guided", [1, 2, 3], steps=1, places_per_row=2)
    batch = tick(scheduler)
    assert batch.rows == (0, 1, 2)
    assert batch.guided == (1, 2)
    assert batch.places == 5


def test_an_odd_place_that_no_guided_row_fits_stays_empty() -> None:
    scheduler = Scheduler(3)
    scheduler.add("guided", [0, 1], steps=1, places_per_row=2)
    assert [batch.places for batch in drain(scheduler)] == [2, 2]


def test_more_rows_than_places_advance_together() -> None:
    scheduler = Scheduler(2, reserved_share=0)
    scheduler.add("a", range(6), steps=4, places_per_row=1)
    for _ in range(3):
        tick(scheduler)
    steps = scheduler.next_batch()
    assert steps is not None
    assert set(steps.steps) == {1}, "each row took step 0 before any took step 1"


def test_cancel_frees_the_places_at_once_and_returns_the_work_left() -> None:
    scheduler = Scheduler(4)
    scheduler.add("a", range(3), steps=5, places_per_row=1)
    scheduler.add("b", range(3, 5), steps=5, places_per_row=2)
    assert scheduler.num_rows == 5
    before = tick(scheduler)
    a_steps = sum(row < 3 for row in before.rows)
    assert scheduler.cancel("a") == 15 - a_steps
    after = scheduler.next_batch()
    assert after is not None
    assert set(after.rows) == {3, 4}
    b_steps = len(before.rows) - a_steps
    assert scheduler.cancel("b") == 2 * (10 - b_steps)
    assert scheduler.next_batch() is None
    assert scheduler.num_rows == 0


def test_cancelling_twice_or_an_unknown_job_does_nothing() -> None:
    scheduler = Scheduler(4)
    scheduler.add("a", [0], steps=5, places_per_row=1)
    assert scheduler.cancel("nobody") == 0
    assert scheduler.cancel("a") == 5
    assert scheduler.cancel("a") == 0


def test_cancelling_a_finished_job_does_nothing() -> None:
    scheduler = Scheduler(4)
    scheduler.add("a", [0], steps=1, places_per_row=1)
    tick(scheduler)
    assert scheduler.cancel("a") == 0


def test_a_row_id_may_return_with_another_job() -> None:
    scheduler = Scheduler(4)
    scheduler.add("a", [0], steps=5, places_per_row=1)
    tick(scheduler)
    scheduler.cancel("a")
    scheduler.add("a", [0], steps=2, places_per_row=1)
    assert [batch.steps for batch in drain(scheduler)] == [(0,), (1,)]


def test_advance_tells_who_started_and_who_finished_once_each() -> None:
    scheduler = Scheduler(2, reserved_share=0)
    scheduler.add("long", [0, 1], steps=2, places_per_row=1)
    scheduler.add("short", [2], steps=1, places_per_row=1)
    seen = []
    while (batch := scheduler.next_batch()) is not None:
        seen.append(scheduler.advance(batch))
    assert [advance.started for advance in seen] == [("short", "long"), (), ()]
    assert [advance.finished for advance in seen] == [("short",), (), ("long",)]


def test_a_job_is_finished_only_with_its_last_row() -> None:
    scheduler = Scheduler(2)
    scheduler.add("a", [0, 1, 2], steps=1, places_per_row=1)
    first = scheduler.next_batch()
    assert first is not None
    assert scheduler.advance(first).finished == ()
    assert scheduler.num_rows == 1
    second = scheduler.next_batch()
    assert second is not None
    assert scheduler.advance(second).finished == ("a",)


def test_rows_by_job_counts_each_jobs_rows_in_a_batch() -> None:
    scheduler = Scheduler(8)
    scheduler.add("a", [0, 1, 2], steps=1, places_per_row=1)
    scheduler.add("b", [3], steps=1, places_per_row=2)
    batch = scheduler.next_batch()
    assert batch is not None
    assert scheduler.rows_by_job(batch) == {"a": 3, "b": 1}


def test_a_programmers_mistake_asserts() -> None:
    scheduler = Scheduler(4)
    scheduler.add("a", [0], steps=2, places_per_row=1)
    with pytest.raises(AssertionError):
        scheduler.add("a", [1], steps=2, places_per_row=1)
    with pytest.raises(AssertionError):
        scheduler.add("b", [], steps=2, places_per_row=1)
    with pytest.raises(AssertionError):
        scheduler.advance(Batch((0,), (1,), ()))
    with pytest.raises(AssertionError):
        Scheduler(1)


# --- for every load ---


@dataclass
class Arrival:
    tick: int
    n: int
    steps: int
    places_per_row: int
    cancel_after: int | None  # ticks from its arrival
    rows: list[int] = field(default_factory=list)


arrivals = st.lists(
    st.builds(
        Arrival,
        tick=st.integers(0, 12),
        n=st.integers(1, 6),
        steps=st.integers(1, 6),
        places_per_row=st.integers(1, 2),
        cancel_after=st.none() | st.none() | st.integers(0, 8),
        rows=st.builds(list),
    ),
    min_size=1,
    max_size=8,
)
loads = given(arrivals, st.integers(2, 12), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))


class Simulation:
    """Runs a load to its end by its own books, which the tests hold against what the scheduler chose."""

    def __init__(self, load: list[Arrival], max_batch: int, reserved_share: float) -> None:
        self.max_batch, self.reserved_share = max_batch, reserved_share
        self.scheduler = Scheduler(max_batch, reserved_share)
        self.load = sorted(load, key=lambda job: job.tick)
        self.jobs = {f"job{i}": job for i, job in enumerate(self.load)}
        self.alive: dict[str, Arrival] = {}  # in order of arrival
        self.next_step: dict[int, int] = {}
        self.job_of: dict[int, str] = {}
        self.taken: dict[int, list[int]] = {}
        self.cancelled: set[str] = set()
        self.finished: list[str] = []
        row_ids = iter(range(10_000))
        for name, job in self.jobs.items():
            job.rows[:] = [next(row_ids) for _ in range(job.n)]
            self.job_of |= dict.fromkeys(job.rows, name)
            self.taken |= {row: [] for row in job.rows}

    def remaining(self, name: str) -> int:
        job = self.jobs[name]
        return sum(job.steps - self.next_step[row] for row in job.rows if row in self.next_step) * job.places_per_row

    def waiting(self) -> dict[int, int]:
        """Rows that can step, with the places each takes."""
        return {row: self.jobs[self.job_of[row]].places_per_row for row in self.next_step}

    def run(self, check: "Check") -> None:
        for now in range(10_000):
            for name, job in self.jobs.items():
                if job.tick == now:
                    self.scheduler.add(name, job.rows, job.steps, job.places_per_row)
                    self.alive[name] = job
                    self.next_step |= dict.fromkeys(job.rows, 0)
                if job.cancel_after is not None and job.tick + job.cancel_after == now and name in self.alive:
                    assert self.scheduler.cancel(name) == self.remaining(name)
                    self.cancelled.add(name)
                    self._forget(name)
            assert self.scheduler.num_rows == len(self.next_step)
            batch = self.scheduler.next_batch()
            if batch is None:
                assert not self.next_step
                if now > 20:
                    return
                continue
            check(self, batch)
            advance = self.scheduler.advance(batch)
            for row, step in zip(batch.rows, batch.steps, strict=True):
                self.taken[row].append(step)
                self.next_step[row] = step + 1
                if step + 1 == self.jobs[self.job_of[row]].steps:
                    del self.next_step[row]
            done = [name for name, job in self.alive.items() if not any(row in self.next_step for row in job.rows)]
            assert sorted(advance.finished) == sorted(done)
            for name in done:
                self.finished.append(name)
                self._forget(name)
        raise AssertionError("the load never ended")

    def _forget(self, name: str) -> None:
        for row in self.alive.pop(name).rows:
            self.next_step.pop(row, None)


class Check:
    def __call__(self, simulation: Simulation, batch: Batch) -> None:
        """Look at a batch before it is carried out."""


@settings(deadline=None, max_examples=200)
@loads
def test_every_row_of_every_job_takes_each_step_once_and_in_order(
    load: list[Arrival], max_batch: int, share: float
) -> None:
    simulation = Simulation(load, max_batch, share)
    simulation.run(Check())
    for row, steps in simulation.taken.items():
        name = simulation.job_of[row]
        job = simulation.jobs[name]
        assert steps == list(range(len(steps)))
        assert len(steps) == job.steps or (name in simulation.cancelled and len(steps) < job.steps)
    assert sorted(simulation.finished) == sorted(set(simulation.jobs) - simulation.cancelled)
    assert simulation.scheduler.next_batch() is None


@settings(deadline=None, max_examples=200)
@loads
def test_places_never_exceed_the_batch_and_no_row_is_in_it_twice(
    load: list[Arrival], max_batch: int, share: float
) -> None:
    class Bounds(Check):
        def __call__(self, simulation: Simulation, batch: Batch) -> None:
            waiting = simulation.waiting()
            assert batch.rows
            assert max(Counter(batch.rows).values()) == 1
            assert set(batch.rows) <= waiting.keys()
            assert sum(waiting[row] for row in batch.rows) == batch.places <= max_batch
            assert [batch.rows[at] for at in batch.guided] == [row for row in batch.rows if waiting[row] == 2]

    Simulation(load, max_batch, share).run(Bounds())


@settings(deadline=None, max_examples=200)
@loads
def test_no_place_stays_empty_that_a_waiting_row_fits(load: list[Arrival], max_batch: int, share: float) -> None:
    class Conserves(Check):
        def __call__(self, simulation: Simulation, batch: Batch) -> None:
            free = max_batch - batch.places
            left_out = [places for row, places in simulation.waiting().items() if row not in batch.rows]
            assert all(places > free for places in left_out)

    Simulation(load, max_batch, share).run(Conserves())


@settings(deadline=None, max_examples=200)
@loads
def test_the_oldest_job_progresses_in_every_tick(load: list[Arrival], max_batch: int, share: float) -> None:
    class Progresses(Check):
        def __call__(self, simulation: Simulation, batch: Batch) -> None:
            oldest = next(iter(simulation.alive))
            mine = [row for row in simulation.alive[oldest].rows if row in simulation.next_step]
            places_per_row = simulation.alive[oldest].places_per_row
            reserve = max(2, int(share * max_batch))
            chosen = sum(row in batch.rows for row in mine)
            assert chosen >= min(len(mine), math.floor(reserve / places_per_row)) >= 1

    Simulation(load, max_batch, share or 0.25).run(Progresses())


@settings(deadline=None, max_examples=200)
@loads
def test_with_no_reserve_no_row_steps_while_a_shorter_jobs_row_that_fits_waits(
    load: list[Arrival], max_batch: int, share: float
) -> None:
    class ShortestFirst(Check):
        def __call__(self, simulation: Simulation, batch: Batch) -> None:
            order = sorted(
                simulation.alive,
                key=lambda name: (simulation.remaining(name), list(simulation.jobs).index(name)),
            )
            rank = {name: position for position, name in enumerate(order)}
            waiting = simulation.waiting()
            left_out = [row for row in waiting if row not in batch.rows]
            for row in left_out:
                later = [r for r in batch.rows if rank[simulation.job_of[r]] > rank[simulation.job_of[row]]]
                # Only an odd place that a guided row cannot use may go to a longer job, and there is one at most.
                assert not later or (waiting[row] == 2 and [waiting[r] for r in later] == [1])

    Simulation(load, max_batch, 0.0).run(ShortestFirst())


@settings(deadline=None, max_examples=200)
@loads
def test_rows_of_one_job_stay_within_a_step_of_each_other(load: list[Arrival], max_batch: int, share: float) -> None:
    class Together(Check):
        def __call__(self, simulation: Simulation, batch: Batch) -> None:
            for name, job in simulation.alive.items():
                steps = [simulation.next_step.get(row, job.steps) for row in job.rows]
                assert max(steps) - min(steps) <= 1, name

    Simulation(load, max_batch, share).run(Together())
