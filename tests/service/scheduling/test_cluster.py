"""Room among replicas, and what one of them takes on, in plain numbers."""

import math
from dataclasses import replace
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.fakes import LIMITS
from tminus.service.scheduling.room import ClusterLoad, Intake, Overload
from tminus.service.work import Work

PLACES = st.floats(0.0, 1e6)
BOUNDS = replace(LIMITS, max_backlog_s=10.0, max_jobs=4)


def work(places: int) -> Work:
    return Work(1, places, range(0))


def test_what_nobody_holds_is_shared_evenly_and_takes_one_replica_as_many_times_longer_as_there_are() -> None:
    load = ClusterLoad(2, 400.0, 6.0, 1, 800.0)
    assert (load.backlog_s, load.waiting_s) == (6.0 + 800 / 400, 800 / 200)
    assert ClusterLoad().backlog_s == 0.0
    assert ClusterLoad(0, 0.0, 0.0, 3, 900.0).waiting_s == 0.0  # nobody has told its pace yet


@pytest.mark.parametrize(
    ("load", "places", "overload"),
    [
        (ClusterLoad(2, 400.0, 6.0, 1, 800.0), 800, None),  # 10 s, just within
        (ClusterLoad(2, 400.0, 6.0, 1, 800.0), 804, Overload("backlog_s", 10.01, 10.0)),
        (ClusterLoad(2, 400.0, 6.0, 7, 40.0), 4, None),
        (ClusterLoad(2, 400.0, 6.0, 8, 40.0), 4, Overload("jobs", 9, 8)),
        (ClusterLoad(2, 400.0, 0.0, 0, 0.0), 10**9, None),  # where nothing waits any job is taken
        (ClusterLoad(0, 0.0, 0.0, 3, 900.0), 100, None),  # nobody has told its pace yet
        (ClusterLoad(0, 0.0, 0.0, 4, 900.0), 100, Overload("jobs", 5, 4)),
    ],
)
def test_a_job_has_room_while_no_limit_is_passed(load: ClusterLoad, places: int, overload: Overload | None) -> None:
    found = load.overload(work(places), BOUNDS)
    if overload is None:
        assert found is None
    else:
        assert found is not None
        assert (found.field, found.limit) == (overload.field, overload.limit)
        assert found.value == pytest.approx(overload.value)


@pytest.mark.parametrize(
    ("least_s", "seconds"),
    [
        (0.0, 0.0),  # with nothing to do it takes any job
        (5.0, 0.0),
        (9.0, 1.0),  # then it has 8 s left, and this job takes 2 s of one of two
        (30.0, 22.0),
        (math.inf, math.inf),  # there is no other
    ],
)
def test_another_replica_has_room_when_it_has_done_enough_of_its_own(least_s: float, seconds: float) -> None:
    load = ClusterLoad(2, 400.0, 6.0, 0, 0.0, least_s)
    assert load.room_elsewhere_in_s(work(400), BOUNDS.max_backlog_s) == seconds
    assert load.room_elsewhere_in_s(work(400), 0.0) == least_s


@given(st.integers(1, 99), st.floats(1, 1e5), st.floats(0, 20), st.integers(1, 999), st.integers(1, 1000), st.data())
def test_after_the_time_that_is_told_there_is_room(
    replicas: int, places_per_s: float, held_s: float, jobs: int, each: int, data: st.DataObject
) -> None:
    load = ClusterLoad(replicas, places_per_s, held_s, jobs, jobs * each)
    places = data.draw(st.integers(1, 10**6))
    if (overload := load.overload(work(places), BOUNDS)) is None:
        return
    seconds = load.room_in_s(overload)
    assert 0 < seconds < math.inf
    if overload.field == "jobs":
        return
    left_s = load.backlog_s - seconds
    assert left_s + places / places_per_s == pytest.approx(BOUNDS.max_backlog_s) or left_s < 0


# --- what one server takes on ---


@given(PLACES, st.lists(PLACES), PLACES)
def test_only_what_is_not_longer_goes_before_a_job(room: float, held: list[float], places: float) -> None:
    before = sum(sorted(each for each in held if each <= places))
    assert Intake(room, held).has_room(places) == (before < room)


@given(st.floats(1.0, 1e6), st.lists(PLACES))
def test_of_jobs_that_come_in_order_of_length_those_are_taken_before_which_there_is_room(
    room: float, offered: list[float]
) -> None:
    offered.sort()
    intake, before = Intake(room), [0.0, *accumulate(offered)]
    taken = [intake.offer(places) for places in offered]
    assert taken == [total < room for total in before[:-1]] or len(set(offered)) < len(offered)
    refused = [places for places, was in zip(offered, taken, strict=True) if not was]
    assert intake.refused == min(refused, default=math.inf)


def test_the_oldest_of_all_is_taken_by_who_has_none_that_is_older() -> None:
    assert not Intake(8.0, [9.0], oldest_us=5).offer_oldest(10.0, 6)
    assert Intake(8.0, [9.0], oldest_us=5).offer_oldest(10.0, 4)
    assert Intake(0.0).offer_oldest(10.0, 4), "who has nothing takes any"
    assert Intake(8.0, [7.0], oldest_us=5).offer_oldest(10.0, 6), "and who has room"
