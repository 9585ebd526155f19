"""The tables of bench/results/quality.json in the pages: what was not measured is left out, or is a dash."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from tminus.model.catalogue import SAMPLER_FACTS

Result = Mapping[str, Any]

NOT_MEASURED = "–"  # noqa: RUF001
# From, to how many passes an image takes.
BANDS = ((5, 6), (8, 11), (19, 21), (40, 59), (100, 100), (250, 250))
CARDS = {
    "fashion-mnist-32": (
        "tuned-8", "tuned-5", "dpmpp_2m-10", "dpmpp_2m-20", "dpmpp_2m-50", "ddpm-50", "ddpm-250",
        "dpmpp_2m-20-guidance-2",
    ),
    "fashion-mnist-32-student": ("consistency-1", "consistency-2"),
    "pixel-art-32": ("dpmpp_2m-10-guidance-1_5", "dpmpp_2m-20", "dpmpp_2m-20-guidance-1_5", "dpmpp_2m-20-guidance-2"),
    "avatars-64": ("dpmpp_2m-10-guidance-1_5", "dpmpp_2m-20", "dpmpp_2m-20-guidance-1_5", "dpmpp_2m-20-guidance-2"),
}  # fmt: skip
TEACHER = ("fashion-mnist-32-student", "fashion-mnist-32", "tuned-8")
GUIDANCE = ("dpmpp_2m-20", "dpmpp_2m-20-guidance-1_5", "dpmpp_2m-20-guidance-2")


def samplers(result: Result) -> str:
    """The distance of the bundled checkpoint's images, by sampler and passes, unguided."""
    found = result["fashion-mnist-32"]
    heads = [f"{low} to {high} passes" if high > low else f"{low} passes" for low, high in BANDS]
    lines = ["| sampler | " + " | ".join(heads) + " |", "|---" * (1 + len(BANDS)) + "|"]
    for name in SAMPLER_FACTS:
        own = [each for each in found.values() if each.get("sampler") == name and each["guidance"] == 1]
        cells = [", ".join(_in_band(own, *band)) or NOT_MEASURED for band in BANDS]
        if own:
            lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    real = found["real"]["distance"]
    return "\n".join([*lines, "", f"{result['made']['images']} real images have a distance of {real:.1f}."])


def _in_band(entries: list[Mapping[str, Any]], low: int, high: int) -> list[str]:
    return [f"{each['distance']:.1f}" for each in entries if low <= each["passes"] <= high]


def guidance(result: Result) -> str:
    """What guidance does to the images of each checkpoint."""
    lines = ["| checkpoint | `guidance` | distance | class accuracy |", "|---|---|---|---|"]
    for name, found in result.items():
        for each in (found[key] for key in GUIDANCE if key in found):
            figures = f"{each['distance']:.1f} | {each['class_accuracy']:.3f}"
            lines.append(f"| {name} | {each['guidance']:g} | {figures} |")
        if any(key in found for key in GUIDANCE):
            real = found["real"]
            lines.append(f"| {name} | real images | {real['distance']:.1f} | {real['class_accuracy']:.3f} |")
    return "\n".join(lines)


def card(name: str, result: Result) -> str:
    """The figures of a checkpoint's images, for its card."""
    if (found := result.get(name)) is None:
        return "*Not measured yet.*"
    rows = [(_title(found[key]), found[key]) for key in CARDS[name] if key in found]
    if name == TEACHER[0] and TEACHER[2] in result.get(TEACHER[1], {}):
        teacher = result[TEACHER[1]][TEACHER[2]]
        rows.append((f"{TEACHER[1]}, {_title(teacher)}", teacher))
    lines = ["| images | passes each | distance | class accuracy |", "|---|---|---|---|"]
    for title, each in rows:
        passes = each["passes"] * (1 if each["guidance"] == 1 else 2)
        lines.append(f"| {title} | {passes} | {each['distance']:.2f} | {each['class_accuracy']:.3f} |")
    real, made = found["real"], result["made"]
    lines.append(f"| real images | | {real['distance']:.2f} | {real['class_accuracy']:.3f} |")
    how = f"{made['images']} images of seed 0 in each row, by `{made['command']}`."
    return "\n".join([*lines, "", how])


def _title(entry: Mapping[str, Any]) -> str:
    steps = f"{entry['steps']} step" + "s" * (entry["steps"] > 1)
    guided = f", guidance {entry['guidance']:g}" if entry["guidance"] != 1 else ""
    return f"`{entry['sampler']}`, {steps}{guided}"


TABLES: Mapping[str, tuple[str, Callable[[Result], str]]] = {
    "quality-samplers": ("quality", samplers),
    "quality-guidance": ("quality", guidance),
    **{f"quality-{name}": ("quality", partial(card, name)) for name in CARDS},
}
