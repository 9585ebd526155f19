"""A run as one picture: throughput, waits beside long jobs, the two policies, and what is wasted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import figures
from bench.figures import SHORT_STEPS, TITLES, quantile
from bench.records import Run

COLOURS = {
    "tminus": "#1b6ca8",
    "before": "#4c4c4c",
    "fcfs": "#7fb2d9",
    "lock": "#b0b0b0",
    "litserve": "#8c6bb1",
    "mosec": "#d08770",
}
SHORT_TITLES = TITLES | {"lock": "lock", "fcfs": "tminus, fcfs"}


def plot(run: Run, path: Path) -> None:
    """Write the picture; its kind is the path's ending. Raises ImportError where there is no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    # The same run gives the same file, and text stays text.
    matplotlib.rcParams |= {"svg.hashsalt": "tminus", "svg.fonttype": "none", "font.size": 9}
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    _bars(axes[0, 0], "Saturated row-steps/s, requests of 1 image", _throughput(run))
    _waits(axes[0, 1], run)
    _curves(axes[1, 0], run, "mixed", "20-step requests beside 8 x 1000 jobs")
    if figures.of(run, "policy", "fcfs"):
        _curves(axes[1, 1], run, "policy", "20-step requests at load 0.8, by policy")
    else:
        _curves(axes[1, 1], run, "steps", "20-step requests among all step counts")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)


def _throughput(run: Run) -> dict[str, list[float]]:
    rates = {key: [figures.row_steps_per_s(one) for one in figures.of(run, "saturation", key)] for key in TITLES}
    return {key: values for key, values in rates.items() if values}


def _bars(axis: Any, title: str, values: dict[str, list[float]]) -> None:
    """A bar a contender, of the median; a whisker from the least to the greatest round."""
    axis.set_title(title)
    names = [SHORT_TITLES[key] for key in values]
    medians = [quantile(rates, 0.5) for rates in values.values()]
    low = [median - min(rates) for median, rates in zip(medians, values.values(), strict=True)]
    high = [max(rates) - median for median, rates in zip(medians, values.values(), strict=True)]
    bars = axis.bar(names, medians, yerr=[low, high], color=[COLOURS[key] for key in values], capsize=3)
    axis.bar_label(bars, fmt="%.0f", padding=3)
    _plain(axis)


def _waits(axis: Any, run: Run) -> None:
    """Medians of the waits by load, a group a load."""
    axis.set_title("Median wait, s")
    loads = [load for load in ("idle", "burst", "mixed", "steps") if figures.of(run, load, "tminus")]
    keys = [key for key in COLOURS if any(figures.of(run, load, key) for load in loads)]
    for number, key in enumerate(keys):
        heights, places = [], []
        for at, load in enumerate(loads):
            waits = _short_waits(run, load, key)
            if waits:
                heights.append(quantile(waits, 0.5))
                places.append(at + (number - (len(keys) - 1) / 2) * 0.8 / len(keys))
        axis.bar(places, heights, 0.8 / len(keys), color=COLOURS[key], label=SHORT_TITLES[key])
    labels = {
        "idle": "idle",
        "burst": "burst",
        "mixed": "20 steps\nbeside 8 x 1000",
        "steps": "20 steps among\nall counts",
    }
    axis.set_xticks(range(len(loads)), [labels[load] for load in loads])
    if keys:
        axis.set_yscale("log")
        axis.legend(frameon=False)
    _plain(axis)


def _curves(axis: Any, run: Run, load: str, title: str) -> None:
    """Which share of the requests waited how long at most."""
    axis.set_title(title)
    axis.set_xlabel("wait, s")
    axis.set_ylabel("share answered")
    drawn = False
    for key, colour in COLOURS.items():
        waits = sorted(_short_waits(run, load, key))
        if waits:
            shares = [(number + 1) / len(waits) for number in range(len(waits))]
            axis.step(waits, shares, where="post", color=colour, label=SHORT_TITLES[key])
            drawn = True
    if drawn:
        axis.set_xscale("log")
        axis.legend(frameon=False)
    _plain(axis)


def _short_waits(run: Run, load: str, key: str) -> Sequence[float]:
    """The waits of the short requests; of all where a load has but one size."""
    most = SHORT_STEPS if load in ("idle", "burst") else SHORT_STEPS - 1
    return [wait for one in figures.of(run, load, key) for wait in figures.waits(one.answers, most_steps=most)]


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
