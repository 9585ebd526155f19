"""`tminus bench`: sends a small open-loop load to a server, and measures the latency of the requests.

With --slo, it measures the share of requests that are in time at each rate. The time alone of a request is its latency
on an idle server. A request is in time if its latency is at most a given multiple of its time alone. `python -m bench`
uses the same functions.

Each request is sent at its planned time, even if earlier requests are still waiting, and its latency counts from that
time. A client that waits for each response would hide the queueing time (coordinated omission).
"""

import asyncio
import math
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

import click

from tminus.service.cli.images import key_of_server, one_line_of_server
from tminus.service.cli.options import JSON, SAMPLER_NAMES, comma_separated
from tminus.service.cli.output import aligned, fail, say, say_json

Kind = TypeVar("Kind")  # all requests of one kind have the same parameters
MOST_REQUESTS = 20_000
SETTINGS = ("sampler", "steps", "guidance")  # settings that a response contains
MOST_OUTSTANDING = 500  # limit on open requests; half of the usual limit of 1024 open files
MOST_LATE = 0.05  # the command warns if the client's lateness exceeds this share of all latency
PERCENTILES = (50, 95, 99)
MIX = "8:1x20,3:4x50,1:8x250"
LADDER = (0.4, 0.6, 0.8, 0.9, 1.0)  # default rates, as shares of the estimated capacity
IN_TIME = 0.95  # the goodput is the highest rate at which this share of requests is in time
ALONE = 3  # requests of each size, sent one at a time; their median latency is the time alone


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a request: its number of images and steps."""

    n: int
    steps: int

    @property
    def row_steps(self) -> int:
        return self.n * self.steps

    def __str__(self) -> str:
        return f"{self.n}x{self.steps}"


Mix = Mapping[Size, int]  # relative frequency of each size


def read_mix(text: str) -> dict[Size, int]:
    """Parse a list of WEIGHT:IMAGESxSTEPS. Raises click.BadParameter."""
    found: dict[Size, int] = {}
    for part in map(str.strip, text.split(",")):
        match = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})x([1-9]\d{0,5})", part, re.ASCII)
        if match is None:
            raise click.BadParameter(f"each must be WEIGHT:IMAGESxSTEPS of positive integers, got {part!r:.100}")
        weight, n, steps = map(int, match.groups())
        found[Size(n, steps)] = found.get(Size(n, steps), 0) + weight
    return found


def mean_row_steps(mix: Mix) -> float:
    """Return the average number of row-steps in a request. A row-step is one step of one image."""
    return sum(size.row_steps * weight for size, weight in mix.items()) / sum(mix.values())


def poisson(count: int, seconds: float, chance: random.Random) -> list[float]:
    """Draw the arrival times of a Poisson process. The number is fixed, so every seed gives the same load.

    Given their number, the arrival times of a Poisson process are independent and uniformly distributed.
    """
    return sorted(chance.uniform(0, seconds) for _ in range(count))


def mixed(mix: Mix, row_steps_per_s: float, seconds: float, seed: int) -> list[tuple[float, Size]]:
    """Draw a Poisson process of requests from a mix. The process lasts about `seconds` seconds.

    The rate and the number of requests of each size (at least one) are the same for every seed.
    """
    chance = random.Random(seed)  # noqa: S311 (no secret)
    blocks = row_steps_per_s * seconds / mean_row_steps(mix) / sum(mix.values())
    sizes = [size for size, weight in mix.items() for _ in range(max(1, round(blocks * weight)))]
    chance.shuffle(sizes)
    end_s = sum(size.row_steps for size in sizes) / row_steps_per_s
    return list(zip(poisson(len(sizes), end_s, chance), sizes, strict=True))


def share_within(times_alone: Sequence[float], factor: float) -> float:
    """Return the share of requests with a latency of at most `factor` times their time alone.

    times_alone: the latency of each request, divided by its time alone.
    """
    return sum(each <= factor for each in times_alone) / len(times_alone)


def goodput(attained: Mapping[float, float]) -> dict[str, Any]:
    """Find the highest rate at which 95 % of the requests are in time.

    attained: the share of requests that are in time, keyed by rate.

    The value is interpolated between the highest rate that reaches 95 % and the next higher rate. `at_least` is set if
    the highest rate measured reaches 95 %, and `at_most` if no rate does.
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


