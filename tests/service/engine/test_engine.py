"""The engine: rows that differ in everything share batches, slots go round, previews, snapshots, edits."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count, islice

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.service.conftest import TABLES_OF_50, MakeCheckpoint
from tests.service.engine.edits import edit, edited_alone, half_mask, picture
from tests.service.engine.engines import (
    CPU,
    MIXED,
    Floats,
    Job,
    OnGpu,
    Poisoned,
    alone,
    independent,
    make_engine,
    noise_of,
    read_images,
    spec_of,
    ticks,
    together,
)
from tminus.model.catalogue import SAMPLERS
from tminus.model.checkpoint import Checkpoint
from tminus.model.consistency import consistency_table
from tminus.model.noise import NoiseConfig
from tminus.model.pixels import to_model_range, to_uint8
from tminus.model.rng import image_noise
from tminus.model.training.distill import student_noise
from tminus.model.trajectory import Trajectory, transitions
from tminus.service.engine.engine import Engine
from tminus.service.engine.executors import EagerExecutor
from tminus.service.engine.protocol import sample_locally
from tminus.service.engine.row_state import FIRST_LINES
from tminus.service.errors import NotFinite
from tminus.service.scheduling.scheduler import BatchPolicy, Scheduler
from tminus.service.spec import Inputs, SampleSpec
from tminus.service.work import Batch, noisy_passes, select_passes, work_of
from tminus.service.worker.recording import TrajectoryRecorder

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("t", [0, 25, 49])
def test_noised_is_q_sample_of_each_image_with_the_x_t_of_a_job(tiny: Checkpoint, t: int) -> None:
    engine = make_engine(tiny)
    images = torch.arange(3 * 64, dtype=torch.uint8).reshape(3, 8, 8, 1)
    rows = engine.add(spec_of(n=3, seed=9))
    eps = torch.from_numpy(engine.latents(rows))
    x_t = tiny.noise.schedule().q_sample(to_model_range(images.permute(0, 3, 1, 2)), torch.tensor([t] * 3), eps)
    expected = to_uint8(x_t).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(engine.noised(images.numpy(), t, 9)(), expected)
    np.testing.assert_array_equal(engine.noised(images.numpy()[:1], t, 9)(), expected[:1], "each is made alone")


# --- bit for bit ---


@pytest.mark.parametrize("size", [1, 4])
def test_any_mix_of_samplers_on_an_exact_executor_has_the_bits_of_each_job_alone(tiny: Checkpoint, size: int) -> None:
    executor = EagerExecutor(tiny.net, CPU, sizes=(size,))
    shared = together(make_engine(tiny, executor=executor), MIXED, max_batch=7, read=Engine.latents)
    for spec, mixed in zip(MIXED, shared, strict=True):
        (own,) = together(make_engine(tiny, executor=executor), [spec], max_batch=16, read=Engine.latents)
        assert np.isfinite(own).all()
        assert mixed.tobytes() == own.tobytes(), spec


def test_student_has_the_bits_of_each_job_alone_and_those_of_a_plain_loop(tiny: Checkpoint) -> None:
    noise = student_noise(tiny.noise)
    tables = {len(t): consistency_table(noise, t) for t in ([49.0], [49.0, 20.0], [49.0, 33.0, 20.0, 6.0])}
    student = replace(tiny, noise=noise, tables=tuple(tables.values()), student={"guidance": 1.5})
    executor = EagerExecutor(student.net, CPU, sizes=(1,))
    specs = [
        spec_of(sampler="consistency", steps=steps, table=tables[steps].hash, n=n, seed=seed, class_labels=(2,) * n)
        for seed, (steps, n) in enumerate([(1, 2), (2, 3), (4, 1), (2, 1), (4, 2)])
    ]
    mixed = together(make_engine(student, executor=executor), specs, max_batch=3, seed=1, read=Engine.latents)
    for spec, images in zip(specs, mixed, strict=True):
        (own,) = together(make_engine(student, executor=executor), [spec], max_batch=16, read=Engine.latents)
        assert images.tobytes() == own.tobytes()
        expected = independent(student, spec).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(own, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction_type", ["edm", "flow", "score"])
def test_a_model_trained_on_another_x_has_the_bits_of_each_job_alone_and_those_of_a_plain_loop(
    make_checkpoint: MakeCheckpoint, prediction_type: str
) -> None:
    """Of random weights a score times sigma^2 is large, so images are compared by their size."""
    sampler, sigma_max = ("ddpm", 3.0) if prediction_type == "score" else ("euler", 80.0)
    noise = NoiseConfig(
        50, prediction_type=prediction_type, default_sampler=sampler, sigma_max=sigma_max, clip_sample=False
    )
    checkpoint = make_checkpoint(noise=noise)
    executor = EagerExecutor(checkpoint.net, CPU, sizes=(2,))
    specs = [
        spec_of(sampler=name, steps=steps, n=1 + k % 2, seed=k, clip=False, timestep_spacing=spacing, guidance=guidance)
        for k, (name, steps, spacing, guidance) in enumerate(
            [
                ("euler", 7, "linspace", 1.0),
                ("dpmpp_2m", 9, "linspace", 1.0),
                ("dpmpp_2m", 5, "karras", 1.0),
                ("ddpm", 12, "leading", 1.0),
                ("unipc", 6, "linspace", 2.0),
                ("dpmpp_2m_sde", 8, "trailing", 1.0),
                ("ddim", 3, "linspace", 1.5),
            ]
        )
    ]
    mixed = together(make_engine(checkpoint, executor=executor), specs, max_batch=5, seed=1, read=Engine.latents)
    for spec, images in zip(specs, mixed, strict=True):
        (own,) = together(make_engine(checkpoint, executor=executor), [spec], max_batch=16, read=Engine.latents)
        assert np.isfinite(own).all()
        assert images.tobytes() == own.tobytes(), spec
        expected = independent(checkpoint, spec).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(own, expected, atol=1e-5 * max(1.0, float(np.abs(expected).max())), rtol=1e-4)


def test_image_k_alone_has_the_bits_of_image_k_of_the_batch(tiny: Checkpoint) -> None:
    executor = EagerExecutor(tiny.net, CPU, sizes=(2,))

    def latents(spec: SampleSpec) -> Floats:
        return together(make_engine(tiny, executor=executor), [spec], max_batch=5, read=Engine.latents)[0]

    for fields in ({}, {"sampler": "ddim", "eta": 0.7}, {"sampler": "unipc", "guidance": 2.0}, {"sampler": "heun"}):
        spec = spec_of(n=4, index=5, class_labels=(0, 1, 2, 1), **fields)
        batch = latents(spec)
        for k in range(4):
            one = replace(spec, n=1, index=5 + k, class_labels=spec.class_labels[k : k + 1])  # type: ignore[index]
            assert latents(one)[0].tobytes() == batch[k].tobytes()


# --- learned variance ---


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_network_of_learned_variance_agrees_with_the_independent_loop(
    make_checkpoint: MakeCheckpoint, prediction_type: str, channels: int
) -> None:
    noise = NoiseConfig(
        num_train_timesteps=50, beta_end=0.1, variance_type="learned_range", prediction_type=prediction_type
    )
    checkpoint = make_checkpoint(noise=noise, in_channels=channels, out_channels=2 * channels)
    specs = [
        spec_of(n=2, steps=50, seed=1, class_labels=(0, 1)),
        spec_of(n=2, steps=10, seed=2, guidance=3.0, class_labels=(1, 2)),
        spec_of(n=1, steps=10, seed=3, sampler="ddim", eta=0.5),
        spec_of(n=1, steps=10, seed=4, sampler="dpmpp_2m", guidance=2.0, guidance_interval=(0, 25)),
    ]
    engine = make_engine(checkpoint)
    assert engine.info.variance_type == "learned_range"
    for spec, images in zip(specs, together(engine, specs, max_batch=5), strict=True):
        assert images.shape == (spec.n, 8, 8, channels)
        np.testing.assert_allclose(images, independent(checkpoint, spec), atol=1e-5, rtol=1e-5, err_msg=str(spec))


# --- trajectories ---

NOISY = [spec for spec in MIXED if spec.num_passes > 1 and (spec.sampler == "ddpm" or spec.eta > 0)]
NOISY += [spec for spec in MIXED if spec.sampler == "dpmpp_2m_sde" or spec.table == TABLES_OF_50[1].hash]
LEARNED = NoiseConfig(num_train_timesteps=50, beta_end=0.1, variance_type="learned_range")


def walked(
    engine: Engine, specs: Sequence[SampleSpec], *, max_batch: int, keep: Sequence[int] | None = None
) -> list[Trajectory]:
    """The trajectories of jobs that share the engine and its batches."""
    scheduler = Scheduler(BatchPolicy.of(max_batch))
    paths = [TrajectoryRecorder(spec, select_passes(keep, spec, engine.info)) for spec in specs]
    rows = [engine.add(spec) for spec in specs]
    for k, spec in enumerate(specs):
        scheduler.add(str(k), rows[k], work_of(spec, engine.info))
        paths[k].record(engine, rows[k], [(0, index) for index in range(spec.n)])
    for batch, advance in ticks(engine, scheduler):
        for job in batch.jobs:
            k = int(job.job_id)
            paths[k].record(engine, rows[k], [(step + 1, index) for step, index in job.steps])
        for name in advance.finished:
            engine.remove(rows[int(name)])
    return [path.trajectory() for path in paths]


def assert_steps_are_mean_and_noise(checkpoint: Checkpoint, spec: SampleSpec, trajectory: Trajectory) -> None:
    """x' - mean is s times the noise of (seed, index, step), which nothing that made the trajectory told us."""
    shape = checkpoint.row_shape
    np.testing.assert_array_equal(trajectory.x_t[0], noise_of(spec, 0, shape))
    found = transitions(trajectory)
    assert found.passes.tolist() == list(noisy_passes(spec, make_engine(checkpoint).info)) != []
    for at, k in enumerate(found.passes):
        z = noise_of(spec, int(k) + 1, shape).double().numpy()
        np.testing.assert_allclose(trajectory.x_t[k + 1], found.mean[at] + found.s[at] * z, rtol=1e-5, atol=2e-6)
        s = np.broadcast_to(found.s[at], z.shape).astype(np.float64)
        log_p = (-(z**2) / 2 - np.log(s) - math.log(2 * math.pi) / 2).sum((1, 2, 3))
        # x is rounded to float32, which a small s magnifies.
        np.testing.assert_allclose(found.log_p[at], log_p, rtol=0, atol=2e-5 * math.prod(shape))


