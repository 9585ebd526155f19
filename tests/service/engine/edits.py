"""Edits for the engine to make, and what comes of them: alone, in company, step by step."""

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tests.service.engine.engines import make_engine, spec_of
from tminus.model.checkpoint import Checkpoint
from tminus.service.engine.engine import Engine
from tminus.service.engine.protocol import sample_locally
from tminus.service.scheduling.scheduler import Scheduler, Sharing
from tminus.service.spec import Images, Inputs, SampleSpec
from tminus.service.work import work_of

Job = tuple[SampleSpec, Inputs | None]
SCHEDULERS = {"ddpm": "DDPMScheduler", "ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}


def picture(seed: int = 0, shape: tuple[int, ...] = (8, 8, 1)) -> Images:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def half_mask(seed: int | None = None) -> np.ndarray:
    """True, new, on the left; or anywhere by chance."""
    if seed is not None:
        return np.random.default_rng(seed).integers(0, 2, (8, 8)).astype(bool)
    return np.repeat(np.arange(8)[None] < 4, 8, axis=0)


def edit(inputs: Inputs, **fields: object) -> Job:
    spec = spec_of(**fields)
    return replace(spec, image_sha256=inputs.image_sha256, mask_sha256=inputs.mask_sha256), inputs


def edited_alone(checkpoint: Checkpoint, job: Job) -> Images:
    return sample_locally(make_engine(checkpoint), job[0], 32, lambda rows: None, job[1])


def in_company(engine: Engine, jobs: Sequence[Job], seed: int = 0) -> list[Images]:
    """The images of jobs that come at random ticks and share batches of seven places."""
    rng, scheduler = random.Random(seed), Scheduler(Sharing.of(7))
    order = rng.sample(range(len(jobs)), len(jobs))
    rows: dict[str, tuple[int, ...]] = {}
    images: dict[str, Images] = {}
    while len(images) < len(jobs):
        if order and (not scheduler.has_work or rng.random() < 0.5):
            k = order.pop()
            spec, inputs = jobs[k]
            rows[str(k)] = engine.add(spec, inputs=inputs)
            scheduler.add(str(k), rows[str(k)], work_of(spec, engine.info))
        batch = scheduler.next_batch()
        if batch is None:
            continue
        engine.step(batch)
        for name in scheduler.advance(batch).finished:
            images[name] = engine.images(rows[name])()
            engine.remove(rows[name])
    return [images[str(k)] for k in range(len(jobs))]


def states(checkpoint: Checkpoint, job: Job) -> list[np.ndarray]:
    """x of a job's rows before each of its steps and after the last."""
    engine, (spec, inputs) = make_engine(checkpoint), job
    scheduler = Scheduler(Sharing.of(64))
    rows = engine.add(spec, inputs=inputs)
    scheduler.add("a", rows, work_of(spec, engine.info))
    found = [engine.latents(rows)]
    while (batch := scheduler.next_batch()) is not None:
        engine.step(batch)
        scheduler.advance(batch)
        found.append(engine.latents(rows))
    return found
