import math
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tminus.service.scheduling import scheduler as scheduler_module
from tminus.service.scheduling.scheduler import (
    MOST_IN_FLIGHT,
    MUCH_LONGER,
    RESERVED_SHARE,
    BatchPolicy,
    Scheduler,
    TickTimes,
)
from tminus.service.work import Batch, Work


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


def add(scheduler: Scheduler, job_id: str, rows: Sequence[int], steps: int, guided: bool = False) -> None:
    scheduler.add(job_id, rows, Work(len(rows), steps, range(steps) if guided else range(0)))


# --- one by one ---


def test_a_job_goes_on_from_the_steps_its_rows_have_taken() -> None:
    scheduler = Scheduler(BatchPolicy.of(8))
    scheduler.add("a", [0, 1, 2], Work(3, 6, range(2, 4)), (3, 6, 5))
    assert scheduler.steps("a") == (3, 6, 5)
    assert tick(scheduler) == Batch((0, 2), (3, 5), (0,))
    assert scheduler.steps("a") == (4, 6, 6)
    assert drain(scheduler) == [Batch((0,), (4,), ()), Batch((0,), (5,), ())]


def test_a_long_job_does_not_hold_up_a_short_one() -> None:
    scheduler = Scheduler(BatchPolicy.of(8))
    add(scheduler, "long", range(8), steps=1000)
    tick(scheduler)
    add(scheduler, "short", [8], steps=20)
    for step in range(20):
        batch = tick(scheduler)
        assert dict(zip(batch.rows, batch.steps, strict=True))[8] == step
        assert batch.places == 8


def test_more_rows_than_places_advance_together() -> None:
    scheduler = Scheduler(BatchPolicy(2, 2, 0))
    add(scheduler, "a", range(6), steps=4)
    for _ in range(3):
        tick(scheduler)
    steps = scheduler.next_batch()
    assert steps is not None
    assert set(steps.steps) == {1}, "each row took step 0 before any took step 1"


def test_cancelling_twice_or_an_unknown_job_does_nothing() -> None:
    scheduler = Scheduler(BatchPolicy.of(4))
    add(scheduler, "a", [0], steps=5)
    scheduler.cancel("nobody")
    assert tick(scheduler).rows == (0,)
    scheduler.cancel("a")
    scheduler.cancel("a")
    assert not scheduler.has_work


def test_advance_tells_once_of_each_job_that_it_has_started_and_finished() -> None:
    scheduler = Scheduler(BatchPolicy(2, 2, 0))
    add(scheduler, "long", [0, 1], steps=2)
    add(scheduler, "short", [2], steps=1)
    seen = []
    while (batch := scheduler.next_batch()) is not None:
        seen.append(scheduler.advance(batch))
    assert [advance.started for advance in seen] == [("short", "long"), (), ()]
    assert [advance.finished for advance in seen] == [("short",), (), ("long",)]


def test_only_the_batch_that_was_chosen_last_may_be_recorded() -> None:
    scheduler = Scheduler(BatchPolicy.of(4))
    add(scheduler, "a", [0, 1], steps=3)
    batch = scheduler.next_batch()
    assert batch is not None
    scheduler.advance(batch)
    with pytest.raises(AssertionError):
        scheduler.advance(batch)
    with pytest.raises(AssertionError):
        scheduler.advance(Batch(batch.rows, (1, 1), ()))


@pytest.mark.parametrize(("max_batch", "places"), [(64, 16), (4, 2), (2, 2)])
def test_the_reserve_is_a_share_and_at_least_a_guided_row(max_batch: int, places: int) -> None:
    assert BatchPolicy.of(max_batch).reserved == places


def test_a_tick_that_a_short_job_shares_with_a_much_longer_one_is_short_until_the_short_one_is_done() -> None:
    scheduler = Scheduler(BatchPolicy.of(8, short_batch=4))
    add(scheduler, "long", range(8), steps=100)
    assert tick(scheduler).places == 8
    add(scheduler, "short", [8], steps=3)
    assert [tick(scheduler).places for _ in range(5)] == [4, 4, 4, 8, 8]


# --- what a tick costs ---


def lines_run(act: Callable[[], object]) -> int:
    """How many lines of the scheduler's file run: a measure of work that no clock or machine changes."""
    count = 0

    def trace(frame, event, arg):  # type: ignore[no-untyped-def]
        nonlocal count
        if frame.f_code.co_filename != scheduler_module.__file__:
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(before)
    assert count > 0
    return count


