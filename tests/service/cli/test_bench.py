"""`tminus bench`, on a clock of its own, and on servers that refuse."""

import asyncio
import json
import random
import selectors
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import click
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.cli.running import run
from tests.service.client.conftest import MakeServed, Served, make_served  # noqa: F401
from tests.service.client.hostile import IMAGE_HEAD, answering
from tminus.service.cli import bench
from tminus.service.cli.bench import (
    Goal,
    Outcome,
    Size,
    drive,
    figures_of_one_rate,
    goodput,
    mixed,
    percentile,
    poisson,
    read_mix,
    text_of_slo,
)
from tminus.service.client import Problem, Unreachable
from tminus.service.images.encoder import encode_png

Ask = Callable[[], Awaitable[None]]


class Instantly(selectors.SelectSelector):
    """Waits in no time: the clock goes on by what was to be waited."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now_s += timeout or 0.0
        return super().select(0)


def driven(at_s: Sequence[float], ask: Ask, give_up_s: float) -> Outcome:
    """How requests end, by a clock that goes on where everybody waits, and at no other time."""
    selector = Instantly()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now_s  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(drive([(each, "all") for each in at_s], lambda _: ask(), give_up_s))["all"]
    finally:
        loop.close()


def one_at_a_time(service_s: float) -> Ask:
    """A server that answers one request after the other, in the order of arrival, each after so long."""
    turn: list[asyncio.Lock] = []

    async def ask() -> None:
        if not turn:
            turn.append(asyncio.Lock())
        async with turn[0]:
            await asyncio.sleep(service_s)

    return ask


times = st.lists(st.integers(0, 400), min_size=1, max_size=30).map(lambda ms: tuple(sorted(each / 40 for each in ms)))


@given(times, st.integers(1, 80))
def test_the_latencies_are_those_of_the_queue(at_s: tuple[float, ...], service: int) -> None:
    service_s = service / 40
    expected, free_s = [], 0.0
    for arrival_s in at_s:  # Lindley's recursion
        free_s = max(free_s, arrival_s) + service_s
        expected.append(free_s - arrival_s)
    outcome = driven(at_s, one_at_a_time(service_s), give_up_s=1e6)
    assert sorted(outcome.latencies_s) == pytest.approx(sorted(expected))
    assert outcome.last_s == pytest.approx(free_s)
    assert outcome.late_s == pytest.approx(0, abs=1e-6)


def test_a_client_that_stands_still_does_not_hide_the_waits_that_it_makes() -> None:
    """Coordinated omission: what should have been sent meanwhile is late, and that is a part of its latency."""
    stood = False

    async def ask() -> None:
        nonlocal stood
        loop = asyncio.get_running_loop()
        if not stood:
            stood = True
            loop._selector.now_s += 10  # type: ignore[attr-defined]  # as a program that computes for ten seconds
        await asyncio.sleep(0.5)

    outcome = driven([0, 1, 2], ask, give_up_s=60)
    assert sorted(outcome.latencies_s) == pytest.approx([8.5, 9.5, 10.5])
    report = figures_of_one_rate(outcome, 1)
    assert report["late_share"] == pytest.approx((9 + 8) / 28.5, abs=1e-4)
    assert not report["kept_up"]


def test_every_request_has_one_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MOST_OUTSTANDING", 3)
    ends = iter(["ok", "refused", "broken", "never", "never", "never"])

    async def ask() -> None:
        match next(ends):
            case "refused":
                raise Problem({"status": 429, "code": "overloaded"})
            case "broken":
                raise Unreachable("gone", reached=True)
            case "never":
                await asyncio.Event().wait()

    report = figures_of_one_rate(driven(range(7), ask, give_up_s=30), 4)
    assert report["refused"] == {"Unreachable": 1, "overloaded (429)": 1}
    assert (report["answered"], report["unanswered"], report["unsent"]) == (1, 3, 1)
    assert report["latency_s"] == {"p50": None, "p95": None, "p99": None}, "three of four were given up"
    assert not report["kept_up"]


@given(st.integers(1, 3000), st.floats(1, 60), st.integers(0, 2**32))
def test_a_load_is_exact_in_number_and_the_same_for_a_seed(count: int, seconds: float, seed: int) -> None:
    times = poisson(count, seconds, random.Random(seed))
    assert len(times) == count
    assert times == sorted(times)
    assert all(0 <= at_s <= seconds for at_s in times)
    assert times == poisson(count, seconds, random.Random(seed))


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[float], q: int) -> None:
    found = percentile(sorted(values), q)
    assert 100 * sum(value <= found for value in values) >= q * len(values)
    assert 100 * sum(value < found for value in values) < q * len(values)


@given(
    st.dictionaries(st.builds(Size, st.integers(1, 9), st.integers(1, 300)), st.integers(1, 9), min_size=1, max_size=4),
    st.floats(1, 2000),
    st.integers(1, 60),
    st.integers(0, 99),
)
def test_a_mix_arrives_at_its_exact_rate_and_every_size_comes(
    mix: dict[Size, int], row_steps_per_s: float, seconds: int, seed: int
) -> None:
    comers = mixed(mix, row_steps_per_s, seconds, seed)
    assert {size for _, size in comers} == mix.keys()
    end_s = sum(size.row_steps for _, size in comers) / row_steps_per_s
    assert [at_s for at_s, _ in comers] == sorted(at_s for at_s, _ in comers)
    assert all(0 <= at_s <= end_s for at_s, _ in comers)
    assert comers == mixed(mix, row_steps_per_s, seconds, seed)


def test_a_mix_keeps_its_weights_by_requests() -> None:
    comers = [size for _, size in mixed(read_mix("8:1x20,3:4x50,1:8x250"), 1000.0, 27.6, seed=3)]
    assert [comers.count(size) for size in (Size(1, 20), Size(4, 50), Size(8, 250))] == [80, 30, 10]


@pytest.mark.parametrize("text", ["8:1x20,", "1x20", "0:1x20", "1:1x0", "-1:1x20", "1:1x20;1:2x20", "1:1.5x20", ""])
def test_a_mix_that_is_none_is_named(text: str) -> None:
    with pytest.raises(click.BadParameter, match="each must be WEIGHT:IMAGESxSTEPS of positive integers, got "):
        read_mix(text)


def test_goodput_is_the_highest_rate_in_time_and_lies_between_two_rates_by_their_shares() -> None:
    assert goodput({100: 1.0, 200: 0.97, 300: 0.92, 400: 0.2}) == {"value": pytest.approx(240)}
    assert goodput({100: 1.0, 200: 0.9, 300: 0.95, 400: 0.85}) == {"value": pytest.approx(300)}, "the highest counts"
    assert goodput({100: 1.0, 200: 0.95}) == {"value": 200, "at_least": True}
    assert goodput({200: 0.3, 100: 0.94}) == {"value": 100, "at_most": True}


def test_a_request_without_images_is_not_in_time_and_a_percentile_at_its_place_is_none() -> None:
    short, long = Size(1, 20), Size(8, 250)
    goal = Goal({short: 1, long: 1}, {short: 0.1, long: 4.0}, (1.5, 3))
    outcomes = {
        short: Outcome(4, [0.1, 0.2, 0.29, 0.5]),
        long: Outcome(6, [4.0, 5.9], unsent=2, refused=Counter({"overloaded (429)": 1})),
    }
    found = goal.at_rate(2.0, outcomes)
    assert found["row_steps_per_s"] == 2 * (20 + 2000) / 2
    assert found[str(short)] == {"requests": 4, "within": {"1.5": 0.25, "3": 0.75}, "p50": 2.0, "p95": 5.0}
    assert found[str(long)] == {"requests": 6, "within": {"1.5": 0.3333, "3": 0.3333}, "p50": None, "p95": None}
    assert found["all"]["within"] == {"1.5": 0.3, "3": 0.5}
    report = goal.report([found])
    assert report["goodput"] == {each: {"value": 2020, "at_most": True} for each in ("1.5", "3")}
    assert not report["kept_up"]


# --- the command ---


def test_what_a_server_refuses_is_counted_by_code_and_the_figures_are_the_same_as_text(
    make_served: MakeServed,  # noqa: F811
) -> None:
    served: Served = make_served(max_jobs=1)
    served.engine.gate.shut()
    load = (served.url, "--rate", "5", "--seconds", "1", "--give-up", "0", "--no-warm-up")
    text = run("bench", *load)
    assert text.exit_code == 1
    assert text.stderr.endswith(f"tminus: {served.url}: no request was answered with images\n")
    lines = dict(line.strip().split("  ", 1) for line in text.stdout.splitlines())
    figures = json.loads(run("bench", *load, "--json").stdout)
    refused, given_up = figures["refused"]["overloaded (429)"], figures["unanswered"]
    assert (figures["requests"], refused + given_up, figures["answered"]) == (5, 5, 0)
    assert refused >= 4, "one waits for the gate"
    assert lines["refused"].endswith(" overloaded (429)")
    assert figures["latency_s"] == {"p50": None, "p95": None, "p99": None}


def test_a_line_warns_where_the_client_could_not_keep_up(
    make_served: MakeServed,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "MOST_OUTSTANDING", 2)
    served: Served = make_served()
    served.engine.gate.shut()
    result = run("bench", served.url, "--rate", "5", "--seconds", "1", "--give-up", "0", "--no-warm-up")
    assert "unsent  3, with 2 others waiting" in result.stdout
    warning, _ = result.stderr.splitlines()
    assert warning.startswith("tminus: the client could not keep up: ")
    assert warning.endswith(", and 3 were not sent; take a lower --rate")


def test_figures_of_answers_without_a_recipe_are_told_without_a_sampler() -> None:
    png = encode_png(np.zeros((4, 6, 1), np.uint8))
    with answering(IMAGE_HEAD, lambda: [png]) as server:
        figures = json.loads(run("bench", server.url, "--rate", "3", "--seconds", "1", "--json").stdout)
    assert (figures["answered"], figures["sampler"], figures["steps"]) == (3, None, None)


def test_attainment_of_a_server_is_the_same_as_a_table_and_as_json(
    make_served: MakeServed,  # noqa: F811
) -> None:
    served: Served = make_served()
    load = (served.url, "--slo", "1000,1", "--mix", "3:1x4,1:2x5", "--rate", "8,4", "--seconds", "1")
    figures = json.loads(run("bench", *load, "--json").stdout)
    assert figures["mix"] == {"1x4": 3, "2x5": 1}
    assert figures["alone_s"].keys() == {"1x4", "2x5"}
    assert [each["rate"] for each in figures["rates"]] == [4, 8]
    for at_rate in figures["rates"]:
        assert at_rate["all"]["within"]["1000"] == 1
        assert (
            at_rate["all"]["requests"] == at_rate["1x4"]["requests"] + at_rate["2x5"]["requests"] == at_rate["answered"]
        )
    assert figures["goodput"]["1000"] == {"value": 8 * 5.5, "at_least": True}
    lines = text_of_slo(figures).splitlines()
    assert lines[0] == "       mix  3 of 1x4, 1 of 2x5; sampler ddpm"
    assert lines[2].split() == [
        "requests/s",
        "row-steps/s",
        "size",
        "requests",
        "within",
        "1000",
        "within",
        "1",
        "p50",
        "p95",
    ]
    assert lines[3].split()[:5] == ["4", "22", "all", "4", "100%"]
    assert "   goodput  > 44 row-steps/s, 95% within 1000 times" in lines


def test_rates_that_are_not_given_are_shares_of_what_one_request_makes_alone(
    make_served: MakeServed,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "LADDER", (0.5, 1.0))
    served: Served = make_served()
    load = (served.url, "--slo", "1000", "--mix", "1:4x1000", "--seconds", "1", "--no-warm-up")
    figures = json.loads(run("bench", *load, "--json").stdout)
    alone = 4000 / figures["alone_s"]["4x1000"]
    rates = [each["row_steps_per_s"] for each in figures["rates"]]
    assert rates == pytest.approx([share * alone for share in bench.LADDER], rel=0.01)
