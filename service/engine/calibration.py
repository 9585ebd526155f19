"""Measure how long a tick takes by its number of places, on the real engine before it serves."""

import time
from collections.abc import Callable
from statistics import median

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.service.engine.protocol import RowEngine
from tminus.service.spec import trial_spec
from tminus.service.work import Batch

ROUNDS = 4  # each measures every size; the fastest counts, since other programs may run too
TICKS = 6  # of one size in a round
WARM_UP = 2  # ticks that do not count: the first may compile; on a GPU the host runs ahead, so the second is too short
BUDGET_S = 2.0  # after this no further round begins
SLOW_TICK_S = 2.0  # after a tick that takes this long no larger size is measured


def measure_ticks(
    engine: RowEngine, max_batch: int, clock: Callable[[], float] = time.perf_counter, *, rounds: int = ROUNDS
) -> tuple[tuple[int, float], ...]:
    """Run a few ticks of 1, 2, 4, … up to max_batch places; returns (places, seconds) of each size."""
    begun_s = clock()
    sizes = sorted({min(2**k, max_batch) for k in range(max_batch.bit_length() + 1)})
    measured: dict[int, list[float]] = {places: [] for places in sizes}
    for round_number in range(rounds):
        if round_number and clock() - begun_s > BUDGET_S:
            break
        for places in sizes:
            seconds = _run_ticks(engine, places, clock)
            measured[places].append(median(seconds[WARM_UP:] or [min(seconds)]))
            if seconds[-1] > SLOW_TICK_S:
                sizes = sizes[: sizes.index(places) + 1]
                break
    return tuple((places, min(measured[places])) for places in sizes)


def _run_ticks(engine: RowEngine, places: int, clock: Callable[[], float]) -> list[float]:
    """Time a few ticks of one size; stops after a slow one."""
    most = SAMPLER_FACTS[engine.info.default_sampler].max_steps(engine.info.num_timesteps)
    spec = trial_spec(engine.info, places, min(TICKS, most))
    rows = engine.add(spec)
    seconds: list[float] = []
    for step in range(spec.steps):
        started_s = clock()
        engine.step(Batch(rows, (step,) * places, ()))
        engine.wait()
        if spec.steps <= WARM_UP:
            engine.latents(rows)  # waits for the device, since no later tick will tell
        seconds.append(clock() - started_s)
        if seconds[-1] > SLOW_TICK_S:
            break
    engine.latents(rows)  # waits for the device
    engine.remove(rows)
    return seconds
