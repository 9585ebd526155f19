"""When requests arrive: seeded lists. Pure; the same arguments give the same list, for every contender alike."""

import random
from collections.abc import Sequence

from bench.records import Arrival, Ask


def poisson(asks: Sequence[Ask], seconds: float, seed: int) -> list[Arrival]:
    """A Poisson process, given that so many come within the time: each at a time of its own, independent and uniform.

    Fixing the number fixes the load exactly, so that it is no luck of the seed.
    """
    chance = random.Random(seed)
    times = sorted(chance.uniform(0, seconds) for _ in asks)
    return [Arrival(at_s, ask, seed=number) for number, (at_s, ask) in enumerate(zip(times, asks, strict=True))]


def at_once(asks: Sequence[Ask]) -> list[Arrival]:
    """Give requests that all arrive at the start."""
    return [Arrival(0.0, ask, seed=number) for number, ask in enumerate(asks)]


def saturating(ask: Ask, outstanding: int, row_steps_per_s: float, seconds: float) -> list[Arrival]:
    """Some at once, so that the server is full from the start, then more than it can do."""
    later = poisson([ask] * round(row_steps_per_s * seconds / ask.row_steps), seconds, seed=1)
    return renumbered(at_once([ask] * outstanding) + later)


def long_and_short(long: Ask, long_at_s: Sequence[float], short: Ask, per_s: float, seconds: float) -> list[Arrival]:
    """Long jobs at given times, and short requests at random."""
    longs = [Arrival(at_s, long, seed=0) for at_s in long_at_s]
    return renumbered(longs + poisson([short] * round(per_s * seconds), seconds, seed=2))


def with_hang_ups(arrivals: Sequence[Arrival], share: float, seconds_per_row_step: float) -> list[Arrival]:
    """An exact share of the clients leave, each after a random fraction of the time its answer is expected to take."""
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
