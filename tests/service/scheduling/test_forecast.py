from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tminus.service.scheduling import forecast as forecasts
from tminus.service.scheduling.forecast import Ahead, Pending, Speed, Stride
from tminus.service.scheduling.scheduler import Scheduler, Sharing
from tminus.service.scheduling.tick_times import TickTimes
from tminus.service.work import Outlook, Work

pytestmark = pytest.mark.slow

POINTS = ((1, 0.003), (2, 0.0033), (4, 0.005), (8, 0.009))
TICKS = TickTimes(((1, 1.0),))  # and so a second for each place
SRPT, FCFS, NO_RESERVE = Sharing.of(8), Sharing.of(8, policy="fcfs"), Sharing(8, 8, 0, "srpt")
SAME = TickTimes(((8, 1.0),))  # a second for each tick of up to eight


def plain(rows: int, steps: int) -> Work:
    return Work(rows, steps, range(0))


def guided(rows: int, steps: int) -> Work:
    return Work(rows, steps, range(steps))


def pendings(*works: Work) -> list[Pending]:
    return [Pending(f"job{i}", work, work.places) for i, work in enumerate(works)]


def forecast(jobs: list[Pending], sharing: Sharing, times: TickTimes, until: str | None = None) -> dict[str, Outlook]:
    """Of one model."""
    return forecasts.forecast(jobs, {0: Speed(sharing, times, 1000)}, until)


def srpt(*works: Work, sharing: Sharing = SRPT) -> dict[str, Outlook]:
    return forecast(pendings(*works), sharing, SAME)


# --- what is foretold, by hand ---


def test_without_jobs_there_are_no_outlooks() -> None:
    assert srpt() == {}


def test_a_job_alone_takes_its_steps_in_ticks() -> None:
    assert srpt(plain(3, 10)) == {"job0": Outlook(0, pytest.approx(10.0))}


def test_a_job_of_more_rows_than_places_takes_turns() -> None:
    assert srpt(plain(12, 10))["job0"].eta_s == pytest.approx(15.0)


def test_a_part_of_a_tick_counts_as_one() -> None:
    assert srpt(plain(9, 1))["job0"].eta_s == pytest.approx(2.0)


def test_guided_steps_take_two_places_each() -> None:
    alone = forecast(pendings(guided(1, 10)), SRPT, TICKS)
    assert alone["job0"].eta_s == pytest.approx(20.0)
    partly = forecast(pendings(Work(1, 10, range(2, 5))), SRPT, TICKS)
    assert partly["job0"].eta_s == pytest.approx(13.0)


def test_of_a_started_job_only_the_steps_left_count() -> None:
    work = Work(2, 10, range(2, 5))
    for left, ticks in ((26, 10), (24, 9), (22, 8), (18, 7), (14, 6), (10, 5), (8, 4), (2, 1)):
        assert forecast([Pending("a", work, left)], SRPT, SAME)["a"].eta_s == pytest.approx(ticks)


def test_the_shorter_goes_first_and_the_oldest_keeps_its_reserve() -> None:
    outlooks = srpt(plain(8, 100), plain(8, 6))
    assert outlooks["job1"] == Outlook(0, pytest.approx(8.0))  # 48 places, six a tick
    assert outlooks["job0"] == Outlook(1, pytest.approx(106.0))


def test_first_come_first_served_goes_by_arrival() -> None:
    outlooks = forecast(pendings(plain(8, 100), plain(8, 6)), FCFS, SAME)
    assert outlooks == {"job0": Outlook(0, 100.0), "job1": Outlook(1, 106.0)}


def test_the_position_counts_those_before_it_that_end_before_it() -> None:
    outlooks = srpt(*[plain(8, steps) for steps in (30, 20, 10)], sharing=NO_RESERVE)
    assert [outlooks[f"job{i}"].position for i in range(3)] == [2, 1, 0]


def test_jobs_that_all_run_are_all_at_position_zero() -> None:
    assert {outlook.position for outlook in srpt(*[plain(2, steps) for steps in (30, 20, 10, 40)]).values()} == {0}


def test_a_job_that_only_waits_for_delivery_is_done_now() -> None:
    jobs = [Pending("done", plain(4, 10), 0), Pending("a", plain(8, 10), 80)]
    assert forecast(jobs, SRPT, SAME) == {"done": Outlook(0, 0.0), "a": Outlook(0, 10.0)}