@pytest.mark.usefixtures("floats")
def test_trajectories_of_jobs_that_share_ticks_are_those_of_each_alone(tiny: Checkpoint) -> None:
    others = [spec for spec in MIXED if spec not in NOISY]
    executor = EagerExecutor(tiny.net, CPU, sizes=(1,))
    shared = walked(make_engine(tiny, executor=executor, max_rows=64, max_jobs=32), [*NOISY, *others], max_batch=5)
    for spec, trajectory in zip(NOISY, shared, strict=False):
        (own,) = walked(make_engine(tiny, executor=executor), [spec], max_batch=16)
        assert trajectory.x_t.tobytes() == own.x_t.tobytes(), spec
        assert trajectory.x_0.tobytes() == own.x_0.tobytes()
        images = sample_locally(make_engine(tiny, executor=executor), spec, 8, lambda rows: None)
        np.testing.assert_array_equal(own.x_t[-1].transpose(0, 2, 3, 1), images)
        assert_steps_are_mean_and_noise(tiny, spec, trajectory)


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("channels", [1, 3])
def test_a_learned_variance_is_in_a_trajectory_by_value(make_checkpoint: MakeCheckpoint, channels: int) -> None:
    checkpoint = make_checkpoint(noise=LEARNED, in_channels=channels, out_channels=2 * channels)
    specs = [
        spec_of(n=2, steps=6, seed=1, class_labels=(0, 1)),
        spec_of(n=2, steps=5, seed=2, guidance=3.0, class_labels=(1, 2)),
        spec_of(n=2, steps=5, seed=3, sampler="ddim", eta=0.5),
    ]
    for spec, trajectory in zip(specs, walked(make_engine(checkpoint), specs, max_batch=3), strict=True):
        assert (trajectory.v is not None) == (spec.sampler == "ddpm")
        assert_steps_are_mean_and_noise(checkpoint, spec, trajectory)


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize(
    "noise",
    [
        NoiseConfig(num_train_timesteps=50, beta_end=0.1),
        LEARNED,
        NoiseConfig(num_train_timesteps=50, prediction_type="flow", default_sampler="euler"),
        NoiseConfig(num_train_timesteps=50, prediction_type="edm", default_sampler="euler"),
    ],
    ids=["eps", "learned variance", "flow", "EDM"],
)
def test_of_some_passes_a_trajectory_has_the_bits_of_the_whole(
    make_checkpoint: MakeCheckpoint, noise: NoiseConfig
) -> None:
    checkpoint = make_checkpoint(noise=noise, out_channels=2 if noise is LEARNED else 1)
    specs = [spec_of(n=2, steps=7, seed=1), spec_of(n=1, steps=7, seed=3, sampler="dpmpp_2m_sde")]
    wholes, parts = (walked(make_engine(checkpoint), specs, max_batch=2, keep=keep) for keep in (None, [2, 5]))
    for spec, whole, part in zip(specs, wholes, parts, strict=True):
        assert_steps_are_mean_and_noise(checkpoint, spec, whole)
        assert part.x_t.tobytes() == whole.x_t[[2, 3, 5, 6]].tobytes()
        assert part.x_0.tobytes() == whole.x_0[list(part.selected.predictions)].tobytes()
        found, slices = transitions(part), transitions(whole)
        assert found.passes.tolist() == [2, 5]
        for name in ("mean", "s", "log_p"):
            np.testing.assert_array_equal(getattr(found, name), getattr(slices, name)[[2, 5]], name)