@pytest.mark.parametrize("guided", [False, True])
def test_a_tick_costs_the_same_however_many_jobs_wait(guided: bool) -> None:
    def ticks(waiting: int) -> int:
        scheduler = Scheduler(BatchPolicy.of(7, short_batch=4))
        for i in range(waiting):
            add(scheduler, f"w{i}", [i], steps=50 + i % 3, guided=guided)
        return lines_run(lambda: [tick(scheduler) for _ in range(10)])

    assert ticks(20) == ticks(200) == ticks(10_000)


def test_finding_the_oldest_job_costs_the_same_after_many_jobs_ended() -> None:
    scheduler = Scheduler(BatchPolicy.of(4))
    for i in range(10_000):
        add(scheduler, f"w{i}", [i], steps=1)
    first = lines_run(lambda: tick(scheduler))
    for _ in range(2_000):
        tick(scheduler)
    assert lines_run(lambda: tick(scheduler)) == first


# --- for every load ---


@dataclass
class Arrival:
    tick: int
    work: Work
    cancel_after: int | None  # ticks from its arrival
    rows: list[int] = field(default_factory=list)


@st.composite
def works(draw: st.DrawFn, max_rows: int = 6, max_steps: int = 6) -> Work:
    steps = draw(st.integers(1, max_steps))
    start = draw(st.integers(0, steps))
    guided = draw(st.sampled_from([range(0), range(steps), range(start, draw(st.integers(start, steps)))]))
    return Work(draw(st.integers(1, max_rows)), steps, guided)


arrivals = st.lists(
    st.builds(
        Arrival,
        tick=st.integers(0, 12),
        work=works(),
        cancel_after=st.none() | st.none() | st.integers(0, 8),
        rows=st.builds(list),
    ),
    min_size=1,
    max_size=8,
)


@st.composite
def sharings(draw: st.DrawFn, overlapped: float | None = None) -> BatchPolicy:
    max_batch = draw(st.integers(2, 12))
    reserved = reserved_places(max_batch, draw(st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0])))
    short_batch = draw(st.just(max_batch) | st.integers(1, max_batch))
    if overlapped is None:
        return BatchPolicy(max_batch, short_batch, reserved)
    times = TickTimes(((1, 1.0), (2 * max_batch - draw(st.integers(0, max_batch)), 4.0)), overlapped)
    return BatchPolicy(max_batch, short_batch, reserved, times, times.seconds_per_place(max_batch))


def reserved_places(max_batch: int, share: float) -> int:
    return max(2, int(max_batch * share)) if share else 0


def short_end(policy: BatchPolicy, places: int) -> int:
    """The least multiple of short_batch that so many places fit in, but for the end of the tick."""
    multiples = range(policy.short_batch, policy.max_batch, policy.short_batch)
    return next((end for end in multiples if end >= places), policy.max_batch)


