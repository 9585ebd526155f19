"""`tminus bench`, on a clock of its own, and on servers that refuse."""

import asyncio
import json
import selectors
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.cli.running import refusal, run
from tests.service.client.conftest import MakeServed, Served, make_served  # noqa: F401
from tests.service.client.hostile import IMAGE_HEAD, answering
from tminus.service.cli import bench
from tminus.service.cli.bench import Load, Outcome, drive, percentile
from tminus.service.client import Problem, Unreachable
from tminus.service.images.encoder import encode_png

Ask = Callable[[], Awaitable[None]]


class Instantly(selectors.SelectSelector):
    """Waits in no time: the clock goes on by what was to be waited."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        self.now_s += timeout or 0.0
        return super().select(0)


def driven(load: Load, ask: Ask) -> Outcome:
    """The outcome of a load, by a clock that goes on where everybody waits, and at no other time."""
    selector = Instantly()
    loop = asyncio.SelectorEventLoop(selector)
    loop.time = lambda: selector.now_s  # type: ignore[method-assign]
    try:
        return loop.run_until_complete(drive(load, ask))
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
    outcome = driven(Load(at_s, {}, give_up_s=1e6), one_at_a_time(service_s))
    assert sorted(outcome.latencies_s) == pytest.approx(sorted(expected))
    assert outcome.last_s == pytest.approx(free_s)
    assert outcome.late_s == pytest.approx(0, abs=1e-6)


def test_a_client_that_stands_still_does_not_hide_the_waits_that_it_makes() -> None:
    """Coordinated omission: what should have been sent meanwhile is late, and that is a part of its latency."""
    load = Load((0.0, 1.0, 2.0), {}, give_up_s=60)
    stood = False

    async def ask() -> None:
        nonlocal stood
        loop = asyncio.get_running_loop()
        if not stood:
            stood = True
            loop._selector.now_s += 10  # type: ignore[attr-defined]  # as a program that computes for ten seconds
        await asyncio.sleep(0.5)

    outcome = driven(load, ask)
    assert sorted(outcome.latencies_s) == pytest.approx([8.5, 9.5, 10.5])
    report = outcome.report(load)
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

    load = Load((0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0), {"n": 4}, give_up_s=30)
    report = driven(load, ask).report(load)
    assert report["refused"] == {"Unreachable": 1, "overloaded (429)": 1}
    assert (report["answered"], report["unanswered"], report["unsent"]) == (1, 3, 1)
    assert report["latency_s"] == {"p50": None, "p95": None, "p99": None}, "three of four were given up"
    assert not report["kept_up"]


@given(st.floats(0.05, 50), st.floats(1, 60), st.integers(0, 2**32))
def test_a_load_is_exact_in_number_and_the_same_for_a_seed(rate: float, seconds: float, seed: int) -> None:
    load = Load.poisson(rate, seconds, seed, {}, 1)
    assert len(load.at_s) == max(1, round(rate * seconds))
    assert list(load.at_s) == sorted(load.at_s)
    assert all(0 <= at_s <= seconds for at_s in load.at_s)
    assert load == Load.poisson(rate, seconds, seed, {}, 1)


@given(st.lists(st.floats(0, 1e6), min_size=1), st.integers(1, 100))
def test_a_percentile_is_the_least_value_that_so_many_do_not_exceed(values: list[float], q: int) -> None:
    found = percentile(sorted(values), q)
    assert 100 * sum(value <= found for value in values) >= q * len(values)
    assert 100 * sum(value < found for value in values) < q * len(values)


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


def test_what_is_wrong_is_one_clear_line() -> None:
    assert "connect" in refusal("bench", "http://127.0.0.1:9").lower()
    assert "is a server running there? tminus serve starts one" in refusal("bench", "http://127.0.0.1:9")
    assert "url must be http://" in refusal("bench", "localhost:8000")
    line = refusal("bench", "http://127.0.0.1:9", "--rate", "1000", "--seconds", "60")
    assert line == "tminus: --rate times --seconds: must be at most 20000 requests, got 60000"
