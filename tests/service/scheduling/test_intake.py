"""What one server takes on of the jobs that any may run, in plain numbers."""

from itertools import accumulate

from hypothesis import given
from hypothesis import strategies as st

from tminus.service.scheduling.cluster import Intake

PLACES = st.floats(0.0, 1e6)


@given(PLACES, st.lists(PLACES), PLACES)
def test_only_what_is_not_longer_goes_before_a_job(room: float, held: list[float], places: float) -> None:
    before = sum(sorted(each for each in held if each <= places))
    assert Intake(room, held).has_room(places) == (before < room)
    assert Intake(room, held, shortest_first=False).has_room(places) == (sum(sorted(held)) < room)


@given(st.floats(1.0, 1e6), st.lists(PLACES))
def test_of_jobs_that_come_in_order_of_length_those_are_taken_before_which_there_is_room(
    room: float, offered: list[float]
) -> None:
    offered.sort()
    intake, before = Intake(room), [0.0, *accumulate(offered)]
    taken = [intake.offer(places) for places in offered]
    assert taken == [total < room for total in before[:-1]] or len(set(offered)) < len(offered)
    refused = [places for places, was in zip(offered, taken, strict=True) if not was]
    assert intake.refused == min(refused, default=float("inf"))


def test_a_job_is_taken_on_beside_any_number_of_longer_ones() -> None:
    assert Intake(8.0, [1000.0] * 50).offer(7.0)


def test_the_oldest_of_all_is_taken_by_who_has_none_that_is_older() -> None:
    assert not Intake(8.0, [9.0], oldest_us=5).offer_oldest(10.0, 6)
    assert Intake(8.0, [9.0], oldest_us=5).offer_oldest(10.0, 4)
    assert Intake(0.0).offer_oldest(10.0, 4), "who has nothing takes any"
    assert Intake(8.0, [7.0], oldest_us=5).offer_oldest(10.0, 6), "and who has room"