class Simulation:
    """Runs a load to its end by its own books, which the tests hold against what the scheduler chose."""

    def __init__(self, load: list[Arrival], policy: BatchPolicy, names: str = "job{}") -> None:
        self.policy = policy
        self.scheduler = Scheduler(policy)
        self.load = sorted(load, key=lambda job: job.tick)
        self.jobs = {names.format(i): job for i, job in enumerate(self.load)}
        self.alive: dict[str, Arrival] = {}  # in order of arrival
        self.next_step: dict[int, int] = {}
        self.job_of: dict[int, str] = {}
        self.taken: dict[int, list[int]] = {}
        self.cancelled: dict[str, int] = {}  # with the places it had left
        self.finished: list[str] = []
        self.batches: list[Batch] = []
        self.in_flight: deque[Batch] = deque()
        self.overlapped = 0  # ticks that began while another was in flight
        self.stepped = 0  # places
        self.oldest: str | None = None  # if it is held back
        self.owed_seconds = self.held_s = self.service_time_s = 0.0  # since it is
        row_ids = iter(range(10_000))
        for name, job in self.jobs.items():
            job.rows[:] = [next(row_ids) for _ in range(job.work.rows)]
            self.job_of |= dict.fromkeys(job.rows, name)
            self.taken |= {row: [] for row in job.rows}

    def remaining(self, name: str) -> int:
        job = self.jobs[name]
        return sum(job.work.places_left(self.next_step[row]) for row in job.rows if row in self.next_step)

    def waiting(self) -> dict[int, int]:
        """Rows that can step, with the places each takes."""
        in_flight = {row for batch in self.in_flight for row in batch.rows}
        return {row: places for row, places in self.wanted().items() if row not in in_flight}

    def wanted(self) -> dict[int, int]:
        """Rows that have steps left, with the places each takes."""
        return {row: self.jobs[self.job_of[row]].work.places_per_row(step) for row, step in self.next_step.items()}

    def overlaps(self) -> bool:
        """Whether jobs wait for throughput only, so that two ticks may be in flight."""
        totals = [job.work.places for job in self.alive.values()]
        if self.policy.times.overlapped is None or not totals:
            return False
        alike = max(totals) < MUCH_LONGER * min(totals)
        return len(totals) > self.policy.max_batch or (alike and sum(self.wanted().values()) > self.policy.max_batch)

    def size(self) -> int:
        """How many places the next tick has."""
        full = self.policy.full_batch
        grows = self.overlaps() and sum(self.wanted().values()) >= 2 * full
        return full if grows else self.policy.max_batch

    def in_turn(self) -> list[str]:
        """The jobs, the first in turn first."""
        return sorted(self.alive, key=self.remaining)

    def held_back(self) -> set[str]:
        """The jobs that make a short tick: much longer than the shortest, with a place for every job."""
        policy = self.policy
        if len(self.alive) > policy.max_batch or policy.short_batch == policy.max_batch:
            return set()
        least = MUCH_LONGER * min(job.work.places for job in self.alive.values())
        return {name for name, job in self.alive.items() if job.work.places >= least}

    def run(self) -> "Simulation":
        for now in range(10_000):
            for name, job in self.jobs.items():
                if job.tick == now:
                    self.scheduler.add(name, job.rows, job.work)
                    self.alive[name] = job
                    self.next_step |= dict.fromkeys(job.rows, 0)
                if job.cancel_after is not None and job.tick + job.cancel_after == now and name in self.alive:
                    self.cancelled[name] = self.remaining(name)
                    self.scheduler.cancel(name)
                    self._forget(name)
            while self.begin():
                pass
            for name, job in self.alive.items():
                assert self.scheduler.steps(name) == tuple(self.next_step.get(row, job.work.steps) for row in job.rows)
                assert self.scheduler.rows_left(name) == sum(row in self.next_step for row in job.rows)
            assert self.scheduler.has_work == bool(self.next_step)
            if self.in_flight:
                self.end(self.in_flight.popleft())
            else:
                assert not self.next_step
                if now > 20:
                    return self
        raise AssertionError("the load never ended")

    def begin(self) -> bool:
        """Begin the next tick, if one may begin now."""
        may = not self.in_flight or (len(self.in_flight) < MOST_IN_FLIGHT and self.overlaps())
        batch = self.scheduler.next_batch()
        assert (batch is not None) == (may and bool(self.waiting()))
        if batch is None:
            return False
        assert self.scheduler.next_batch() == batch, "choosing changes nothing"
        self.check_rows(batch)
        self.check_jobs_of(batch)
        self.check_order(batch)
        self.check_short_ticks(batch)
        self.batches.append(batch)
        self.overlapped += bool(self.in_flight)
        self.scheduler.begin(batch)
        self.in_flight.append(batch)
        return True

    def end(self, batch: Batch) -> None:
        """End a tick. Some of its jobs may have been cancelled since it began."""
        advance = self.scheduler.advance(batch)
        wanted = self.wanted()
        places: Counter[str] = Counter()
        for row, step in zip(batch.rows, batch.steps, strict=True):
            if row not in self.next_step:
                assert self.job_of[row] in self.cancelled
                continue
            places[self.job_of[row]] += wanted[row]
            self.taken[row].append(step)
            self.next_step[row] = step + 1
            if step + 1 == self.jobs[self.job_of[row]].work.steps:
                del self.next_step[row]
        assert advance.places == places
        self.stepped += sum(places.values())
        if places:
            self.check_share_of_time(places)
        done = [name for name, job in self.alive.items() if not any(row in self.next_step for row in job.rows)]
        assert sorted(advance.finished) == sorted(done)
        for name in done:
            self.finished.append(name)
            self._forget(name)

    def check_share_of_time(self, places: Counter[str]) -> None:
        """While the oldest job is held back, it has a quarter of the time, less one tick."""
        oldest = next(iter(self.alive))
        if oldest not in self.held_back():
            self.oldest, self.owed_seconds = None, 0.0
            return
        if oldest != self.oldest:
            self.oldest, self.held_s, self.service_time_s = oldest, 0.0, 0.0
        seconds, share = self.policy.tick_s(places.total()), places[oldest] / places.total()
        self.held_s += seconds
        self.service_time_s += seconds * share
        self.owed_seconds = max(0.0, self.owed_seconds + seconds * (RESERVED_SHARE - share))
        longest_s = self.policy.tick_s(self.policy.full_batch)
        assert not self.policy.reserved or self.service_time_s >= RESERVED_SHARE * self.held_s - longest_s

    def check_jobs_of(self, batch: Batch) -> None:
        """The rows of a batch by job are just its rows."""
        by_job: dict[str, set[tuple[int, int]]] = {}
        for row, step in zip(batch.rows, batch.steps, strict=True):
            by_job.setdefault(self.job_of[row], set()).add((step, self.jobs[self.job_of[row]].rows.index(row)))
        assert [picked.job_id for picked in batch.jobs] == list(by_job), "in the order of their first rows"
        assert {picked.job_id: set(picked.steps) for picked in batch.jobs} == by_job
        assert sum(len(picked.steps) for picked in batch.jobs) == len(batch.rows)
        for picked in batch.jobs:
            work = self.jobs[picked.job_id].work
            assert picked.places == sum(work.places_per_row(step) for step, _ in picked.steps)

    def check_rows(self, batch: Batch) -> None:
        """No row is in it twice, none that fits is left out, and the oldest job, if not held back, has its reserve."""
        waiting, held_back, max_batch, size = self.waiting(), self.held_back(), self.policy.max_batch, self.size()
        assert max(Counter(batch.rows).values()) == 1
        assert set(batch.rows) <= waiting.keys(), "nor one that is in flight, done, cancelled or not there yet"
        assert sum(waiting[row] for row in batch.rows) == batch.places <= size
        assert [batch.rows[at] for at in batch.guided] == [row for row in batch.rows if waiting[row] == 2]
        rank = {name: position for position, name in enumerate(self.in_turn())}
        last = max(rank[self.job_of[row]] for row in batch.rows)
        for row, places in waiting.items() if len(self.alive) <= max_batch else ():  # no more jobs are looked at
            room = size
            if (name := self.job_of[row]) in held_back:
                # A job after it may have begun another multiple of short_batch, to which it is not asked again.
                room = short_end(self.policy, batch.places) if rank[name] >= last else 0
            assert row in batch.rows or places > room - batch.places
        oldest, job = next(iter(self.alive.items()))
        mine = [row for row in job.rows if row in waiting]
        assert oldest in held_back or sum(row in batch.rows for row in mine) >= min(
            len(mine), self.policy.reserved // 2
        )

    def check_order(self, batch: Batch) -> None:
        """With no reserve no row steps while a row that fits of a job before it waits."""
        if self.policy.reserved:
            return
        rank = {name: position for position, name in enumerate(self.in_turn())}
        waiting, held_back = self.waiting(), self.held_back()
        for row in waiting.keys() - set(batch.rows):
            later = [each for each in batch.rows if rank[self.job_of[each]] > rank[self.job_of[row]]]
            # Only an odd place that a guided row cannot use may go to a later job, and there is one at most.
            one_odd = waiting[row] == 2 and [waiting[each] for each in later] == [1]
            assert not later or one_odd or self.job_of[row] in held_back

    def check_short_ticks(self, batch: Batch) -> None:
        """What much longer jobs add stays within a short tick, but for the reserve, or the turn of the oldest job."""
        waiting, held_back, (oldest, job) = self.waiting(), self.held_back(), next(iter(self.alive.items()))
        places: Counter[str] = Counter()
        for row in batch.rows:
            places[self.job_of[row]] += waiting[row]
        reserve = min(places[oldest], self.policy.reserved)
        if oldest in held_back and self.policy.reserved:
            mine = min(self.policy.max_batch, sum(waiting.get(row, 0) for row in job.rows))
            is_turn = self.owed_seconds >= (1 - RESERVED_SHARE) * self.policy.tick_s(mine) - 1e-9
            reserve = places[oldest] if is_turn else 0
        so_far = reserve
        for name in self.in_turn():
            beyond = places[name] - (reserve if name == oldest else 0)
            end = short_end(self.policy, so_far)
            so_far += beyond
            # One more may come last, into the single place that no guided row before it fits.
            last = batch.places == self.policy.max_batch == short_end(self.policy, batch.places - 1)
            assert name not in held_back or beyond == 0 or so_far - last <= end

    def _forget(self, name: str) -> None:
        for row in self.alive.pop(name).rows:
            self.next_step.pop(row, None)