def test_trajectories_change_no_bit_of_a_learned_variances_images(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint, spec = make_checkpoint(noise=LEARNED, out_channels=2), spec_of(n=2, steps=6)
    engine = make_engine(checkpoint)
    before = sample_locally(engine, spec, 8, lambda rows: None)
    walked(engine, [spec_of(n=2, steps=6, seed=9)], max_batch=8)
    assert sample_locally(engine, spec, 8, lambda rows: None).tobytes() == before.tobytes()


# --- other models ---


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize(
    ("fields", "shape"),
    [
        ({"classes": False}, (8, 8, 1)),
        ({"in_channels": 3, "out_channels": 3}, (8, 8, 3)),
        ({"sample_size": (4, 10)}, (4, 10, 1)),
        ({"classes": False, "in_channels": 3, "out_channels": 3, "sample_size": (12, 6)}, (12, 6, 3)),
    ],
    ids=["unconditional", "colour", "wide", "unconditional colour tall"],
)
def test_models_of_other_shapes(
    make_checkpoint: MakeCheckpoint, fields: dict[str, object], shape: tuple[int, int, int]
) -> None:
    checkpoint = make_checkpoint(**fields)
    labels = (0, 1) if checkpoint.labels.class_names else None
    specs = [spec_of(n=2, class_labels=labels), spec_of(n=2, steps=7, sampler="ddim", seed=2, class_labels=labels)]
    for spec, images in zip(specs, together(make_engine(checkpoint), specs, max_batch=3), strict=True):
        assert images.shape == (2, *shape)
        np.testing.assert_allclose(images, independent(checkpoint, spec), atol=1e-5, rtol=1e-5)


# --- slots ---


def test_thousands_of_jobs_come_and_go_without_a_leak(tiny: Checkpoint) -> None:
    rng, engine = random.Random(0), make_engine(tiny, max_rows=12, max_jobs=5)
    held: list[tuple[int, ...]] = []
    for _ in range(3000):
        n = rng.randint(1, 4)
        if held and (len(held) == 5 or sum(map(len, held)) + n > 12):
            engine.remove(held.pop(rng.randrange(len(held))))
        else:
            held.append(engine.add(spec_of(n=n, steps=rng.choice([1, 50]), seed=rng.getrandbits(64))))
        taken = [row for rows in held for row in rows]
        assert len(set(taken)) == len(taken), "two jobs share a slot"
    for rows in held:
        engine.remove(rows)
    jobs = [engine.add(spec_of(n=2)) for _ in range(5)]
    assert len({row for rows in jobs for row in rows}) == 10
    for rows in jobs:
        engine.remove(rows)
    assert sorted(engine.add(spec_of(n=12))) == list(range(12))


def test_a_slots_former_row_leaves_no_trace(tiny: Checkpoint) -> None:
    engine = make_engine(tiny, max_rows=4, max_jobs=4)
    former = (
        spec_of(n=4, steps=50, seed=9, guidance=7.0, class_labels=(2, 2, 2, 2), index=100),
        spec_of(n=3, steps=50, seed=8, sampler="ddim", eta=1.0, clip=False, class_labels=(1, 1, 1)),
    )
    for spec in (spec_of(n=4, steps=3, seed=4), spec_of(n=2, steps=7, guidance=2.0)):
        expected = alone(tiny, spec).tobytes()
        for before in former:
            rows = engine.add(before)
            for step in range(5):
                guided = tuple(range(len(rows))) if before.guidance != 1 else ()
                engine.step(Batch(rows, (step,) * len(rows), guided))
            engine.remove(rows)
            assert sample_locally(engine, spec, 32, lambda rows: None).tobytes() == expected


@pytest.mark.parametrize(("value", "clip"), [(float("nan"), True), (float("nan"), False), (float("inf"), False)])
def test_a_class_that_gives_no_finite_image_breaks_its_own_rows_only(
    tiny: Checkpoint, value: float, clip: bool
) -> None:
    exact = EagerExecutor(tiny.net, CPU, sizes=(1,))
    engine = make_engine(tiny, executor=Poisoned(exact, 2, value), max_rows=6)
    spec = spec_of(n=3, seed=1, steps=3, class_labels=(0, 2, 1), clip=clip)
    other_spec = spec_of(n=2, seed=2, steps=3, class_labels=(1, 0), guidance=2.0)
    mixed, others = engine.add(spec), engine.add(other_spec)
    assert engine.broken((*mixed, *others)) == (), "nothing has stepped"
    for step in range(3):
        engine.step(Batch((*mixed, *others), (step,) * 5, (3, 4)))
        engine.wait()
        assert engine.broken((*others, *mixed)) == (mixed[1],)
    with pytest.raises(NotFinite):
        engine.images(mixed)()
    expected = together(make_engine(tiny, executor=exact), [other_spec], max_batch=16, read=Engine.latents)[0]
    assert engine.latents(others).tobytes() == expected.tobytes()
    read = engine.images(others)
    engine.remove(others)
    engine.remove(mixed)
    assert read().shape == (2, 8, 8, 1), "what was read is there after its rows are gone"

    # All slots again, those that were broken among them.
    after = spec_of(n=6, seed=3, steps=2, class_labels=(0, 1, 0, 1, 0, None))
    again = together(engine, [after], max_batch=16, read=Engine.latents)[0]
    expected = together(make_engine(tiny, executor=exact), [after], max_batch=16, read=Engine.latents)[0]
    assert again.tobytes() == expected.tobytes()


def test_a_job_that_cannot_be_compiled_takes_no_slot(make_checkpoint: MakeCheckpoint) -> None:
    engine = make_engine(make_checkpoint(), max_rows=2, max_jobs=1)
    for bad in (spec_of(sampler="rk45"), spec_of(steps=51), spec_of(steps=0)):
        with pytest.raises(ValueError, match="must be"):
            engine.add(bad)
    assert len(engine.add(spec_of(n=2))) == 2


def failing(operation: str, at: int) -> Callable[..., object]:
    """An operation of tensors that raises at its so-manieth call."""
    whole, calls = getattr(Tensor, operation), count(1)

    def call(*args: object, **kwargs: object) -> object:
        if next(calls) == at:
            raise RuntimeError("out of memory")
        return whole(*args, **kwargs)

    return call


@pytest.mark.parametrize("sampler", ["ddpm", "deis"])
@pytest.mark.parametrize(("operation", "at_least"), [("__setitem__", 10), ("to", 1)])
def test_an_add_that_fails_midway_takes_no_slot(tiny: Checkpoint, operation: str, at_least: int, sampler: str) -> None:
    """As when a device has no memory left: whatever it was doing, the next job finds all slots and plans free."""
    engine = make_engine(tiny, max_rows=4, max_jobs=1)
    spec = spec_of(n=4, steps=5, guidance=2.0, class_labels=(0, 1, 2, 0), sampler=sampler)
    expected, failures, rows = alone(tiny, spec).tobytes(), 0, ()
    while not rows:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, operation, failing(operation, failures + 1))
            try:
                rows = engine.add(spec)
            except RuntimeError as error:
                assert str(error) == "out of memory"
                failures += 1
        free = (len(engine._free_rows), sum(size for _, size in engine._plans._free), len(engine._plan_of))
        assert free == ((0, FIRST_LINES - 5, 1) if rows else (4, FIRST_LINES, 0)), f"after failure {failures}"
    assert failures >= at_least
    engine.remove(rows)
    assert sample_locally(engine, spec, 32, lambda rows: None).tobytes() == expected


