"""`tminus bench`: a small open-loop load on a running server, and what its users would wait.

A request is sent at the time that was planned for it, whether or not earlier ones are answered, and its latency counts
from that time: a client that waits for answers before it asks again hides the waits that it makes (coordinated
omission).
"""

import asyncio
import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import click

from tminus.service.cli.images import key_of_server, one_line_of_server
from tminus.service.cli.options import JSON, SAMPLER_NAMES
from tminus.service.cli.output import fail, say, say_json

if TYPE_CHECKING:
    from tminus.service.client import Sampled

MOST_REQUESTS = 20_000
SETTINGS = ("sampler", "steps", "guidance")  # that an answer says were taken
MOST_OUTSTANDING = 500  # connections at once: half of the 1024 open files that a process usually has
MOST_LATE = 0.05  # share of all latency that may be the client's own lateness, before a line warns
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, slots=True)
class Load:
    """Says what is asked for, and when: seconds after the start, rising."""

    at_s: tuple[float, ...]
    parameters: Mapping[str, Any]
    give_up_s: float  # after the last one

    @classmethod
    def poisson(cls, rate: float, seconds: float, seed: int, parameters: Mapping[str, Any], give_up_s: float) -> "Load":
        """Draw a Poisson process of a given number of arrivals, so that the load is no luck of the seed.

        Then each arrival is at a time of its own, independent and uniform.
        """
        chance = random.Random(seed)  # noqa: S311 (no secret)
        count = max(1, round(rate * seconds))
        return cls(tuple(sorted(chance.uniform(0, seconds) for _ in range(count))), parameters, give_up_s)


@dataclass(slots=True)
class Outcome:
    """Counts what becomes of the requests of a load, as they end."""

    latencies_s: list[float] = field(default_factory=list)  # of those answered with images
    late_s: float = 0.0  # by how much all that were answered were sent after their time
    refused: Counter[str] = field(default_factory=Counter)  # by code
    unanswered: int = 0  # given up at the end
    unsent: int = 0  # since MOST_OUTSTANDING others had no answer yet
    last_s: float = 0.0  # when the last answer came, after the start

    def report(self, load: Load) -> dict[str, Any]:
        """Return the figures, as --json prints them. A latency is None where that request was given up."""
        answered, total = len(self.latencies_s), sum(self.latencies_s)
        # Without those, the longest waits would be left out of the percentiles.
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
            "latency_s": {name: round(value, 4) if value < math.inf else None for name, value in found.items()},
            "images_per_s": round(images / self.last_s, 3) if self.last_s else 0.0,
            "late_share": round(late, 4),
            "kept_up": self.unsent == 0 and late <= MOST_LATE,
        }


def percentile(ordered: Sequence[float], q: int) -> float:
    """Return the least of the values, in rising order, that q percent of them do not exceed."""
    return ordered[max(0, math.ceil(len(ordered) * q / 100) - 1)]