@settings(deadline=None, max_examples=60)
@given(works(max_rows=9, max_steps=30), sharings(), st.sampled_from([0.1, 0.25, 0.5]), st.randoms())
def test_under_an_endless_stream_of_short_jobs_the_oldest_ends_in_time(
    work: Work, policy: BatchPolicy, share: float, random: random.Random
) -> None:
    policy = replace(policy, reserved=reserved_places(policy.max_batch, share))
    scheduler = Scheduler(policy)
    scheduler.add("oldest", range(work.rows), work)
    rows_a_turn = policy.reserved // 2
    # Every turn steps that many rows, or all that are left; and those left when they are fewer take `steps` at most.
    turns = work.rows * work.steps // rows_a_turn + work.steps
    # Each tick is a turn where the oldest has its reserve in places. While it is held back, its next full tick comes
    # after three times as long; and what it is owed is forgotten when its reserve is one in places again.
    most_s = turns * policy.tick_s(policy.max_batch) * (1 if policy.short_batch == policy.max_batch else 5)
    row, time_s = work.rows, 0.0
    while time_s < most_s:
        for _ in range(random.randint(1, policy.max_batch)):
            scheduler.add(f"short{row}", [row], Work(1, 1, range(random.randint(0, 1))))
            row += 1
        batch = scheduler.next_batch()
        assert batch is not None
        time_s += policy.tick_s(batch.places)
        if "oldest" in scheduler.advance(batch).finished:
            return
    raise AssertionError(f"not done after {most_s} s")


