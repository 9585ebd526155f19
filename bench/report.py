"""Rounds to figures: medians, ratios of medians with their range over the rounds, a markdown page and a JSON file."""

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.load import Loaded
from bench.pace import Pace

BUSY = 0.5  # a load average over this says that something else ran


@dataclass(frozen=True, slots=True)
class Round:
    """What one turn of all contenders gave. Latencies in seconds, on an idle server."""

    matmul_flops: float
    conv_flops: float
    bare: dict[int, Pace]  # by batch size
    mixed: Loaded
    tminus: Loaded  # at the unguided load, the one that the lock gets too
    lock: Loaded
    tminus_idle_s: list[float]
    lock_idle_s: list[float]


@dataclass(frozen=True, slots=True)
class Run:
    """All rounds, and what they were made with."""

    command: str
    date: str
    commit: str
    load_average: float  # of the last minute, before the first contender
    checkpoint: str
    machine: dict[str, str | int]
    flops_per_row: int
    max_batch: int
    idle_steps: int
    settings: dict[str, Any]
    rounds: tuple[Round, ...]


Figure = Callable[[Round], float]


def best_batch(run: Run) -> int:
    """The batch size at which the bare loop does most: the bare limit."""
    return max(run.rounds[0].bare, key=lambda batch: _median(run, lambda r: r.bare[batch].rows_per_s))


def ratios(run: Run) -> dict[str, tuple[float, float, float]]:
    """Name -> ratio of the medians, and the least and greatest ratio of any one round."""
    best, served = best_batch(run), run.max_batch
    steps = run.idle_steps
    pairs: dict[str, tuple[Figure, Figure]] = {
        "row-steps/s, same unguided load: tminus / lock around DDPMPipeline": (
            lambda r: r.tminus.row_steps_per_s,
            lambda r: r.lock.row_steps_per_s,
        ),
        f"U-Net rows/s: tminus, unguided load / bare loop at batch {served}": (
            lambda r: r.tminus.places_per_s,
            lambda r: r.bare[served].rows_per_s,
        ),
        f"U-Net rows/s: tminus, mixed load / bare loop at batch {served}": (
            lambda r: r.mixed.places_per_s,
            lambda r: r.bare[served].rows_per_s,
        ),
        f"U-Net rows/s: tminus, mixed load / bare loop at its best batch ({best})": (
            lambda r: r.mixed.places_per_s,
            lambda r: r.bare[best].rows_per_s,
        ),
        f"U-Net rows/s: lock around DDPMPipeline / bare loop at its best batch ({best})": (
            lambda r: r.lock.places_per_s,
            lambda r: r.bare[best].rows_per_s,
        ),
        f"idle latency p50, n=1, {steps} steps: tminus / lock around DDPMPipeline": (
            lambda r: _quantile(r.tminus_idle_s, 0.5),
            lambda r: _quantile(r.lock_idle_s, 0.5),
        ),
        f"idle latency p95, n=1, {steps} steps: tminus / lock around DDPMPipeline": (
            lambda r: _quantile(r.tminus_idle_s, 0.95),
            lambda r: _quantile(r.lock_idle_s, 0.95),
        ),
        f"idle latency p50, n=1, {steps} steps: tminus / {steps} bare passes at batch 1": (
            lambda r: _quantile(r.tminus_idle_s, 0.5),
            lambda r: steps / r.bare[1].rows_per_s,
        ),
    }
    return {name: _ratio(run, top, bottom) for name, (top, bottom) in pairs.items()}


