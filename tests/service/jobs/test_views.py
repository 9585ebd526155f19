"""Where jobs stand: facts as they are now, one forecast for all who ask."""

import asyncio
from collections.abc import Coroutine, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import pytest

from tests.service.fakes import INFO, LIMITS, PATIENCE_S, make_spec
from tests.service.worker.bench import Bench as WorkerBench
from tminus.service.jobs import jobs as views_module
from tminus.service.jobs.held_job import HeldJob, HeldState, ModelOfJobs
from tminus.service.jobs.jobs import JobStatuses, held_view
from tminus.service.jobs.store.records import JobRecord, Outcome
from tminus.service.work import JobStatus, Outlook, Ticket
from tminus.service.worker.running_job import AcceptedJobs

T = TypeVar("T")


class Bench(WorkerBench):
    """A worker whose ticks wait for the test, and a loop to ask in."""

    def __init__(self) -> None:
        super().__init__(limits=replace(LIMITS, max_batch=2))
        self.forecasts, self.statuses, self.loop_of_test = 0, JobStatuses(self.worker), asyncio.new_event_loop()

    def enter(self, name: str, steps: int) -> Ticket:
        return self.submit_spec(name, make_spec(n=2, steps=steps))

    def next_tick(self) -> None:
        """Let the tick that waits pass, and the next begin."""
        self.engine.gate.let()
        self.engine.next_begun()

    def ask(self, question: Coroutine[Any, Any, T]) -> T:
        return self.loop_of_test.run_until_complete(asyncio.wait_for(question, PATIENCE_S))

    def of(self, name: str) -> JobStatus:
        status = self.ask(self.statuses.of(name))
        assert status is not None
        return status


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """One forecast has to do, unless the test says otherwise."""
    monkeypatch.setattr(views_module, "FORECAST_S", 1e9)
    made = Bench()
    made.a_tick_is_known_to_take_a_second()
    forecast = AcceptedJobs.statuses

    def counted(jobs: AcceptedJobs) -> list[JobStatus]:
        made.forecasts += 1
        return forecast(jobs)

    monkeypatch.setattr(AcceptedJobs, "statuses", counted)
    made.start(shut=True)
    yield made
    made.close()
    made.loop_of_test.close()


def facts(status: JobStatus) -> tuple[str, int, int, float]:
    return status.state, status.step, status.position, status.eta_s


def test_state_and_step_are_told_as_they_are_now_and_the_eta_is_counted_down(bench: Bench) -> None:
    bench.enter("a", steps=5)
    bench.engine.next_begun()
    assert facts(bench.of("a")) == ("waiting", 0, 0, 5.0)
    accepted_us = bench.of("a").created_us
    bench.next_tick()
    bench.next_tick()
    assert facts(bench.of("a")) == ("running", 2, 0, 3.0)
    assert bench.of("a").created_us == accepted_us, "however late one looks"
    assert bench.ask(bench.statuses.all()) == [bench.of("a")]
    bench.now_s += 100
    assert bench.of("a").eta_s == 0, "never less"
    assert bench.forecasts == 1


def test_a_job_that_came_after_the_forecast_is_told_with_the_forecast_of_its_ticket(bench: Bench) -> None:
    bench.enter("a", steps=5)
    bench.engine.next_begun()
    bench.of("a")
    ticket = bench.enter("b", steps=10)
    assert facts(bench.of("b")) == ("waiting", 0, 1, 15.0)
    assert ticket.outlook == Outlook(1, 15.0)
    bench.next_tick()
    assert facts(bench.of("b")) == ("waiting", 0, 1, 14.0)
    assert [status.id for status in bench.ask(bench.statuses.all())] == ["a", "b"]
    assert bench.forecasts == 1


def test_a_job_that_ended_after_the_forecast_is_not_told(bench: Bench) -> None:
    done, cancelled = bench.enter("done", steps=1), bench.enter("cancelled", steps=9)
    bench.engine.next_begun()
    assert len(bench.ask(bench.statuses.all())) == 2
    bench.worker.cancel("cancelled", "deleted")
    bench.engine.gate.let()
    assert done.future.result(PATIENCE_S)
    assert cancelled.future.exception(PATIENCE_S)
    assert bench.ask(bench.statuses.of("done")) is bench.ask(bench.statuses.of("cancelled")) is None
    assert bench.ask(bench.statuses.all()) == []


def test_those_who_ask_at_the_same_time_share_a_forecast_and_an_unknown_job_costs_none(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert bench.ask(bench.statuses.of("nobody")) is None
    assert bench.forecasts == 0
    bench.enter("a", steps=5)
    bench.engine.next_begun()

    async def ask_often() -> list[JobStatus | None]:
        return await asyncio.gather(*[bench.statuses.of("a") for _ in range(50)])

    assert {status and status.eta_s for status in bench.ask(ask_often())} == {5.0}
    assert bench.forecasts == 1
    monkeypatch.setattr(views_module, "FORECAST_S", -1.0)
    assert bench.of("a").eta_s == 5.0
    assert bench.forecasts == 2, "one that is old is made anew"


@pytest.mark.parametrize(("outcome", "step"), [("done", 20), ("cancelled", None)])
def test_only_a_job_that_is_done_is_told_to_have_taken_all_its_steps_before_its_end_is_kept(
    outcome: Outcome, step: int | None
) -> None:
    job = HeldJob(record := JobRecord("a", make_spec(steps=20), 1), ModelOfJobs(0, INFO, LIMITS))
    job.ending = replace(record, outcome=outcome, finished_us=2)
    job.become(HeldState.ENDING)
    view = held_view(job, None)
    assert (view.state, view.step) == ("running", step)
