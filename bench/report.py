"""A run as a page of markdown and as JSON, and the results' place in the documentation."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter

from bench import figures
from bench.figures import TITLES, quantile
from bench.records import Answer, Loaded, Run
from bench.servers import PACKAGES

BUSY = 0.5  # a load average over this says that something else ran
OTHER_OUTCOMES = ("refused", "failed", "left", "unanswered", "unsent")
MOST_KINDS = 4  # of more sizes of job a table shows only all together
BEGIN, END = "<!-- results: python -m bench --docs writes from here -->", "<!-- to here -->"
LOADS = {
    "idle": ("Idle", "Requests of n=1, 50 steps, one after the other."),
    "saturation": (
        "Saturation, requests of 1 image",
        "All of n=1, 50 steps, more than any contender can do; counted in a window after a warm-up.",
    ),
    "saturation-16": (
        "Saturation, requests of 16 images",
        "All of n=16, 50 steps: each request fills a pass by itself, so that batching gains nothing and tminus should "
        "only tie.",
    ),
    "saturation-dpmpp_2m": (
        "Saturation, `dpmpp_2m`",
        "All of n=1, 50 steps of `dpmpp_2m`, which keeps the output before; counted like the others. tminus alone.",
    ),
    "mixed": ("Long and short", "Jobs of 8 x 1000 steps, and requests of n=1, 20 steps arriving at random."),
    "burst": ("Burst", "Requests of n=1, 50 steps, all at one moment."),
    "steps": (
        "Mixed step counts",
        "n=4; 80 % of 20 steps, 15 % of 50, 5 % of 1000, arriving at random at 0.8 of tminus's saturated row-steps/s. "
        "The same arrivals for all, so that a slower contender is nearer to its limit, or over it.",
    ),
    "hang-ups": (
        "Clients that hang up",
        "n=2, 50 or 100 steps, at 0.8 of tminus's saturated row-steps/s; one client in five leaves after a random part "
        "of the time that its answer should take.",
    ),
    "policy": (
        "Policies",
        "Mixed step counts as above, for longer; `TMINUS_POLICY=srpt` (the default) against `fcfs`.",
    ),
    "first-step": (
        "First step",
        "Requests of n=1, 3 steps, at random beside long jobs that always take half of the places.",
    ),
    "identity": ("All kinds at once", "The load under which the byte-identical images were made."),
}


def to_markdown(run: Run) -> str:
    """The page of a run."""
    parts = [_head(run), _figures(run), _limits(run)]
    parts += [_load(run, load) for load in LOADS if any(one.load == load for one in run.loads)]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_json(run: Run) -> bytes:
    """Write all records as JSON."""
    return TypeAdapter(Run).dump_json(run, indent=1)


def from_json(data: bytes) -> Run:
    """Read them back."""
    return TypeAdapter(Run).validate_json(data)


def write(run: Run, folder: Path) -> None:
    """Write latest.json and latest.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "latest.json").write_bytes(to_json(run))
    (folder / "latest.md").write_text(to_markdown(run), "utf-8")


