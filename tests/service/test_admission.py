import heapq
import math
import random
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import admission as admission_module
from service.admission import Admission, Entry
from service.errors import DeadlineUnmeetable, InvalidField, Overloaded
from service.forecast import Outlook, TickTimes
from service.job import Batch, Limits, Work
from service.scheduler import Policy, Scheduler

LIMITS = Limits(max_n=64, max_batch=8, max_rows=256, max_jobs=16, max_backlog_s=1e9, max_body_bytes=4096)
RATE = ((8, 1 / 8),)  # 64 full places a second; exact in binary, so that no test hangs on rounding
SECONDS_PER_PLACE = 1 / 64


def make_admission(points: Sequence[tuple[int, float]] = RATE, policy: Policy = "srpt", **limits: float) -> Admission:
    admission = Admission(replace(LIMITS, **limits), policy)  # type: ignore[arg-type]
    admission.calibrate(points)
    return admission


def plain(rows: int, steps: int) -> Work:
    return Work(rows, steps, range(0))


def refusal(admission: Admission, work: Work, now_s: float = 0.0) -> Overloaded:
    with pytest.raises(Overloaded) as caught:
        admission.enter("refused", work, now_s=now_s)
    assert caught.value.status == 429
    assert wait_of(caught.value) >= 1
    return caught.value


def wait_of(error: Overloaded | DeadlineUnmeetable) -> int:
    return int(error.headers["Retry-After"])


# --- the ledger ---


def test_the_backlog_is_the_accepted_work_at_the_rate_of_full_ticks() -> None:
    admission = make_admission()
    admission.enter("a", Work(4, 10, range(10)), now_s=0.0)
    admission.enter("b", plain(3, 8), now_s=0.0)
    assert admission.backlog_s == (80 + 24) * SECONDS_PER_PLACE
    assert (admission.rows, admission.jobs) == (7, 2)
    admission.stepped({"a": 6, "b": 2}, 8, 1 / 8)
    assert admission.backlog_s == 96 * SECONDS_PER_PLACE


def test_guidance_counts_only_where_it_is_on() -> None:
    admission = make_admission()
    admission.enter("a", Work(4, 10, range(2, 5)), now_s=0.0)
    assert admission.backlog_s == 4 * 13 * SECONDS_PER_PLACE


def test_a_job_that_leaves_takes_all_it_had_left_with_it() -> None:
    admission = make_admission()
    admission.enter("a", plain(4, 10), now_s=0.0)
    admission.enter("b", plain(1, 10), now_s=0.0)
    admission.stepped({"a": 4}, 4, 1 / 8)
    admission.leave("a")
    assert (admission.backlog_s, admission.rows, admission.jobs) == (10 * SECONDS_PER_PLACE, 1, 1)
    admission.leave("b")
    assert (admission.backlog_s, admission.rows, admission.jobs) == (0, 0, 0)


def test_who_is_not_here_neither_leaves_nor_steps() -> None:
    admission = make_admission()
    admission.enter("a", plain(1, 2), now_s=0.0)
    admission.leave("nobody")
    admission.stepped({"nobody": 5, "a": 1}, 6, 1 / 8)
    assert admission.backlog_s == SECONDS_PER_PLACE
    admission.stepped({"a": 5}, 5, 1 / 8)
    assert admission.backlog_s == 0, "no job has less than nothing left"


def test_a_name_may_come_again_but_not_twice_at_once() -> None:
    admission = make_admission()
    admission.enter("a", plain(1, 2), now_s=0.0)
    with pytest.raises(AssertionError):
        admission.enter("a", plain(1, 2), now_s=0.0)
    admission.leave("a")
    admission.enter("a", plain(1, 2), now_s=0.0)


def test_the_rate_follows_the_ticks_slowly() -> None:
    admission = make_admission()
    admission.enter("a", plain(64, 1000), now_s=0.0)
    before_s = admission.backlog_s
    admission.stepped({}, 8, 2 / 8)
    assert 1.0 < admission.backlog_s / before_s < 1.05
    for _ in range(500):
        admission.stepped({}, 3, 2 / 8)
    assert admission.backlog_s / before_s == pytest.approx(2.0, rel=1e-2)


