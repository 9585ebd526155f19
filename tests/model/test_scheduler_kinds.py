"""Each scheduler of diffusers as it is saved, in a loop of its own, against the sampler that its checkpoint gets."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from torch import Tensor

from tminus.model.checkpoint import load_checkpoint
from tminus.model.pixels import to_uint8
from tminus.model.samplers import sample
from tminus.service.engine.protocol import BUNDLED

STEPS = 20
CLIP = {"thresholding": True, "sample_max_value": 1.0}  # how classes without clip_sample say it
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddpm": (DDPMScheduler, {}),
    # (with trailing spacing diffusers leaves noise in the last image, as its last timestep is not 0)
    "ddpm, linspace": (DDPMScheduler, {"variance_type": "fixed_large", "timestep_spacing": "linspace"}),
    "ddim": (DDIMScheduler, {"set_alpha_to_one": False, "clip_sample": False}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, CLIP),
    "dpmpp_3m": (DPMSolverMultistepScheduler, {"solver_order": 3, **CLIP}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", **CLIP}),
    "unipc": (UniPCMultistepScheduler, CLIP),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
    "pndm": (PNDMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "euler, leading": (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    "heun": (HeunDiscreteScheduler, {"beta_start": 1e-4, "beta_end": 0.02}),
}
NO_CLIP = ("plms", "pndm", "euler")  # classes that know none, where ours clips unless it is told not to
OF_EPS = ("plms", "pndm")  # extrapolate eps, as CompVis does; diffusers extrapolates what the network gives, here v
LABELS = torch.tensor([8])


def seeded(k: int) -> Tensor:
    return torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(k))


@pytest.fixture(scope="module")
def net() -> UNet2DModel:
    return UNet2DModel.from_pretrained(BUNDLED, subfolder="unet")


def loop_of_diffusers(net: UNet2DModel, scheduler: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    draws = iter(range(1, 10_000))
    monkeypatch.setattr(
        f"{type(scheduler).__module__}.randn_tensor", lambda *_a, **_k: seeded(next(draws)), raising=False
    )
    scheduler.set_timesteps(STEPS)
    x = seeded(0) * getattr(scheduler, "init_noise_sigma", 1.0)
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), t, LABELS).sample
        x = scheduler.step(out, t, x).prev_sample
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
@torch.no_grad()
def test_garment_is_that_of_the_checkpoints_own_scheduler_within_a_grey_level(
    name: str, net: UNet2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cls, settings = SCHEDULERS[name]
    scheduler = cls(prediction_type="epsilon" if name in OF_EPS else "v_prediction", **settings)
    shutil.copytree(BUNDLED / "unet", tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    checkpoint = load_checkpoint(tmp_path)
    sampler = checkpoint.noise.default_sampler
    assert sampler == name.split(",")[0]
    plan = checkpoint.plan(sampler, STEPS, clip=False if sampler in NO_CLIP else None)
    ours = sample(checkpoint.net, plan, seeded(0), lambda k: seeded(k + 1), class_labels=LABELS)
    theirs = loop_of_diffusers(net, scheduler, monkeypatch)
    levels = (to_uint8(ours).int() - to_uint8(theirs).int()).abs()
    assert levels.max() <= 1
    if name in OF_EPS:
        return
    grey = (to_uint8(ours) > 10) & (to_uint8(ours) < 245)
    assert grey.float().mean() > 0.1, "there is a garment, not black and white alone"


def test_deis_ends_at_no_noise_where_diffusers_ends_at_the_first_level() -> None:
    """The one difference: docs/checkpoints.md tells it."""
    scheduler = DEISMultistepScheduler()
    scheduler.set_timesteps(STEPS)
    assert scheduler.sigmas[-1] > 0.009
    plan = load_checkpoint(BUNDLED).plan("deis", STEPS)
    assert plan.matrices is not None
    assert plan.matrices[-1, 0].tolist() == [0, 1, 0, 0, 0], "x' = x0"
