"""The blocks that bench/pages.py puts into the pages: each is Markdown made of one file of results, or of all."""

import re
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from bench import image_tables
from bench.figures import EAGER
from bench.records import SLO
from bench.servers import SAME_GRAPH
from tminus.model.catalogue import SAMPLER_FACTS, SamplerFacts

Result = Mapping[str, Any]

TITLES = {  # those of the same executor and precision stand together
    "tminus": "tminus",
    "before": "tminus before",
    "litserve_openvino": "LitServe, OpenVINO",
    "litserve_steps_openvino": "LitServe step by step, OpenVINO",
    "litserve_queues_openvino": "LitServe with two queues, OpenVINO",
    "mosec_openvino": "mosec, OpenVINO",
    "tminus_eager": "tminus, eager float32",
    "lock": "diffusers behind a lock",
    "litserve": "LitServe",
    "mosec": "mosec",
}
SETUPS = {
    "tminus_two": "two processes of tminus, each with half of the cores",
    "litserve_openvino_one": "LitServe with one worker and tminus' executor",
    "mosec_openvino_one": "mosec with one worker and tminus' executor",
}
DETAILED = "slo_80"  # the load whose requests are told by size
SATURATED = ("saturation_1", "saturation_16")
COLUMNS = {
    "short": "20 steps beside long jobs, s",
    "long": "the long jobs, s",
    "idle": "idle, s",
    "saturation_1": "full load, 1 image a request, row-steps/s",
    "saturation_16": "full load, 16 images, row-steps/s",
    "goodput": "goodput, row-steps/s",
    "hang_ups": "computed for clients who left, %",
}
# What is left out of tminus to see what it is worth.
WITHOUT = {
    "tminus_in_order": "in order of arrival",
    "tminus_one_job": "one job a tick",
    "tminus_eager": "eager float32",
}
# Who is compared with whom: the executor and the precision are the same.
LIKE_FOR_LIKE = {
    "tminus": SAME_GRAPH,
    "tminus_eager": ("lock", "litserve", "mosec"),
}


def machine(result: Result) -> str:
    """What the figures were measured on, and by which command."""
    made, tminus = result["made"], result.get("tminus", {})
    on, peaks = made["machine"], made["machine"].get("peaks_gflop_per_s", {})
    versions = ", ".join(
        f"{name} {on[name]}" for name in ("torch", "openvino", "diffusers", "litserve", "mosec") if name in on
    )
    lines = [
        f"- Machine: {on['cpu']}, {on['cores']} cores, {on.get('memory_gib', '?')} GiB, {on['system']}. "
        + " ".join(f"It reaches {peak:.0f} GFLOP/s in {precision}." for precision, peak in peaks.items()),
        f"- Versions: Python {on['python']}, {versions}.",
        run(result),
    ]
    if tminus.get("details"):
        lines.append(
            f"- tminus chose {tminus['executor'].replace('openvino', 'OpenVINO')} in {tminus['precision']}: "
            f"{_details(tminus['details'])}. A tick has up to {tminus['places']} rows."
        )
    lines += [f"- {sentence.partition('. ')[0].removesuffix('.')}." for sentence in result.get("left_out", [])]
    return "\n".join(lines)


def run(result: Result) -> str:
    """Which command made a file, and when."""
    made = result["made"]
    return (
        f"- Run: `{made['command']}`, {made['date']}, commit {made['commit']}, {made['seconds']} s. Other programs "
        f"took {100 * made['busy_share']:.0f} % of the cores before it."
    )


def headline(result: Result) -> str:
    """Every contender at every load, those that run the network the same way one after the other."""
    precision = result.get("tminus", {}).get("precision", "")
    columns = {key: text for key, text in COLUMNS.items() if result.get(key)}
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (1 + len(columns)) + "|"]
    for key, title in TITLES.items():
        cells = [_cell(result[column].get(key)) for column in columns]
        if any(cells):
            way = f" {precision}" if "OpenVINO" in title else f", OpenVINO {precision}" if key == "tminus" else ""
            way = way or ("" if "eager" in title else ", eager float32")
            lines.append(f"| {title}{way} | " + " | ".join(cells) + " |")
    if unanswered := {key: count for key, count in result.get("unanswered", {}).items() if key in TITLES}:
        some = ", ".join(f"{count} of {TITLES[key]}" for key, count in unanswered.items())
        lines += ["", f"Requests without an answer, which count as waits to the end of the load: {some}."]
    return "\n".join(lines)