# --- devices, limits, description ---


def test_a_preview_is_the_latent_and_the_networks_guess_of_the_image(tiny: Checkpoint) -> None:
    """x_0 = (x_t - sqrt(1 - alpha_bar) eps) / sqrt(alpha_bar): eq. 4 of Ho et al. 2020, solved for x_0."""
    engine, spec = make_engine(tiny), spec_of(n=2, steps=10, sampler="ddim", seed=3, class_labels=(0, 2))
    rows = engine.add(spec)
    x_T = image_noise(spec.seed, range(2), 0, (1, *tiny.size_px), CPU)
    engine.step(Batch(rows, (0, 0), ()))
    shown = engine.preview(rows, ("x_0", "x_t"))()
    assert list(shown) == ["x_0", "x_t"]
    t = int(engine.plan(spec).timesteps[0])
    alpha_bar = float(tiny.noise.schedule().alpha_bar[t])
    eps = tiny.net(x_T, torch.tensor([t, t]), torch.tensor([0, 2])).double()
    x_0 = ((x_T.double() - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)).clamp(-1, 1)
    np.testing.assert_allclose(shown["x_0"], (x_0.permute(0, 2, 3, 1) + 1) * 127.5, atol=1)
    x_t = np.clip(engine.latents(rows).transpose(0, 2, 3, 1), -1, 1)
    np.testing.assert_allclose(shown["x_t"], (x_t + 1) * 127.5, atol=0.51)
    for step in range(1, spec.steps):
        engine.step(Batch(rows, (step, step), ()))
    (last,) = engine.preview(rows, ("x_0",))().values()
    np.testing.assert_array_equal(last, engine.images(rows)())  # ddim ends in its guess


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.usefixtures("floats")
def test_a_gpu_gives_the_images_of_the_cpu(tiny: Checkpoint, on_gpu: OnGpu) -> None:
    checkpoint, device = on_gpu()
    engine = make_engine(checkpoint, device=device)
    for spec, images in zip(MIXED, together(engine, MIXED, max_batch=8), strict=True):
        np.testing.assert_allclose(images, alone(tiny, spec), atol=1e-3, err_msg=str(spec))