def test_threads_may_enter_step_and_leave_at_once() -> None:
    admission = make_admission(max_jobs=10_000, max_rows=100_000)
    done: list[int] = []

    def work(thread: int) -> None:
        for i in range(300):
            name = f"{thread}-{i}"
            admission.enter(name, plain(2, 5), now_s=0.0)
            for _ in range(3):
                admission.stepped({name: 3}, 3, 1 / 8)
            assert admission.outlook(name) is not None
            if i % 100 == 0:
                admission.outlooks()
            admission.leave(name)
        done.append(thread)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [0, 1, 2, 3]
    assert (admission.backlog_s, admission.rows, admission.jobs, admission.outlooks()) == (0, 0, 0, [])


def test_one_thread_may_enter_while_another_steps_and_lets_leave() -> None:
    admission = make_admission(max_jobs=10_000, max_rows=100_000)
    entered: list[str] = []
    all_in = threading.Event()

    def serve() -> None:
        at = 0
        while not all_in.is_set() or at < len(entered):
            if at < len(entered):
                admission.stepped({entered[at]: 7}, 7, 1 / 8)
                admission.leave(entered[at])
                at += 1

    server = threading.Thread(target=serve)
    server.start()
    for i in range(500):
        admission.enter(f"job{i}", plain(3, 5), now_s=0.0)
        entered.append(f"job{i}")
    all_in.set()
    server.join()
    assert (admission.backlog_s, admission.rows, admission.jobs) == (0, 0, 0)


# --- what an accepted job is told ---


def test_an_accepted_job_is_told_its_place_and_its_end() -> None:
    admission = make_admission()
    assert admission.enter("a", plain(8, 40), now_s=0.0) == Entry(0, 5.0)
    assert admission.enter("b", plain(8, 80), now_s=0.0).position == 1
    assert admission.outlook("a") == Outlook("a", 0, 5.0)
    assert [outlook.job_id for outlook in admission.outlooks()] == ["a", "b"]
    assert admission.outlooks()[1].eta_s == pytest.approx(15.0)
    assert admission.outlook("nobody") is None
    for _ in range(8):
        admission.stepped({"a": 8}, 8, 1 / 8)
    assert admission.outlooks()[0].eta_s == pytest.approx(4.0)


def test_first_come_first_served_is_told_as_it_is() -> None:
    admission = make_admission(policy="fcfs")
    admission.enter("long", plain(8, 80), now_s=0.0)
    assert admission.enter("short", plain(8, 8), now_s=0.0) == Entry(1, pytest.approx(11.0))


# --- limits ---


def test_a_job_over_the_backlog_limit_is_refused_with_the_reason() -> None:
    admission = make_admission(max_backlog_s=10.0)
    admission.enter("a", plain(10, 50), now_s=0.0)  # 7.8 s
    error = refusal(admission, plain(10, 20))  # 3.1 s
    assert (error.code, error.field, error.bound) == ("overloaded", "backlog_s", "at most 10")
    assert error.value == pytest.approx(700 / 64, abs=0.05)
    assert wait_of(error) in (1, 2)


def test_work_up_to_the_very_limit_is_taken() -> None:
    admission = make_admission(max_backlog_s=10.0)
    admission.enter("a", plain(10, 50), now_s=0.0)
    admission.enter("b", plain(10, 14), now_s=0.0)
    assert admission.backlog_s == 10.0


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


def test_a_refused_job_leaves_nothing_on_the_ledger() -> None:
    admission = make_admission(max_backlog_s=1.0)
    admission.enter("a", plain(1, 10), now_s=0.0)
    before = (admission.backlog_s, admission.rows, admission.jobs)
    refusal(admission, plain(64, 1000))
    assert (admission.backlog_s, admission.rows, admission.jobs) == before


def test_an_idle_server_accepts_any_job_however_long() -> None:
    admission = make_admission(max_backlog_s=0.001)
    admission.enter("a", Work(64, 1000, range(1000)), now_s=0.0)
    refusal(admission, plain(1, 1))


def test_more_rows_than_the_server_can_hold_are_a_bad_request() -> None:
    admission = make_admission(max_rows=9)
    with pytest.raises(InvalidField) as caught:
        admission.enter("a", plain(10, 1), now_s=0.0)
    assert (caught.value.field, caught.value.bound, caught.value.value) == ("n", "at most 9", 10)


def test_before_calibration_nothing_is_refused_for_time_and_every_wait_is_a_second() -> None:
    admission = Admission(replace(LIMITS, max_backlog_s=0.001, max_jobs=3))
    for i in range(3):
        assert admission.enter(f"job{i}", plain(64, 1000), now_s=0.0, deadline_s=1.0).eta_s == 0
    assert admission.backlog_s == 0
    for i in range(20):
        assert wait_of(refusal(admission, plain(64, 1000), now_s=i / 2)) == 1


