"""Make the figures of a result file from records. Pure arithmetic: nothing is measured, read or written here."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any

from bench.records import SLO, Answer, Loaded, Run
from bench.result_file import ratio, rounds
from bench.servers import CONTROLS, SAME_GRAPH
from tminus.service.cli.bench import goodput, percentile, share_within

SHORT_STEPS = 50  # a "short" request of the mixed load has fewer
EAGER = ("tminus_eager", "lock", "litserve", "mosec")
# Whom each form of tminus is compared with: those of the same executor and precision, and the default with all.
COMPARED = {
    "tminus": ("before", *EAGER, *SAME_GRAPH, *CONTROLS),
    "tminus_eager": ("lock", "litserve", "mosec"),
    "litserve_openvino": ("tminus",),
    "tminus_two": ("tminus",),
}
WITHIN = {"within_1_5": 1.5, "within_3": 3.0, "within_5": 5.0}  # times alone; goodput is of 3
Value = Callable[[Loaded], float | None]


def quantile(values: Iterable[float], q: float) -> float:
    """Interpolate linearly between the order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def waits(answers: Iterable[Answer], least_steps: int = 0, most_steps: int = 1_000_000) -> list[float]:
    """Return how long requests waited. One without an answer counts with its wait to the end of the load."""
    return [a.waited_s for a in answers if a.outcome in ("ok", "unanswered") and least_steps <= a.steps <= most_steps]


def received(answers: Iterable[Answer]) -> int:
    """Row-steps of the answers that were delivered."""
    return sum(a.row_steps for a in answers if a.outcome == "ok")


def wasted_of_abandoned(loaded: Loaded) -> float | None:
    """Row-steps that were not delivered, over those of the abandoned requests; None where none was abandoned."""
    abandoned = sum(a.row_steps for a in loaded.answers if a.outcome in ("left", "unanswered"))
    return max(0.0, loaded.took_row_steps - received(loaded.answers)) / abandoned if abandoned else None


def times_alone(loaded: Loaded, q: int, alone_s: Mapping[str, float]) -> float | None:
    """Return a percentile of the waits, as multiples of the time alone. One without an answer counts as in `waits`."""
    ordered = sorted(a.waited_s / alone_s[a.size] for a in loaded.answers if a.outcome in ("ok", "unanswered"))
    return percentile(ordered, q) if ordered else None


def in_time(loaded: Loaded, factor: float, alone_s: Mapping[str, float]) -> float:
    """Return the share of the requests that were answered within so many times their time alone."""
    return share_within([a.waited_s / alone_s[a.size] if a.outcome == "ok" else inf for a in loaded.answers], factor)


def row_steps_per_s(loaded: Loaded) -> float:
    """Steps taken in the window, a second."""
    return loaded.counted.row_steps / loaded.seconds


def of(run: Run, load: str, contender: str) -> list[Loaded]:
    """A contender's turns at a load, in order of the rounds."""
    turns = [one for one in run.loads if one.load == load and one.contender == contender]
    return sorted(turns, key=lambda one: one.round)


def summary(run: Run, peaks: Mapping[str, float]) -> dict[str, Any]:
    """Make the figures of a run. peaks: GFLOP/s by precision."""
    found: dict[str, Any] = {
        "checkpoint": run.checkpoint,
        "tminus": {
            "executor": run.model.get("executor"),
            "precision": run.model.get("precision"),
            "details": run.model.get("executor_details"),
            "places": run.places,
        },
        "setups": run.setups,
        "trials": run.trials,
        "left_out": run.left_out,
    }
    median_wait: Value = lambda one: _median(waits(one.answers))  # noqa: E731
    median_short: Value = lambda one: _median(waits(one.answers, most_steps=SHORT_STEPS - 1))  # noqa: E731
    mean_long: Value = lambda one: _mean(waits(one.answers, least_steps=SHORT_STEPS))  # noqa: E731
    for key, load, value, is_time in (
        ("idle", "idle", median_wait, True),  # seconds
        ("saturation_1", "saturation_1", row_steps_per_s, False),
        ("saturation_16", "saturation_16", row_steps_per_s, False),
        ("short", "mixed", median_short, True),
        ("long", "mixed", mean_long, True),
    ):
        found[key] = _compared(run, load, value, is_time=is_time)
    found["hang_ups"] = {
        key: rounds(100 * share if (share := wasted_of_abandoned(one)) is not None else None for one in turns)  # %
        for key, turns in _by_contender(run, "hang_ups").items()
    }
    unanswered = {
        key: sum(a.outcome != "ok" for one in turns for a in one.answers)
        for key, turns in _by_contender(run, "mixed").items()
    }
    found["unanswered"] = {key: count for key, count in unanswered.items() if count}
    found |= _slo(run)
    found["limits"] = _limits(run, peaks)
    found["lock_step"] = {
        where: {name: rounds(each[where][name] for each in run.lock_step) for name in rates}
        for where, rates in (run.lock_step or [{}])[0].items()
    }
    return {key: value for key, value in found.items() if value not in ({}, [])}


