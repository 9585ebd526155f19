import math
import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest

from tests.service.scheduling.machine import plain
from tminus.service.errors import DeadlineUnmeetable, InvalidField, Overloaded
from tminus.service.model_info import Limits
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.owners import OwnerTimes
from tminus.service.scheduling.room import ClusterLoad
from tminus.service.scheduling.scheduler import BatchPolicy, TickTimes
from tminus.service.work import JobRows, Outlook, Work

LIMITS = Limits(max_n=64, max_batch=8, max_rows=256, max_jobs=16, max_backlog_s=1e9, max_body_bytes=4096)
RATE = ((8, 1 / 8),)  # 64 full places a second; exact in binary, so that no test hangs on rounding
SECONDS_PER_PLACE = 1 / 64


def make_admission(
    points: Sequence[tuple[int, float]] = RATE,
    decode_s: float = 0.0,
    encode_s: float = 0.0,
    times_of_owners: OwnerTimes | None = None,
    shared: bool = False,
    **limits: float,
) -> Admission:
    held = replace(LIMITS, **limits)  # type: ignore[arg-type]
    admission = Admission(held, times_of_owners, shared=shared)
    times = TickTimes(tuple(points))
    policy = BatchPolicy.of(held.max_batch, 4, times)
    admission.put(0, Speed(policy, held.max_rows, decode_s, encode_s))
    return admission


def refusal(admission: Admission, work: Work, now_s: float = 0.0) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        admission.enter("refused", work, now_s=now_s)
    assert caught.value.status == 429
    assert wait_of(caught.value) >= 1
    return caught.value


def wait_of(error: Overloaded) -> int:
    return int(error.headers["Retry-After"])


# --- the ledger ---


def test_the_backlog_is_what_is_left_of_the_accepted_work_at_the_rate_of_full_ticks() -> None:
    admission = make_admission()
    admission.enter("a", Work(4, 10, range(10)), now_s=0.0)
    admission.enter("b", plain(3, 8), now_s=0.0)
    assert admission.backlog_s == (80 + 24) * SECONDS_PER_PLACE
    assert (admission.rows, len(admission.outlooks(0.0))) == (7, 2)
    admission.stepped(0, [JobRows("a", (), 6), JobRows("b", (), 2), JobRows("nobody", (), 5)], 8, 1 / 8)
    admission.leave("nobody")
    assert admission.backlog_s == 96 * SECONDS_PER_PLACE
    admission.leave("a")
    assert (admission.rows, len(admission.outlooks(0.0))) == (3, 1), "it takes all it had left with it"
    admission.stepped(0, [JobRows("b", (), 99)], 8, 1 / 8)
    assert admission.backlog_s == 0, "no job has less than nothing left"
    admission.leave("b")
    assert (admission.backlog_s, admission.rows, len(admission.outlooks(0.0))) == (0, 0, 0)


def test_one_thread_may_admit_jobs_while_another_steps_and_removes_them() -> None:
    admission = make_admission(max_jobs=10_000, max_rows=100_000)
    entered: list[str] = []
    all_in = threading.Event()

    def serve() -> None:
        at = 0
        while not all_in.is_set() or at < len(entered):
            if at < len(entered):
                admission.stepped(0, [JobRows(entered[at], (), 7)], 7, 1 / 8)
                admission.leave(entered[at])
                at += 1

    server = threading.Thread(target=serve)
    server.start()
    for i in range(500):
        admission.enter(f"job{i}", plain(3, 5), now_s=0.0)
        entered.append(f"job{i}")
    all_in.set()
    server.join()
    assert (admission.backlog_s, admission.rows, len(admission.outlooks(0.0))) == (0, 0, 0)


# --- what an accepted job is told ---


def test_an_accepted_job_is_told_its_position_and_when_it_will_end() -> None:
    admission = make_admission()
    assert admission.enter("a", plain(8, 40), now_s=0.0) == Outlook(0, 5.0)
    assert admission.enter("b", plain(8, 80), now_s=0.0).position == 1
    assert admission.outlooks(0.0) == {"a": Outlook(0, 5.0), "b": Outlook(1, pytest.approx(15.0))}
    for _ in range(8):
        admission.stepped(0, [JobRows("a", (), 8)], 8, 1 / 8)
    assert admission.outlooks(0.0)["a"].eta_s == pytest.approx(4.0)


# --- limits ---