@pytest.mark.gpu
def test_noised_on_a_gpu_is_that_of_the_cpu(tiny: Checkpoint, on_gpu: OnGpu) -> None:
    checkpoint, device = on_gpu()
    images = np.arange(2 * 64, dtype=np.uint8).reshape(2, 8, 8, 1)
    engines = make_engine(checkpoint, device=device), make_engine(tiny)
    on_device, on_cpu = (engine.noised(images, 20, 3)() for engine in engines)
    np.testing.assert_allclose(on_device.astype(int), on_cpu.astype(int), atol=1)


@pytest.mark.gpu
def test_an_engine_on_a_gpu_tells_its_memory_and_name(on_gpu: OnGpu) -> None:
    checkpoint, device = on_gpu()
    engine = make_engine(checkpoint, device=device)
    memory = engine.memory_bytes()
    assert memory is not None
    assert memory > 0
    assert engine.info.device == torch.cuda.get_device_name(device)


# --- snapshots and edits ---


def interrupted(
    checkpoint: Checkpoint, job: Job, after: int, read: Callable[[Engine, Sequence[int]], Floats]
) -> Floats:
    """What is read of a job that went on in another engine after so many ticks of three places."""
    spec, inputs = job
    first, scheduler = make_engine(checkpoint), Scheduler(BatchPolicy.of(3))
    rows = first.add(spec, inputs=inputs)
    work = work_of(spec, first.info)
    scheduler.add("a", rows, work)
    for _ in islice(ticks(first, scheduler), after):
        if not scheduler.has_work:
            return read(first, rows)
    snapshot = first.snapshot(rows, scheduler.steps("a"))()
    first.remove(rows)
    first.add(spec_of(n=spec.n, seed=99))  # whose slots have others now
    second, scheduler = make_engine(checkpoint), Scheduler(BatchPolicy.of(4))
    second.add(spec_of(n=3))  # so that the rows have other slots
    rows = second.add(spec, snapshot, inputs)
    scheduler.add("a", rows, work, snapshot.steps)
    for _ in ticks(second, scheduler):
        pass
    return read(second, rows)


