"""Fair shares between owners: the arithmetic, and the ticks of the scheduler."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.scheduling.machine import TIMES, Machine, guided, plain, speed_of
from tminus.service.scheduling.owners import BURST_S, OwnerTimes, allot
from tminus.service.scheduling.scheduler import TickTimes
from tminus.service.work import Work

FLAT = TickTimes(((1, 0.009), (8, 0.009)))  # as on a GPU: a tick takes no longer for more rows


# --- what each has had ---


def test_who_comes_later_is_behind_by_no_more_than_a_burst_and_who_returns_soon_is_where_it_was() -> None:
    owner_times = OwnerTimes()
    owner_times.join("flood")
    assert owner_times.of(["flood"]) == {"flood": 0.0}
    owner_times.stepped({"flood": 100.0})
    assert owner_times.of(["b"]) == {"b": 100.0 - BURST_S}
    owner_times.join("b")
    owner_times.stepped({"flood": 1.0, "b": 3.0})
    owner_times.leave("b")
    owner_times.join("b")
    assert owner_times.service_time_s("b") == 100.0 - BURST_S + 3.0
    for owner in ("flood", "b"):
        owner_times.leave(owner)
    owner_times.join("c")
    assert owner_times.of(["c", "flood"]) == {"c": 0.0, "flood": 0.0}, "when all have left nothing is kept of them"


def test_nobody_saves_up_or_owes_more_than_a_burst() -> None:
    owner_times = OwnerTimes()
    owner_times.join("flood")
    owner_times.join("b")
    for _ in range(100):
        owner_times.stepped({"flood": 0.9, "b": 0.1})
    assert owner_times.service_time_s("flood") - owner_times.service_time_s("b") == pytest.approx(BURST_S)
    owner_times.leave("flood")
    owner_times.stepped({"flood": 5000.0})
    owner_times.join("flood")
    assert owner_times.service_time_s("flood") - owner_times.service_time_s("b") == pytest.approx(BURST_S)


@given(st.integers(0, 64), st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(0, 40), st.floats(0, 9))))
def test_places_go_to_those_who_have_had_least_and_none_is_left_that_somebody_wants(
    places: int, owners: dict[str, tuple[int, float]]
) -> None:
    wants = {owner: want for owner, (want, _) in owners.items()}
    service_time_s = {owner: had for owner, (_, had) in owners.items()}
    allotted = allot(places, 0.25, wants, service_time_s)
    assert all(0 <= allotted[owner] <= wants[owner] for owner in wants)
    assert sum(allotted.values()) == min(places, sum(wants.values()))
    for owner in wants:
        for other in wants:
            if allotted[owner] < wants[owner] and allotted[other] > 0:
                before_last_s = service_time_s[other] + (allotted[other] - 1) * 0.25
                assert before_last_s <= service_time_s[owner] + allotted[owner] * 0.25 + 1e-9, "it went before its turn"


# --- the scheduler ---


def test_a_long_job_is_owed_nothing_for_the_time_in_which_owners_share_the_ticks() -> None:
    machine = Machine(speed_of(short_batch=1))
    machine.add("a0", plain(8, 100_000))
    machine.add("a1", plain(8, 4000))
    machine.add("b0", plain(1, 3000))  # leaves seven places, of which the oldest job has one
    while "b" in machine.owners:
        machine.step()
    machine.add("a2", plain(1, 20))
    before_s = machine.now_s
    while "a2" not in machine.ends:
        machine.step()
    alone_s = 20 * TIMES.seconds(1)
    assert machine.ends["a2"] - before_s <= alone_s / (1 - 0.25) + 2 * TIMES.seconds(8)


def test_two_who_want_all_get_half_of_every_tick_each_however_many_jobs_they_have() -> None:
    machine = Machine(speed_of())
    for number in range(50):
        machine.add(f"a{number}", plain(8, 5))
    machine.add("b0", plain(8, 500))
    assert [machine.tick() for _ in range(10)] == [{"a": 4, "b": 4}] * 10


def test_a_guided_row_finds_its_two_places_however_many_owners_there_are() -> None:
    machine = Machine(speed_of(4))
    for owner in "abcdef":
        machine.add(f"{owner}0", guided(1, 10))
    while places := machine.tick():
        assert all(count == 2 for count in places.values())
    assert machine.places == dict.fromkeys("abcdef", 20)


def flooded(times: TickTimes = TIMES) -> Machine:
    """A machine that somebody else has had for itself for a while."""
    machine = Machine(speed_of(times=times))
    for number in range(20):
        machine.add(f"f{number}", plain(8, 1000))
    while machine.now_s < 2 * BURST_S:
        machine.tick()
    return machine


def test_who_comes_into_a_flood_goes_first_in_ticks_that_are_no_longer_than_a_quarter_more() -> None:
    machine = flooded()
    machine.add("v0", plain(1, 20))
    assert machine.forecast()["v0"].eta_s == pytest.approx(20 * TIMES.seconds(2)), "it is told so"
    began_s = machine.now_s
    for _ in range(20):
        assert machine.tick() == {"v": 1, "f": 1}
    assert machine.ends["v0"] - began_s <= 20 * TIMES.seconds(2) + 1e-9
    assert machine.tick() == {"f": 8}


def test_where_more_rows_cost_no_time_the_flood_takes_what_is_left() -> None:
    machine = flooded(FLAT)
    machine.add("v0", plain(1, 20))
    assert machine.tick() == {"v": 1, "f": 7}


def test_who_wants_more_than_its_share_goes_first_for_a_burst_and_then_gets_its_share() -> None:
    machine = flooded()
    machine.add("v0", plain(16, 10_000))
    began_s = machine.now_s
    while machine.tick() == {"v": 8}:
        pass
    assert machine.now_s - began_s == pytest.approx(BURST_S, rel=0.01)
    machine.tick()
    assert [machine.tick() for _ in range(10)] == [{"v": 4, "f": 4}] * 10


@pytest.mark.parametrize("times", [TIMES, FLAT])
def test_the_oldest_job_of_each_owner_moves_on_under_its_own_short_jobs(times: TickTimes) -> None:
    machine = flooded(times)
    machine.add("v0", plain(1, 100_000))
    oldest = next(job for job, left in machine.left.items() if left)
    before = machine.left[oldest]
    for number in range(100, 500):
        machine.add(f"f{number}", plain(1, 2))  # an endless stream of shorter ones
        machine.tick()
    assert before - machine.left[oldest] >= 50


def test_who_took_less_than_half_while_alone_does_not_wait_for_a_flood_that_comes() -> None:
    machine = Machine(speed_of())
    machine.add("v0", plain(1, 100_000))
    while machine.now_s < 6 * BURST_S:
        machine.tick()
    for number in range(20):
        machine.add(f"f{number}", plain(8, 1000))
    before = machine.left["v0"]
    for _ in range(100):
        machine.tick()
    assert before - machine.left["v0"] >= 90


def test_of_many_owners_each_ones_oldest_job_moves_on() -> None:
    machine, owners = Machine(speed_of()), "abcdefghijklmnop"
    for owner in owners:
        machine.add(f"{owner}0", plain(1, 10_000))
    for number in range(1, 1200):
        for owner in owners:
            if not any(left for job, left in machine.left.items() if job[0] == owner and job[1:] != "0"):
                machine.left = {job: left for job, left in machine.left.items() if left}
                machine.add(f"{owner}{number}", plain(1, 2))
        machine.tick()
    assert min(10_000 - machine.left[f"{owner}0"] for owner in owners) >= 75, "a quarter of half a place of 1,200 ticks"


def test_on_a_slow_machine_too_somebody_leads() -> None:
    assert speed_of(times=TickTimes(((1, 3.0), (8, 6.0)))).policy.is_leader(BURST_S)


def test_who_leads_pays_for_the_places_that_others_could_not_have() -> None:
    machine = flooded()
    machine.add("v0", plain(1, 100_000))
    led_s, before_s = 0.0, machine.now_s
    while machine.tick() == {"v": 1, "f": 1}:
        led_s, before_s = led_s + machine.now_s - before_s, machine.now_s
    # Of a tick of 3.3 ms the flood's place counts as 1.125 ms, and the rest is the leader's: it catches up by 1.05 ms.
    assert led_s == pytest.approx(BURST_S * 3.3 / 1.05, rel=0.01)


@settings(deadline=None, max_examples=100)
@given(st.randoms(use_true_random=False))
def test_all_work_is_done_and_who_has_had_more_does_not_go_before_one_who_could_use_it(
    rng: random.Random,
) -> None:
    max_batch = rng.choice([2, 4, 8, 16])
    machine = Machine(speed_of(max_batch, rng.choice([max_batch, 2])))
    for number in range(rng.randint(2, 15)):
        steps = rng.choice([1, 5, 20, 50])
        on = rng.choice([range(0), range(steps)])
        machine.add(f"{rng.choice('abc')}{number}", Work(rng.choice([1, 2, 8]), steps, on))
    place_s, scheduler = machine.speeds[0].policy.place_s, machine.schedulers[0]
    wanted: Counter[str] = Counter()
    for job_id, work in machine.works.items():
        wanted[job_id[0]] += work.places
    while True:
        service_time_s = machine.times.of(machine.owners)
        can_use = {owner: scheduler._owners[owner].places_now for owner in service_time_s}
        if (places := machine.tick()) is None:
            break
        assert sum(places.values()) <= max_batch
        for other in service_time_s if scheduler._leader is None else ():
            if places.get(other, 0) + 1 < can_use[other]:  # a guided row may have to wait for a second place
                for owner in places:
                    before_last_s = service_time_s[owner] + (places[owner] - 2) * place_s
                    assert (
                        owner == other
                        or before_last_s <= service_time_s[other] + (places.get(other, 0) + 3) * place_s + 1e-9
                    )
    assert machine.places == wanted
    assert not any(machine.left.values())
