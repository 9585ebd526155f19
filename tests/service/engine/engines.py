"""Engines of tiny checkpoints, jobs that differ in every way, and their images: alone, together, by a plain loop."""

import math
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tests.service.conftest import TABLES_OF_50, Around
from tests.service.fakes import make_spec
from tminus.model.checkpoint import Checkpoint
from tminus.model.rng import image_noise
from tminus.model.samplers import sample
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor, Executor
from tminus.service.engine.protocol import sample_locally
from tminus.service.engine.row_state import PlanCompiler
from tminus.service.scheduling.scheduler import Advance, BatchPolicy, Scheduler
from tminus.service.spec import Inputs, SampleSpec
from tminus.service.work import Batch, work_of

CPU = torch.device("cpu")
Floats = npt.NDArray[np.float32]
OnGpu = Callable[..., tuple[Checkpoint, torch.device]]
Job = tuple[SampleSpec, Inputs | None]


def make_engine(
    checkpoint: Checkpoint,
    *,
    executor: Executor | None = None,
    max_rows: int = 64,
    max_jobs: int = 32,
    device: torch.device = CPU,
) -> Engine:
    # Row by row: passes of other sizes differ in the last bit, which now and then is one of an image.
    executor = executor or EagerExecutor(checkpoint.net, device, sizes=(1,))
    return Engine(checkpoint, executor, device, max_rows=max_rows, max_jobs=max_jobs)


def spec_of(**fields: object) -> SampleSpec:
    return make_spec(**{"steps": 10, "n": 1} | fields)


# Mixed in every way a batch may be: samplers, step counts, eta, classes, none, guidance, clip, index, number of rows.
MIXED = (
    spec_of(n=2, steps=50, seed=1, class_labels=(0, 2)),
    spec_of(n=3, steps=10, seed=2, sampler="ddim", class_labels=(1, None, 0)),
    spec_of(n=2, steps=7, seed=3, guidance=3.0, class_labels=(2, 1)),
    spec_of(n=1, steps=50, seed=4, sampler="ddim", eta=1.0, guidance=1.5, class_labels=(0,)),
    spec_of(n=1, steps=1, seed=5),
    spec_of(n=2, steps=13, seed=2**64 - 1, sampler="ddim", eta=0.3, clip=False, index=2**32 - 2),
    spec_of(n=1, steps=3, seed=7, guidance=0.0, class_labels=(1,), index=9),
    spec_of(n=2, steps=12, seed=8, sampler="dpmpp_2m"),
    spec_of(n=1, steps=20, seed=9, sampler="dpmpp_2m", guidance=2.0, guidance_interval=(10, 30)),
    spec_of(n=2, steps=25, seed=10, guidance=4.0, guidance_interval=(0, 20), timestep_spacing="trailing"),
    spec_of(n=1, steps=9, seed=11, sampler="ddim", timestep_spacing="linspace", guidance=2.0, guidance_interval=(1, 2)),
    spec_of(n=2, steps=9, seed=21, guidance=2.5, guidance_rescale=0.7, class_labels=(1, 2)),
    spec_of(n=2, steps=14, seed=22, to_seed=23, mix=0.25, index=4),
    spec_of(n=1, steps=9, seed=24, to_seed=2**64 - 1, mix=0.6, sampler="ddim", class_labels=(2,), guidance=2.0),
    spec_of(n=2, steps=8, seed=12, sampler="unipc", class_labels=(None, 1), guidance=1.5),
    spec_of(n=1, steps=6, seed=13, sampler="heun", guidance=2.0, guidance_interval=(0, 20)),
    spec_of(n=2, steps=11, seed=14, sampler="plms", clip=False),
    spec_of(n=2, steps=8, seed=25, sampler="pndm", guidance=2.0, class_labels=(0, 1)),
    spec_of(n=1, steps=16, seed=15, sampler="deis"),
    spec_of(n=1, steps=15, seed=16, sampler="dpmpp_3m", guidance=3.0),
    spec_of(n=2, steps=9, seed=17, sampler="dpmpp_2m_sde", index=3),
    spec_of(n=1, steps=7, seed=18, sampler="euler", timestep_spacing="linspace"),
    *(
        spec_of(n=2, steps=table.steps, seed=19, sampler="tuned", guidance=table.guidance, table=table.hash)
        for table in TABLES_OF_50
    ),
)