def test_a_job_over_the_backlog_limit_is_refused_with_the_reason() -> None:
    admission = make_admission(max_backlog_s=10.0)
    admission.enter("a", plain(10, 50), now_s=0.0)  # 7.8 s
    error = refusal(admission, plain(10, 20))  # 3.1 s
    assert (error.code, error.field, error.bound) == ("overloaded", "backlog_s", "at most 10")
    assert error.value == pytest.approx(700 / 64, abs=0.05)
    assert wait_of(error) in (1, 2)
    assert (admission.rows, len(admission.outlooks(0.0))) == (10, 1), "it leaves nothing on the ledger"
    admission.enter("b", plain(10, 14), now_s=0.0)
    assert admission.backlog_s == 10.0, "work up to the very limit is taken"


def test_an_idle_server_accepts_any_job_however_long_and_with_any_deadline_that_it_meets() -> None:
    admission = make_admission(max_backlog_s=0.001)
    admission.enter("a", Work(64, 1000, range(1000)), now_s=0.0, deadline_s=math.inf)
    refusal(admission, plain(1, 1))
    admission.leave("a")
    assert admission.enter("a", plain(8, 80), now_s=0.0, deadline_s=10.0) == Outlook(0, 10.0)


@pytest.mark.parametrize(
    ("name", "limits", "bound"),
    [("jobs", {"max_jobs": 2}, "at most 2"), ("rows", {"max_rows": 9}, "at most 9")],
)
def test_jobs_and_rows_have_limits(name: str, limits: dict[str, int], bound: str) -> None:
    admission = make_admission(**limits)
    admission.enter("a", plain(4, 64), now_s=0.0)
    admission.enter("b", plain(4, 64), now_s=0.0)
    error = refusal(admission, plain(4, 64))
    assert (error.field, error.bound) == (name, bound)
    assert str(error.value) in error.detail
    admission.leave("a")
    admission.leave("b")
    admission.enter("c", plain(4, 64), now_s=float(wait_of(error)))


def test_more_rows_than_the_server_can_hold_are_a_bad_request() -> None:
    admission = make_admission(max_rows=9)
    with pytest.raises(InvalidField) as caught:
        admission.enter("a", plain(10, 1), now_s=0.0)
    assert (caught.value.field, caught.value.bound, caught.value.value) == ("n", "at most 9", 10)


def test_before_calibration_nothing_is_refused_for_time_and_every_wait_is_a_second() -> None:
    admission = make_admission((), max_backlog_s=0.001, max_jobs=3)
    for i in range(3):
        assert admission.enter(f"job{i}", plain(64, 1000), now_s=0.0, deadline_s=1.0).eta_s == 0
    assert admission.backlog_s == 0
    for i in range(20):
        assert wait_of(refusal(admission, plain(64, 1000), now_s=i / 2)) == 1


# --- deadlines ---


@pytest.mark.parametrize("deadline_s", [9.99, -1.0, math.nan])
def test_a_deadline_that_even_an_idle_server_misses_is_a_bad_field(deadline_s: float) -> None:
    admission = make_admission()
    with pytest.raises(InvalidField) as caught:
        admission.enter("a", plain(8, 80), now_s=0.0, deadline_s=deadline_s)
    assert (caught.value.field, caught.value.bound) == ("deadline_s", "at least 10 s for this work")
    assert len(admission.outlooks(0.0)) == 0


def test_a_deadline_that_the_load_prevents_is_refused_with_the_earliest_that_can_be_met() -> None:
    admission = make_admission()
    admission.enter("a", plain(8, 80), now_s=0.0)
    with pytest.raises(DeadlineUnmeetable) as caught:
        admission.enter("b", plain(8, 160), now_s=0.0, deadline_s=25.0)
    error = caught.value
    assert (error.status, error.code, error.field, error.value) == (429, "deadline_unmeetable", "deadline_s", 25.0)
    assert error.bound == "at least 30 s at this load"
    assert "Retry-After" not in error.headers
    assert len(admission.outlooks(0.0)) == 1
    assert admission.enter("b", plain(8, 160), now_s=0.0, deadline_s=30.0) == Outlook(1, pytest.approx(30.0))


# --- latent models: images are decoded after their steps ---


def test_decoding_counts_as_work_and_as_time() -> None:
    admission = make_admission(decode_s=0.5, encode_s=0.25)
    outlook = admission.enter("a", plain(4, 10), now_s=0.0)
    assert admission.backlog_s == 40 * SECONDS_PER_PLACE + 2.0
    assert outlook.eta_s == make_admission().enter("a", plain(4, 10), now_s=0.0).eta_s + 2.0
    admission.stepped(0, [JobRows("a", (), 40)], 8, 1 / 8)
    assert admission.outlooks(1.0)["a"].eta_s == 2.0, "its images are still to be decoded"
    admission.decoded("a")
    admission.decoded("nobody")
    assert admission.backlog_s == 1.5
    assert admission.outlooks(1.0)["a"].eta_s == 1.5
    admission.leave("a")
    assert admission.backlog_s == 0


