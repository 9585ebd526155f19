"""The tables of bench/results/quality.json in the pages: what was not measured is left out, or n/a."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

Result = Mapping[str, Any]

NOT_MEASURED = "n/a"
CARDS = {
    "fashion-mnist-32": (
        "tuned-8", "tuned-5", "dpmpp_2m-20", "ddpm-250", "dpmpp_2m-20-guidance-2",
    ),
    "fashion-mnist-32-student": ("consistency-1", "consistency-2"),
    "pixel-art-32": ("dpmpp_2m-20", "dpmpp_2m-20-guidance-1_5", "dpmpp_2m-20-guidance-2"),
    "avatars-64": ("dpmpp_2m-20", "dpmpp_2m-20-guidance-1_5", "dpmpp_2m-20-guidance-2"),
}  # fmt: skip
TEACHER = ("fashion-mnist-32-student", "fashion-mnist-32", "tuned-8")
GUIDANCE = {
    "unguided": "dpmpp_2m-20",
    "guidance 1.5": "dpmpp_2m-20-guidance-1_5",
    "guidance 2": "dpmpp_2m-20-guidance-2",
}


def guidance(result: Result) -> str:
    """What guidance does to the images of each checkpoint: distances, and class accuracies in brackets."""
    lines = [
        "| checkpoint | " + " | ".join(map(str, GUIDANCE)) + " | real images |",
        "|---" * (2 + len(GUIDANCE)) + "|",
    ]
    for name, found in result.items():
        if any(key in found for key in GUIDANCE.values()):
            cells = [_cell(found.get(key)) for key in (*GUIDANCE.values(), "real")]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(entry: Mapping[str, Any] | None) -> str:
    return NOT_MEASURED if entry is None else f"{entry['distance']:.1f} ({entry['class_accuracy']:.2f})"


def card(name: str, result: Result) -> str:
    """The figures of a checkpoint's images, for its card; nothing where there are none."""
    if (found := result.get(name)) is None:
        return ""
    rows = [(_title(found[key]), found[key]) for key in CARDS[name] if key in found]
    if name == TEACHER[0] and TEACHER[2] in result.get(TEACHER[1], {}):
        teacher = result[TEACHER[1]][TEACHER[2]]
        rows.append((f"{TEACHER[1]}, {_title(teacher)}", teacher))
    lines = ["| images | passes each | distance | class accuracy |", "|---|---|---|---|"]
    for title, each in rows:
        passes = each["passes"] * (1 if each["guidance"] == 1 else 2)
        lines.append(f"| {title} | {passes} | {each['distance']:.2f} | {each['class_accuracy']:.3f} |")
    if "autoencoder" in found:
        lines.append(f"| real images, encoded and decoded | | {found['autoencoder']['distance']:.2f} | |")
    real, made = found["real"], result["made"]
    lines.append(f"| real images | | {real['distance']:.2f} | {real['class_accuracy']:.3f} |")
    seeds = " and ".join(map(str, made.get("seeds", [0])))
    how = f"{made['images']} images of seed {seeds} in each row, by `{made['command']}`."
    return "\n".join([*lines, "", how])


def _title(entry: Mapping[str, Any]) -> str:
    steps = f"{entry['steps']} step" + "s" * (entry["steps"] > 1)
    guided = f", guidance {entry['guidance']:g}" if entry["guidance"] != 1 else ""
    return f"`{entry['sampler']}`, {steps}{guided}"


TABLES: Mapping[str, tuple[str, Callable[[Result], str]]] = {
    "quality-guidance": ("quality", guidance),
    **{f"quality-{name}": ("quality", partial(card, name)) for name in CARDS},
}
