"""How long a tick takes by its number of places, measured on the real engine before it serves."""

import time
from collections.abc import Callable
from statistics import median

from service.engine.protocol import RowEngine
from service.spec import trial_spec
from service.work import Batch

ROUNDS = 4  # each measures every size; the fastest counts, as others may use the machine too
TICKS = 6  # of a size at a time
WARM_UP = 2  # of them do not count: the first may compile; on a GPU, where the host runs ahead, the second is too short
BUDGET_S = 2.0  # no further round begins after so long
SLOW_TICK_S = 2.0  # no size is larger than one whose tick takes so long


def measure_ticks(
    engine: RowEngine, max_batch: int, clock: Callable[[], float] = time.perf_counter
) -> tuple[tuple[int, float], ...]:
    """Run a few ticks of 1, 2, 4, … up to max_batch places; (places, seconds) of each."""
    begun_s = clock()
    sizes = sorted({min(2**k, max_batch) for k in range(max_batch.bit_length() + 1)})
    measured: dict[int, list[float]] = {places: [] for places in sizes}
    for round_number in range(ROUNDS):
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
    """Time some ticks of one size, or fewer if they are slow."""
    spec = trial_spec(engine.info, places, min(TICKS, engine.info.num_timesteps))
    rows = engine.add(spec)
    seconds: list[float] = []
    for step in range(spec.steps):
        started_s = clock()
        engine.step(Batch(rows, (step,) * places, ()))
        engine.wait()
        seconds.append(clock() - started_s)
        if seconds[-1] > SLOW_TICK_S:
            break
    engine.latents(rows)  # waits for the device
    engine.remove(rows)
    return seconds