@dataclass(slots=True)
class Outcome:
    """Counts the outcomes of all requests of one kind."""

    requests: int = 0
    latencies_s: list[float] = field(default_factory=list)  # latencies of the requests that were answered with images
    late_s: float = 0.0  # sum of the delays with which the client sent these requests
    refused: Counter[str] = field(default_factory=Counter)  # keyed by error code and status, or by exception type
    unsent: int = 0  # number of requests not sent, because MOST_OUTSTANDING others were still waiting
    last_s: float = 0.0  # time from the start to the last response
    answer: Any = None  # the last response

    @property
    def missed(self) -> int:
        """Number of requests that were not answered with images."""
        return self.requests - len(self.latencies_s)

    @property
    def unanswered(self) -> int:
        """Number of requests that were given up without a response."""
        return self.missed - self.refused.total() - self.unsent


def figures_of(outcomes: Collection[Outcome]) -> dict[str, Any]:
    """Return the values that --json prints for every kind of load."""
    latency_s = sum(sum(each.latencies_s) for each in outcomes)
    return {
        "answered": sum(len(each.latencies_s) for each in outcomes),
        "refused": dict(sorted(sum((each.refused for each in outcomes), Counter[str]()).items())),
        "unanswered": sum(each.unanswered for each in outcomes),
        "unsent": sum(each.unsent for each in outcomes),
        "late_share": round(sum(each.late_s for each in outcomes) / latency_s, 4) if latency_s else 0.0,
    }


def kept_up(unsent: int, late_share: float) -> bool:
    """Return True if the client was fast enough, so the measurements describe the server."""
    return unsent == 0 and late_share <= MOST_LATE


def figures_of_one_rate(outcome: Outcome, n: int) -> dict[str, Any]:
    """Return the values that --json prints for requests of n images.

    A percentile is None if it falls on a request that was given up.
    """
    # A request that was given up counts as infinitely slow: the percentiles must not ignore the longest waits.
    ordered = sorted([*outcome.latencies_s, *[math.inf] * outcome.unanswered])
    figures = figures_of([outcome])
    return figures | {
        "requests": outcome.requests,
        "latency_s": {f"p{q}": finite(percentile(ordered, q)) if ordered else None for q in PERCENTILES},
        "images_per_s": round(n * figures["answered"] / outcome.last_s, 3) if outcome.last_s else 0.0,
        "kept_up": kept_up(figures["unsent"], figures["late_share"]),
    }


def percentile(ordered: Sequence[float], q: int) -> float:
    """Return the smallest value that is at least as large as q % of the values. ordered: ascending."""
    return ordered[max(0, math.ceil(len(ordered) * q / 100) - 1)]