def alone(checkpoint: Checkpoint, spec: SampleSpec, device: torch.device = CPU) -> Floats:
    """The images of a job that has the engine for itself."""
    return sample_locally(make_engine(checkpoint, device=device), spec, 32, lambda rows: None)


def ticks(engine: Engine, scheduler: Scheduler) -> Iterator[tuple[Batch, Advance]]:
    """Step the engine until the scheduler has nothing to do."""
    while (batch := scheduler.next_batch()) is not None:
        engine.step(batch)
        yield batch, scheduler.advance(batch)


def read_images(engine: Engine, rows: Sequence[int]) -> Floats:
    return engine.images(rows)()


def together(
    engine: Engine,
    jobs: Sequence[SampleSpec | Job],
    *,
    max_batch: int,
    seed: int = 0,
    read: Callable[[Engine, Sequence[int]], Floats] = read_images,
) -> list[Floats]:
    """The images of jobs that arrive at random ticks and share the engine and its batches."""
    rng, scheduler = random.Random(seed), Scheduler(BatchPolicy.of(max_batch))
    order = list(range(len(jobs)))
    rng.shuffle(order)
    rows: dict[str, tuple[int, ...]] = {}
    images: dict[str, Floats] = {}
    while len(images) < len(jobs):
        if order and (not scheduler.has_work or rng.random() < 0.3):
            k = order.pop()
            job = jobs[k]
            spec, inputs = (job, None) if isinstance(job, SampleSpec) else job
            rows[str(k)] = engine.add(spec, inputs=inputs)
            scheduler.add(str(k), rows[str(k)], work_of(spec, engine.info))
        batch = scheduler.next_batch()
        if batch is None:
            continue
        engine.step(batch)
        for name in scheduler.advance(batch).finished:
            images[name] = read(engine, rows[name])
            engine.remove(rows[name])
    return [images[str(k)] for k in range(len(jobs))]


def noise_of(spec: SampleSpec, draw: int, shape: Sequence[int]) -> Tensor:
    """A job's noise by the formula."""
    indices = range(spec.index, spec.index + spec.n)
    own = image_noise(spec.seed, indices, draw, shape, CPU)
    if spec.to_seed is None or spec.mix is None:
        return own
    angle = spec.mix * math.pi / 2
    return math.cos(angle) * own + math.sin(angle) * image_noise(spec.to_seed, indices, draw, shape, CPU)


def independent(checkpoint: Checkpoint, spec: SampleSpec) -> Floats:
    """The images by model.samplers.sample, which moves one batch in step."""
    shape = checkpoint.row_shape
    plan = PlanCompiler(make_engine(checkpoint).info, checkpoint.noise).plan(spec)
    labels = None
    if spec.class_labels is not None:
        null = checkpoint.labels.null_class
        labels = torch.tensor([null if label is None else label for label in spec.class_labels])
    x = sample(
        checkpoint.net,
        plan,
        noise_of(spec, 0, shape),
        lambda k: noise_of(spec, k + 1, shape),
        class_labels=labels,
        null_class=checkpoint.labels.null_class,
        guidance=spec.guidance,
        guidance_interval=spec.guidance_interval,
        guidance_rescale=spec.guidance_rescale or 0.0,
    )
    return x.permute(0, 2, 3, 1).numpy()


class Counting(Around):
    """An executor that notes the places of each pass."""

    def __init__(self, executor: Executor) -> None:
        super().__init__(executor)
        self.passes: list[tuple[list[int], list[int]]] = []  # timesteps, labels

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        assert class_labels is not None
        self.passes.append((t.tolist(), class_labels.tolist()))
        return super().__call__(x, t, class_labels)


class Poisoned(Counting):
    """An executor that gives NaN or infinity for one class and is sound for the others."""

    def __init__(self, executor: Executor, label: int, value: float) -> None:
        super().__init__(executor)
        self._label, self._value = label, value

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        assert class_labels is not None
        out = super().__call__(x, t, class_labels).clone()
        out[class_labels == self._label] = self._value
        return out
