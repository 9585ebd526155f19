"""The picture of the benchmark's page: waits and throughput, drawn from the file of results.

Its colours are legible on white and on black; the background is left open.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.tables import TITLES

INK = "#808a94"  # on white 3.5 to 1, on black 6 to 1
# By executor and precision: those that run the network the same way have one colour, and tminus the full one.
COLOURS = {
    "tminus": "#2f81c7",
    "litserve_openvino": "#8fb8dd",
    "mosec_openvino": "#8fb8dd",
    "tminus_eager": "#d2691e",
    "lock": "#e0ab82",
    "litserve": "#e0ab82",
    "mosec": "#e0ab82",
}
NAMES = {"tminus": "tminus, OpenVINO", "litserve": "LitServe, eager float32", "mosec": "mosec, eager float32"}
PANELS = (
    ("short", "20 steps beside two jobs of 8 x 1000 steps:\nmedian wait, s (log)", True),
    ("saturation_1", "Full load, requests of 1 image:\nrow-steps/s", False),
    ("saturation_16", "Full load, requests of 16 images:\nrow-steps/s", False),
)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture; its kind is the path's ending. Raises ImportError where there is no matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    # The same file gives the same picture, and text stays text.
    matplotlib.rcParams |= {
        "svg.hashsalt": "tminus",
        "svg.fonttype": "none",
        "font.size": 9,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    }
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(PANELS), figsize=(10.5, 3.2), layout="constrained", sharey=True)
    for axes, (row, title, is_log) in zip(panels, PANELS, strict=True):
        values = {key: result[row][key]["value"] for key in reversed(COLOURS) if key in result.get(row, {})}
        names = [NAMES.get(key, TITLES[key]) for key in values]
        bars = axes.barh(names, list(values.values()), color=[COLOURS[key] for key in values], log=is_log)
        axes.bar_label(bars, fmt=lambda value: f"{value:.3g}" if value < 1000 else f"{value:.0f}", padding=3)
        axes.set_title(title, fontsize=9)
        axes.margins(x=0.2)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, metadata=metadata, transparent=True)
    plt.close(figure)