@dataclass(frozen=True, slots=True)
class Goal:
    """Parameters of --slo. A request is in time if it takes at most `factor` times its time alone.

    The share of requests in time is measured for each of several factors.
    """

    mix: Mix
    alone_s: Mapping[Size, float]
    factors: tuple[float, ...]

    def at_rate(self, rate: float, outcomes: Mapping[Size, Outcome]) -> dict[str, Any]:
        """Return the values that --json prints for one rate. A request without images is not in time."""
        times = {
            str(size): [s / self.alone_s[size] for s in outcome.latencies_s] + [math.inf] * outcome.missed
            for size, outcome in outcomes.items()
        }
        return {
            "rate": round(rate, 4),
            "row_steps_per_s": round(rate * mean_row_steps(self.mix), 2),
            **figures_of(outcomes.values()),
            "all": self._figures([each for own in times.values() for each in own]),
            **{size: self._figures(own) for size, own in times.items()},
        }

    def report(self, at_rates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        late_share = max(each["late_share"] for each in at_rates)
        unsent = sum(each["unsent"] for each in at_rates)
        names = [f"{factor:g}" for factor in self.factors]
        return {
            "mix": {str(size): weight for size, weight in self.mix.items()},
            "alone_s": {str(size): round(alone_s, 4) for size, alone_s in self.alone_s.items()},
            "rates": at_rates,
            "goodput": {
                name: goodput({each["row_steps_per_s"]: each["all"]["within"][name] for each in at_rates})
                for name in names
            },
            "answered": sum(each["answered"] for each in at_rates),
            "unsent": unsent,
            "late_share": late_share,
            "kept_up": kept_up(unsent, late_share),
        }

    def _figures(self, times_alone: Sequence[float]) -> dict[str, Any]:
        ordered = sorted(times_alone)
        return {
            "requests": len(ordered),
            "within": {f"{factor:g}": round(share_within(ordered, factor), 4) for factor in self.factors},
            **{f"p{q}": finite(percentile(ordered, q)) for q in PERCENTILES[:2]},
        }


def finite(value: float) -> float | None:
    """Round a value for --json. Returns None for infinity, which JSON cannot express."""
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

    The load is an open loop: requests arrive as a Poisson process, even if earlier requests have no response yet. The
    latency of a request counts from its planned arrival. If the rate exceeds the server's capacity, the latencies grow
    with --seconds, until the server refuses requests. The requests have no seed, so no response comes from a
    cache. The command sends the API key in the variable TMINUS_KEY, if there is one.

    The command prints these lines. --json has the same values under the names in brackets, and also url, model and
    class_label.

    \b
      load        [requests, n, sampler, steps, guidance, rate, seconds, seed]
                  the requests, with the settings that the server used
      answered    [answered] requests answered with images
      refused     [refused] other requests, by error code and status
      unanswered  [unanswered] requests given up
      unsent      [unsent] requests not sent, because 500 others waited
      p50 ... p99 [latency_s] percentiles of the latency in seconds; none
                  (null) if the percentile falls on a request given up
      images/s    [images_per_s] images a second until the last response
      sent late   [late_share] lateness of this client, as a share of all
                  latency; above 5 % [kept_up] is false, and a warning says
                  that the client was too slow to measure the server

    With --slo, the requests are those of --mix. The command first sends one request at a time, to measure the time
    that a request takes alone. The default rates are 0.4, 0.6, 0.8, 0.9 and 1 times the highest number of row-steps a
    second that a request reaches alone. A request that is refused or given up is not in time.

    \b
      mix         [mix, sampler, seconds, seed] weights by size, IMAGESxSTEPS
      alone       [alone_s] median time of a request alone, in seconds
      the table   [rates] for each rate, for all requests and for each size:
                  the share within each multiple of the time alone, and the
                  p50 and p95 of latency / time alone; none (null) as above
      goodput     [goodput] highest rate in row-steps a second with 95 % within
                  the multiple, interpolated; > [at_least] and < [at_most]:
                  above the highest or below the lowest rate measured
    """
    parameters = {name: value for name, value in flags.items() if value is not None}
    report: dict[str, Any] = {"url": url, "model": model, "seconds": seconds, "seed": seed}
    if factors is None:
        if mix is not None or (rates is not None and len(rates) > 1):
            fail(f"{'--mix' if mix is not None else '--rate, more than one'}: needs --slo")
        (rate,) = rates or (1.0,)
        check_number(rate, seconds)
        chance = random.Random(seed)  # noqa: S311 (no secret)
        arrivals = [(at_s, "all") for at_s in poisson(max(1, round(rate * seconds)), seconds, chance)]
        with one_line_of_server(url):
            _, example = asyncio.run(_send_alone(url, model, {"all": parameters}, int(warm_up)))
            outcome = asyncio.run(_send(url, model, {"all": parameters}, arrivals, give_up_s))["all"]
        report |= flags | used_settings(outcome.answer or example) | {"rate": rate}
        report |= figures_of_one_rate(outcome, flags["n"])
    else:
        if parameters.pop("n") != 1 or parameters.pop("steps", None) is not None:
            fail("--n and --steps: the requests of --slo are those of --mix")
        check_number(max(rates or [0.0]), seconds)
        mix = mix or read_mix(MIX)
        kinds = {size: {**parameters, "n": size.n, "steps": size.steps} for size in mix}
        with one_line_of_server(url):
            took_s, example = asyncio.run(_send_alone(url, model, kinds, warm_up + ALONE))
            goal = Goal(mix, {size: median(own[warm_up:]) for size, own in took_s.items()}, factors)
            most = max(size.row_steps / goal.alone_s[size] for size in mix)
            rates = rates or tuple(share * most / mean_row_steps(mix) for share in LADDER)
            check_number(max(rates), seconds)
            at_rates = []
            for rate in sorted(rates):
                comers = mixed(mix, rate * mean_row_steps(mix), seconds, seed)
                at_rates.append(goal.at_rate(rate, asyncio.run(_send(url, model, kinds, comers, give_up_s))))
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
    """Fail if there would be too many requests at this rate."""
    if rate * seconds > MOST_REQUESTS:
        fail(f"--rate times --seconds: must be at most {MOST_REQUESTS} requests, got {rate * seconds:.0f}")


def used_settings(example: Any) -> dict[str, Any]:
    """Return the settings that the server used, as stated in one of its responses."""
    return {name: value for name in SETTINGS if (value := getattr(example, name, None)) is not None}


def text_of(report: Mapping[str, Any]) -> str:
    """Return the report as lines of text."""
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
    """Return the report of --slo as lines of text, with a table."""
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


async def _send_alone(
    url: str, model: str | None, kinds: Mapping[Kind, Mapping[str, Any]], times: int
) -> tuple[dict[Kind, list[float]], Any]:
    """Send requests one after the other, `times` of each kind.

    Returns the duration of each request in seconds, and the last response. Raises ClientError.
    """
    from tminus.service.client import AsyncClient

    clock = asyncio.get_running_loop().time
    took_s: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    answer = None
    async with AsyncClient(url, model=model, key=key_of_server()) as client:
        for kind, parameters in kinds.items():
            for _ in range(times):
                sent_s = clock()
                answer = await client.sample(**parameters)
                took_s[kind].append(clock() - sent_s)
    return took_s, answer


async def _send(
    url: str,
    model: str | None,
    kinds: Mapping[Kind, Mapping[str, Any]],
    arrivals: Sequence[tuple[float, Kind]],
    give_up_s: float,
) -> dict[Kind, Outcome]:
    from tminus.service.client import AsyncClient

    async with AsyncClient(url, model=model, key=key_of_server()) as client:
        return await drive(arrivals, lambda kind: client.sample(**kinds[kind]), give_up_s)


async def drive(
    arrivals: Sequence[tuple[float, Kind]], ask: Callable[[Kind], Awaitable[object]], give_up_s: float
) -> dict[Kind, Outcome]:
    """Send each request at its planned time, and count the outcomes of each kind.

    arrivals: for each request, its kind and the seconds from the start to its planned time; in ascending order. ask:
    sends a request and returns the response; may raise ClientError. give_up_s: seconds to wait after the last arrival.
    """
    from tminus.service.client import ClientError, Problem

    clock = asyncio.get_running_loop().time
    outcomes = {kind: Outcome() for _, kind in arrivals}
    start_s = clock()
    waiting: set[asyncio.Task[None]] = set()

    async def one(due_s: float, kind: Kind) -> None:
        outcome, late_s = outcomes[kind], clock() - due_s
        try:
            outcome.answer = await ask(kind)
        except Problem as error:
            outcome.refused[f"{error.code or 'problem'} ({error.status})"] += 1
        except ClientError as error:
            outcome.refused[type(error).__name__] += 1
        else:
            outcome.late_s += late_s
            outcome.latencies_s.append(clock() - due_s)
            outcome.last_s = clock() - start_s

    for at_s, kind in arrivals:
        await asyncio.sleep(start_s + at_s - clock())
        outcomes[kind].requests += 1
        if len(waiting) >= MOST_OUTSTANDING:
            outcomes[kind].unsent += 1
            continue
        task = asyncio.create_task(one(start_s + at_s, kind))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    if waiting:
        await asyncio.wait(set(waiting), timeout=give_up_s)
    left = list(waiting)
    for task in left:
        task.cancel()
    await asyncio.gather(*left, return_exceptions=True)
    return outcomes