def test_a_picture_to_begin_with_is_encoded_and_a_job_that_comes_back_has_done_that() -> None:
    admission = make_admission(decode_s=0.5, encode_s=0.25)
    admission.enter("a", plain(2, 10), now_s=0.0, has_picture=True)
    assert admission.backlog_s == 20 * SECONDS_PER_PLACE + 1.25
    admission.readmit("b", plain(2, 10), places_left=6)
    assert admission.backlog_s == 26 * SECONDS_PER_PLACE + 2.25


@pytest.mark.parametrize("owner", ["", "other"])
@pytest.mark.parametrize("ticks_first", [False, True])
def test_who_comes_again_when_told_finds_room_though_images_take_longer_than_ticks(
    ticks_first: bool, owner: str
) -> None:
    decode_s, steps_s = 5.0, 40 * SECONDS_PER_PLACE
    admission = make_admission(decode_s=decode_s, max_backlog_s=30.0)
    admission.enter("a", plain(4, 10), now_s=0.0, owner="first")
    begins_s = 0.0
    if ticks_first:
        admission.stepped(0, [JobRows("a", (), 40)], 8, 1 / 8)
        begins_s = steps_s
    with pytest.raises(Overloaded) as refused:
        admission.enter("b", plain(4, 10), now_s=begins_s, owner=owner or "first")
    told_s = refused.value.retry_after_s
    if not ticks_first:
        admission.stepped(0, [JobRows("a", (), 40)], 8, 1 / 8)
    for _ in range(int((begins_s + told_s - steps_s) / decode_s)):
        admission.decoded("a")
    admission.enter("b", plain(4, 10), now_s=begins_s + told_s, owner=owner or "first")
    assert told_s < 4 * decode_s + 1, "and not much too late"


# --- jobs that any replica may do ---


def test_a_job_that_is_left_to_others_is_not_counted_here_and_is_told_when_it_will_be_done() -> None:
    admission = make_admission()
    outlook = admission.leave_to_any(plain(8, 8), ClusterLoad(2, 128.0, 3.0, 5, 256.0), now_s=0.0)
    assert outlook == Outlook(5, 3.0 + 256 / 128 + 8 * 8 * SECONDS_PER_PLACE)
    assert (admission.backlog_s, admission.rows) == (0.0, 0)


def test_a_job_for_which_no_replica_has_room_or_time_is_refused_and_each_is_told_another_time() -> None:
    admission = make_admission(max_backlog_s=10.0)
    load, idle = ClusterLoad(2, 128.0, 4.0, 5, 6.0 * 128), ClusterLoad(2, 128.0, 3.0, 0, 0.0)
    waits = []
    for _ in range(3):
        with pytest.raises(Overloaded) as caught:
            admission.leave_to_any(plain(8, 32), load, now_s=0.0)
        waits.append(wait_of(caught.value))
    assert waits == [2, 4, 6], "one takes the two 2 s"
    admission.leave_to_any(plain(8, 8), idle, now_s=0.0, deadline_s=4.0)
    with pytest.raises(DeadlineUnmeetable, match=r"would be done in 4\.0 s"):
        admission.leave_to_any(plain(8, 8), idle, now_s=0.0, deadline_s=3.9)
    for work, deadline_s in ((plain(8, 8), 0.5), (plain(257, 1), None)):
        with pytest.raises(InvalidField):
            admission.leave_to_any(work, idle, now_s=0.0, deadline_s=deadline_s)


def test_a_job_is_taken_on_where_little_goes_before_it() -> None:
    admission = make_admission()
    admission.enter("long", plain(1, 640), now_s=0.0)  # 10 s
    admission.enter("short", plain(1, 64), now_s=0.0)
    admission.stepped(0, [JobRows("long", (), 320)], 0, 0.0)  # 5 s are left
    intake = admission.intake(0, 6.0)
    assert [intake.has_room(places) for places in (1, 319, 320)] == [True, True, False]
    assert admission.intake(0, 6.1).has_room(320)


def test_work_of_other_models_goes_before_a_job_by_the_seconds_it_takes() -> None:
    admission = make_admission()
    slower = TickTimes(((8, 1.0),))  # 8 times as slow
    admission.put(1, Speed(BatchPolicy.of(8, 4, slower), 256))
    admission.enter("other", Work(1, 8, range(0), model=1), now_s=0.0)  # a second, 64 places of the first model
    assert admission.intake(0, 1.0).has_room(63)
    assert not admission.intake(0, 1.0).has_room(64)
    assert make_admission(points=()).intake(0, 1.0).has_room(1), "before ticks are measured"