def into_page(page: str, results: str) -> str:
    """Put a run's markdown between the two marks of a page."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the page has no {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n\n{results}\n{END}{tail}"


def _head(run: Run) -> str:
    machine, model = run.machine, run.model
    versions = ", ".join(f"{name} {machine[name]}" for name in PACKAGES if name in machine)
    capability = f" ({machine['capability']})" if "capability" in machine else ""
    lines = [
        f"Machine: {machine['cpu']}{capability}, {machine['cores']} cores, {machine['system']}; "
        f"Python {machine['python']}, {versions}.",
        f"Command: `{run.command}`, {run.date}, commit {run.commit}, checkpoint {run.checkpoint}, {run.seconds:.0f} s.",
        f"tminus chose executor {model.get('executor', 'eager')}, {model.get('precision', 'float32')} "
        f"({model.get('executor_details', '')}), at most {model.get('limits', {}).get('max_batch')} places a tick.",
        f"Load average before it began: {run.load_average:.2f}"
        + (" (the machine was not idle: distrust the figures)." if run.load_average > BUSY else "."),
    ]
    lines += [f"{TITLES[key]}: {text}" for key, text in run.tunings.items()]
    if run.quick:
        lines.append("**A quick run, to see that it works: the figures mean nothing.**")
    lines += run.left_out
    return "  \n".join(lines)


def _figures(run: Run) -> str:
    lines = ["| figure | | least to greatest by round |", "|---|---|---|"]
    for figure in figures.figures(run):
        span = f"{figure.low:.2f} to {figure.high:.2f}" if figure.low is not None and figure.high is not None else ""
        value = f"{figure.value:.0f}" if figure.unit == "images" else f"{figure.value:.2f}"
        lines.append(f"| {figure.name} | **{value}**{' ' + figure.unit if figure.unit else ''} | {span} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _limits(run: Run) -> str:
    if not run.bare:
        return ""
    first, bares = run.bare[0], run.bare
    peak = statistics.median(figures.peak_flops(bare) for bare in bares)

    def line(name: str, rates: Sequence[float], cpu_s: Sequence[float]) -> str:
        rate = statistics.median(rates)
        cpu = f"{1e3 * statistics.median(cpu_s):.2f}" if cpu_s else ""
        return f"| {name} | {_spread(rates)} | {cpu} | {100 * rate * first.flops_per_row / peak:.0f} % |"

    lines = [
        "### Limits",
        "",
        f"float32 matmul {_spread([bare.matmul_flops / 1e9 for bare in bares])} GFLOP/s, bfloat16 matmul "
        f"{_spread([bare.matmul_bfloat16_flops / 1e9 for bare in bares])} GFLOP/s, wide 3x3 float32 convolution "
        f"{_spread([bare.conv_flops / 1e9 for bare in bares])} GFLOP/s; the U-Net is {first.flops_per_row / 1e9:.3f} "
        f"GFLOP a row. The peak below is {peak / 1e9:.0f} GFLOP/s, the most seen at {first.precision}.",
        "",
        "| | U-Net rows/s | CPU ms a row | of peak |",
        "|---|---|---|---|",
    ]
    for batch in first.paces:
        name = f"bare loop, executor {first.executor} {first.precision}, batch {batch}"
        paces = [bare.paces[batch] for bare in bares]
        lines.append(line(name, [p.rows_per_s for p in paces], [p.cpu_s_per_row for p in paces]))
    for load, what in (("saturation", "requests of 1"), ("saturation-16", "requests of 16")):
        for key, title in TITLES.items():
            if turns := figures.of(run, load, key):
                cpu_s = [one.counted.cpu_s / one.counted.places for one in turns if one.counted.cpu_s]
                lines.append(line(f"{title}, {what}", [figures.places_per_s(one) for one in turns], cpu_s))
    return "\n".join(lines)


def _load(run: Run, load: str) -> str:
    title, text = LOADS[load]
    lines = [
        f"### {title}",
        "",
        text,
        "",
        "| contender | job | answered | p50 s | p95 s | p99 s | first step p50, p99 s | row-steps/s | rows a tick "
        "| steps wasted |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, name in TITLES.items():
        if turns := figures.of(run, load, key):
            lines += _contender(name, turns)
    return "\n".join(lines)


def _contender(name: str, turns: Sequence[Loaded]) -> list[str]:
    """A line for each size of job; what is of the contender as a whole stands in the first."""
    answers = [answer for one in turns for answer in one.answers]
    # What is cut off on purpose at the end is no waste.
    counts_waste = bool(answers) and turns[0].load != "first-step"
    whole = [
        _spread([figures.row_steps_per_s(one) for one in turns]),
        f"{statistics.median(figures.rows_per_tick(one) for one in turns):.1f}",
        f"{100 * statistics.median(figures.wasted_share(one) for one in turns):.1f} %" if counts_waste else "",
    ]
    kinds = sorted({(answer.steps, answer.n) for answer in answers})
    if len(kinds) > MOST_KINDS:
        return [_line(name, "all", answers, whole)]
    lines = []
    for number, (steps, n) in enumerate(kinds):
        some = [answer for answer in answers if (answer.steps, answer.n) == (steps, n)]
        lines.append(_line("" if number else name, f"{n} x {steps}", some, ["", "", ""] if number else whole))
    return lines or [_line(name, "", [], whole)]


def _line(name: str, kind: str, answers: Sequence[Answer], whole: Sequence[str]) -> str:
    waits, first = figures.waits(answers), figures.first_steps(answers)
    cells = [name, kind, _answered(answers)]
    cells += [f"{quantile(waits, q):.3g}" for q in (0.5, 0.95, 0.99)] if waits else ["", "", ""]
    cells.append(f"{quantile(first, 0.5):.3g}, {quantile(first, 0.99):.3g}" if first else "")
    return f"| {' | '.join([*cells, *whole])} |"


def _answered(answers: Sequence[Answer]) -> str:
    """How many were answered of how many came, and what became of the others."""
    if not answers:
        return ""
    counts = {outcome: sum(a.outcome == outcome for a in answers) for outcome in OTHER_OUTCOMES}
    others = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    answered = sum(a.outcome == "ok" for a in answers)
    return f"{answered} of {len(answers)}" + (f" ({others})" if others else "")


def _spread(values: Sequence[float]) -> str:
    median = f"{statistics.median(values):.1f}"
    return f"{median} [{min(values):.1f} to {max(values):.1f}]" if len(values) > 1 else median
