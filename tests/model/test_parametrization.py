"""Models that were trained on another x than ours: EDM, flow matching, VE. diffusers' own loops are the reference."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from safetensors.torch import load_file
from torch import Tensor

from tests.model.formats.conftest import randomised
from tests.model.test_unet import NCSNPP
from tests.tiny import TINY
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.files import CheckpointError
from tminus.model.samplers import Plan, sample

STEPS = 12
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "edm, euler": (EDMEulerScheduler, {}),
    "edm, exponential": (EDMEulerScheduler, {"sigma_schedule": "exponential", "sigma_max": 20.0, "sigma_data": 1.0}),
    "edm, another ramp": (EDMEulerScheduler, {"sigma_min": 0.01, "rho": 4.0, "num_train_timesteps": 77}),
    "edm, v": (EDMEulerScheduler, {"prediction_type": "v_prediction"}),
    "edm, dpmpp_2m": (EDMDPMSolverMultistepScheduler, {}),
    "edm, dpmpp_2m, clip": (EDMDPMSolverMultistepScheduler, {"thresholding": True}),
    "edm, dpmpp_3m": (EDMDPMSolverMultistepScheduler, {"solver_order": 3, "prediction_type": "v_prediction"}),
    "edm, dpmpp_2m_sde": (EDMDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "flow": (FlowMatchEulerDiscreteScheduler, {}),
    "flow, shift": (FlowMatchEulerDiscreteScheduler, {"shift": 3.0, "num_train_timesteps": 500}),
    "ve": (ScoreSdeVeScheduler, {"sigma_max": 3.0, "correct_steps": 0}),
    "ve, centred": (ScoreSdeVeScheduler, {"sigma_max": 3.0, "correct_steps": 0}),
    "ve, fourier": (ScoreSdeVeScheduler, {"sigma_max": 3.0, "correct_steps": 0}),
    "ve, ncsnpp": (ScoreSdeVeScheduler, {"correct_steps": 0}),
}
NETS: dict[str, dict[str, Any]] = {
    "ve, centred": {"center_input_sample": True},
    "ve, fourier": {"time_embedding_type": "fourier"},
    "ve, ncsnpp": {"in_channels": 3, "out_channels": 3, "center_input_sample": True, **NCSNPP, "sample_size": 8},
}


def noise_of(k: int, channels: int = 1) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(k))


def saved(folder: Path, name: str) -> tuple[Checkpoint, UNet2DModel, Any]:
    cls, settings = CASES[name]
    fields = {key: value for key, value in TINY.to_dict().items() if key != "_class_name"}
    net = randomised(UNet2DModel(**fields | NETS.get(name, {})))
    scheduler = cls(**settings)
    pipeline = ScoreSdeVePipeline if cls is ScoreSdeVeScheduler else DDPMPipeline
    pipeline(net, scheduler).save_pretrained(folder)
    return load_checkpoint(folder), net, scheduler


def loop_of_diffusers(net: UNet2DModel, scheduler: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Run diffusers' loop from its own x, with the noise of step k noise_of(1 + k)."""
    draws = iter(range(1, 10_000))
    module = type(scheduler).__module__
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_a, **_k: noise_of(next(draws), x.shape[1]), raising=False)
    scheduler.set_timesteps(STEPS)
    if isinstance(scheduler, ScoreSdeVeScheduler):
        scheduler.set_sigmas(STEPS)
        for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=True):
            out = net(x, sigma.expand(len(x))).sample
            x, mean = scheduler.step_pred(out, t, x, return_dict=False)
        return mean
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(scaled, t).sample, t, x, return_dict=False)[0]
    return x


def to_theirs(name: str, x: Tensor, plan: Plan) -> Tensor:
    """The x that diffusers has where ours is x, before the first pass."""
    alpha_bar = plan.alpha_bar[0].item()
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if name.startswith("flow"):
        return x / (signal + noise)
    return (x / signal + 1) / 2 if name.startswith("ve") else x / signal


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_image_is_that_of_diffusers_own_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, net, scheduler = saved(tmp_path, name)
    plan = checkpoint.plan(checkpoint.default_sampler, STEPS)
    channels = net.config.in_channels
    x_T = noise_of(0, channels)
    got = sample(checkpoint.net, plan, x_T, lambda k: noise_of(1 + k, channels))
    theirs = loop_of_diffusers(net, scheduler, to_theirs(name, x_T, plan), monkeypatch)
    if name.startswith("ve"):
        theirs = 2 * theirs - 1
    torch.testing.assert_close(got, theirs, rtol=1e-5, atol=1e-4 * max(1.0, theirs.abs().max().item()))
    assert got.std() > 0.05


@pytest.mark.parametrize("cls", [DDPMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler])
def test_fourier_features_are_refused_with_a_scheduler_of_no_score_by_field_and_value(cls: Any, tmp_path: Path) -> None:
    fields = {key: value for key, value in TINY.to_dict().items() if key != "_class_name"}
    DDPMPipeline(UNet2DModel(**fields | {"time_embedding_type": "fourier"}), cls()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"time_embedding_type must be positional or learned .*, got 'fourier'"):
        load_checkpoint(tmp_path)


def test_fourier_features_under_their_old_name_are_read(tmp_path: Path) -> None:
    """diffusers of 2022 wrote the same weights as time_proj.W too."""
    checkpoint, *_ = saved(tmp_path, "ve, fourier")
    file = next(tmp_path.glob("unet/*.safetensors"))
    state = load_file(file)
    torch.save({**state, "time_proj.W": state["time_proj.weight"]}, file.with_suffix(".bin"))
    file.unlink()
    assert load_checkpoint(tmp_path).weights_hash == checkpoint.weights_hash