# --- several owners ---

WORK = plain(8, 80)  # ten seconds


def shared(**limits: float) -> Admission:
    return make_admission(RATE, shared=True, **limits)


def enter(admission: Admission, owner: str, works: int, work: Work = WORK) -> int:
    """How many of them are let in."""
    for number in range(works):
        try:
            admission.enter(f"{owner}{number}", work, owner, now_s=0.0)
        except Overloaded:
            return number
    return works


@pytest.mark.parametrize("limits", [{"max_backlog_s": 80.0}, {"max_jobs": 8}, {"max_rows": 64}])
def test_one_key_may_hold_three_quarters_and_leaves_room_for_another(limits: dict[str, float]) -> None:
    assert enter(make_admission(**limits), "", 20) == 8, "without keys one who comes alone may have all"
    admission = shared(**limits)
    assert enter(admission, "flood", 20) == 6
    assert enter(admission, "b", 20) == 1, "three quarters of what the others leave, and the first in any case"
    assert enter(admission, "c", 20) == 1, "its first job may take the last that there is"
    assert enter(admission, "d", 20) == 0


def test_the_refusal_says_that_the_limit_is_of_the_key_and_when_there_is_room_for_it() -> None:
    admission = shared(max_backlog_s=80.0)
    enter(admission, "flood", 6)
    with pytest.raises(Overloaded) as caught:
        admission.enter("more", WORK, "flood", now_s=0.0)
    detail = str(caught.value)
    assert "70.0 s of work of this key would be waiting; the limit of a key now is 60 s" in detail
    assert 10 <= wait_of(caught.value) <= 12


def test_a_key_is_told_a_time_where_another_has_jobs_of_another_model() -> None:
    admission = shared(max_backlog_s=80.0)
    admission.put(1, Speed(BatchPolicy.of(8, 4, TickTimes(RATE)), 256))
    assert enter(admission, "flood", 20) == 6
    admission.enter("other", replace(WORK, model=1), "b", now_s=0.0)
    with pytest.raises(Overloaded) as caught:
        admission.enter("more", WORK, "flood", now_s=0.0)
    assert 10 <= wait_of(caught.value) <= 25


def test_of_many_keys_that_find_no_room_at_all_each_is_told_another_time() -> None:
    admission = shared(max_backlog_s=80.0)
    for owner, works in (("flood", 6), ("b", 1), ("c", 1)):
        assert enter(admission, owner, works) == works
    waits = []
    for number in range(10):
        with pytest.raises(Overloaded) as caught:
            admission.enter(f"new{number}", WORK, f"new{number}", now_s=0.0)
        waits.append(wait_of(caught.value))
    assert waits == sorted(set(waits))


def test_what_is_kept_of_keys_that_are_gone_is_forgotten() -> None:
    admission = shared(max_jobs=10_000)
    for number in range(300):
        admission.enter("job", plain(1, 1), f"key{number}", now_s=200.0 * number)
        admission.leave("job")
    assert len(admission._arrivals) < 30


def test_a_key_that_was_refused_does_not_wait_in_the_line_of_another() -> None:
    admission = shared(max_backlog_s=80.0)
    enter(admission, "flood", 6)
    for _ in range(100):
        with pytest.raises(Overloaded):
            admission.enter("more", WORK, "flood", now_s=0.0)
    enter(admission, "b", 1)
    with pytest.raises(Overloaded) as caught:
        admission.enter("b9", WORK, "b", now_s=0.0)
    assert wait_of(caught.value) <= 40


def test_who_comes_into_a_flood_is_told_a_time_of_its_own_and_meets_its_deadline() -> None:
    owner_times = OwnerTimes()
    owner_times.join("flood")
    admission = make_admission(RATE, times_of_owners=owner_times, shared=True, max_backlog_s=1e6)
    admission.enter("f0", plain(64, 1000), "flood", now_s=0.0)
    for number in range(1, 8):
        admission.enter(f"f{number}", plain(8, 1000), "flood", now_s=0.0)
    for _ in range(200):
        admission.stepped(0, [JobRows("f0", (), 8)], 8, 1 / 8)
    owner_times.stepped({"flood": 25.0})
    outlook = admission.enter("v0", plain(8, 80), "v", now_s=25.0, deadline_s=11.0)
    assert outlook.eta_s == pytest.approx(10.0, rel=0.1)


def test_a_job_of_an_earlier_process_is_refused_for_no_share() -> None:
    admission = shared(max_jobs=8)
    for number in range(8):
        admission.readmit(f"f{number}", WORK, "flood", places_left=10)