@click.command(
    short_help="Send a small load to a server, and measure its latency.",
    epilog="Exit codes: 0 done; 1 no request was answered with images, or the command failed; 2 wrong command line; "
    "130 stopped by Ctrl-C.",
)
@click.argument("url", default="http://localhost:8000")
@click.option("--model", help="Name of one of its models  [default: its default model]")
@click.option("--rate", type=click.FloatRange(0.01, 1000), default=1.0, help="Requests a second, on average")
@click.option("--seconds", type=click.FloatRange(1, 3600), default=20.0, help="Seconds for which requests arrive")
@click.option("-n", "--n", type=click.IntRange(1), default=1, help="Images in each request")
@click.option(
    "--sampler",
    shell_complete=SAMPLER_NAMES,
    help="Sampler of the requests  [default: the recommended one; with --steps that of the scheduler]",
)
@click.option("--steps", metavar="INTEGER", help="Steps of the requests  [default: the recommended ones]")
@click.option("--class-label", help="Number or name of the class of all images")
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the arrival times")
@click.option(
    "--give-up",
    "give_up_s",
    type=click.FloatRange(0, 3600),
    default=60.0,
    help="Seconds after the last arrival at which unanswered requests are given up",
)
@click.option("--warm-up/--no-warm-up", default=True, help="Send one request first, which does not count")
@JSON
def bench(
    url: str,
    model: str | None,
    rate: float,
    seconds: float,
    seed: int,
    give_up_s: float,
    warm_up: bool,
    as_json: bool,
    **given: Any,
) -> None:
    """Send requests at random times to the server at URL, and print their latencies.

    \b
      tminus bench http://localhost:8000 --rate 2 --seconds 20
      tminus bench --rate 4 -n 4 --sampler dpmpp_2m --steps 20 --json

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
    """
    if rate * seconds > MOST_REQUESTS:
        fail(f"--rate times --seconds: must be at most {MOST_REQUESTS} requests, got {rate * seconds:.0f}")
    parameters = {name: value for name, value in given.items() if value is not None}
    load = Load.poisson(rate, seconds, seed, parameters, give_up_s)
    with one_line_of_server(url):
        outcome, example = asyncio.run(_bench(url, model, load, warm_up))
    report = {
        "url": url,
        "model": model,
        **given,
        **{name: value for name in SETTINGS if (value := getattr(example, name, None)) is not None},
        "rate": rate,
        "seconds": seconds,
        "seed": seed,
    }
    report |= outcome.report(load)
    if as_json:
        say_json(report)
    else:
        say(text_of(report))
    if not report["kept_up"]:
        waiting = f", and {outcome.unsent} were not sent" if outcome.unsent else ""
        say_late = f"{report['late_share']:.0%} of the latency is lateness of this client{waiting}"
        click.echo(f"tminus: the client could not keep up: {say_late}; take a lower --rate", err=True)
    if not outcome.latencies_s:
        fail(f"{url}: no request was answered with images")


def text_of(report: Mapping[str, Any]) -> str:
    """Lay the figures out as lines."""
    images = f"{report['n']} image{'s' * (report['n'] > 1)}"
    how = "".join(f", {name} {report[name]}" for name in SETTINGS if report.get(name) is not None)
    told = {
        "load": f"{report['requests']} requests of {images}{how}; {report['rate']:g} a second",
        "answered": str(report["answered"]),
        "refused": ", ".join(f"{count} {code}" for code, count in report["refused"].items()),
        "unanswered": f"{report['unanswered']}, given up" if report["unanswered"] else "",
        "unsent": f"{report['unsent']}, with {MOST_OUTSTANDING} others waiting" if report["unsent"] else "",
        **{name: f"{value:.3f} s" if value is not None else "none" for name, value in report["latency_s"].items()},
        "images/s": f"{report['images_per_s']:g}",
        "sent late": f"{report['late_share']:.1%} of the latency",
    }
    return "\n".join(f"{name:>10}  {value}" for name, value in told.items() if value)


async def _bench(url: str, model: str | None, load: Load, warm_up: bool) -> "tuple[Outcome, Sampled | None]":
    """Send a load to a server. Raises ClientError where the request that warms up fails.

    Also returns an answer, if there was one, which says how its images were made.
    """
    from tminus.service.client import AsyncClient

    async with AsyncClient(url, model=model, key=key_of_server()) as client:
        examples = [await client.sample(**load.parameters)] if warm_up else []

        async def ask() -> None:
            examples[:] = [await client.sample(**load.parameters)]

        outcome = await drive(load, ask)
        return outcome, examples[0] if examples else None


async def drive(load: Load, ask: Callable[[], Awaitable[None]]) -> Outcome:
    """Send each request of a load at its time, and see what becomes of it. ask: sends one; may raise ClientError."""
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
        if len(waiting) >= MOST_OUTSTANDING:
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
