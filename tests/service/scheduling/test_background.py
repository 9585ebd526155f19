"""Background jobs: they step while nothing else waits, and end at last."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.scheduling.machine import Machine, guided, held_back, plain, speed_of
from tests.service.scheduling.test_admission import RATE, make_admission, wait_of
from tminus.service.errors import DeadlineUnmeetable, InvalidField, Overloaded
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.scheduler import QUIET_S, RESERVED_SHARE, Policy, TickTimes
from tminus.service.work import JobRows, Work

FAST, SLOW = 0, 1
HOUR_S = 3600.0


def two_models(policy: Policy = "srpt") -> Machine:
    slow = TickTimes(((1, 0.02), (8, 0.1)))
    return Machine(speed_of(8, policy, 4), speed_of(8, policy, times=slow))


@st.composite
def foregrounds(draw: st.DrawFn, models: Sequence[int] = (FAST, SLOW)) -> Work:
    rows, steps = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    work = guided(rows, steps) if draw(st.booleans()) else plain(rows, steps)
    return replace(work, model=draw(st.sampled_from(models)))


# Jobs of either class with the owner they are of, and how many ticks there are before the next comes.
SCRIPTS = st.lists(
    st.tuples(foregrounds(), st.sampled_from("ab"), st.booleans(), st.integers(0, 30)), min_size=1, max_size=20
)


@settings(deadline=None, max_examples=150)
@given(SCRIPTS, st.sampled_from(["srpt", "fcfs"]))
def test_the_ticks_of_other_jobs_are_the_same_whatever_there_is_in_the_background(
    script: list[tuple[Work, str, bool, int]], policy: Policy
) -> None:
    without, beside = two_models(policy), two_models(policy)
    for number, (work, owner, in_background, ticks) in enumerate([*script, (plain(1, 1), "a", False, 10**6)]):
        job_id = f"{owner}{number}"
        if in_background:
            beside.add(job_id, held_back(work))
        else:
            without.add(job_id, work)
            beside.add(job_id, work)
        for _ in range(ticks):
            expected = without.step()
            stepped = beside.step()
            if expected is None:
                if ticks == 10**6:
                    break
                continue
            assert stepped is not None
            assert (stepped[0], stepped[1].jobs) == (expected[0], expected[1].jobs)
    owners = ["a", "b"]
    assert beside.times.foreground.of(owners) == without.times.foreground.of(owners), "nor does it cost its owner"
    beside.run()
    assert beside.left.keys() == beside.ends.keys(), "and all of it ends"


@settings(deadline=None, max_examples=60)
@given(foregrounds([FAST]), st.floats(0.0, 2.0), st.sampled_from([FAST, SLOW]))
def test_a_background_job_ends_after_its_wait_and_its_work_however_much_else_comes(
    work: Work, wait_s: float, others: int
) -> None:
    machine = two_models()
    machine.add("b", held_back(work, wait_s))
    tick_s = max(speed.longest_tick_s for speed in machine.speeds.values())
    # The oldest job has its share of each tick, or of the time where its model is not that of the others.
    ticks = 1 + max(math.ceil(work.places / machine.speeds[FAST].sharing.reserved), work.steps)
    least_s = wait_s + 4 * tick_s + ticks * machine.speeds[FAST].longest_tick_s / (RESERVED_SHARE if others else 1)
    number = 0
    while "b" not in machine.ends:
        if not any(left for job_id, left in machine.left.items() if job_id != "b"):
            machine.add(f"b{number}", plain(8, 2, others))
            number += 1
        _, batch = machine.step() or pytest.fail("there is always something to do")
        if "b" in {picked.job_id for picked in batch.jobs}:
            assert machine.now_s >= wait_s, "until then it is held back"
        assert machine.now_s <= least_s
    assert machine.ends["b"] <= least_s


def test_a_job_that_was_held_back_for_long_enough_has_the_place_of_its_arrival() -> None:
    machine = Machine(speed_of(8))
    machine.add("a first", plain(8, 10_000))
    machine.add("a held back", held_back(plain(8, 10_000), 1.0))
    machine.add("a held back for less", held_back(plain(8, 10_000), 0.5))
    machine.add("a last", plain(8, 10_000))
    while machine.now_s < 1.1:
        machine.step()
    queue = machine.schedulers[0].foreground._owners["a"]
    assert list(queue._jobs) == ["a first", "a held back", "a held back for less", "a last"]
    assert not machine.schedulers[0].background.has_work


def test_background_jobs_of_any_model_wait_for_other_jobs_of_any_owner_and_model() -> None:
    machine = two_models()
    machine.add("a", held_back(plain(1, 5, FAST)))
    machine.add("b", held_back(plain(1, 50, SLOW)))
    machine.add("c", plain(8, 100, SLOW))
    while "c" not in machine.ends:
        machine.step()
    assert (machine.left["a"], machine.left["b"]) == (5, 50)
    machine.add("c2", plain(1, 1, SLOW))
    machine.run()
    order = sorted(machine.ends, key=machine.ends.__getitem__)
    assert order == ["c", "c2", "a", "b"]


def test_a_job_that_comes_waits_for_the_tick_that_runs_and_no_longer() -> None:
    machine = Machine(speed_of(8))
    machine.add("a", held_back(plain(8, 1000)))
    for _ in range(5):
        machine.step()
    machine.add("b", plain(1, 20))
    began_s = machine.now_s
    while "b" not in machine.ends:
        machine.step()
    assert machine.ends["b"] - began_s == pytest.approx(20 * machine.speeds[0].tick_s(1))


def test_owners_share_what_is_left_to_the_background_evenly() -> None:
    machine = Machine(speed_of(8))
    machine.add("a", held_back(plain(8, 100_000)))
    machine.add("b", held_back(plain(8, 100_000)))
    machine.add("b2", held_back(plain(8, 100_000)))
    for _ in range(4000):
        machine.step()
    assert machine.places["a"] / machine.places["b"] == pytest.approx(1.0, abs=0.02)


def test_background_ticks_change_nothing_of_when_the_oldest_of_other_jobs_has_its_turn() -> None:
    """Background ticks here are of one row, so that they take a fifth of what a full tick takes."""
    without, beside = two_models(), two_models()
    beside.add("b", held_back(plain(1, 10_000, SLOW)))
    for _ in range(5):
        beside.step()
    for machine in (without, beside):
        machine.add("a oldest", plain(8, 1000, SLOW))
        machine.add("a", plain(8, 500, FAST))
    for _ in range(100):
        expected, stepped = without.step(), beside.step()
        assert expected is not None
        assert stepped is not None
        assert stepped[0] == expected[0]


def test_a_background_job_that_is_cancelled_leaves_nothing_behind() -> None:
    machine = Machine(speed_of(8))
    scheduler = machine.schedulers[0]
    machine.add("a", held_back(plain(2, 10), 1.0))
    machine.step()
    assert scheduler.steps("a") == (1, 1)
    scheduler.cancel("a")
    scheduler.come_to(2.0)
    assert not scheduler.has_work
    assert scheduler.changes_at_s == math.inf
    assert scheduler.next_batch() is None


# --- the size of background ticks ---


@pytest.mark.parametrize(
    ("points", "size"),
    [
        (((1, 1.0), (2, 1.5), (4, 2.5), (8, 4.5)), 2),
        (((1, 1.0), (2, 1.5), (4, 2.0), (8, 4.5)), 4),
        (((1, 1.0), (2, 1.1), (4, 1.3), (8, 1.5), (16, 3.0)), 8),
        (((1, 1.0), (2, 2.5), (4, 5.0), (8, 9.0)), 2),  # a guided row takes two
        ((), 8),  # nothing was measured
    ],
)
def test_where_other_jobs_come_a_background_tick_is_little_longer_than_that_of_one_row(
    points: tuple[tuple[int, float], ...], size: int
) -> None:
    machine = Machine(speed_of(8, times=TickTimes(points)))
    machine.add("b", held_back(plain(64, 10_000)))

    def sizes(seconds: float) -> set[int]:
        end_s, found = machine.now_s + seconds, set()
        while machine.now_s < end_s:
            _, batch = machine.step() or pytest.fail("there is something to do")
            found.add(batch.places)
            if not points:
                machine.now_s += 1.0
        return found

    assert sizes(10.0) == {8}, "while nobody else comes they are full"
    for _ in range(2):
        machine.add(f"c{machine.now_s}", plain(1, 1))
        machine.step()
        assert sizes(QUIET_S - 5.0) == {size}
    assert sizes(10.0) == {size, 8}
    assert sizes(10.0) == {8}


@given(st.lists(st.floats(1e-4, 1.0), min_size=1, max_size=6), st.integers(2, 64), st.sampled_from(["srpt", "fcfs"]))
def test_alone_background_jobs_are_done_as_fast_as_others(seconds: list[float], max_batch: int, policy: Policy) -> None:
    times = TickTimes(tuple((2**k, each) for k, each in enumerate(seconds)))
    ended_s = []
    for in_background in (False, True):
        machine = Machine(speed_of(max_batch, policy, times=times))
        machine.add("b", held_back(plain(max_batch, 20)) if in_background else plain(max_batch, 20))
        machine.run()
        ended_s.append(machine.now_s)
    assert ended_s[0] == ended_s[1]


# --- who is refused ---


def fill_background(admission: Admission, work: Work) -> int:
    """Have background jobs accepted until there is no room for one more; how many there are then."""
    for number in range(10_000):
        try:
            admission.enter(f"background {number}", held_back(work), now_s=0.0)
        except Overloaded as error:
            assert "in the background" in error.detail
            assert wait_of(error) >= 1
            return number
    pytest.fail("it is not bounded")


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 64), st.integers(1, 200)), min_size=1, max_size=30),
    st.tuples(st.integers(1, 64), st.integers(1, 1000)),
    st.sampled_from(["srpt", "fcfs"]),
)
def test_what_other_jobs_are_told_is_the_same_whatever_there_is_in_the_background(
    asked: list[tuple[int, int]], beside: tuple[int, int], policy: Policy
) -> None:
    def told(admission: Admission) -> list[object]:
        answers: list[object] = []
        for number, (rows, steps) in enumerate(asked):
            try:
                outlook = admission.enter(f"{number}", plain(rows, steps), now_s=number / 10, deadline_s=60.0)
                answers.append((outlook.position, outlook.eta_s))
            except (Overloaded, DeadlineUnmeetable, InvalidField) as error:
                answers.append((error.detail, error.headers))
        return answers

    without, full = (make_admission(RATE, policy, max_backlog_s=40.0, max_rows=128) for _ in range(2))
    assert fill_background(full, plain(*beside)) >= 1
    assert full.background_rows <= full._limits.max_background_rows
    assert told(full) == told(without)
    assert full.backlog_s == without.backlog_s


def test_background_jobs_are_bounded_by_slots_of_their_own_and_not_by_time() -> None:
    admission = make_admission(RATE, max_jobs=400, max_rows=10_000, max_backlog_s=1.0)
    assert admission._limits.max_background_jobs == 100
    assert fill_background(admission, plain(1, 1000)) == 100
    assert admission.background_backlog_s == pytest.approx(100 * 1000 / 64)
    assert admission.backlog_s == 0.0
    assert (admission.rows, admission.background_rows) == (100, 100)
    with pytest.raises(InvalidField, match="at most 2500 in the background"):
        admission.enter("large", held_back(plain(2501, 1)), now_s=0.0)


@pytest.mark.parametrize("most", [1, 10, 64, 100, 256, 1000])
def test_the_slots_of_the_background_hold_a_usual_request_where_those_of_others_do(most: int) -> None:
    admission = make_admission(max_rows=most)
    admission.enter("a", held_back(plain(min(most, 64), 10)), now_s=0.0)


def test_a_deadline_that_others_leave_no_time_for_is_refused() -> None:
    admission = make_admission(RATE)
    admission.enter("others", plain(8, 640), now_s=0.0)  # 80 s
    assert admission.enter("a", held_back(plain(8, 8)), now_s=0.0).eta_s == pytest.approx(81.0)
    with pytest.raises(DeadlineUnmeetable) as caught:
        admission.enter("b", held_back(plain(8, 8)), now_s=0.0, deadline_s=60.0)
    assert caught.value.bound == "at least 82 s at this load"
    admission.enter("c", plain(8, 8), now_s=0.0, deadline_s=60.0)


def test_what_is_told_of_a_background_job_counts_on_more_of_other_work_and_on_its_end_being_at_last() -> None:
    admission = make_admission(RATE)
    alone_s = admission.enter("b", held_back(plain(8, 64), 300.0), now_s=0.0).eta_s
    for number in range(200):  # of half of the machine for 100 s
        admission.enter(f"{number}", plain(8, 2), now_s=number / 2)
        admission.stepped(0, [JobRows(f"{number}", (), 16)], 16, 0.25)
        admission.leave(f"{number}")
    assert admission.outlooks(100.0)["b"].eta_s == pytest.approx(2 * alone_s, rel=0.05)
    assert admission.outlooks(299.0)["b"].eta_s == pytest.approx(alone_s), "nothing has come of late"
    flooded = make_admission(RATE)
    flooded.enter("b", held_back(plain(8, 64), 20.0), now_s=0.0)
    for number in range(200):
        flooded.enter(f"{number}", plain(8, 8), now_s=number / 2)
        flooded.leave(f"{number}")
    assert flooded.outlooks(15.0)["b"].eta_s <= 5.0 + 8.0 / RESERVED_SHARE


def test_after_its_wait_a_background_job_is_told_what_any_other_is_told() -> None:
    told = []
    for work in (held_back(plain(1, 64), 20.0), plain(1, 64)):  # one row cannot use what is kept for the oldest job
        admission = make_admission(RATE)
        admission.enter("b", work, now_s=0.0)
        for number in range(200):
            admission.enter(f"{number}", plain(8, 4), now_s=number / 4)
            admission.leave(f"{number}")
        told.append(admission.outlooks(15.0)["b"].eta_s)
    assert told[1] == pytest.approx(8.0 / RESERVED_SHARE)
    assert told[0] == pytest.approx(5.0 + told[1])


def test_a_background_job_that_goes_on_after_a_restart_needs_a_slot_of_the_background() -> None:
    admission = make_admission(max_jobs=400, max_rows=10_000)
    fill_background(admission, plain(1, 10))
    admission.readmit("another", plain(1, 10), places_left=5, now_s=0.0)
    with pytest.raises(Overloaded):
        admission.readmit("one more", held_back(plain(1, 10), 0.0), places_left=5, now_s=0.0)


def test_background_owners_have_shares_of_slots_as_others_have() -> None:
    admission = make_admission(max_jobs=400, max_rows=10_000, shared=True)
    for number in range(75):
        admission.enter(f"{number}", held_back(plain(1, 10)), "flood", now_s=0.0)
    with pytest.raises(Overloaded) as caught:
        admission.enter("75", held_back(plain(1, 10)), "flood", now_s=0.0)
    assert caught.value.of_owner
    assert "in the background of this key" in caught.value.detail
    admission.enter("b", held_back(plain(1, 10)), "b", now_s=0.0)
    admission.enter("f", plain(1, 10), "flood", now_s=0.0)


def test_what_a_replica_takes_on_of_the_background_is_what_nothing_else_goes_before() -> None:
    admission = make_admission(RATE)
    admission.enter("long", plain(8, 80), now_s=0.0)  # 640 places
    admission.enter("b", held_back(plain(8, 8)), now_s=0.0)
    intake = admission.intake(0, 8.0, held_back_after_us=7)
    assert intake.held_back_after_us == 7
    assert intake.has_room(500)
    assert not intake.has_room(1, held_back=True), "ten seconds go before it"
    assert intake.has_room(640 + 600) is False
    admission.leave("long")
    assert admission.intake(0, 8.0).has_room(1, held_back=True)
    assert admission.intake(0, 0.5).has_room(1000, held_back=False), "no background job goes before it"
    assert not admission.intake(0, 0.5).has_room(1000, held_back=True)
    assert not admission.intake(0, 0.5, now_s=2e9).has_room(1000), "but one that is held back no more"
    assert not math.isinf(admission.intake(0, 0.5).refused[0])
