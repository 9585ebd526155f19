"""From records to figures. Pure arithmetic: nothing is measured, read or written here."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from bench.records import Answer, Bare, Etas, Loaded, Run

TITLES = {
    "tminus": "tminus",
    "before": "tminus before",
    "fcfs": "tminus, first come first served",
    "lock": "lock around DDPMPipeline",
    "litserve": "LitServe",
    "mosec": "mosec",
}
PEERS = ("before", "lock", "litserve", "mosec")
ETA_LEAST_S = 0.25  # a job that is nearly done says nothing: the answer's own way counts for as much
SHORT_STEPS = 50  # a "short" request has fewer, a "long" one more


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure: a ratio unless its unit says otherwise, with the range over the rounds where there are several."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    unit: str = ""


def quantile(values: Iterable[float], q: float) -> float:
    """Interpolate linearly between the order statistics."""
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def waits(answers: Iterable[Answer], least_steps: int = 0, most_steps: int = 1_000_000) -> list[float]:
    """How long they waited. Who had no answer at the load's end waited at least so long, and counts."""
    return [a.waited_s for a in answers if a.outcome in ("ok", "unanswered") and least_steps <= a.steps <= most_steps]


def first_steps(answers: Iterable[Answer], most_steps: int = 1_000_000) -> list[float]:
    """Times to the first step, where the answers tell."""
    return [a.first_step_s for a in answers if a.first_step_s is not None and a.steps <= most_steps]


def received(answers: Iterable[Answer]) -> int:
    """Row-steps of the answers that were delivered."""
    return sum(a.row_steps for a in answers if a.outcome == "ok")


def wasted_share(loaded: Loaded) -> float:
    """The share of the steps taken that went into answers that were not delivered."""
    return max(0.0, loaded.took_row_steps - received(loaded.answers)) / max(1.0, loaded.took_row_steps)


def wasted_of_abandoned(loaded: Loaded) -> float | None:
    """Row-steps that were not delivered, over those of the abandoned requests; None where none was abandoned."""
    abandoned = sum(a.row_steps for a in loaded.answers if a.outcome in ("left", "unanswered"))
    return max(0.0, loaded.took_row_steps - received(loaded.answers)) / abandoned if abandoned else None


def row_steps_per_s(loaded: Loaded) -> float:
    """Steps taken in the window, a second."""
    return loaded.counted.row_steps / loaded.seconds


def places_per_s(loaded: Loaded) -> float:
    """Rows through the network in the window, a second: twice the steps where rows are guided."""
    return loaded.counted.places / loaded.seconds


def rows_per_tick(loaded: Loaded) -> float:
    """How full the passes were."""
    return loaded.counted.places / max(1.0, loaded.counted.ticks)


def eta_errors(etas: Etas) -> list[float]:
    """|ETA - what was left in fact| as a share of the job's whole time in the system, for each time it was told."""
    done = {a.job_id: a for a in etas.answers if a.outcome == "ok" and a.job_id is not None}
    errors = []
    for sample in etas.samples:
        answer = done.get(sample.job_id)
        if answer is None:
            continue
        left_s = answer.at_s + answer.waited_s - sample.at_s
        if left_s >= ETA_LEAST_S:
            errors.append(abs(sample.eta_s - left_s) / answer.waited_s)
    return errors


def of(run: Run, load: str, contender: str) -> list[Loaded]:
    """A contender's turns at a load, in order of the rounds."""
    turns = [one for one in run.loads if one.load == load and one.contender == contender]
    return sorted(turns, key=lambda one: one.round)


def peak_flops(bare: Bare) -> float:
    """The most that the processor does at the precision in use, by matmul or by convolution."""
    if bare.precision == "bfloat16":
        return max(bare.matmul_bfloat16_flops, bare.matmul_flops)
    return max(bare.matmul_flops, bare.conv_flops)


def bare_rate(bare: Bare, places: int) -> float:
    """Rows/s of the bare loop at the batch that is nearest to the server's."""
    return bare.paces[min(bare.paces, key=lambda batch: abs(batch - places))].rows_per_s