def check_load(load: list[Arrival], policy: BatchPolicy) -> Simulation:
    simulation = Simulation(load, policy).run()
    for row, steps in simulation.taken.items():
        name = simulation.job_of[row]
        assert steps == list(range(len(steps)))
        assert len(steps) == simulation.jobs[name].work.steps or name in simulation.cancelled
    assert sorted(simulation.finished) == sorted(set(simulation.jobs) - set(simulation.cancelled))
    assert simulation.stepped + sum(simulation.cancelled.values()) == sum(job.work.places for job in load)
    assert Simulation(load, policy, names="{0:03d}z").run().batches == simulation.batches, "whatever jobs are called"
    return simulation


@settings(deadline=None, max_examples=400)
@given(arrivals, sharings())
def test_every_row_takes_each_step_once_in_order_and_no_work_is_lost(load: list[Arrival], policy: BatchPolicy) -> None:
    """The simulation checks each batch."""
    assert check_load(load, policy).overlapped == 0


@settings(deadline=None, max_examples=400)
@given(arrivals, sharings(overlapped=0.9))
def test_the_same_holds_with_two_ticks_in_flight(load: list[Arrival], policy: BatchPolicy) -> None:
    check_load(load, policy)


# --- two ticks in flight ---

OVERLAPPED = TickTimes(((1, 0.003), (8, 0.009), (16, 0.017)), overlapped=0.9)


def begin_all(scheduler: Scheduler) -> list[Batch]:
    """Begin as many ticks as may be in flight."""
    begun = []
    while (batch := scheduler.next_batch()) is not None:
        scheduler.begin(batch)
        begun.append(batch)
    return begun


@pytest.mark.parametrize(
    ("jobs", "places"),
    [
        pytest.param([(6, 20), (6, 30)], [8, 4], id="two alike that want more than a tick: two, with different rows"),
        pytest.param([(4, 20), (4, 30)], [8], id="two alike that fit one tick: one"),
        pytest.param([(40, 20)], [16, 16], id="rows for two larger ticks: two larger ones"),
        pytest.param([(31, 20)], [8, 8], id="rows for less than these: two"),
        pytest.param([(12, 1000), (1, 20)], [1], id="a short one beside a much longer one: its own alone"),
        pytest.param([(1, 1000), *[(1, 20)] * 8], [8, 1], id="more jobs than places, however long: two"),
    ],
)
def test_two_ticks_are_in_flight_where_jobs_wait_for_nothing_but_throughput(
    jobs: list[tuple[int, int]], places: list[int]
) -> None:
    scheduler, first = Scheduler(BatchPolicy.of(8, short_batch=1, times=OVERLAPPED)), 0
    for rows, steps in jobs:
        add(scheduler, f"job{first}", range(first, first + rows), steps)
        first += rows
    begun = begin_all(scheduler)
    assert [batch.places for batch in begun] == places
    assert max(Counter(row for batch in begun for row in batch.rows).values()) == 1