def _compared(run: Run, load: str, value: Value, *, is_time: bool) -> dict[str, Any]:
    """One figure of each contender, and how many times as fast one is as another.

    A time that is only the least that it can be, since requests had no answer, has `at_least`. So has a ratio of it, or
    `at_most`; a ratio of two such times means nothing and is left out.
    """
    by_contender = _by_contender(run, load)
    by_round = {key: [each for one in turns if (each := value(one)) is not None] for key, turns in by_contender.items()}
    least = {key for key, turns in by_contender.items() if any(value(one) != value(_for_ever(one)) for one in turns)}
    found: dict[str, Any] = {key: _bounded(rounds(values), at_least=key in least) for key, values in by_round.items()}
    for top, bottom in sorted((top, bottom) for top, bottoms in COMPARED.items() for bottom in bottoms):
        ours, theirs = by_round.get(top, []), by_round.get(bottom, [])
        if not {top, bottom} <= least:
            quotient = ratio(theirs, ours) if is_time else ratio(ours, theirs)
            found[f"{top}_over_{bottom}"] = _bounded(quotient, at_least=bottom in least, at_most=top in least)
    return found


def _slo(run: Run) -> dict[str, Any]:
    """Attainment and waits by rate and size, and goodput. The time alone is that on an idle tminus, for everyone."""
    if not run.own_rate:
        return {}
    values: dict[str, Value] = {
        name: partial(in_time, factor=factor, alone_s=run.alone_s) for name, factor in WITHIN.items()
    }
    values |= {f"p{q}": partial(times_alone, q=q, alone_s=run.alone_s) for q in (50, 95)}
    found: dict[str, Any] = {"own_rate": run.own_rate, "alone_s": run.alone_s}
    attained: dict[str, dict[float, float]] = {}
    for load, share in SLO.items():
        by_contender = _by_contender(run, load)
        found[load] = {
            size: {
                key: {name: _together([_only(one, size) for one in turns], value) for name, value in values.items()}
                for key, turns in by_contender.items()
            }
            for size in ("all", *run.alone_s)
        }
        for key, figures in found[load]["all"].items():
            attained.setdefault(key, {})[share * run.own_rate] = figures["within_3"]["value"]
    good = {key: goodput(shares) for key, shares in attained.items()}
    ours = good.get("tminus")
    ratios = {f"tminus_over_{key}": _quotient(ours, each) for key, each in good.items() if ours and key != "tminus"}
    return {"slo": found, "goodput": good | ratios}


def _only(loaded: Loaded, size: str) -> Loaded:
    return replace(loaded, answers=tuple(a for a in loaded.answers if size in ("all", a.size)))


def _together(turns: Sequence[Loaded], value: Value) -> dict[str, Any] | None:
    """A figure of the requests of all rounds together, and of each round: one round has too few."""
    whole = replace(turns[0], answers=tuple(a for one in turns for a in one.answers))
    by_round = rounds(map(value, turns))
    return by_round and _bounded(by_round | {"value": value(whole)}, at_least=value(whole) != value(_for_ever(whole)))


def _quotient(top: Mapping[str, Any], bottom: Mapping[str, Any]) -> dict[str, Any] | None:
    """Divide figures that may be bounds; None where nothing is known of the quotient."""
    at_least, at_most = "at_least" in top or "at_most" in bottom, "at_most" in top or "at_least" in bottom
    if at_least and at_most:
        return None
    return _bounded({"value": top["value"] / bottom["value"]}, at_least=at_least, at_most=at_most)


def _for_ever(loaded: Loaded) -> Loaded:
    """The same turn, had those without an answer waited for ever."""
    answers = (replace(each, waited_s=inf) if each.outcome == "unanswered" else each for each in loaded.answers)
    return replace(loaded, answers=tuple(answers))


def _bounded(figure: dict[str, Any] | None, **bounds: bool) -> dict[str, Any] | None:
    return figure and figure | {bound: True for bound, holds in bounds.items() if holds}


def _limits(run: Run, peaks: Mapping[str, float]) -> dict[str, Any]:
    """What the processor and the network allow, and how near to it the servers come."""
    if not run.bare:
        return {}
    gflop = run.bare[0].flops_per_row / 1e9
    peak = peaks.get(run.bare[0].precision, max(peaks.values()))
    bare = {f"{batch}": [each.paces[batch].rows_per_s for each in run.bare] for batch in run.bare[0].paces}
    full = bare[f"{run.places}"]
    found: dict[str, Any] = {
        "gflop_a_row": gflop,
        "peak": peak,
        "bare": {batch: rounds(rates) for batch, rates in bare.items()},
        "bare_of_peak": 100 * gflop * statistics.median(full) / peak,
    }
    for key, turns in _by_contender(run, "saturation_1").items():
        rates = [row_steps_per_s(one) for one in turns]
        at = peaks["float32"] if key in EAGER else peak
        found[f"{key}_of_peak"] = 100 * gflop * statistics.median(rates) / at
    return found


def _by_contender(run: Run, load: str) -> dict[str, list[Loaded]]:
    keys = dict.fromkeys(one.contender for one in run.loads if one.load == load)
    return {key: of(run, load, key) for key in keys}


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None
