"""How long a tick takes by its number of places, measured on the real engine before it serves."""

import time
from collections.abc import Callable

from service.job import Batch, trial_spec
from service.row_engine import RowEngine

TRIES = 8  # ticks of each size; the fastest counts
SLOW_TICK_S = 2.0  # of a size whose tick takes this long fewer are run, and no larger size


def measure_ticks(
    engine: RowEngine, max_batch: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[tuple[int, float], ...]:
    """Run a few ticks of 1, 2, 4, … up to max_batch places; (places, seconds) of each."""
    points: list[tuple[int, float]] = []
    for places in sorted({min(2**k, max_batch) for k in range(max_batch.bit_length() + 1)}):
        spec = trial_spec(engine.info, places, min(TRIES + 1, engine.info.num_timesteps))
        rows = engine.add(spec)
        seconds = []
        for step in range(spec.steps):
            started = clock()
            engine.step(Batch(rows, (step,) * places, ()))
            engine.wait()
            seconds.append(clock() - started)
            if seconds[-1] > SLOW_TICK_S:
                break
        engine.latents(rows)  # waits for the device
        engine.remove(rows)
        # The first of a size may compile or allocate, and on a GPU, where the host runs a tick ahead, the second is too
        # short; the least of the others is what the machine does when it does nothing else.
        points.append((places, min(seconds[2:] or seconds)))
        if points[-1][1] > SLOW_TICK_S:
            break
    return tuple(points)