def test_jobs_of_several_owners_have_two_ticks_in_flight() -> None:
    scheduler = Scheduler(BatchPolicy.of(8, times=OVERLAPPED))
    for owner in "abc":
        scheduler.add(owner, range(6), Work(6, 20, range(0)), owner=owner)
    first, second = begin_all(scheduler)
    assert first.places == second.places == 8
    taken = Counter(picked.job_id for batch in (first, second) for picked in batch.jobs for _ in picked.steps)
    assert taken.total() == 16
    assert max(taken.values()) == 6, "no row is in both"
    for batch in (first, second):
        scheduler.advance(batch)
    assert scheduler.steps("a").count(1) == taken["a"]


def test_a_job_that_is_cancelled_in_flight_is_left_out_when_its_tick_ends() -> None:
    scheduler = Scheduler(BatchPolicy.of(8, times=OVERLAPPED))
    add(scheduler, "a", range(6), steps=20)
    add(scheduler, "b", range(6, 12), steps=20)
    first, second = begin_all(scheduler)
    scheduler.cancel("a")
    assert scheduler.steps("b") == (0,) * 6, "nothing has ended"
    assert scheduler.rows_left("b") == 6
    assert {**scheduler.advance(first).places, **scheduler.advance(second).places}.keys() == {"b"}
    assert scheduler.steps("b") == (1,) * 6


# --- a job that is held back ---


def test_a_much_longer_job_has_a_quarter_of_the_time_beside_short_ones_whose_ticks_are_as_short_as_alone() -> None:
    times = TickTimes(((1, 0.003), (8, 0.009)))
    scheduler = Scheduler(BatchPolicy.of(8, short_batch=1, times=times))
    add(scheduler, "long", range(8), steps=1000)
    add(scheduler, "short", [8], steps=100)
    batches = [tick(scheduler) for _ in range(100)]
    assert {batch.rows for batch in batches} == {(8,), tuple(range(8))}, "each has ticks of its own"
    long_s = sum(times.seconds(8) for batch in batches if batch.places == 8)
    total_s = sum(times.seconds(batch.places) for batch in batches)
    assert long_s == pytest.approx(total_s / 4, abs=times.seconds(8))


def test_a_much_longer_job_that_fills_up_a_few_places_has_its_quarter_all_the_same() -> None:
    scheduler = Scheduler(BatchPolicy.of(8, short_batch=4))
    add(scheduler, "long", range(8), steps=1000)
    add(scheduler, "short", range(8, 15), steps=100)
    batches = [tick(scheduler) for _ in range(80)]
    of_long = sum(row < 8 for batch in batches for row in batch.rows)
    assert of_long >= sum(batch.places for batch in batches) / 4 - 8


# --- how long ticks take ---

POINTS = ((1, 0.003), (2, 0.0033), (4, 0.005), (8, 0.009))


@pytest.mark.parametrize(
    ("points", "places", "seconds"),
    [
        pytest.param(POINTS, 3, 0.00415, id="between points"),
        pytest.param(POINTS, 8, 0.009, id="at a point"),
        pytest.param(POINTS, 16, 0.017, id="beyond them, on the last line"),
        pytest.param(((4, 0.1), (8, 0.2)), 1, 0.1, id="below the first as much as there"),
        pytest.param(((4, 0.1),), 8, 0.2, id="beyond a single one in proportion"),
        pytest.param(((8, 0.1),), 2, 0.1, id="below a single one as much as there"),
        pytest.param(((1, 0.2), (2, 0.1)), 1000, 0.1, id="beyond one that noise made cheap no less"),
        pytest.param((), 8, 0.0, id="nothing without points"),
    ],
)
def test_times_are_on_straight_lines_between_the_points(
    points: tuple[tuple[int, float], ...], places: int, seconds: float
) -> None:
    assert TickTimes(points).seconds(places) == pytest.approx(seconds)
    assert TickTimes(points).seconds_per_place(places) == pytest.approx(seconds / places)


@pytest.mark.parametrize("points", [((2, 0.1), (1, 0.2)), ((0, 0.1),), ((1, -0.1),), ((1, math.nan),)])
def test_points_that_are_no_measurement_assert(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(AssertionError):
        TickTimes(points)
