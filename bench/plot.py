"""The pictures of the pages, drawn from files of results: waits and throughput, and distances of images by sampler.

Their colours are legible on white and on black; the background is left open.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import NullLocator

from bench.tables import TITLES, sign_of
from tminus.model.catalogue import SAMPLER_FACTS

INK = "#808a94"  # on white 3.5 to 1, on black 6 to 1
matplotlib.rcParams |= {
    # The same file gives the same picture, and text stays text.
    "svg.hashsalt": "tminus",
    "svg.fonttype": "none",
    "font.size": 9,
    "savefig.transparent": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}
# By executor and precision: those that run the network the same way have one colour, and tminus the full one.
COLOURS = {
    "tminus": "#2f81c7",
    "litserve_openvino": "#8fb8dd",
    "litserve_steps_openvino": "#8fb8dd",
    "litserve_queues_openvino": "#8fb8dd",
    "mosec_openvino": "#8fb8dd",
    "tminus_eager": "#d2691e",
    "lock": "#e0ab82",
    "litserve": "#e0ab82",
    "mosec": "#e0ab82",
}
NAMES = {"tminus": "tminus, OpenVINO", "litserve": "LitServe, eager float32", "mosec": "mosec, eager float32"}
PANELS = (  # those that the file has
    ("short", "20 steps beside two jobs of 8 x 1000 steps:\nmedian wait, s (log)", True),
    ("saturation_1", "Full load, requests of 1 image:\nrow-steps/s", False),
    ("saturation_16", "Full load, requests of 16 images:\nrow-steps/s", False),
    ("goodput", "A mix, 95 % within 3 times the time alone:\nrow-steps/s", False),
)
MARKERS = "osD^v<>PX*hd"  # one for each sampler that is drawn: there are only ten colours


def contenders(serving: Mapping[str, Any], path: Path) -> None:
    """Draw waits and throughput of every contender, as bars."""
    shown = [panel for panel in PANELS if panel[0] in serving]
    figure, panels = plt.subplots(1, len(shown), figsize=(3.5 * len(shown), 3.2), layout="constrained", sharey=True)
    for axes, (row, title, is_log) in zip(panels, shown, strict=True):
        found = {key: serving[row][key] for key in reversed(COLOURS) if key in serving[row]}
        names, values = [NAMES.get(key, TITLES[key]) for key in found], [each["value"] for each in found.values()]
        bars = axes.barh(names, values, color=[COLOURS[key] for key in found], log=is_log)
        axes.bar_label(bars, list(map(label, found.values())), padding=3)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.2)
    save(figure, path)


def label(figure: Mapping[str, Any]) -> str:
    """Return the number at a bar."""
    value = figure["value"]
    return sign_of(figure) + (f"{value:.3g}" if value < 1000 else f"{value:.0f}")


def samplers(quality: Mapping[str, Any], path: Path) -> None:
    """Draw the distance over the passes of an image, unguided: a line for each sampler, and one for real images."""
    entries = quality["fashion-mnist-32"]
    figure, axes = plt.subplots(figsize=(7.8, 4.4), layout="constrained")
    highest = 0.0
    for number, name in enumerate(SAMPLER_FACTS):
        own = [each for each in entries.values() if each.get("sampler") == name and each["guidance"] == 1]
        own.sort(key=lambda each: each["passes"])
        if own:
            passes, distances = ([each[what] for each in own] for what in ("passes", "distance"))
            highest = max(highest, *distances)
            axes.plot(
                passes, distances, label=name, color=f"C{number % 10}", marker=MARKERS[number % len(MARKERS)],
                markersize=4.5, linewidth=1.4, linestyle="-" if number < 10 else "-.",
            )  # fmt: skip
    axes.axhline(entries["real"]["distance"], color=INK, linestyle=":", linewidth=1.2, label="real images")
    axes.set(xscale="log", yscale="log", xlabel="passes of the network for an image", ylabel="Fréchet distance")
    for axis, ticks in ((axes.xaxis, (5, 8, 10, 20, 50, 100, 250)), (axes.yaxis, (2, 3, 5, 10, 20, 50, 100))):
        axis.set_minor_locator(NullLocator())
        axis.set_ticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(2, 1.15 * highest)
    axes.grid(visible=True, which="major", color=INK, alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)


def adaptive(result: Mapping[str, Any], path: Path) -> None:
    """Draw the share of requests in time, and the distance of their images, over the load."""
    loads = result["loads"]
    percents = [float(load.rstrip("%")) for load in loads]
    figure, panels = plt.subplots(1, 2, figsize=(7.8, 3), layout="constrained")
    for axes, name, title in zip(
        panels, ("in_time", "distance"), ("requests in time", "Fréchet distance"), strict=True
    ):
        for mode, colour in (("recommended", "#d2691e"), ("adaptive", "#2f81c7")):
            values = [modes[mode][name]["value"] for modes in loads.values()]
            axes.plot(percents, values, label=mode, color=colour, marker="o", markersize=4.5)
        axes.set(xlabel="load, % of the most at the recommended setting", title=title)
        axes.set_ylim(0)
        axes.grid(visible=True, color=INK, alpha=0.25, linewidth=0.6)
    panels[0].legend(frameon=False)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Write a picture as SVG."""
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
