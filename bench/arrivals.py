"""When requests arrive: seeded lists. Pure; the same arguments give the same list, for every contender alike."""

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

from bench.records import Arrival, Ask

Way = tuple[str, int, float]  # sampler, steps, guidance

STEP_SHARES = {20: 0.80, 50: 0.15, 1000: 0.05}


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


def of_steps(n: int, row_steps_per_s: float, seconds: float, most_steps: int) -> list[Arrival]:
    """80 % of 20 steps, 15 % of 50, 5 % of 1000, at an exact mean of so many row-steps a second."""
    shares = {min(steps, most_steps): share for steps, share in STEP_SHARES.items()}
    mean = n * sum(steps * share for steps, share in shares.items())
    count = max(len(shares), round(row_steps_per_s * seconds / mean))
    counts = {steps: max(1, round(count * share)) for steps, share in shares.items()}
    asks = [Ask(n, steps) for steps, number in counts.items() for _ in range(number)]
    random.Random(3).shuffle(asks)
    return poisson(asks, seconds, seed=3)


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


def all_ways(model: Mapping[str, Any], steps: Sequence[int]) -> list[Way]:
    """Every sampler by step count, guided and not where there are classes; of tables, each."""
    guidances = (1.0, 2.0) if model["null_class"] is not None else (1.0,)
    of_tables = [(each["sampler"], each["steps"], each["guidance"]) for each in model["tables"]]
    plain = [name for name in model["samplers"] if name not in {sampler for sampler, *_ in of_tables}]
    return [*itertools.product(plain, steps, guidances), *of_tables]


def of_all_kinds(count: int, ways: Sequence[Way], classes: int) -> list[Ask]:
    """Every way of sampling, by classes and sizes, in a shuffled order."""
    kinds = itertools.cycle(itertools.product(ways, (1, 2, 3)))
    asks = [
        Ask(n, steps, sampler, guidance, number % classes if classes else None)
        for number, ((sampler, steps, guidance), n) in enumerate(itertools.islice(kinds, count))
    ]
    random.Random(5).shuffle(asks)
    return asks


def assorted(count: int, steps: Sequence[int]) -> list[Ask]:
    """Jobs of 1 to 4 images by the given step counts, in a shuffled order."""
    kinds = itertools.cycle(itertools.product((1, 2, 3, 4), steps))
    asks = [Ask(n, number_of_steps) for n, number_of_steps in itertools.islice(kinds, count)]
    random.Random(6).shuffle(asks)
    return asks


def renumbered(arrivals: Sequence[Arrival]) -> list[Arrival]:
    """Put requests in order of time and give each a seed of its own."""
    ordered = sorted(arrivals, key=lambda a: a.at_s)
    return [Arrival(a.at_s, a.ask, seed, a.leaves_after_s) for seed, a in enumerate(ordered)]
