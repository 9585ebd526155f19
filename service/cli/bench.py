"""`tminus bench`: a small open-loop load on a running server, and the latency of its requests.

With --slo it measures, by rate, the share of requests that are answered within some multiple of the time that a request
of that size takes alone. `python -m bench` uses the same functions.

A request is sent at its planned time, whether or not earlier ones are answered, and its latency counts from that time.
A client that waits for an answer before the next request would hide the waiting (coordinated omission).
"""

import asyncio
import math
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from tminus.service.cli.images import key_of_server, one_line_of_server
from tminus.service.cli.options import JSON, SAMPLER_NAMES, comma_separated
from tminus.service.cli.output import aligned, fail, say, say_json

if TYPE_CHECKING:
    from tminus.service.client import Sampled

MOST_REQUESTS = 20_000
SETTINGS = ("sampler", "steps", "guidance")  # that an answer names
MOST_OUTSTANDING = 500  # connections at once: half of the 1024 open files that a process usually has
MOST_LATE = 0.05  # the client's own lateness as a share of all latency; above it a line warns
PERCENTILES = (50, 95, 99)
MIX = "8:1x20,3:4x50,1:8x250"
LADDER = (0.4, 0.6, 0.8, 0.9, 1.0)  # rates, as shares of the estimated capacity
IN_TIME = 0.95  # share of the requests, at goodput
ALONE = 3  # requests of each size, one after the other; their median is the time alone


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a request in a mix."""

    n: int
    steps: int

    @property
    def row_steps(self) -> int:
        """The work of the request."""
        return self.n * self.steps

    def __str__(self) -> str:
        return f"{self.n}x{self.steps}"


Mix = Mapping[Size, int]  # the weight of each, by number of requests


def read_mix(text: str) -> dict[Size, int]:
    """Read WEIGHT:IMAGESxSTEPS, joined by commas. Raises click.BadParameter."""
    found: dict[Size, int] = {}
    for part in map(str.strip, text.split(",")):
        match = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})x([1-9]\d{0,5})", part, re.ASCII)
        if match is None:
            raise click.BadParameter(f"each must be WEIGHT:IMAGESxSTEPS of positive integers, got {part!r:.100}")
        weight, n, steps = map(int, match.groups())
        found[Size(n, steps)] = found.get(Size(n, steps), 0) + weight
    return found


def mean_row_steps(mix: Mix) -> float:
    """Return the mean work of a request of the mix."""
    return sum(size.row_steps * weight for size, weight in mix.items()) / sum(mix.values())


def mixed(mix: Mix, row_steps_per_s: float, seconds: float, seed: int) -> list[tuple[float, Size]]:
    """Draw a Poisson process of requests of a mix, for about so many seconds.

    The number of each size, at least one, and the rate are fixed, so that the load does not depend on the seed.
    """
    chance = random.Random(seed)  # noqa: S311 (no secret)
    blocks = row_steps_per_s * seconds / mean_row_steps(mix) / sum(mix.values())
    sizes = [size for size, weight in mix.items() for _ in range(max(1, round(blocks * weight)))]
    chance.shuffle(sizes)
    end_s = sum(size.row_steps for size in sizes) / row_steps_per_s
    return list(zip(sorted(chance.uniform(0, end_s) for _ in sizes), sizes, strict=True))


def share_within(times_alone: Sequence[float], factor: float) -> float:
    """Return the share of requests that took at most `factor` times their time alone."""
    return sum(each <= factor for each in times_alone) / len(times_alone)


def goodput(attained: Mapping[float, float]) -> dict[str, Any]:
    """Find the highest rate at which 95 % are in time. attained: the share in time at each rate.

    The value is interpolated between the last such rate and the next one. `at_least` marks the highest rate measured,
    `at_most` the lowest one: the goodput lies beyond it.
    """
    rates = sorted(attained)
    good = [rate for rate in rates if attained[rate] >= IN_TIME]
    if not good:
        return {"value": rates[0], "at_most": True}
    if good[-1] == rates[-1]:
        return {"value": rates[-1], "at_least": True}
    low, high = good[-1], rates[rates.index(good[-1]) + 1]
    part = (attained[low] - IN_TIME) / (attained[low] - attained[high])
    return {"value": low + part * (high - low)}


@dataclass(frozen=True, slots=True)
class Load:
    """Requests with the same parameters, and when each is sent: seconds after the start, rising."""

    at_s: tuple[float, ...]
    parameters: Mapping[str, Any]
    give_up_s: float  # after the last request

    @classmethod
    def poisson(cls, rate: float, seconds: float, seed: int, parameters: Mapping[str, Any], give_up_s: float) -> "Load":
        """Draw a Poisson process with a fixed number of arrivals, so that the load does not depend on the seed.

        Given their number, the arrivals are independent and uniform.
        """
        chance = random.Random(seed)  # noqa: S311 (no secret)
        count = max(1, round(rate * seconds))
        return cls(tuple(sorted(chance.uniform(0, seconds) for _ in range(count))), parameters, give_up_s)


@dataclass(slots=True)
class Outcome:
    """Counts how the requests of a load end."""

    latencies_s: list[float] = field(default_factory=list)  # of requests that were answered with images
    late_s: float = 0.0  # how late these requests were sent, in all
    refused: Counter[str] = field(default_factory=Counter)  # by code
    unanswered: int = 0  # given up at the end
    unsent: int = 0  # because MOST_OUTSTANDING others waited
    last_s: float = 0.0  # when the last answer came, after the start

    @property
    def missed(self) -> int:
        """The number of requests without images."""
        return self.refused.total() + self.unanswered + self.unsent

    def report(self, load: Load) -> dict[str, Any]:
        """Return the figures of --json. A percentile is None if the request at that place was given up."""
        answered, total = len(self.latencies_s), sum(self.latencies_s)
        # Without the given up ones, the percentiles would leave out the longest waits.
        ordered = sorted([*self.latencies_s, *[math.inf] * self.unanswered])
        found = {f"p{q}": percentile(ordered, q) if ordered else math.inf for q in PERCENTILES}
        images = answered * load.parameters.get("n", 1)
        late = self.late_s / total if total else 0.0
        return {
            "requests": len(load.at_s),
            "answered": answered,
            "refused": dict(sorted(self.refused.items())),
            "unanswered": self.unanswered,
            "unsent": self.unsent,
            "latency_s": {name: finite(value) for name, value in found.items()},
            "images_per_s": round(images / self.last_s, 3) if self.last_s else 0.0,
            "late_share": round(late, 4),
            "kept_up": self.unsent == 0 and late <= MOST_LATE,
        }


def percentile(ordered: Sequence[float], q: int) -> float:
    """Return the least of the values, in rising order, that q percent of them do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * q / 100) - 1)]


