"""Tests of the real engine before it serves: the same bits alone and beside other jobs, and how long ticks take."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from statistics import median

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.service.engine.protocol import RowEngine
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import Scheduler, Sharing
from tminus.service.spec import Floats, SampleSpec, trial_spec
from tminus.service.work import Batch, work_of

STEPS = 4
ROWS = 2
GUIDED = 3  # so many samplers run guided too

ROUNDS = 4  # each measures every size; the fastest counts, since other programs may run too
TICKS = 6  # of one size in a round
WARM_UP = 2  # ticks that do not count: the first may compile; on a GPU the host runs ahead, so the second is too short
BUDGET_S = 2.0  # after this no further round begins
SLOW_TICK_S = 2.0  # after a tick that takes this long no larger size is measured


def same_alone_and_together(engine: RowEngine, max_batch: int, most: int | None = None) -> bool:
    """Run a job of every sampler, each alone and then all in shared ticks; True if every latent agrees to the bit.

    most: run no more than so many jobs.
    """
    specs = _possible(engine, _specs(engine.info))[:most]
    alone = [_run(engine, [spec], max_batch)[0] for spec in specs]
    together = _run(engine, specs, max_batch)
    return all(a.tobytes() == b.tobytes() for a, b in zip(alone, together, strict=True))


def _specs(model: ModelInfo) -> list[SampleSpec]:
    """Jobs of every sampler with different step counts, the first ones of several rows, and guided where that is so."""
    specs = []
    for k, sampler in enumerate(model.samplers):
        steps = min(STEPS, SAMPLER_FACTS[sampler].max_steps(model.num_timesteps))
        first = k < GUIDED
        specs.append(
            trial_spec(model, n=ROWS + k if first else 1, steps=max(1, steps - k % 3), sampler=sampler, seed=k)
        )
        if first and model.null_class is not None:
            specs.append(trial_spec(model, n=1 + k, steps=steps, sampler=sampler, seed=k + 100, guidance=2.0))
    return specs


def _possible(engine: RowEngine, specs: Sequence[SampleSpec]) -> list[SampleSpec]:
    """Keep the jobs that the model's schedule allows: some samplers cannot start where there is no signal."""
    possible = []
    for spec in specs:
        with suppress(ValueError):
            engine.plan(spec)
            possible.append(spec)
    return possible


def _run(engine: RowEngine, specs: list[SampleSpec], max_batch: int) -> list[Floats]:
    scheduler = Scheduler(Sharing.of(max(2, max_batch)))
    rows = [engine.add(spec) for spec in specs]
    for k, spec in enumerate(specs):
        scheduler.add(str(k), rows[k], work_of(spec, engine.info))
    while (batch := scheduler.next_batch()) is not None:
        engine.step(batch)
        engine.wait()
        scheduler.advance(batch)
    latents = [engine.latents(each) for each in rows]
    for each in rows:
        engine.remove(each)
    return latents


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