# --- promises ---


def test_each_of_many_refused_at_once_is_given_a_later_time() -> None:
    admission = make_admission(max_backlog_s=10.0)
    work = plain(8, 80)  # ten seconds
    admission.enter("a", work, now_s=0.0)
    waits = [wait_of(refusal(admission, work)) for _ in range(4)]
    assert waits == sorted(set(waits))
    for turn, wait_s in enumerate(waits, 1):
        assert 10 * turn <= wait_s <= 1.05 * 10 * turn + turn + 1


def test_nobody_slips_into_promised_room_and_who_it_was_promised_to_finds_it() -> None:
    admission = make_admission(max_backlog_s=10.0)
    admission.enter("a", plain(8, 80), now_s=0.0)
    work = plain(8, 70)
    wait_s = wait_of(refusal(admission, work))
    for _ in range(75):
        admission.stepped({"a": 8}, 8, 1 / 8)
    refusal(admission, plain(8, 72), now_s=wait_s)
    admission.enter("b", work, now_s=wait_s)
    refusal(admission, work, now_s=wait_s)


def test_who_comes_too_early_is_one_more_in_the_queue() -> None:
    admission = make_admission(max_backlog_s=10.0)
    admission.enter("a", plain(8, 80), now_s=0.0)
    first_s = wait_of(refusal(admission, plain(8, 80)))
    assert 1.0 + wait_of(refusal(admission, plain(8, 80), now_s=1.0)) > first_s


def test_a_promise_nobody_comes_for_expires() -> None:
    admission = make_admission(max_jobs=1)
    admission.enter("a", plain(8, 16), now_s=0.0)
    wait_s = wait_of(refusal(admission, plain(8, 16)))
    admission.leave("a")
    refusal(admission, plain(8, 17), now_s=wait_s + admission_module.GRACE_S - 0.01)
    admission.enter("b", plain(8, 17), now_s=wait_s + admission_module.GRACE_S + 0.01)


def test_a_late_client_still_finds_its_room_within_the_grace() -> None:
    admission = make_admission(max_jobs=1)
    admission.enter("a", plain(8, 16), now_s=0.0)
    wait_s = wait_of(refusal(admission, plain(8, 16)))
    admission.leave("a")
    admission.enter("b", plain(8, 16), now_s=wait_s + admission_module.GRACE_S - 0.01)


def test_a_job_that_is_done_before_the_next_promise_is_due_may_use_an_empty_server() -> None:
    admission = make_admission(max_jobs=1)
    admission.enter("a", plain(8, 800), now_s=0.0)
    wait_s = wait_of(refusal(admission, plain(8, 800)))
    assert wait_s >= 100
    admission.leave("a")
    refusal(admission, plain(8, 900), now_s=1.0)
    admission.enter("b", plain(8, 8), now_s=1.0)


def test_a_client_whose_room_is_not_there_is_next_not_last() -> None:
    admission = make_admission(max_jobs=1)
    admission.enter("a", plain(8, 8), now_s=0.0)
    waits = [wait_of(refusal(admission, plain(8, 8 + i))) for i in range(50)]
    again_s = wait_of(refusal(admission, plain(8, 8), now_s=waits[0]))  # "a" has not even begun
    assert again_s <= 3 < waits[-1] - waits[0]


def test_a_slower_machine_breaks_no_promise_until_the_rest_is_over_twice_the_limit() -> None:
    work = plain(8, 70)
    for ticks_done, let_in in ((30, True), (10, False)):
        admission = make_admission(max_backlog_s=10.0)
        admission.enter("a", plain(8, 75), now_s=0.0)
        admission.enter("b", plain(1, 32), now_s=0.0)  # in all 632 places, of at most 640
        wait_s = wait_of(refusal(admission, work))
        for _ in range(ticks_done):
            admission.stepped({"a": 8}, 8, 1 / 8)
        if not let_in:
            for _ in range(200):
                admission.stepped({}, 8, 4 / 8)  # in the end four times slower
            refusal(admission, work, now_s=wait_s)
        else:
            admission.enter("c", work, now_s=wait_s)
            assert admission.backlog_s > 10.0


def test_beyond_so_many_promises_a_time_is_told_but_no_room_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "MAX_PROMISES", 3)
    admission = make_admission(max_jobs=1)
    admission.enter("a", plain(8, 8), now_s=0.0)
    waits = [wait_of(refusal(admission, plain(8, 8))) for _ in range(10)]
    assert waits[:4] == sorted(set(waits[:4]))
    assert len(set(waits[3:])) == 1


