"""One job without a server, on an engine of its own: against an independent loop and against diffusers."""

from dataclasses import replace
from itertools import product

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

from tests.service.conftest import MakeCheckpoint
from tests.service.engine.engines import CPU, MIXED, Counting, Floats, alone, independent, make_engine, spec_of
from tminus.model.catalogue import SAMPLERS
from tminus.model.checkpoint import Checkpoint
from tminus.model.noise import NoiseConfig
from tminus.model.pixels import to_uint8
from tminus.model.rng import image_noise
from tminus.model.timesteps import SPACINGS
from tminus.service.engine.executors import EagerExecutor
from tminus.service.engine.protocol import sample_locally
from tminus.service.spec import SampleSpec
from tminus.service.work import work_of

pytestmark = pytest.mark.slow

# --- against the independent loop ---


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("spec", MIXED, ids=lambda spec: f"seed{spec.seed}")
def test_the_engine_agrees_with_the_independent_loop(tiny: Checkpoint, spec: SampleSpec) -> None:
    images = alone(tiny, spec)
    assert images.shape == (spec.n, 8, 8, 1)
    np.testing.assert_allclose(images, independent(tiny, spec), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("floats")
def test_all_of_a_spec_matters(tiny: Checkpoint) -> None:
    """Or the tests above would compare images that a lost field leaves alone."""
    base = spec_of(sampler="ddim", eta=0.5, guidance=2.0, class_labels=(0,), clip=True)
    others = ({"steps": 9}, {"sampler": "ddpm"}, {"eta": 0.6}, {"guidance": 2.5}, {"class_labels": (1,)})
    others += ({"guidance_interval": (0, 25)}, {"guidance_interval": (25, 49)}, {"timestep_spacing": "trailing"})
    others += (
        {"sampler": "dpmpp_2m"},
        {"clip": False},
        {"seed": 2},
        {"seed": 1 + 2**32},
        {"index": 1},
        {"guidance": 1.0},
    )  # type: ignore[assignment]
    images = alone(tiny, base)
    for change in others:
        other = alone(tiny, replace(base, **change))  # type: ignore[arg-type]
        assert np.abs(other - images).max() > 1e-3, change
    null = alone(tiny, replace(base, class_labels=(None,), guidance=1.0))
    assert np.abs(null - alone(tiny, replace(base, guidance=1.0))).max() > 1e-3


def test_images_are_bytes_rounded_as_training_data_is(tiny: Checkpoint) -> None:
    spec = spec_of(n=3, seed=11)
    images = alone(tiny, spec)
    expected = to_uint8(torch.from_numpy(independent(tiny, spec).copy())).numpy()
    assert images.dtype == np.uint8
    assert images.std() > 10, "not a blank image"
    np.testing.assert_allclose(images.astype(int), expected.astype(int), atol=1)
    assert (images == expected).mean() > 0.99


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
def test_other_predictions_and_variances_agree_with_the_independent_loop(
    make_checkpoint: MakeCheckpoint, prediction_type: str, variance_type: str
) -> None:
    noise = NoiseConfig(num_train_timesteps=20, prediction_type=prediction_type, variance_type=variance_type)
    checkpoint, spec = make_checkpoint(noise=noise), spec_of(n=2, steps=20)
    np.testing.assert_allclose(alone(checkpoint, spec), independent(checkpoint, spec), atol=1e-5, rtol=1e-5)


INTERVALS = ((10, 30), (0, 0), (40, 49))
# All three with ddpm in each spacing; with every other sampler too, though not in each spacing.
IN_TURN = [(*pair, INTERVALS[k % 3]) for k, pair in enumerate(product(SAMPLERS, SPACINGS)) if pair[0] != "ddpm"]


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize(
    ("sampler", "spacing", "interval"), [*product(["ddpm"], SPACINGS, INTERVALS), *IN_TURN], ids=str
)
def test_guidance_intervals_agree_with_the_independent_loop(
    tiny: Checkpoint, sampler: str, spacing: str, interval: tuple[int, int]
) -> None:
    spec = spec_of(
        n=2, steps=10, sampler=sampler, timestep_spacing=spacing, guidance=3.0, guidance_interval=interval,
        class_labels=(0, 2),
    )  # fmt: skip
    images = alone(tiny, spec)
    np.testing.assert_allclose(images, independent(tiny, spec), atol=1e-5, rtol=1e-5)
    if work_of(spec, make_engine(tiny).info).guided:
        assert np.abs(images - alone(tiny, replace(spec, guidance=1.0, guidance_interval=None))).max() > 1e-4


# --- guidance intervals ---


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("interval", [(0, 49), (10, 30), (49, 49), (11, 12)])
def test_a_guided_row_takes_a_second_place_only_inside_its_interval(
    tiny: Checkpoint, sampler: str, interval: tuple[int, int]
) -> None:
    executor = Counting(EagerExecutor(tiny.net, CPU))
    engine = make_engine(tiny, executor=executor)
    spec = spec_of(steps=10, sampler=sampler, guidance=3.0, guidance_interval=interval, class_labels=(1,))
    sample_locally(engine, spec, 8, lambda rows: None)
    assert len(executor.passes) == spec.num_passes
    timesteps = engine.plan(spec).timesteps.tolist()
    for t, (ts, labels) in zip(timesteps, executor.passes, strict=True):
        inside = interval[0] <= t <= interval[1]
        assert ts == pytest.approx([t, t] if inside else [t])
        assert labels == ([1, 3] if inside else [1]), "the null class beside its own"
    assert sum(len(ts) for ts, _ in executor.passes) == work_of(spec, engine.info).places


# --- against diffusers ---


@pytest.fixture(scope="module")
def net(tiny: Checkpoint) -> diffusers.UNet2DModel:
    """diffusers' U-Net with our weights."""
    config = {key: value for key, value in tiny.net.config.to_dict().items() if not key.startswith("_")}
    net = diffusers.UNet2DModel(**config).eval()
    net.load_state_dict(tiny.net.state_dict())
    return net


def diffusers_images(
    net: diffusers.UNet2DModel,
    checkpoint: Checkpoint,
    spec: SampleSpec,
    monkeypatch: pytest.MonkeyPatch,
    scheduler_name: str,
) -> Floats:
    """The images by diffusers' scheduler with our noise."""
    scheduler = getattr(diffusers, scheduler_name).from_config(checkpoint.noise.to_dict())
    scheduler.set_timesteps(spec.steps)
    shape = checkpoint.row_shape
    indices = range(spec.index, spec.index + spec.n)
    draws = [image_noise(spec.seed, indices, draw, shape, CPU) for draw in range(spec.steps + 1)]
    null = checkpoint.labels.null_class
    labels = torch.tensor([null if label is None else label for label in spec.class_labels or ()])
    x = draws[0]
    with torch.inference_mode():
        for k, t in enumerate(scheduler.timesteps):
            out = net(x, t, labels).sample
            if spec.guidance != 1:
                out_u = net(x, t, torch.full_like(labels, null)).sample
                out = out_u + spec.guidance * (out - out_u)
            z = draws[k + 1]
            if scheduler_name == "DDIMScheduler":
                # eps is taken from the clipped x0 here, as the one update rule does.
                step = scheduler.step(out, t, x, eta=spec.eta, use_clipped_model_output=True, variance_noise=z)
            else:

                def randn(*_args: object, z: Tensor = z, **_kwargs: object) -> Tensor:
                    return z

                monkeypatch.setattr(scheduling_ddpm, "randn_tensor", randn)
                step = scheduler.step(out, t, x)
            x = step.prev_sample
    images: Floats = x.permute(0, 2, 3, 1).numpy()
    return images


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize(
    ("steps", "variance_type", "guidance"),
    [*product([10, 1], ["fixed_small", "fixed_large"], [1.0, 3.0]), (50, "fixed_large", 3.0)],
)
def test_ddpm_agrees_with_diffusers(
    net: diffusers.UNet2DModel,
    tiny: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    variance_type: str,
    guidance: float,
) -> None:
    noise = NoiseConfig(num_train_timesteps=50, beta_end=0.1, variance_type=variance_type)
    checkpoint, spec = replace(tiny, noise=noise), spec_of(n=2, steps=steps, guidance=guidance, class_labels=(0, 2))
    ours, theirs = alone(checkpoint, spec), diffusers_images(net, checkpoint, spec, monkeypatch, "DDPMScheduler")
    np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=1e-4)


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize(
    ("steps", "eta", "set_alpha_to_one"), [*product([10, 7], [0.0, 0.5, 1.0], [True, False]), (50, 0.5, False)]
)
def test_ddim_agrees_with_diffusers(
    net: diffusers.UNet2DModel,
    tiny: Checkpoint,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
    eta: float,
    set_alpha_to_one: bool,
) -> None:
    noise = NoiseConfig(num_train_timesteps=50, beta_end=0.1, set_alpha_to_one=set_alpha_to_one, default_sampler="ddim")
    checkpoint = replace(tiny, noise=noise)
    spec = spec_of(n=2, steps=steps, sampler="ddim", eta=eta, class_labels=(1, None))
    ours, theirs = alone(checkpoint, spec), diffusers_images(net, checkpoint, spec, monkeypatch, "DDIMScheduler")
    np.testing.assert_allclose(ours, theirs, atol=3e-5, rtol=1e-4)
