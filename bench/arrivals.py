"""When requests arrive: seeded lists. Pure; the same arguments give the same list, for every contender alike."""

import random
from collections.abc import Sequence

from bench.records import Arrival, Ask
from tminus.service.cli.bench import Mix, mixed


def poisson(asks: Sequence[Ask], seconds: float, seed: int) -> list[Arrival]:
    """Make a Poisson process of a fixed number of arrivals: their times are independent and uniform.

    The fixed number fixes the load, which would otherwise depend on the seed.
    """
    chance = random.Random(seed)
    times = sorted(chance.uniform(0, seconds) for _ in asks)
    return [Arrival(at_s, ask, seed=number) for number, (at_s, ask) in enumerate(zip(times, asks, strict=True))]


def at_once(asks: Sequence[Ask]) -> list[Arrival]:
    """Make requests that all arrive at the start."""
    return [Arrival(0.0, ask, seed=number) for number, ask in enumerate(asks)]


def saturating(ask: Ask, outstanding: int, row_steps_per_s: float, seconds: float) -> list[Arrival]:
    """Make some requests that fill the server at the start, and then more than it can do."""
    later = poisson([ask] * round(row_steps_per_s * seconds / ask.row_steps), seconds, seed=1)
    return renumbered(at_once([ask] * outstanding) + later)


def long_and_short(long: Ask, long_at_s: Sequence[float], short: Ask, per_s: float, seconds: float) -> list[Arrival]:
    """Make long jobs at given times, and short requests at random ones."""
    longs = [Arrival(at_s, long, seed=0) for at_s in long_at_s]
    return renumbered(longs + poisson([short] * round(per_s * seconds), seconds, seed=2))


def of_mix(mix: Mix, row_steps_per_s: float, seconds: float, seed: int) -> list[Arrival]:
    """Make requests of a mix at random times, of an exact rate."""
    comers = mixed(mix, row_steps_per_s, seconds, seed)
    return [Arrival(at_s, Ask(size.n, size.steps), number) for number, (at_s, size) in enumerate(comers)]


def with_hang_ups(arrivals: Sequence[Arrival], share: float, seconds_per_row_step: float) -> list[Arrival]:
    """Let an exact share of the clients leave, each after a random part of the time that its answer should take."""
    chance = random.Random(4)
    leaving = set(chance.sample(range(len(arrivals)), round(share * len(arrivals))))
    return [
        Arrival(a.at_s, a.ask, a.seed, chance.random() * a.ask.row_steps * seconds_per_row_step)
        if number in leaving
        else a
        for number, a in enumerate(arrivals)
    ]


def renumbered(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Put requests in order of time and give each a seed of its own."""
    ordered = sorted(arrivals, key=lambda a: a.at_s)
    return [Arrival(a.at_s, a.ask, seed, a.leaves_after_s) for seed, a in enumerate(ordered)]