@pytest.mark.parametrize(
    "spec", [spec for spec in MIXED if spec.steps > 2], ids=lambda spec: f"{spec.sampler}-{spec.seed}"
)
def test_a_job_that_goes_on_from_a_snapshot_elsewhere_has_the_bits_of_one_that_was_not_disturbed(
    tiny: Checkpoint, spec: SampleSpec
) -> None:
    (undisturbed,) = together(make_engine(tiny), [spec], max_batch=16, read=Engine.latents)
    ticks = work_of(spec, make_engine(tiny).info).places // 3
    for after in {1, ticks // 2, ticks - 1}:
        assert interrupted(tiny, (spec, None), after, Engine.latents).tobytes() == undisturbed.tobytes()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_edit_is_the_same_alone_in_company_interrupted_and_by_index(tiny: Checkpoint, data: st.DataObject) -> None:
    mask = half_mask(data.draw(st.integers(0, 9))) if data.draw(st.booleans(), "masked") else None
    strength = (
        data.draw(st.none() | st.floats(0.01, 1), "strength") if mask is not None else data.draw(st.floats(0.01, 1))
    )
    n, guided = data.draw(st.integers(1, 3), "n"), data.draw(st.booleans(), "guided")
    sampler = data.draw(st.sampled_from(SAMPLERS), "sampler")
    fields = {
        "n": n, "steps": data.draw(st.integers(1, 14), "steps"), "sampler": sampler, "strength": strength,
        "seed": data.draw(st.integers(0, 2**64 - 1)), "guidance": 3.0 if guided else 1.0,
        "guidance_interval": (10, 30) if guided and data.draw(st.booleans()) else None,
        "eta": data.draw(st.sampled_from([0.0, 0.6])) if sampler == "ddim" else 0.0, "clip": data.draw(st.booleans()),
    }  # fmt: skip
    inputs = Inputs(picture(data.draw(st.integers(0, 9))), mask)
    job = edit(inputs, **fields)
    try:
        images = edited_alone(tiny, job)
    except NotFinite:  # without the clip
        return
    if mask is not None:
        np.testing.assert_array_equal(images[:, ~mask], np.repeat(inputs.image[~mask][None], n, 0), "known, and exact")
    short = [spec for spec in MIXED if spec.steps <= 10][:4]
    others = [(spec, None) for spec in short] + [edit(Inputs(picture(77), half_mask(77)), n=2, steps=9, seed=5)]
    shared = together(make_engine(tiny), [job, *others], max_batch=7, seed=data.draw(st.integers(0, 99)))
    np.testing.assert_array_equal(shared[0], images)
    ticks = data.draw(st.integers(0, n * job[0].num_passes), "interrupted after")
    np.testing.assert_array_equal(interrupted(tiny, job, ticks, read_images), images)
    k = data.draw(st.integers(0, n - 1), "k")
    one = replace(job[0], n=1, index=job[0].index + k, class_labels=(job[0].class_labels or ())[k : k + 1])
    np.testing.assert_array_equal(edited_alone(tiny, (one, inputs))[0], images[k])