# --- deadlines ---


def test_a_deadline_that_can_be_met_changes_nothing() -> None:
    admission = make_admission()
    assert admission.enter("a", plain(8, 80), now_s=0.0, deadline_s=10.0) == Entry(0, 10.0)


@pytest.mark.parametrize("deadline_s", [9.99, 0.0, -1.0, math.nan, -math.inf])
def test_a_deadline_that_no_load_explains_is_a_bad_field(deadline_s: float) -> None:
    admission = make_admission()
    with pytest.raises(InvalidField) as caught:
        admission.enter("a", plain(8, 80), now_s=0.0, deadline_s=deadline_s)
    assert (caught.value.field, caught.value.bound) == ("deadline_s", "at least 10 s for this work")
    assert admission.jobs == 0


def test_a_deadline_that_the_load_prevents_is_refused_with_a_time_that_is_right() -> None:
    admission = make_admission(policy="fcfs")
    admission.enter("a", plain(8, 80), now_s=0.0)
    with pytest.raises(DeadlineUnmeetable) as caught:
        admission.enter("b", plain(8, 8), now_s=0.0, deadline_s=4.0)
    error = caught.value
    assert (error.status, error.code, error.field, error.value) == (429, "deadline_unmeetable", "deadline_s", 4.0)
    assert error.bound == "at least 11 s at this load"
    assert 7 <= wait_of(error) <= 9
    assert admission.jobs == 1
    for _ in range(8 * wait_of(error)):
        admission.stepped({"a": 8}, 8, 1 / 8)
    admission.enter("b", plain(8, 8), now_s=wait_of(error), deadline_s=4.0)


def test_an_endless_deadline_is_none() -> None:
    admission = make_admission()
    admission.enter("a", plain(8, 80), now_s=0.0, deadline_s=math.inf)


# --- for every load: a server that runs as fast as predicted, and clients that come back when told ---


@dataclass
class Outcome:
    tries: Counter[int] = field(default_factory=Counter)  # by number of tries
    waits: list[int] = field(default_factory=list)
    ended_s: float = 0.0


def serve(
    requests: Sequence[tuple[float, Work]],
    limits: Limits,
    points: tuple[tuple[int, float], ...],
    policy: Policy = "srpt",
    deadlines: dict[Work, float] | None = None,
) -> Outcome:
    """Run requests at their times to the end of all work, with the scheduler itself and a clock of predicted ticks."""
    scheduler, times = Scheduler(limits.max_batch, 0.25, policy), TickTimes(points)
    admission = Admission(limits, policy)
    admission.calibrate(points)
    coming = [(at_s, number, 1) for number, (at_s, _) in enumerate(requests)]
    heapq.heapify(coming)
    outcome, row = Outcome(), 0
    running: tuple[Batch, float] | None = None  # and when its tick ends
    while coming or running is not None:
        if running is not None and (not coming or running[1] <= coming[0][0]):
            batch, now_s = running
            admission.stepped(scheduler.places_by_job(batch), batch.places, times.seconds(batch.places))
            for job_id in scheduler.advance(batch).finished:
                admission.leave(job_id)
            running = None
        else:
            now_s, number, tries = heapq.heappop(coming)
            work = requests[number][1]
            try:
                admission.enter(str(number), work, now_s=now_s, deadline_s=(deadlines or {}).get(work))
            except (Overloaded, DeadlineUnmeetable) as error:
                outcome.waits.append(wait_of(error))
                heapq.heappush(coming, (now_s + wait_of(error), number, tries + 1))
            else:
                outcome.tries[tries] += 1
                scheduler.add(str(number), range(row, row + work.rows), work)
                row += work.rows
            assert admission.jobs <= limits.max_jobs
            assert admission.rows <= limits.max_rows
        if running is None and (batch := scheduler.next_batch()) is not None:
            running = (batch, now_s + times.seconds(batch.places))
    assert (admission.jobs, admission.rows, admission.backlog_s) == (0, 0, 0)
    outcome.ended_s = now_s
    return outcome