def figures(run: Run) -> list[Figure]:
    """Compute all figures that can be had from what was run."""
    found: list[Figure] = []

    def ratio(name: str, top: Sequence[float], bottom: Sequence[float]) -> None:
        if top and bottom:
            found.append(_ratio(name, top, bottom))

    def values(load: str, key: str, value: Callable[[Loaded], float | None]) -> list[float]:
        return [found for one in of(run, load, key) if (found := value(one)) is not None]

    def compare(name: str, load: str, value: Callable[[Loaded], float | None], *, of_tminus: bool) -> None:
        """A ratio for each peer, tminus over it or it over tminus."""
        ours = values(load, "tminus", value)
        for peer in PEERS:
            theirs = values(load, peer, value)
            title = TITLES[peer]
            if of_tminus:
                ratio(f"{name}: tminus / {title}", ours, theirs)
            else:
                ratio(f"{name}: {title} / tminus", theirs, ours)

    def wait(q: float) -> Callable[[Loaded], float | None]:
        return lambda one: _quantile(waits(one.answers), q)

    def short_wait(q: float) -> Callable[[Loaded], float | None]:
        return lambda one: _quantile(waits(one.answers, most_steps=SHORT_STEPS - 1), q)

    def long_mean(one: Loaded) -> float | None:
        return _mean(waits(one.answers, least_steps=SHORT_STEPS + 1))

    compare("idle request n=1, 50 steps, median", "idle", wait(0.5), of_tminus=True)
    for load, what in (("saturation", "1 image"), ("saturation-16", "16 images")):
        name = f"saturated row-steps/s, requests of {what}"
        compare(name, load, row_steps_per_s, of_tminus=True)
        bare = [bare_rate(one, run.places) for one in run.bare]
        ratio(f"{name}: tminus / bare executor loop", values(load, "tminus", places_per_s), bare)
    compare("saturated row-steps/s, dpmpp_2m", "saturation-dpmpp_2m", row_steps_per_s, of_tminus=True)
    compare("mixed load, median wait of 20-step requests", "mixed", short_wait(0.5), of_tminus=False)
    compare("mixed load, mean time of the long jobs", "mixed", long_mean, of_tminus=True)
    compare("burst, 95th percentile of the wait", "burst", wait(0.95), of_tminus=False)
    name = "load of all step counts, 99th percentile of the 20-step requests"
    compare(name, "steps", short_wait(0.99), of_tminus=False)
    for name, value in (
        ("99th percentile of the 20-step requests", short_wait(0.99)),
        ("mean time of the 1000-step jobs", long_mean),
    ):
        fcfs, default = values("policy", "fcfs", value), values("policy", "tminus", value)
        ratio(f"load 0.8, {name}: first come first served / default policy", fcfs, default)
    for one in of(run, "first-step", "tminus"):
        times = first_steps(one.answers, most_steps=SHORT_STEPS)
        if times and one.counted.ticks_s:
            tick_s = one.counted.ticks_s / max(1.0, one.counted.ticks)
            found.append(Figure("first step with a place free, p99", quantile(times, 0.99) / tick_s, unit="ticks"))
    for key in ("tminus", *PEERS):
        for one in of(run, "hang-ups", key):
            if (share := wasted_of_abandoned(one)) is not None:
                name = f"row-steps for clients who left, of those they had asked for: {TITLES[key]}"
                found.append(Figure(name, 100 * share, unit="%"))
    if run.identity is not None and run.identity.requests:
        name = f"images byte-identical alone and under load, of {run.identity.requests}"
        found.append(Figure(name, run.identity.same, unit="images"))
    if run.etas is not None and (errors := eta_errors(run.etas)):
        name = f"ETA of running jobs, p95 of the error over the job's whole time ({len(errors)} times told)"
        found.append(Figure(name, 100 * quantile(errors, 0.95), unit="%"))
    none = [crowd for crowd in run.crowds if not crowd.waiting]
    for many in run.crowds:
        if many.waiting and none:
            name = f"a full tick, {many.waiting} jobs waiting / none"
            found.append(Figure(name, many.tick_s / statistics.mean(one.tick_s for one in none)))
            wall_s = statistics.mean(one.tick_wall_s for one in none)
            found.append(Figure(f"{name}, with what is between ticks", many.tick_wall_s / wall_s))
    if len(run.memory) == 2:
        few, many_requests = run.memory
        name = f"resident memory after {many_requests.requests} requests / after {few.requests}"
        found.append(Figure(name, many_requests.rss_bytes / few.rss_bytes))
    return found


def _ratio(name: str, top: Sequence[float], bottom: Sequence[float]) -> Figure:
    """Divide the medians; the range is that of the ratios round by round."""
    value = statistics.median(top) / statistics.median(bottom)
    by_round = [a / b for a, b in zip(top, bottom, strict=False)]
    return Figure(name, value, min(by_round), max(by_round)) if len(by_round) > 1 else Figure(name, value)


def _quantile(values: Sequence[float], q: float) -> float | None:
    return quantile(values, q) if values else None


def _mean(values: Sequence[float]) -> float | None:
    return statistics.mean(values) if values else None
