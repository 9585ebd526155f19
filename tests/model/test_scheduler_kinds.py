"""The differences from diffusers' schedulers that docs/checkpoints.md tells."""

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from torch import Tensor

from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.pixels import to_uint8
from tminus.model.samplers import sample
from tminus.service.engine.protocol import BUNDLED

STEPS = 20
LABELS = torch.tensor([8])


def seeded(k: int) -> Tensor:
    return torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(k))


@pytest.fixture(scope="module")
def net() -> Callable[[Tensor, Tensor], Tensor]:
    """The bundled network, which predicts v, as diffusers has it."""
    loaded = UNet2DModel.from_pretrained(BUNDLED, subfolder="unet")
    return lambda x, t: loaded(x, t, LABELS).sample


def loop_of_diffusers(
    net: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    monkeypatch: pytest.MonkeyPatch,
    steps: int = STEPS,
    before: Callable[[int], None] = lambda _k: None,
) -> Tensor:
    draws = iter(range(1, 10_000))
    monkeypatch.setattr(
        f"{type(scheduler).__module__}.randn_tensor", lambda *_a, **_k: seeded(next(draws)), raising=False
    )
    scheduler.set_timesteps(steps)
    x = seeded(0) * getattr(scheduler, "init_noise_sigma", 1.0)
    for k, t in enumerate(scheduler.timesteps):
        before(k)
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t), t, x).prev_sample
    return x


def load_with(scheduler: Any, folder: Path) -> Checkpoint:
    """The bundled network in a folder with this scheduler."""
    shutil.copytree(BUNDLED / "unet", folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    return load_checkpoint(folder)


def sampled(checkpoint: Checkpoint, steps: int = STEPS) -> Tensor:
    """What the checkpoint's own sampler makes, without a clip."""
    plan = checkpoint.plan(checkpoint.noise.default_sampler, steps, clip=False)
    return sample(checkpoint.net, plan, seeded(0), lambda k: seeded(k + 1), class_labels=LABELS)


def grey_levels(one: Tensor, other: Tensor) -> int:
    """The most by which two images differ."""
    return int((to_uint8(one).int() - to_uint8(other).int()).abs().max())


@pytest.mark.parametrize(
    ("scheduler", "steps"),
    [
        (DDIMScheduler(timestep_spacing="linspace", clip_sample=False, prediction_type="v_prediction"), 20),
        (PNDMScheduler(timestep_spacing="trailing", skip_prk_steps=True), 12),
    ],
    ids=["ddim", "plms"],
)
@torch.no_grad()
def test_a_step_leads_to_the_next_timestep_where_diffusers_jumps_by_equal_ones(
    scheduler: Any,
    steps: int,
    net: Callable[[Tensor, Tensor], Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = sampled(load_with(scheduler, tmp_path), steps)
    assert grey_levels(ours, loop_of_diffusers(net, scheduler, monkeypatch, steps)) > 1
    timesteps = list(dict.fromkeys(scheduler.timesteps.tolist()))  # plms takes its second one twice
    jumps = [t - after for t, after in pairwise([*timesteps, -1])]
    again = jumps[:1] if len(scheduler.timesteps) > steps else []

    def tell(k: int) -> None:
        scheduler.register_to_config(num_train_timesteps=[*again, *jumps][k])  # T // steps is the jump
        scheduler.num_inference_steps = 1

    assert grey_levels(ours, loop_of_diffusers(net, scheduler, monkeypatch, steps, tell)) <= 1


@pytest.mark.parametrize("skips", [True, False], ids=["plms", "pndm"])
@torch.no_grad()
def test_eps_is_extrapolated_where_diffusers_extrapolates_what_the_network_predicts(
    skips: bool, net: Callable[[Tensor, Tensor], Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_v, of_eps = (PNDMScheduler(skip_prk_steps=skips, prediction_type=each) for each in ("v_prediction", "epsilon"))

    def eps(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = of_eps.alphas_cumprod[t]
        return alpha_bar.sqrt() * net(x, t) + (1 - alpha_bar).sqrt() * x

    ours = sampled(load_with(of_v, tmp_path))
    assert grey_levels(ours, loop_of_diffusers(eps, of_eps, monkeypatch)) <= 1
    assert grey_levels(ours, loop_of_diffusers(net, of_v, monkeypatch)) > 1


def test_deis_ends_at_no_noise_where_diffusers_ends_at_the_first_level() -> None:
    scheduler = DEISMultistepScheduler()
    scheduler.set_timesteps(STEPS)
    assert scheduler.sigmas[-1] > 0.009
    plan = load_checkpoint(BUNDLED).plan("deis", STEPS)
    assert plan.matrices is not None
    assert plan.matrices[-1, 0].tolist() == [0, 1, 0, 0, 0], "x' = x0"
