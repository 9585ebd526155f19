"""Edits for the engine to make, and what comes of them: alone, and step by step."""

from dataclasses import replace

import numpy as np

from tests.service.engine.engines import Job, make_engine, spec_of, ticks
from tminus.model.checkpoint import Checkpoint
from tminus.service.engine.protocol import sample_locally
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler
from tminus.service.spec import Images, Inputs
from tminus.service.work import work_of

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


def states(checkpoint: Checkpoint, job: Job) -> list[np.ndarray]:
    """x of a job's rows before each of its steps and after the last."""
    engine, (spec, inputs) = make_engine(checkpoint), job
    scheduler = Scheduler(BatchPolicy.of(64))
    rows = engine.add(spec, inputs=inputs)
    scheduler.add("a", rows, work_of(spec, engine.info))
    found = [engine.latents(rows)]
    return found + [engine.latents(rows) for _ in ticks(engine, scheduler)]