def to_markdown(run: Run) -> str:
    """The page of a run."""
    machine = run.machine
    peak = _median(run, lambda r: max(r.matmul_flops, r.conv_flops))

    def of_peak(figure: Figure) -> str:
        return f"{100 * _median(run, figure) * run.flops_per_row / peak:.0f} %"

    def contender(name: str, row_steps: Figure, places: Figure, per_pass: Figure, cpu_s: Figure) -> str:
        cells = [_spread(run, row_steps), _spread(run, places), f"{_median(run, per_pass):.1f}"]
        cells += [f"{1e3 * _median(run, cpu_s):.2f}", of_peak(places)]
        return f"| {name} | {' | '.join(cells)} |"

    def loaded(name: str, load: Callable[[Round], Loaded]) -> str:
        return contender(
            name,
            lambda r: load(r).row_steps_per_s,
            lambda r: load(r).places_per_s,
            lambda r: load(r).places_per_tick,
            lambda r: load(r).cpu_s_per_place,
        )

    def bare(batch: int) -> str:
        rate: Figure = lambda r: r.bare[batch].rows_per_s  # noqa: E731
        return contender(
            f"bare loop, batch {batch}", rate, rate, lambda _: batch, lambda r: r.bare[batch].cpu_s_per_row
        )

    lines = [
        f"Machine: {machine['cpu']} ({machine['capability']}), {machine['cores']} cores, {machine['system']}; "
        f"torch {machine['torch']} with {machine['threads']} threads, diffusers {machine['diffusers']}, "
        f"Python {machine['python']}.",
        f"Command: `{run.command}`, {run.date}, commit {run.commit}, checkpoint {run.checkpoint}.",
        f"Load average before it began: {run.load_average:.2f}"
        + (" (the machine was not idle: distrust the figures)." if run.load_average > BUSY else "."),
        f"Median [least to greatest] of {len(run.rounds)} rounds, the contenders taking turns in each.",
        "",
        f"Limit: float32 matmul {_spread(run, lambda r: r.matmul_flops / 1e9)} GFLOP/s, "
        f"wide 3x3 convolution {_spread(run, lambda r: r.conv_flops / 1e9)} GFLOP/s; "
        f"the U-Net is {run.flops_per_row / 1e9:.3f} GFLOP a row, so at most {peak / run.flops_per_row:.0f} rows/s "
        "at the greater of the two, the peak below.",
        "",
        "| contender | row-steps/s | U-Net rows/s | rows a pass | CPU ms a row | of peak |",
        "|---|---|---|---|---|---|",
        *(bare(batch) for batch in sorted(run.rounds[0].bare)),
        loaded("tminus, mixed load (a third guided)", lambda r: r.mixed),
        loaded("tminus, unguided load", lambda r: r.tminus),
        loaded("lock around DDPMPipeline, unguided load", lambda r: r.lock),
        "",
        "A guided row-step is two U-Net rows. CPU ms a row counts all threads and, for a server, its edge.",
        f"Share of the window that tminus spent in ticks: {_percent(run, lambda r: r.mixed.share_in_ticks)} (mixed), "
        f"{_percent(run, lambda r: r.tminus.share_in_ticks)} (unguided).",
        "",
        "| ratio of medians | | least to greatest by round |",
        "|---|---|---|",
        *(
            f"| {name} | **{value:.2f}** | {low:.2f} to {high:.2f} |"
            for name, (value, low, high) in ratios(run).items()
        ),
        "",
        f"| idle server, n=1, {run.idle_steps} steps, ms | p50 | p95 | requests |",
        "|---|---|---|---|",
        _latency_line("tminus", [s for r in run.rounds for s in r.tminus_idle_s]),
        _latency_line("lock around DDPMPipeline", [s for r in run.rounds for s in r.lock_idle_s]),
        "",
        _account(run),
    ]
    return "\n".join(lines) + "\n"


def write(run: Run, folder: Path) -> None:
    """Write latest.json and latest.md."""
    folder.mkdir(parents=True, exist_ok=True)
    rounds = [
        {
            "matmul_flops": r.matmul_flops,
            "conv_flops": r.conv_flops,
            "bare": {batch: asdict(pace) for batch, pace in r.bare.items()},
            "tminus_mixed": r.mixed.to_dict(),
            "tminus_unguided": r.tminus.to_dict(),
            "lock_unguided": r.lock.to_dict(),
            "tminus_idle_s": r.tminus_idle_s,
            "lock_idle_s": r.lock_idle_s,
        }
        for r in run.rounds
    ]
    document = {
        "command": run.command,
        "date": run.date,
        "commit": run.commit,
        "load_average": run.load_average,
        "checkpoint": run.checkpoint,
        "machine": run.machine,
        "settings": run.settings,
        "flops_per_row": run.flops_per_row,
        "ratios": {name: dict(zip(("value", "min", "max"), r, strict=True)) for name, r in ratios(run).items()},
        "rounds": rounds,
    }
    (folder / "latest.json").write_text(json.dumps(document, indent=2) + "\n", "utf-8")
    (folder / "latest.md").write_text(to_markdown(run), "utf-8")


def _account(run: Run) -> str:
    """One sentence on whether servers and clients counted the same."""
    loads = [load for r in run.rounds for load in (r.mixed, r.tminus, r.lock)]
    wrong = [load for load in loads if not load.agrees]
    if not wrong:
        return f"Servers and clients account for the same row-steps in all {len(loads)} loads."
    counts = "; ".join(
        f"counted {load.counted.row_steps:.0f}, saved {load.counted.saved}, received {load.received_row_steps}, "
        f"abandoned {load.abandoned_row_steps}"
        for load in wrong
    )
    return f"**Servers and clients differ in {len(wrong)} of {len(loads)} loads**: {counts}."


def _latency_line(name: str, seconds: Sequence[float]) -> str:
    return f"| {name} | {1e3 * _quantile(seconds, 0.5):.0f} | {1e3 * _quantile(seconds, 0.95):.0f} | {len(seconds)} |"


def _ratio(run: Run, top: Figure, bottom: Figure) -> tuple[float, float, float]:
    by_round = [top(r) / bottom(r) for r in run.rounds]
    return _median(run, top) / _median(run, bottom), min(by_round), max(by_round)


def _median(run: Run, figure: Figure) -> float:
    return statistics.median(figure(r) for r in run.rounds)


def _spread(run: Run, figure: Figure) -> str:
    values = [figure(r) for r in run.rounds]
    return f"{statistics.median(values):.1f} [{min(values):.1f} to {max(values):.1f}]"


def _percent(run: Run, figure: Figure) -> str:
    return f"{100 * _median(run, figure):.1f} %"


def _quantile(seconds: Sequence[float], q: float) -> float:
    """Linear between the order statistics."""
    ordered = sorted(seconds)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