@dataclass(frozen=True, slots=True)
class Goal:
    """The requests at each rate, and the multiples of the time alone within which they should be answered."""

    mix: Mix
    alone_s: Mapping[Size, float]
    factors: tuple[float, ...]
    seconds: float
    seed: int
    give_up_s: float

    def at_rate(self, rate: float, outcomes: Mapping[Size, Outcome]) -> dict[str, Any]:
        """Return the figures of a rate. A request without an answer is not in time."""
        times = {
            str(size): [s / self.alone_s[size] for s in outcome.latencies_s] + [math.inf] * outcome.missed
            for size, outcome in outcomes.items()
        }
        ended = outcomes.values()
        latency_s = sum(sum(each.latencies_s) for each in ended)
        return {
            "rate": round(rate, 4),
            "row_steps_per_s": round(rate * mean_row_steps(self.mix), 2),
            "answered": sum(len(each.latencies_s) for each in ended),
            "refused": dict(sorted(sum((each.refused for each in ended), Counter[str]()).items())),
            "unanswered": sum(each.unanswered for each in ended),
            "unsent": sum(each.unsent for each in ended),
            "late_share": round(sum(each.late_s for each in ended) / latency_s, 4) if latency_s else 0.0,
            "all": self._figures([each for own in times.values() for each in own]),
            **{size: self._figures(own) for size, own in times.items()},
        }

    def report(self, at_rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the figures of all rates for --json."""
        late_share = max(each["late_share"] for each in at_rates)
        unsent = sum(each["unsent"] for each in at_rates)
        return {
            "mix": {str(size): weight for size, weight in self.mix.items()},
            "alone_s": {str(size): round(alone_s, 4) for size, alone_s in self.alone_s.items()},
            "seconds": self.seconds,
            "seed": self.seed,
            "rates": at_rates,
            "goodput": {
                f"{factor:g}": goodput(
                    {each["row_steps_per_s"]: each["all"]["within"][f"{factor:g}"] for each in at_rates}
                )
                for factor in self.factors
            },
            "answered": sum(each["answered"] for each in at_rates),
            "unsent": unsent,
            "late_share": late_share,
            "kept_up": unsent == 0 and late_share <= MOST_LATE,
        }

    def _figures(self, times_alone: Sequence[float]) -> dict[str, Any]:
        ordered = sorted(times_alone)
        return {
            "requests": len(ordered),
            "within": {f"{factor:g}": round(share_within(ordered, factor), 4) for factor in self.factors},
            **{f"p{q}": finite(percentile(ordered, q)) for q in PERCENTILES[:2]},
        }


def finite(value: float) -> float | None:
    """Round a value for --json; None for infinity, which JSON cannot hold."""
    return round(value, 4) if value < math.inf else None


@click.command(
    short_help="Send a small load to a server, and measure its latency.",
    epilog="Exit codes: 0 done; 1 no request was answered with images, or the command failed; 2 wrong command line; "
    "130 stopped by Ctrl-C.",
)
@click.argument("url", default="http://localhost:8000")
@click.option("--model", help="Name of one of its models  [default: its default model]")
@click.option(
    "--rate",
    "rates",
    metavar="NUMBER",
    callback=comma_separated(float, "a number from 0.01 to 1000", lambda rate: 0.01 <= rate <= 1000),
    help="Requests a second, on average; with --slo several, joined by commas  [default: 1; with --slo from the times "
    "alone]",
)
@click.option(
    "--seconds", type=click.FloatRange(1, 3600), default=20.0, help="Seconds for which requests arrive, at each rate"
)
@click.option("-n", "--n", type=click.IntRange(1), default=1, help="Images in each request")
@click.option(
    "--sampler",
    shell_complete=SAMPLER_NAMES,
    help="Sampler of the requests  [default: the recommended one; with --steps that of the scheduler]",
)
@click.option("--steps", metavar="INTEGER", help="Steps of the requests  [default: the recommended ones]")
@click.option(
    "--slo",
    "factors",
    metavar="NUMBER",
    callback=comma_separated(float, "a number from 1 to 1000", lambda factor: 1 <= factor <= 1000),
    help="Measure the share answered within so many times the time alone, by rate; one or several, joined by commas",
)
@click.option(
    "--mix",
    metavar="WEIGHT:IMAGESxSTEPS,...",
    callback=lambda _context, _option, text: text and read_mix(text),
    help=f"Requests of --slo  [default: {MIX}]",
)
@click.option("--class-label", help="Number or name of the class of all images")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the arrival times")
@click.option(
    "--give-up",
    "give_up_s",
    type=click.FloatRange(0, 3600),
    default=60.0,
    help="Seconds after the last arrival at which unanswered requests are given up",
)
@click.option(
    "--warm-up/--no-warm-up",
    default=True,
    help="Send one request first, which does not count; with --slo one of each size",
)
@JSON
def bench(
    url: str,
    model: str | None,
    rates: tuple[float, ...] | None,
    factors: tuple[float, ...] | None,
    mix: dict[Size, int] | None,
    seconds: float,
    seed: int,
    give_up_s: float,
    warm_up: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Send requests at random times to the server at URL, and print their latencies.

    \b
      tminus bench http://localhost:8000 --rate 2 --seconds 20
      tminus bench --rate 4 -n 4 --sampler dpmpp_2m --steps 20 --json
      tminus bench --slo 3 --mix 8:1x20,3:4x50,1:8x250

    The load is an open loop: requests arrive as a Poisson process, whether or not earlier ones are answered. A latency
    counts from the planned arrival. So a rate above what the server can do shows as latencies that grow with --seconds,
    and then as refusals. The requests have no seed, so that none is answered from a cache. A server that has keys gets
    the key in the variable TMINUS_KEY.

    The command prints these lines. --json has the same values under the names in brackets, and also url, model and
    class_label.

    \b
      load        [requests, n, sampler, steps, guidance, rate, seconds, seed]
                  what was sent, with the settings that the server used
      answered    [answered] requests answered with images
      refused     [refused] other requests, by error code and status
      unanswered  [unanswered] requests given up
      unsent      [unsent] requests not sent, because 500 others waited
      p50 ... p99 [latency_s] percentiles of the latency in seconds; none
                  (null) if the request at that place was given up
      images/s    [images_per_s] images of all answers, until the last one
      sent late   [late_share] lateness of this client, as a share of all
                  latency; above 5 % [kept_up] is false, and a warning says
                  that the client was too slow to measure the server

    With --slo, the requests are those of --mix, and the server is first measured with one request at a time. Rates that
    are not given are 0.4, 0.6, 0.8, 0.9 and 1 of the most row-steps a second that one request makes alone. A request
    that is refused or given up is not in time.

    \b
      mix         [mix, sampler, seconds, seed] weights by size, IMAGESxSTEPS
      alone       [alone_s] median time of a request alone, in seconds
      the table   [rates] for each rate, of all requests and of each size: the
                  share within so many times the time alone, and the p50 and
                  p95 of that multiple; none (null) as above
      goodput     [goodput] highest rate in row-steps a second with 95 % within
                  so many times, interpolated; > [at_least] and < [at_most]
                  mark a bound: the highest and the lowest of the rates
    """
    parameters = {name: value for name, value in flags.items() if value is not None}
    report: dict[str, Any] = {"url": url, "model": model}
    if factors is None:
        if mix is not None or (rates is not None and len(rates) > 1):
            fail(f"{'--mix' if mix is not None else '--rate, more than one'}: needs --slo")
        (rate,) = rates or (1.0,)
        check_number(rate, seconds)
        load = Load.poisson(rate, seconds, seed, parameters, give_up_s)
        with one_line_of_server(url):
            outcome, example = asyncio.run(_bench(url, model, load, warm_up))
        report |= flags | used_settings(example) | {"rate": rate, "seconds": seconds, "seed": seed}
        report |= outcome.report(load)
    else:
        if parameters.pop("n") != 1 or parameters.pop("steps", None) is not None:
            fail("--n and --steps: the requests of --slo are those of --mix")
        check_number(max(rates or [0.0]), seconds)
        mix = mix or read_mix(MIX)
        with one_line_of_server(url):
            alone_s, example = asyncio.run(_alone(url, model, mix, parameters, warm_up))
            most = max(size.row_steps / alone_s[size] for size in mix)
            rates = rates or tuple(share * most / mean_row_steps(mix) for share in LADDER)
            check_number(max(rates), seconds)
            goal = Goal(mix, alone_s, factors, seconds, seed, give_up_s)
            at_rates = [asyncio.run(_at_rate(url, model, goal, rate, parameters)) for rate in sorted(rates)]
        settings = flags | used_settings(example)
        report |= {"sampler": settings["sampler"], "class_label": settings["class_label"]} | goal.report(at_rates)
    if as_json:
        say_json(report)
    else:
        say(text_of(report) if factors is None else text_of_slo(report))
    if not report["kept_up"]:
        waiting = f", and {report['unsent']} were not sent" if report["unsent"] else ""
        say_late = f"{report['late_share']:.0%} of the latency is lateness of this client{waiting}"
        click.echo(f"tminus: the client could not keep up: {say_late}; take a lower --rate", err=True)
    if not report["answered"]:
        fail(f"{url}: no request was answered with images")


def check_number(rate: float, seconds: float) -> None:
    """Fail if a rate makes too many requests."""
    if rate * seconds > MOST_REQUESTS:
        fail(f"--rate times --seconds: must be at most {MOST_REQUESTS} requests, got {rate * seconds:.0f}")


def used_settings(example: "Sampled | None") -> dict[str, Any]:
    """Return the settings that a server used, by one of its answers."""
    return {name: value for name in SETTINGS if (value := getattr(example, name, None)) is not None}


def text_of(report: Mapping[str, Any]) -> str:
    """Lay the figures out as lines."""
    images = f"{report['n']} image{'s' * (report['n'] > 1)}"
    how = "".join(f", {name} {report[name]}" for name in SETTINGS if report.get(name) is not None)
    lines = {
        "load": f"{report['requests']} requests of {images}{how}; {report['rate']:g} a second",
        "answered": str(report["answered"]),
        "refused": ", ".join(f"{count} {code}" for code, count in report["refused"].items()),
        "unanswered": f"{report['unanswered']}, given up" if report["unanswered"] else "",
        "unsent": f"{report['unsent']}, with {MOST_OUTSTANDING} others waiting" if report["unsent"] else "",
        **{name: f"{value:.3f} s" if value is not None else "none" for name, value in report["latency_s"].items()},
        "images/s": f"{report['images_per_s']:g}",
        "sent late": f"{report['late_share']:.1%} of the latency",
    }
    return "\n".join(f"{name:>10}  {value}" for name, value in lines.items() if value)


def text_of_slo(report: Mapping[str, Any]) -> str:
    """Lay the figures of --slo out as lines and a table."""
    sampler = f"; sampler {report['sampler']}" if report["sampler"] is not None else ""
    factors = list(report["goodput"])
    rows = [["requests/s", "row-steps/s", "size", "requests", *(f"within {each}" for each in factors), "p50", "p95"]]
    for at_rate in report["rates"]:
        for size in ("all", *report["mix"]):
            figures, first = at_rate[size], size == "all"
            rows.append([f"{at_rate['rate']:.3g}", f"{at_rate['row_steps_per_s']:.0f}"] if first else ["", ""])
            rows[-1] += [size, str(figures["requests"]), *(f"{share:.0%}" for share in figures["within"].values())]
            rows[-1] += [f"{figures[q]:.3g}" if figures[q] is not None else "none" for q in ("p50", "p95")]
    lines = [
        f"{'mix':>10}  " + ", ".join(f"{weight} of {size}" for size, weight in report["mix"].items()) + sampler,
        f"{'alone':>10}  " + ", ".join(f"{size} {alone_s:.3f} s" for size, alone_s in report["alone_s"].items()),
        aligned(rows),
    ]
    for factor, found in report["goodput"].items():
        bound = "> " if "at_least" in found else "< " if "at_most" in found else ""
        lines.append(f"{'goodput':>10}  {bound}{found['value']:.0f} row-steps/s, {IN_TIME:.0%} within {factor} times")
    return "\n".join(lines)


async def _alone(
    url: str, model: str | None, mix: Mix, parameters: Mapping[str, Any], warm_up: bool
) -> "tuple[dict[Size, float], Sampled]":
    """Return the time that a request of each size takes alone, and an answer. Raises ClientError."""
    from tminus.service.client import AsyncClient

    clock = asyncio.get_running_loop().time
    alone_s: dict[Size, float] = {}
    async with AsyncClient(url, model=model, key=key_of_server()) as client:
        for size in mix:
            seconds = []
            for _ in range(warm_up + ALONE):
                sent_s = clock()
                example = await client.sample(**parameters, n=size.n, steps=size.steps)
                seconds.append(clock() - sent_s)
            alone_s[size] = median(seconds[warm_up:])
    return alone_s, example


async def _at_rate(
    url: str, model: str | None, goal: Goal, rate: float, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Send the mix at a rate, one load for each size, and return the figures."""
    from tminus.service.client import AsyncClient

    comers = mixed(goal.mix, rate * mean_row_steps(goal.mix), goal.seconds, goal.seed)
    end_s = comers[-1][0] + goal.give_up_s
    async with AsyncClient(url, model=model, key=key_of_server()) as client:

        def drive_size(size: Size) -> Awaitable[Outcome]:
            at_s = tuple(at_s for at_s, comer in comers if comer == size)
            of_size = {**parameters, "n": size.n, "steps": size.steps}
            load = Load(at_s, of_size, end_s - at_s[-1])
            return drive(load, partial(client.sample, **of_size), other_loads=len(goal.mix) - 1)

        outcomes = await asyncio.gather(*map(drive_size, goal.mix))
    return goal.at_rate(rate, dict(zip(goal.mix, outcomes, strict=True)))


async def _bench(url: str, model: str | None, load: Load, warm_up: bool) -> "tuple[Outcome, Sampled | None]":
    """Send a load to a server. Returns the outcome and an answer, if there was one.

    Raises ClientError if the request that warms up fails.
    """
    from tminus.service.client import AsyncClient

    async with AsyncClient(url, model=model, key=key_of_server()) as client:
        examples = [await client.sample(**load.parameters)] if warm_up else []

        async def ask() -> None:
            examples[:] = [await client.sample(**load.parameters)]

        outcome = await drive(load, ask)
        return outcome, examples[0] if examples else None


async def drive(load: Load, ask: Callable[[], Awaitable[object]], other_loads: int = 0) -> Outcome:
    """Send each request of a load at its time, and count how it ends.

    ask: sends one; may raise ClientError. other_loads: the number of loads that the client drives at the same time.
    """
    from tminus.service.client import ClientError, Problem

    clock = asyncio.get_running_loop().time
    outcome, start_s = Outcome(), clock()
    waiting: set[asyncio.Task[None]] = set()

    async def one(due_s: float) -> None:
        late_s = clock() - due_s
        try:
            await ask()
        except Problem as error:
            outcome.refused[f"{error.code or 'problem'} ({error.status})"] += 1
        except ClientError as error:
            outcome.refused[type(error).__name__] += 1
        else:
            outcome.late_s += late_s
            outcome.latencies_s.append(clock() - due_s)
            outcome.last_s = clock() - start_s

    for at_s in load.at_s:
        await asyncio.sleep(start_s + at_s - clock())
        if len(waiting) >= MOST_OUTSTANDING // (1 + other_loads):
            outcome.unsent += 1
            continue
        task = asyncio.create_task(one(start_s + at_s))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    if waiting:
        await asyncio.wait(set(waiting), timeout=load.give_up_s)
    left = list(waiting)
    outcome.unanswered = len(left)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    return outcome
