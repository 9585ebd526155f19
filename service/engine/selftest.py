"""Test on the real engine, before it serves, that a spec gives the same bits alone and beside other jobs."""

from collections.abc import Sequence
from contextlib import suppress

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.service.engine.protocol import RowEngine
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import Scheduler, Sharing
from tminus.service.spec import Floats, SampleSpec, trial_spec
from tminus.service.work import work_of

STEPS = 4
ROWS = 2
GUIDED = 3  # so many samplers run guided too


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
    """Those that the model's schedule allows: some samplers cannot start where there is no signal."""
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
