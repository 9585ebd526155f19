"""Edits in the engine: where they start, what they keep, held against diffusers, float64 formulas and themselves."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.checkpoint import Checkpoint
from model.rng import image_noise
from service.engine.engine import Engine
from service.engine.executors import EagerExecutor
from service.engine.local import sample_locally
from service.errors import NotFinite
from service.scheduling.scheduler import Scheduler, Sharing
from service.spec import Images, Inputs, SampleSpec
from service.work import Batch, timesteps_of, work_of
from tests.service.conftest import Around, MakeCheckpoint
from tests.service.engine.test_engine import CPU, MIXED, OnGpu, make_engine, on_gpu, spec_of  # noqa: F401

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


def alone(checkpoint: Checkpoint, job: Job) -> Images:
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


def interrupted(checkpoint: Checkpoint, job: Job, after: int) -> Images:
    """The images of a job that went on in another engine after so many ticks of three places."""
    spec, inputs = job
    first, scheduler = make_engine(checkpoint), Scheduler(Sharing.of(3))
    rows = first.add(spec, inputs=inputs)
    work = work_of(spec, first.info)
    scheduler.add("a", rows, work)
    for _ in range(after):
        batch = scheduler.next_batch()
        assert batch is not None
        first.step(batch)
        scheduler.advance(batch)
        if not scheduler.has_work:
            return first.images(rows)()
    snapshot = first.snapshot(rows, scheduler.steps("a"))()
    second, scheduler = make_engine(checkpoint), Scheduler(Sharing.of(4))
    second.add(spec_of(n=3))  # so that the rows have other slots
    rows = second.add(spec, snapshot, inputs)
    scheduler.add("a", rows, work, snapshot.steps)
    while (batch := scheduler.next_batch()) is not None:
        second.step(batch)
        scheduler.advance(batch)
    return second.images(rows)()


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


# --- against diffusers, as its img2img and inpaint pipelines do it ---


def theirs(checkpoint: Checkpoint, job: Job, monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """x before each step and after the last, by diffusers' schedulers with our network and our noise."""
    spec, inputs = job
    assert inputs is not None
    noise = replace(checkpoint.noise, default_sampler=spec.sampler, timestep_spacing=spec.timestep_spacing)
    scheduler = getattr(diffusers, SCHEDULERS[spec.sampler]).from_config(noise.to_dict())
    scheduler.set_timesteps(spec.steps)
    first = 0
    if spec.strength is not None:  # StableDiffusionImg2ImgPipeline.get_timesteps
        first = max(spec.steps - min(int(spec.steps * spec.strength), spec.steps), 0)
    timesteps = scheduler.timesteps[first:]
    if spec.sampler == "dpmpp_2m":
        scheduler.set_begin_index(first)
    indices = range(spec.index, spec.index + spec.n)

    def draw(k: int) -> Tensor:
        return image_noise(spec.seed, indices, k, (1, 8, 8), CPU)

    x_0 = (
        torch.from_numpy(inputs.image.astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None].expand(spec.n, -1, -1, -1)
    )
    x = draw(0) if spec.strength is None else scheduler.add_noise(x_0, draw(0), timesteps[:1].expand(spec.n))
    labels = torch.tensor(spec.class_labels)
    found = [x]
    for i, t in enumerate(timesteps):
        k = first + i
        with torch.inference_mode():
            out = checkpoint.net(x, t.expand(spec.n), labels)
        z = draw(k + 1)
        if spec.sampler == "ddim":
            x = scheduler.step(out, t, x, eta=spec.eta, use_clipped_model_output=True, variance_noise=z).prev_sample
        else:
            monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, z=z, **__: z)
            x = scheduler.step(out, t, x).prev_sample
        if inputs.mask is not None:
            known = x_0
            if i < len(timesteps) - 1:
                known = scheduler.add_noise(x_0, draw(2**31 + k), timesteps[i + 1 : i + 2].expand(spec.n))
            x = torch.where(torch.from_numpy(inputs.mask), x, known)
        found.append(x)
    return [each.numpy() for each in found]


def edits_that_diffusers_makes() -> Iterator[tuple[int, float | None, bool, str, float]]:
    """Steps, strength, whether masked, sampler, eta."""
    samplers = [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7), ("dpmpp_2m", 0.0)]
    for steps, strength, masked in product([1, 2, 5, 10, 50], [None, 0.2, 0.5, 0.8, 1.0], [False, True]):
        for sampler, eta in samplers:
            is_edit = masked or strength is not None
            takes_a_step = strength is None or int(strength * steps) > 0  # diffusers may take none
            repeats_timesteps = sampler == "dpmpp_2m" and steps == 50  # in diffusers
            if is_edit and takes_a_step and not repeats_timesteps:
                yield steps, strength, masked, sampler, eta