def test_a_faster_job_overtakes_one_that_has_less_left() -> None:
    outlooks = srpt(plain(1, 100), plain(8, 15), sharing=NO_RESERVE)
    assert outlooks["job1"].eta_s == pytest.approx(16, abs=1.01)
    assert outlooks["job0"].eta_s == pytest.approx(112, abs=2)


def test_before_calibration_every_eta_is_zero_and_positions_are_right() -> None:
    outlooks = forecast(pendings(plain(8, 100), plain(8, 6)), NO_RESERVE, TickTimes())
    assert [(outlooks[f"job{i}"].position, outlooks[f"job{i}"].eta_s) for i in range(2)] == [(1, 0.0), (0, 0.0)]


def played(sharing: Sharing, jobs: list[tuple[Work, int]], times: TickTimes) -> dict[str, float]:
    """When jobs end that have taken some steps each, by the scheduler itself."""
    scheduler, row, ends, now_s = Scheduler(sharing), 0, dict[str, float](), 0.0
    for number, (work, left) in enumerate(jobs):
        rows = range(row, row + work.rows)
        row += work.rows
        scheduler.add(f"job{number}", rows, work, ((work.places - left) // work.rows,) * work.rows)
    while batch := scheduler.next_batch():
        now_s += times.seconds(batch.places)
        ends |= dict.fromkeys(scheduler.advance(batch).finished, now_s)
    return ends


@pytest.mark.parametrize(
    "jobs",
    [
        pytest.param([(plain(8, 200), 1600), (plain(1, 20), 20)], id="a short job beside a long one"),
        pytest.param([(plain(1, 400), 300), (plain(4, 500), 2000), (plain(16, 300), 4800)], id="one overtakes another"),
        pytest.param(
            [(plain(1, 900), 300 + k) for k in range(13)] + [(plain(7, 30), 210), (plain(4, 200), 800)],
            id="more that are held back than are looked past",
        ),
        pytest.param([(plain(8, 200), 1600), (guided(1, 20), 40), (guided(2, 200), 800)], id="guided ones too"),
    ],
)
def test_the_forecast_follows_the_scheduler_through_short_ticks(jobs: list[tuple[Work, int]]) -> None:
    sharing, times = Sharing.of(16, short_batch=8), TickTimes(((1, 0.003), (16, 0.018)))
    pending = [Pending(f"job{number}", work, left) for number, (work, left) in enumerate(jobs)]
    outlooks = forecast(pending, sharing, times)
    for job_id, end_s in played(sharing, jobs, times).items():
        assert outlooks[job_id].eta_s == pytest.approx(end_s, rel=0.05, abs=2 * times.seconds(16)), job_id


# --- for every load: against the scheduler itself, tick by tick ---


@dataclass(frozen=True)
class Load:
    sharing: Sharing
    works: tuple[Work, ...]
    ticks_done: int

    def play(self, times: TickTimes) -> tuple[list[Pending], dict[str, float]]:
        """What is pending after the first ticks, and when each job of it ends."""
        scheduler = Scheduler(self.sharing)
        left = {}
        row = 0
        for job in pendings(*self.works):
            scheduler.add(job.job_id, range(row, row + job.work.rows), job.work)
            left[job.job_id] = job.work.places
            row += job.work.rows
        for _ in range(self.ticks_done):
            if batch := scheduler.next_batch():
                for picked in batch.jobs:
                    left[picked.job_id] -= picked.places
                scheduler.advance(batch)
        now_s, ends = 0.0, {}
        while batch := scheduler.next_batch():
            now_s += times.seconds(batch.places)
            ends |= dict.fromkeys(scheduler.advance(batch).finished, now_s)
        jobs = [Pending(f"job{i}", work, left[f"job{i}"]) for i, work in enumerate(self.works)]
        return [job for job in jobs if job.places_left], ends


@st.composite
def loads(draw: st.DrawFn) -> Load:
    max_batch = draw(st.sampled_from([2, 4, 8, 8, 16, 64]))

    def work() -> Work:
        steps = draw(st.sampled_from([5, 20, 50]) | st.integers(1, 100))
        start = draw(st.integers(0, steps - 1))
        stop = draw(st.integers(start + 1, steps))
        guided = draw(st.sampled_from([range(0), range(0), range(steps), range(start, stop)]))
        return Work(draw(st.sampled_from([1, 1, 2, 4]) | st.integers(1, 2 * max_batch)), steps, guided)

    share, policy = draw(st.sampled_from([0.0, 0.25, 0.25, 0.5])), draw(st.sampled_from(["srpt", "srpt", "fcfs"]))
    reserved = max(2, int(max_batch * share)) if share and policy == "srpt" else 0
    return Load(
        Sharing(max_batch, draw(st.sampled_from([max_batch, max(2, max_batch // 2)])), reserved, policy),
        tuple(work() for _ in range(draw(st.integers(1, 12)))),
        draw(st.sampled_from([0, 0, 3, 40])),
    )


def test_the_forecast_is_good_to_five_percent_or_two_ticks_for_nearly_all_jobs() -> None:
    times = TickTimes(POINTS)
    errors: list[bool] = []

    @settings(deadline=None, max_examples=150, derandomize=True, database=None)
    @given(loads())
    def compare(load: Load) -> None:
        jobs, ends = load.play(times)
        outlooks = forecast(jobs, load.sharing, times)
        assert outlooks.keys() == ends.keys()
        tick_s = times.seconds(load.sharing.max_batch)
        for job_id, end_s in ends.items():
            errors.append(abs(outlooks[job_id].eta_s - end_s) > max(0.05 * end_s, 2 * tick_s) * (1 + 1e-9))
        # The last end is the least forgiving: it sums up all that went before.
        last_s = max(ends.values(), default=0.0)
        assert max((o.eta_s for o in outlooks.values()), default=0.0) == pytest.approx(last_s, rel=0.15, abs=3 * tick_s)

    compare()
    assert len(errors) > 300
    assert sum(errors) <= 0.03 * len(errors)


@settings(deadline=None, max_examples=100)
@given(loads())
def test_positions_and_times_are_sane_for_any_load(load: Load) -> None:
    jobs = pendings(*load.works)
    outlooks = forecast(jobs, load.sharing, TickTimes(POINTS))
    assert outlooks.keys() == {job.job_id for job in jobs}
    for job in jobs:
        alone_s = forecast([job], load.sharing, TickTimes(POINTS))[job.job_id].eta_s
        outlook = outlooks[job.job_id]
        assert 0 <= outlook.position < len(jobs)
        assert outlook.eta_s >= 0.99 * min(alone_s, job.work.steps * POINTS[0][1]) > 0
        assert forecast(jobs, load.sharing, TickTimes(POINTS), job.job_id)[job.job_id] == outlook, (
            "looking no further than one job changes nothing for it"
        )


def test_the_cost_of_a_forecast_grows_no_faster_than_the_number_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    step = Ahead.step

    def counted(self: Ahead) -> Stride | None:
        counts[-1] += 1
        return step(self)

    monkeypatch.setattr(Ahead, "step", counted)
    for jobs in (100, 1000):
        counts.append(0)
        forecast(pendings(*[plain(1 + i % 5, 1 + 37 * i % 200) for i in range(jobs)]), SRPT, TickTimes(POINTS))
    assert counts[1] <= 12 * counts[0]
    assert counts[1] <= 3 * 1000


@pytest.mark.parametrize("work", [plain(3, 7), guided(3, 7), Work(3, 7, range(2, 4)), Work(3, 7, range(4, 7), start=2)])
def test_rows_are_as_level_as_what_is_left_of_a_job_allows(work: Work) -> None:
    for left in range(1, work.places + 1):
        steps = Pending("a", work, left).steps or (work.start,) * work.rows
        assert max(steps) - min(steps) <= 1
        assert left <= sum(map(work.places_left, steps)) <= left + 1, "a guided row takes two places or none"


def test_what_comes_beside_the_ticks_is_done_one_job_at_a_time_as_their_ticks_end() -> None:
    ticks, sharing = TickTimes(((1, 1.0), (8, 1.0))), Sharing.of(8)
    jobs = [Pending("a", plain(1, 10), 10, beside_s=4.0), Pending("b", plain(1, 12), 12, beside_s=3.0)]
    found = forecast(
        [*jobs, Pending("c", plain(1, 20), 20), Pending("d", plain(1, 5), 0, beside_s=2.0)], sharing, ticks
    )
    assert {name: outlook.eta_s for name, outlook in found.items()} == {"d": 2.0, "a": 14.0, "b": 17.0, "c": 20.0}
