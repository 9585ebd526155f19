"""The plots of a report, as SVG: quality over passes, and the terms of the bound. matplotlib is imported when one is
drawn.
"""

import importlib.util
import io
from collections import Counter
from collections.abc import Sequence
from typing import Any

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.evaluation.figures import Bound, PointFigures
from tminus.model.evaluation.options import EvaluateError
from tminus.model.evaluation.sweep_report import SweepReport

MARKERS = "osD^v<>PX*"
GREY = "#555555"
PANEL_INCHES = (6.0, 4.4)
LEGEND_INCHES = 1.8
NEXT_TICK = 1.15  # a tick nearer to the one before has no room for its number


def check_installed() -> None:
    """Raise EvaluateError where there is nothing to draw with."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluateError("a report has plots, which need matplotlib: pip install 'tminus[evaluate]'")


def plot_distances(report: SweepReport) -> bytes | None:
    """Fréchet distance over passes, a line a sampler, a panel a guidance scale; None where there are no two to compare.

    Bars reach from the least to the greatest seed; horizontal lines are real images, and the references.
    """
    drawn = [point for point in report.points if point.frechet is not None]
    if len(drawn) < 2:
        return None
    plt = _pyplot()
    panels = report.guidances
    size = (PANEL_INCHES[0] + LEGEND_INCHES, PANEL_INCHES[1] * len(panels))
    figure, axes = plt.subplots(len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    names = list(dict.fromkeys(point.sampler for point in drawn))
    for axis, guidance in zip(axes[:, 0], panels, strict=True):
        for name in names:
            line = [point for point in drawn if (point.sampler, point.guidance) == (name, guidance)]
            _line(axis, name, sorted(line, key=lambda point: point.passes))
        for point in report.references:
            if point.guidance == guidance and point.frechet is not None:
                label = f"{point.sampler}, {point.steps} steps"
                axis.axhline(point.frechet.mean, color=GREY, linestyle="--", linewidth=1, label=label)
        if report.real_frechet is not None:
            axis.axhline(report.real_frechet.mean, color=GREY, linestyle=":", linewidth=1.2, label="real images")
        axis.set_title(f"guidance {guidance:g}" if len(panels) > 1 or guidance != 1 else "")
        axis.set_xlabel("passes of the network, an image")
        axis.set_ylabel("classifier_frechet_distance")
        _log(axis, [point.passes for point in drawn])
        _plain(axis)
    handles: dict[str, Any] = {}
    for axis in axes[:, 0]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = sorted(handles, key=lambda label: names.index(label) if label in names else len(names))
    figure.legend([handles[label] for label in order], order, loc="outside right upper", frameon=False)
    return _svg(figure, plt)


def plot_terms(bound: Bound) -> bytes:
    """The curve of L_t over t on held-out images: a stair for each run of timesteps whose mean was measured."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(PANEL_INCHES[0] + LEGEND_INCHES, 3.6), layout="constrained")
    values = [bound.L_0, *(term.bits_per_dim for term in bound.terms)]
    edges = [0, *(term.first for term in bound.terms), bound.terms[-1].last + 1 if bound.terms else 1]
    axis.stairs(values, edges, baseline=None, color=_colour(0), linewidth=1.6)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(0, edges[-1])
    ticks = [0, *(10**k for k in range(7) if 10**k <= edges[-1])]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_yscale("log")
    axis.set_xlabel("t, counted from 0")
    axis.set_ylabel("L_t, bits/dim")
    _plain(axis)
    return _svg(figure, plt)


def _line(axis: Any, name: str, points: Sequence[PointFigures]) -> None:
    """A sampler's line: its colour and marker are its own, whichever others are drawn."""
    number = [*SAMPLER_FACTS, name].index(name)
    spreads = [point.frechet for point in points if point.frechet is not None]
    means = [one.mean for one in spreads]
    bars = [[one.mean - one.minimum for one in spreads], [one.maximum - one.mean for one in spreads]]
    axis.errorbar(
        [point.passes for point in points], means, yerr=bars, label=name, color=_colour(number),
        marker=MARKERS[number % len(MARKERS)], markersize=4.5, linewidth=1.4, elinewidth=0.8, capsize=2,
        linestyle="-" if number < 10 else "-.",
    )  # fmt: skip


def _colour(number: int) -> str:
    return f"C{number % 10}"


def _log(axis: Any, passes: Sequence[int]) -> None:
    """Make both axes logarithmic in plain numbers: passes have ticks where points are, distances at 1, 2 and 5."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    ticks: list[int] = []
    for count, _ in Counter(sorted(passes)).most_common():  # those of most points first
        if all(max(count, tick) >= NEXT_TICK * min(count, tick) for tick in ticks):
            ticks.append(count)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for of, locator in ((axis.xaxis, FixedLocator(ticks)), (axis.yaxis, LogLocator(subs=(1, 2, 5)))):
        of.set_major_locator(locator)
        of.set_minor_locator(NullLocator())
        of.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)


def _pyplot() -> Any:
    check_installed()
    import matplotlib

    matplotlib.use("Agg")
    # The same figures give the same file, and text stays text.
    matplotlib.rcParams |= {"svg.hashsalt": "tminus", "svg.fonttype": "none", "font.size": 9}
    import matplotlib.pyplot as plt

    return plt


def _svg(figure: Any, plt: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()