@pytest.mark.parametrize(("steps", "strength", "masked", "sampler", "eta"), edits_that_diffusers_makes())
def test_every_step_is_that_of_diffusers(
    tiny: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    strength: float | None,
    masked: bool,
    sampler: str,
    eta: float,
) -> None:
    fields = {"n": 2, "steps": steps, "sampler": sampler, "eta": eta, "strength": strength, "index": 3}
    fields |= {"timestep_spacing": "leading", "class_labels": (0, 2), "seed": 11}
    job = edit(Inputs(picture(), half_mask(5) if masked else None), **fields)
    ours, expected = states(tiny, job), theirs(tiny, job, monkeypatch)
    assert len(ours) == len(expected)
    for mine, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(mine, other, atol=2e-4)


# --- against the formulas, in float64 and without a table ---


def by_the_formulas(checkpoint: Checkpoint, job: Job) -> np.ndarray:
    """x_0 of an unguided DDIM job of spacing `leading`, each line as it stands in the papers."""
    spec, inputs = job
    assert inputs is not None
    T = 50
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.1, T))
    taus = [k * (T // spec.steps) for k in range(spec.steps)][::-1]
    taken = spec.steps if spec.strength is None else max(1, int(np.floor(spec.strength * spec.steps + 1e-9)))

    def draw(k: int) -> np.ndarray:
        return image_noise(spec.seed, [spec.index], k, (1, 8, 8), CPU).double().numpy()

    x_0 = inputs.image.transpose(2, 0, 1)[None] / 127.5 - 1
    x = draw(0)
    for k in range(spec.steps - taken, spec.steps):
        abar = alpha_bar[taus[k]]
        if k == spec.steps - taken and spec.strength is not None:
            x = np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * draw(0)  # Ho et al. 2020, eq. 4
        prev = alpha_bar[taus[k + 1]] if k + 1 < spec.steps else 1.0
        with torch.inference_mode():
            t, label = torch.tensor([taus[k]]), torch.tensor(spec.class_labels)
            eps = checkpoint.net(torch.from_numpy(x).float(), t, label).double().numpy()
        guess = np.clip((x - np.sqrt(1 - abar) * eps) / np.sqrt(abar), -1, 1)
        towards = (x - np.sqrt(abar) * guess) / np.sqrt(1 - abar)
        x = np.sqrt(prev) * guess + np.sqrt(1 - prev) * towards  # Song et al. 2021, eq. 12, eta 0
        if inputs.mask is not None:  # Lugmayr et al. 2022, eq. 8
            m = inputs.mask.astype(float)
            x = m * x + (1 - m) * (np.sqrt(prev) * x_0 + np.sqrt(1 - prev) * draw(2**31 + k))
    return x


@pytest.mark.parametrize("strength", [None, 0.01, 0.3, 0.29, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 10, 25])
def test_an_edit_is_its_formulas(tiny: Checkpoint, strength: float | None, steps: int) -> None:
    inputs = Inputs(picture(1), half_mask(2))
    job = edit(inputs, steps=steps, sampler="ddim", strength=strength, seed=4, class_labels=(1,))
    np.testing.assert_allclose(states(tiny, job)[-1], by_the_formulas(tiny, job), atol=1e-4)


# --- the same bytes ---


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_edit_is_the_same_alone_in_company_interrupted_and_by_index(tiny: Checkpoint, data: st.DataObject) -> None:
    mask = half_mask(data.draw(st.integers(0, 9))) if data.draw(st.booleans(), "masked") else None
    strength = (
        data.draw(st.none() | st.floats(0.01, 1), "strength") if mask is not None else data.draw(st.floats(0.01, 1))
    )
    n, guided = data.draw(st.integers(1, 3), "n"), data.draw(st.booleans(), "guided")
    sampler = data.draw(st.sampled_from(sorted(SCHEDULERS)), "sampler")
    fields = {
        "n": n, "steps": data.draw(st.integers(1, 14), "steps"), "sampler": sampler, "strength": strength,
        "seed": data.draw(st.integers(0, 2**64 - 1)), "guidance": 3.0 if guided else 1.0,
        "guidance_interval": (10, 30) if guided and data.draw(st.booleans()) else None,
        "eta": data.draw(st.sampled_from([0.0, 0.6])) if sampler == "ddim" else 0.0, "clip": data.draw(st.booleans()),
    }  # fmt: skip
    inputs = Inputs(picture(data.draw(st.integers(0, 9))), mask)
    job = edit(inputs, **fields)
    try:
        images = alone(tiny, job)
    except NotFinite:  # without the clip
        return
    if mask is not None:
        np.testing.assert_array_equal(images[:, ~mask], np.repeat(inputs.image[~mask][None], n, 0), "known, and exact")
    others = [(spec, None) for spec in MIXED[:4]] + [edit(Inputs(picture(77), half_mask(77)), n=2, steps=9, seed=5)]
    together = in_company(make_engine(tiny), [job, *others], data.draw(st.integers(0, 99)))
    np.testing.assert_array_equal(together[0], images)
    ticks = data.draw(st.integers(0, n * job[0].num_steps), "interrupted after")
    np.testing.assert_array_equal(interrupted(tiny, job, ticks), images)
    k = data.draw(st.integers(0, n - 1), "k")
    one = replace(job[0], n=1, index=job[0].index + k, class_labels=(job[0].class_labels or ())[k : k + 1])
    np.testing.assert_array_equal(alone(tiny, (one, inputs))[0], images[k])


def test_plain_rows_beside_masked_ones_have_the_bytes_they_had(tiny: Checkpoint) -> None:
    plain: list[Job] = [(spec, None) for spec in MIXED]
    masked = [edit(Inputs(picture(k), half_mask(k)), n=2, steps=8 + k, seed=k, guidance=1.0 + k) for k in range(3)]
    found = in_company(make_engine(tiny), [*plain, *masked])
    for job, images in zip([*plain, *masked], found, strict=True):
        np.testing.assert_array_equal(images, alone(tiny, job))


def test_a_mask_that_is_all_white_is_no_mask_and_one_that_is_all_black_gives_the_image(tiny: Checkpoint) -> None:
    inputs = Inputs(picture(), np.ones((8, 8), bool))
    np.testing.assert_array_equal(alone(tiny, edit(inputs, n=2)), alone(tiny, (spec_of(n=2), None)))
    kept = alone(tiny, edit(Inputs(picture(), np.zeros((8, 8), bool)), n=2))
    np.testing.assert_array_equal(kept, np.stack([picture()] * 2))


def test_the_noise_of_known_pixels_is_drawn_apart_from_every_other(tiny: Checkpoint) -> None:
    """At each step the known pixels are x_0 under noise of that step's own draw, whatever the strength."""
    inputs = Inputs(picture(), half_mask())
    schedule = tiny.noise.schedule()
    for strength in (None, 0.5):
        job = edit(inputs, steps=10, strength=strength, seed=8)
        timesteps, start = timesteps_of(job[0], make_engine(tiny).info), job[0].start
        x_0 = inputs.image.transpose(2, 0, 1) / 127.5 - 1
        for i, x in enumerate(states(tiny, job)[1:]):
            abar = float(schedule.alpha_bar[timesteps[i + 1]]) if i + 1 < len(timesteps) else 1.0
            eps = image_noise(8, [0], 2**31 + start + i, (1, 8, 8), CPU)[0].numpy()
            expected = np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * eps
            np.testing.assert_allclose(x[0][:, :, 4:], expected[:, :, 4:], atol=1e-6)


def test_known_pixels_are_exact_where_ddim_ends_short_of_x_0(make_checkpoint: MakeCheckpoint, tiny: Checkpoint) -> None:
    checkpoint = make_checkpoint(noise=replace(tiny.noise, set_alpha_to_one=False))
    image, mask = picture(), half_mask()
    found = alone(checkpoint, edit(Inputs(image, mask), sampler="ddim"))
    np.testing.assert_array_equal(found[0][~mask], image[~mask])


def test_every_grey_comes_out_as_it_went_in(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(sample_size=(16, 16))
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    for sampler in SCHEDULERS:
        job = edit(Inputs(image, np.zeros((16, 16), bool)), steps=3, sampler=sampler)
        np.testing.assert_array_equal(alone(checkpoint, job)[0], image)


def test_colour_is_kept_in_all_its_channels(make_checkpoint: MakeCheckpoint) -> None:
    checkpoint = make_checkpoint(in_channels=3, out_channels=3, sample_size=(4, 10))
    image, mask = picture(3, (4, 10, 3)), np.eye(4, 10, dtype=bool)
    found = alone(checkpoint, edit(Inputs(image, mask), n=2, steps=5, strength=0.7))
    np.testing.assert_array_equal(found[:, ~mask], np.stack([image[~mask]] * 2))
    assert (found[:, mask] != image[mask]).any()


def test_a_zero_snr_schedule_is_edited_from_where_there_is_signal(
    make_checkpoint: MakeCheckpoint, tiny: Checkpoint
) -> None:
    noise = replace(tiny.noise, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    checkpoint = make_checkpoint(noise=noise)
    for sampler in SCHEDULERS:
        for strength in (None, 0.5, 1.0):
            job = edit(Inputs(picture(), half_mask()), steps=6, sampler=sampler, strength=strength,
                       timestep_spacing="trailing")  # fmt: skip
            np.testing.assert_array_equal(alone(checkpoint, job)[0][~half_mask()], picture()[~half_mask()])


# --- what it costs, and what is refused ---


def test_an_engine_that_sees_no_mask_makes_no_room_for_one(tiny: Checkpoint) -> None:
    engine = make_engine(tiny)
    in_company(engine, [(MIXED[0], None), edit(Inputs(picture()), strength=0.5)])
    assert engine._known is None
    in_company(engine, [edit(Inputs(picture(), half_mask()))])
    assert engine._known is not None


def test_a_slots_former_mask_leaves_no_trace(tiny: Checkpoint) -> None:
    engine = make_engine(tiny, max_rows=2, max_jobs=1)
    for job in [
        edit(Inputs(picture(), half_mask()), n=2),
        (spec_of(n=2), None),
        edit(Inputs(picture(1), half_mask(3)), n=2),
    ]:
        np.testing.assert_array_equal(in_company(engine, [job])[0], alone(tiny, job))


@pytest.mark.parametrize(
    "inputs",
    [None, Inputs(picture(1), half_mask()), Inputs(picture()), Inputs(picture(), half_mask(1))],
    ids=["none", "another image", "no mask", "another mask"],
)
def test_inputs_that_are_not_those_of_the_spec_are_refused_and_take_nothing(
    tiny: Checkpoint, inputs: Inputs | None
) -> None:
    engine = make_engine(tiny, max_rows=2)
    spec, own = edit(Inputs(picture(), half_mask()), n=2)
    with pytest.raises(ValueError, match="not those of the spec"):
        engine.add(spec, inputs=inputs)
    with pytest.raises(ValueError, match="not those of the spec"):
        engine.add(spec_of(), inputs=own)
    engine.add(spec, inputs=own)


@pytest.mark.parametrize(
    ("image", "mask"),
    [((8, 8, 3), None), ((8, 4, 1), None), ((8, 8, 1), (4, 8)), ((8, 8), None), ((8, 8, 1), (8, 8, 1))],
)
def test_inputs_of_another_shape_are_refused(
    tiny: Checkpoint, image: tuple[int, ...], mask: tuple[int, ...] | None
) -> None:
    inputs = Inputs(np.zeros(image, np.uint8), np.zeros(mask, bool) if mask is not None else None)
    spec, _ = edit(inputs, strength=0.5)
    with pytest.raises(ValueError, match="must be"):
        make_engine(tiny).add(spec, inputs=inputs)


def test_a_row_that_turns_nan_under_its_mask_breaks_its_own_job_only(tiny: Checkpoint) -> None:
    class Sick(Around):
        def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
            out = self.executor(x, t, class_labels)
            assert class_labels is not None
            return torch.where((class_labels == 2)[:, None, None, None], torch.nan, out)

    engine = make_engine(tiny, executor=Sick(EagerExecutor(tiny.net, CPU)))
    sick, well = edit(Inputs(picture(), half_mask()), class_labels=(2,)), edit(Inputs(picture(), half_mask()), seed=3)
    rows = [engine.add(spec, inputs=inputs) for spec, inputs in (sick, well)]
    engine.step(Batch((*rows[0], *rows[1]), (0, 0), ()))
    assert engine.broken((*rows[0], *rows[1])) == rows[0]


# --- on a GPU ---


@pytest.mark.gpu
def test_edits_on_a_gpu_are_those_of_the_cpu_and_a_tick_does_not_wait(
    tiny: Checkpoint,
    on_gpu: OnGpu,  # noqa: F811
) -> None:
    checkpoint, device = on_gpu()
    jobs = [
        edit(Inputs(picture(k), half_mask(k)), n=2, steps=8 + k, seed=k, strength=s) for k, s in enumerate((None, 0.5))
    ]
    for job, images in zip(jobs, in_company(make_engine(checkpoint, device=device), jobs), strict=True):
        np.testing.assert_allclose(images.astype(int), alone(tiny, job).astype(int), atol=1)
    engine = make_engine(checkpoint, device=device)
    (spec, inputs), warm = jobs[0], 2
    rows = engine.add(spec, inputs=inputs)
    for step in range(warm):
        engine.step(Batch(rows, (step, step), ()))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step(Batch(rows, (warm, warm), ()))
    finally:
        torch.cuda.set_sync_debug_mode("default")
