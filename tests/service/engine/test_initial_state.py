"""Where edits and snapshots start: against diffusers, float64 formulas, and what is refused."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from tests.service.conftest import MakeCheckpoint
from tests.service.engine.edits import SCHEDULERS, edit, edited_alone, half_mask, picture, states
from tests.service.engine.engines import CPU, Job, make_engine, spec_of
from tminus.model.checkpoint import Checkpoint
from tminus.model.rng import image_noise
from tminus.service.spec import Inputs, Snapshot

pytestmark = pytest.mark.slow

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
    for steps, strength, masked in product([2, 10], [None, 0.2, 0.8, 1.0], [False, True]):
        for sampler, eta in samplers:
            is_edit = masked or strength is not None
            takes_a_step = strength is None or int(strength * steps) > 0  # diffusers may take none
            if is_edit and takes_a_step:
                yield steps, strength, masked, sampler, eta
    yield 50, 0.8, True, "ddpm", 0.0  # all timesteps that there are


@pytest.mark.parametrize(("steps", "strength", "masked", "sampler", "eta"), [*edits_that_diffusers_makes()])
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


@pytest.mark.parametrize(("strength", "steps"), [(None, 10), (0.01, 1), (0.29, 25), (0.7, 10), (1.0, 25)])
def test_an_edit_is_its_formulas(tiny: Checkpoint, strength: float | None, steps: int) -> None:
    inputs = Inputs(picture(1), half_mask(2))
    job = edit(inputs, steps=steps, sampler="ddim", strength=strength, seed=4, class_labels=(1,))
    np.testing.assert_allclose(states(tiny, job)[-1], by_the_formulas(tiny, job), atol=1e-4)


def test_a_zero_snr_schedule_is_edited_from_where_there_is_signal(
    make_checkpoint: MakeCheckpoint, tiny: Checkpoint
) -> None:
    noise = replace(tiny.noise, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    checkpoint = make_checkpoint(noise=noise)
    for sampler in SCHEDULERS:
        for strength in (None, 0.5, 1.0):
            job = edit(Inputs(picture(), half_mask()), steps=6, sampler=sampler, strength=strength,
                       timestep_spacing="trailing")  # fmt: skip
            np.testing.assert_array_equal(edited_alone(checkpoint, job)[0][~half_mask()], picture()[~half_mask()])


# --- what is refused ---


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
    [((8, 8, 3), None), ((8, 4, 1), None), ((8, 8, 1), (4, 8))],
)
def test_inputs_of_another_shape_are_refused(
    tiny: Checkpoint, image: tuple[int, ...], mask: tuple[int, ...] | None
) -> None:
    inputs = Inputs(np.zeros(image, np.uint8), np.zeros(mask, bool) if mask is not None else None)
    spec, _ = edit(inputs, strength=0.5)
    with pytest.raises(ValueError, match="must be"):
        make_engine(tiny).add(spec, inputs=inputs)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((1, 1, 8, 8), np.float32), ((2, 1, 8, 9), np.float32), ((2, 8, 8), np.float32), ((2, 1, 8, 8), np.float64)],
)
def test_a_snapshot_of_another_shape_or_type_is_refused_and_takes_nothing(
    tiny: Checkpoint, shape: tuple[int, ...], dtype: type
) -> None:
    engine, zeros = make_engine(tiny, max_rows=2), np.zeros(shape, dtype)
    with pytest.raises(ValueError, match=rf"a snapshot's x must be float32 .*, got {np.dtype(dtype)}"):
        engine.add(spec_of(n=2), Snapshot((1, 1), zeros, zeros, zeros[:, None][:, :0]))
    assert len(engine.add(spec_of(n=2))) == 2