@st.composite
def works(draw: st.DrawFn) -> Work:
    steps = draw(st.integers(1, 100))
    return Work(draw(st.integers(1, 16)), steps, draw(st.sampled_from([range(0), range(steps), range(steps // 2)])))


@st.composite
def requests(draw: st.DrawFn) -> list[tuple[float, Work]]:
    span_s = draw(st.sampled_from([0, 0, 1, 20]))
    return [(draw(st.floats(0, 1)) * span_s, work) for work in draw(st.lists(works(), min_size=1, max_size=40))]


tick_points = st.sampled_from([((8, 1 / 8),), ((1, 0.003), (8, 0.02)), ((1, 0.02), (8, 0.022)), ((1, 0.01), (8, 0.08))])


@settings(deadline=None, max_examples=100)
@given(requests(), tick_points, st.sampled_from([0.1, 0.5, 2.0, 10.0]), st.sampled_from(["srpt", "fcfs"]))
def test_with_a_backlog_limit_who_waits_as_told_is_always_let_in(
    load: list[tuple[float, Work]], points: tuple[tuple[int, float], ...], max_backlog_s: float, policy: Policy
) -> None:
    limits = replace(LIMITS, max_jobs=1000, max_rows=10_000, max_backlog_s=max_backlog_s)
    outcome = serve(load, limits, points, policy)
    assert outcome.tries.keys() <= {1, 2}
    assert outcome.tries.total() == len(load)
    places, times = sum(work.places for _, work in load), TickTimes(points)
    slowest_s = max(places * times.seconds(1), places * times.seconds_per_place(8))
    assert all(1 <= wait_s <= 1.05 * slowest_s + 20 + len(load) for wait_s in outcome.waits)


def test_with_limits_on_jobs_and_rows_nearly_all_who_wait_as_told_are_let_in_at_once_and_all_soon() -> None:
    tries: Counter[int] = Counter()

    @settings(deadline=None, max_examples=100, derandomize=True, database=None)
    @given(requests(), tick_points, st.sampled_from([(1, 256), (4, 32), (16, 24), (1000, 40)]))
    def count(load: list[tuple[float, Work]], points: tuple[tuple[int, float], ...], most: tuple[int, int]) -> None:
        limits = replace(LIMITS, max_jobs=most[0], max_rows=most[1])
        outcome = serve(load, limits, points)
        tries.update(outcome.tries)
        assert outcome.tries.total() == len(load)

    count()
    assert tries.total() > 500
    assert sum(count for number, count in tries.items() if number > 2) <= 0.005 * tries.total()
    assert max(tries) <= 4


@pytest.mark.parametrize(
    ("limits", "points"),
    [
        (replace(LIMITS, max_jobs=16), ((1, 0.003), (2, 0.005), (4, 0.01), (8, 0.02))),
        (replace(LIMITS, max_jobs=64, max_backlog_s=60.0), ((1, 0.003), (2, 0.005), (4, 0.01), (8, 0.02))),
        (replace(LIMITS, max_jobs=10_000, max_rows=100_000, max_backlog_s=10.0), ((1, 0.003), (8, 0.02))),
        (replace(LIMITS, max_batch=64, max_rows=1024, max_jobs=256), ((1, 0.003), (64, 0.0036))),
    ],
)
def test_a_thousand_at_once_are_all_in_with_two_tries_and_the_server_is_kept_busy(
    limits: Limits, points: tuple[tuple[int, float], ...]
) -> None:
    mix = random.Random(0)
    load = [(0.0, plain(mix.choice([1, 1, 2, 4, 8]), mix.choice([20, 20, 50, 100]))) for _ in range(1000)]
    outcome = serve(load, limits, points)
    assert outcome.tries.keys() == {1, 2}
    assert outcome.tries.total() == 1000
    full_s = sum(work.places for _, work in load) * TickTimes(points).seconds_per_place(limits.max_batch)
    assert outcome.ended_s <= 1.1 * full_s + 2


def test_after_the_time_told_nearly_every_deadline_can_be_met() -> None:
    points = ((1, 0.003), (8, 0.02))
    tries: Counter[int] = Counter()

    @settings(deadline=None, max_examples=150, derandomize=True, database=None)
    @given(st.lists(works(), min_size=1, max_size=10), works(), st.floats(1.0, 3.0), st.sampled_from(["srpt", "fcfs"]))
    def count(before: list[Work], wanted: Work, slack: float, policy: Policy) -> None:
        wanted = replace(wanted, steps=101)  # as no other has
        alone_s = make_admission(points, policy).enter("alone", wanted, now_s=0.0).eta_s
        load = [*[(0.0, work) for work in before], (0.0, wanted)]
        tries.update(serve(load, LIMITS, points, policy, {wanted: slack * alone_s}).tries)

    count()
    assert tries[2] > 50
    assert sum(count for number, count in tries.items() if number > 2) <= 0.03 * tries[2]
    assert max(tries) <= 4