def like_for_like(result: Result) -> str:
    """How many times as fast tminus is as each peer that runs the same network the same way."""
    columns = {key: text.rpartition(", ")[0] for key, text in COLUMNS.items() if result.get(key) and key != "hang_ups"}
    lines = ["| times as fast | " + " | ".join(columns.values()) + " |", "|---" * (1 + len(columns)) + "|"]
    for ours, peers in LIKE_FOR_LIKE.items():
        for theirs in peers:
            cells = [_cell(result[column].get(f"{ours}_over_{theirs}")) for column in columns]
            if any(cells):
                lines.append(f"| {TITLES[ours]} / {TITLES[theirs]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def attainment(result: Result) -> str:
    """The share within three times by rate, and more of the rate 0.8: of tminus by size. Empty if not measured."""
    if (slo := result.get("slo")) is None:
        return ""
    rates = {load: f"{share:g}" for load, share in SLO.items() if slo[load]["all"]}
    lines = ["| share within 3 times, by rate | " + " | ".join(rates.values()) + " |", "|---" * (1 + len(rates)) + "|"]
    for key, title in TITLES.items():
        if any(cells := [_cell(slo[load]["all"].get(key, {}).get("within_3")) for load in rates]):
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
    columns = {"p50": "p50, times alone", "p95": "p95, times alone"}
    alone = ", ".join(f"{size} {_digits(alone_s)} s" for size, alone_s in slo["alone_s"].items())
    lines += [
        "",
        f"The executor's own rate is {_digits(slo['own_rate'])} row-steps/s. Alone: {alone}.",
        "",
    ]
    lines += [f"| rate {SLO[DETAILED]:g} | " + " | ".join(columns.values()) + " |", "|---" * (1 + len(columns)) + "|"]
    for key in ("tminus", "before", *SAME_GRAPH):
        for size, found in slo[DETAILED].items() if key == "tminus" else [("all", slo[DETAILED]["all"])]:
            if any(cells := [_cell(found.get(key, {}).get(column)) for column in columns]):
                lines.append(f"| {TITLES[key]}, {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def effects(result: Result) -> str:
    """How many times as fast tminus is as itself with one thing left out. Empty if no control was measured."""
    rows = {row: text.rpartition(", ")[0] for row, text in COLUMNS.items() if row in ("short", "long", *SATURATED)}
    if "tminus_in_order" not in result.get("saturation_1", {}):
        return ""
    lines = ["| tminus, times as fast as | " + " | ".join(WITHOUT.values()) + " |", "|---" * (1 + len(WITHOUT)) + "|"]
    for row, text in rows.items():
        cells = [_cell(result.get(row, {}).get(f"tminus_over_{key}")) for key in WITHOUT]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def limits(result: Result) -> str:
    """Full load beside what the processor allows: the executor alone, and streams that wait for each other or not."""
    found = result["limits"]
    lines = ["| row-steps/s | 1 image a request | 16 images | % of peak |", "|---|---|---|---|"]
    for batch, rate in found["bare"].items():
        share = 100 * found["gflop_a_row"] * rate["value"] / found["peak"]
        rows = f"{batch} row{'s' * (batch != '1')} a call"
        lines.append(f"| tminus' executor alone, {rows} | {_cell(rate)} | | {share:.0f} |")
    for key, title in (TITLES | SETUPS).items():
        cells = [_cell(result.get(row, {}).get(key)) for row in SATURATED]
        if cells[0] and key not in EAGER:
            lines.append(f"| {title} | {' | '.join(cells)} | {found[f'{key}_of_peak']:.0f} |")
    if streams := result.get("lock_step"):
        lines += ["", "| two streams of one thread | wait for each other | do not wait |", "|---|---|---|"]
        lines += [f"| {of} | {_cell(each['joined'])} | {_cell(each['free'])} |" for of, each in streams.items()]
    return "\n".join(lines)


def networks(result: Result) -> str:
    """Larger networks: a row for each figure, a column for each network."""
    names = [key for key in result if isinstance(result[key], Mapping) and "parameters_m" in result[key]]
    lines = ["| | " + " | ".join(result[name]["title"] for name in names) + " |", "|---" * (1 + len(names)) + "|"]
    for key, text in NETWORK_ROWS.items():
        if any(cells := [_cell(_found(result[name], key)) for name in names]):
            lines.append(f"| {text} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def costs(result: Result) -> str:
    """What each feature costs."""
    lines = ["| what is measured | |", "|---|---|"]
    lines += [f"| {text} | {_cell(_found(result, key))} |" for key, text in COST_ROWS.items()]
    return "\n".join(lines)


def adaptive(result: Result) -> str:
    """Make the table of adaptive requests beside those at the recommended setting, by load."""
    head = ["load", "setting", *ADAPTIVE_COLUMNS.values()]
    rows = [
        [load, mode, *(_cell(_found(figures, name)) for name in ADAPTIVE_COLUMNS)]
        for load, modes in result["loads"].items()
        for mode, figures in modes.items()
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def gpu(results: Mapping[str, Result]) -> str:
    """What has been measured on GPUs."""
    cards = {name: each for name, each in results.items() if name.startswith("gpu-")}
    if not cards:
        return "The GPU path has not been measured: no GPU was at hand."
    lines = [
        "| card | network | passes of tminus / of diffusers, by rows | served: tminus / best peer |",
        "|---|---|---|---|",
    ]
    for each in cards.values():
        for network in dict.fromkeys(m["network"] for m in each["measures"]):
            own = [m for m in each["measures"] if m["network"] == network]
            passes = [f"{m['rows']}: {m['value']:.2f}" for m in own if m["what"] == "passes, ratio" and m["rows"]]
            served = {m["contender"]: m["value"] for m in own if m["what"].startswith("served")}
            ours = served.pop("tminus", None)
            ratio = f"{ours / max(served.values()):.2f}" if ours and served else ""
            lines.append(f"| {each['card']} | {network} | {', '.join(passes[:4])} | {ratio} |")
    return "\n".join(lines)


def samplers(_results: Mapping[str, Result]) -> str:
    """What the catalogue says of each sampler."""
    lines = ["| sampler | when to take it | passes of S steps | | source |", "|---|---|---|---|---|"]
    for name, facts in SAMPLER_FACTS.items():
        notes = ("needs signal", facts.needs_signal), ("fractional timesteps", facts.fractional)
        said = ", ".join(note for note, holds in notes if holds)
        lines.append(f"| `{name}` | {facts.when} | {_passes(facts)} | {said} | {facts.source} |")
    return "\n".join(lines)


def _passes(facts: SamplerFacts) -> str:
    per_step = f"{facts.passes_per_step} S" if facts.passes_per_step > 1 else "S"
    more = facts.passes_to_start - (facts.passes_per_step - 1)
    return f"{per_step} {'+' if more > 0 else '-'} {abs(more)}" if more else per_step


NETWORK_ROWS = {
    "parameters_m": "parameters, millions",
    "gflop_a_row": "GFLOP a row",
    "precision": "precision of tminus and LitServe",
    "bare": "the executor alone, row-steps/s",
    "idle.tminus": "1 image of 20 steps, idle server: tminus, s",
    "saturation.tminus": "tminus, full load, row-steps/s",
    "saturation.litserve_openvino": "LitServe with the same graph",
    "saturation.litserve": "LitServe with diffusers' network, eager float32",
    "short.tminus": "20 steps beside long jobs: tminus, s",
    "short.litserve_openvino": "LitServe with the same graph, s",
    "short.litserve": "LitServe with diffusers' network, s",
    "of_peak": "tminus, % of peak",
    "start_s": "first start, s",
    "second_start_s": "second start, s",
    "memory_mib": "memory of the server, MiB",
}
COST_ROWS = {
    "durable.ratio": "row-steps/s: durable jobs / the same jobs by `POST /sample`",
    "viewers.ratio": "row-steps/s: 50 jobs with a viewer each, at 5 frames a second / 50 jobs without viewers",
    "viewers.late_ms": "the most that a frame came late there, ms",
    "viewers.first_frame_ms": "from request to first frame, idle server, median, ms",
    "models.sharing_ratio": "row-steps/s: two models at once / one after the other",
    "models.reload_s": "a reload while 8 clients ask, s",
    "models.failed": "requests of these clients that fail",
    "models.reload_wait_ratio": "median wait of these clients: during reloads / otherwise",
    "models.load_s": "a request that loads its model, idle server, s",
}
ADAPTIVE_COLUMNS = {
    "in_time": "in time",
    "missed_though_admitted": "accepted, but late",
    "refused": "refused",
    "passes": "passes, mean",
    "distance": "distance",
    "pixel_distance": "in pixels",
}
# The file of each block, and what makes it; of all files where it has none.
TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "machine": ("serving", machine),
    "headline": ("serving", headline),
    "like-for-like": ("serving", like_for_like),
    "attainment": ("serving", attainment),
    "effects": ("serving", effects),
    "limits": ("serving", limits),
    "networks": ("networks", networks),
    "networks-machine": ("networks", run),
    "costs": ("costs", costs),
    "adaptive": ("adaptive", adaptive),
    "gpu": ("", gpu),
    "samplers": ("", samplers),
    **image_tables.TABLES,
}


def _found(result: Any, key: str) -> Any:
    for part in key.split("."):
        result = result.get(part) if isinstance(result, Mapping) else None
    return result


def sign_of(figure: Any) -> str:
    """Return what stands before a figure that is a bound."""
    bounds = figure if isinstance(figure, Mapping) else {}
    return "> " if "at_least" in bounds else "< " if "at_most" in bounds else ""


def _cell(figure: Any) -> str:
    """Three digits, the range where the rounds differ by more than 5 %, and whether the figure is a bound."""
    if isinstance(figure, str):
        return figure
    if sign := sign_of(figure):
        return sign + _digits(figure["value"])
    value = figure.get("value") if isinstance(figure, Mapping) else figure
    if value is None:
        return ""
    each = figure.get("rounds", []) if isinstance(figure, Mapping) else []
    if len(each) > 1 and max(each) - min(each) > 0.05 * abs(median(each)):
        return f"{_digits(value)} ({_digits(min(each))}\u2013{_digits(max(each))})"
    return _digits(value)


def _details(text: str) -> str:
    """Put how an executor divides its passes into words."""
    text = re.sub(r"(\d+) streams", r"\1 streams of one thread each", text.partition(", ")[2])
    text = re.sub(
        r"passes of ([\d, ]*\d)", lambda sizes: f"passes of {' or '.join(sizes[1].rsplit(', ', 1))} rows", text
    )
    return re.sub(r"up to (\d+) wide", r"a rest of \1 at most on all threads", text)


def _digits(value: float) -> str:
    text = f"{value:.3g}"
    return f"{value:.0f}" if "e" in text else text
