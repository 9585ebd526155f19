import heapq
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import DeadlineUnmeetable, Overloaded
from service.model_info import Limits
from service.scheduling import promises
from service.scheduling.admission import Admission
from service.scheduling.scheduler import Policy, Scheduler, Sharing
from service.scheduling.tick_times import TickTimes
from service.work import Batch, Work
from tests.service.scheduling.test_admission import LIMITS, make_admission, plain, refusal, wait_of

pytestmark = pytest.mark.slow

# --- one by one ---


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
    refusal(admission, plain(8, 17), now_s=wait_s + promises.GRACE_S - 0.01)
    admission.enter("b", plain(8, 17), now_s=wait_s + promises.GRACE_S + 0.01)


def test_a_late_client_still_finds_its_room_within_the_grace() -> None:
    admission = make_admission(max_jobs=1)
    admission.enter("a", plain(8, 16), now_s=0.0)
    wait_s = wait_of(refusal(admission, plain(8, 16)))
    admission.leave("a")
    admission.enter("b", plain(8, 16), now_s=wait_s + promises.GRACE_S - 0.01)


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
    monkeypatch.setattr(promises, "MAX_PROMISES", 3)
    admission = make_admission(max_jobs=1)
    admission.enter("a", plain(8, 8), now_s=0.0)
    waits = [wait_of(refusal(admission, plain(8, 8))) for _ in range(10)]
    assert waits[:4] == sorted(set(waits[:4]))
    assert len(set(waits[3:])) == 1


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
    sharing = Sharing.of(limits.max_batch, policy=policy, short_batch=limits.max_batch // 2)
    scheduler, times = Scheduler(sharing), TickTimes(points)
    admission = Admission(limits, sharing)
    admission.calibrate(points)
    coming = [(at_s, number, 1) for number, (at_s, _) in enumerate(requests)]
    heapq.heapify(coming)
    outcome, row = Outcome(), 0
    running: tuple[Batch, float] | None = None  # and when its tick ends
    while coming or running is not None:
        if running is not None and (not coming or running[1] <= coming[0][0]):
            batch, now_s = running
            admission.stepped({job.job_id: job.places for job in batch.jobs}, batch.places, times.seconds(batch.places))
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
            assert len(admission.outlooks()) <= limits.max_jobs
            assert admission.rows <= limits.max_rows
        if running is None and (batch := scheduler.next_batch()) is not None:
            running = (batch, now_s + times.seconds(batch.places))
    assert (len(admission.outlooks()), admission.rows, admission.backlog_s) == (0, 0, 0)
    outcome.ended_s = now_s
    return outcome


@st.composite
def works(draw: st.DrawFn) -> Work:
    steps = draw(st.integers(1, 50))
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
        wanted = replace(wanted, steps=51)  # as no other has
        alone_s = make_admission(points, policy).enter("alone", wanted, now_s=0.0).eta_s
        load = [*[(0.0, work) for work in before], (0.0, wanted)]
        tries.update(serve(load, LIMITS, points, policy, {wanted: slack * alone_s}).tries)

    count()
    assert tries[2] > 50
    assert sum(count for number, count in tries.items() if number > 2) <= 0.03 * tries[2]
    assert max(tries) <= 4
