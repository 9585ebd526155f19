"""Each scheduler of diffusers, also of models that were trained on another x than ours: EDM, flow matching, VE.

diffusers' own loops are the reference.
"""

import dataclasses
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DModel,
    UniPCMultistepScheduler,
)
from safetensors.torch import load_file
from torch import Tensor

from tests.model import loops
from tests.model.formats.conftest import randomised
from tests.model.loops import loop_of_diffusers, to_theirs
from tests.model.test_unet import NCSNPP
from tests.tiny import TINY
from tminus.model.catalogue import SAMPLER_FACTS, SAMPLERS
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.files import CheckpointError
from tminus.model.guidance import Forward
from tminus.model.loss import variational_bound
from tminus.model.noise import NoiseConfig
from tminus.model.samplers import compile_plan, sample
from tminus.model.timesteps import make_timesteps

STEPS = 10
EDM, EDM_SOLVER, KARRAS = "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "KarrasEDMScheduler"
FLOW, VE = "FlowMatchEulerDiscreteScheduler", "ScoreSdeVeScheduler"
CLIP = {"thresholding": True, "sample_max_value": 1.0}  # how classes without clip_sample say it
NO_CLIP = ("plms", "pndm", "euler")  # of betas; their classes know none, where ours clips unless it is told not to
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
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
    return loops.noise_of((2, channels, 8, 8), k)


def saved(folder: Path, name: str) -> tuple[Checkpoint, UNet2DModel, Any]:
    cls, settings = CASES[name]
    fields = {key: value for key, value in TINY.to_dict().items() if key != "_class_name"}
    net = randomised(UNet2DModel(**fields | NETS.get(name, {})))
    scheduler = cls(**settings)
    pipeline = ScoreSdeVePipeline if cls is ScoreSdeVeScheduler else DDPMPipeline
    pipeline(net, scheduler).save_pretrained(folder)
    return load_checkpoint(folder), net, scheduler


@pytest.mark.parametrize(
    ("cls", "fields", "message"),
    [
        (EDM, {"sigma_min": 90}, "sigma_min must be above 0 and below sigma_max 80"),
        (EDM, {"sigma_min": 1e-12}, "sigma_min must be such that all noise levels differ in float64"),
        (EDM, {"rho": 1e-9}, "sigma_min must be such that all noise levels differ in float64"),
        (EDM, {"sigma_data": 0}, "sigma_data must be a positive number"),
        (EDM, {"sigma_schedule": "beta"}, "sigma_schedule must be among karras, exponential, got 'beta'"),
        (EDM, {"prediction_type": "sample"}, "must be among epsilon, v_prediction for EDMEulerScheduler"),
        (EDM, {"num_train_timesteps": 1}, "num_train_timesteps must be 2 or more with prediction_type edm"),
        (EDM_SOLVER, {"solver_type": "heun"}, "solver_type must be 'midpoint' for dpmpp_2m, got 'heun'"),
        (EDM_SOLVER, {"thresholding": True, "sample_max_value": 2.0}, "thresholding must be false"),
        (FLOW, {"shift": 0}, "shift must be a positive number, got 0"),
        (FLOW, {"shift": 1e-9}, "shift must be such that all noise levels differ"),
        (FLOW, {"shift_terminal": 0.1}, "shift_terminal must be None for euler, got 0.1"),
        (FLOW, {"use_beta_sigmas": True}, "use_beta_sigmas must be False for euler, got True"),
        (FLOW, {"invert_sigmas": True}, "invert_sigmas must be False for euler, got True"),
        (FLOW, {"stochastic_sampling": True}, "stochastic_sampling must be False for euler"),
        (VE, {"sampling_eps": 1.5}, "sampling_eps must be below 1, got 1.5"),
        (VE, {"correct_steps": -1}, "correct_steps must be an integer, 0 or more, got -1"),
        (KARRAS, {"precondition_type": "none"}, "precondition_type must be among edm, cm_edm, got 'none'"),
    ],
)
def test_what_would_change_images_is_refused_by_field(cls: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        NoiseConfig.from_dict({"_class_name": cls, **fields})


def test_the_corrector_of_ve_is_left_out_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        noise = NoiseConfig.from_dict({"_class_name": "ScoreSdeVeScheduler", "correct_steps": 1, "snr": 0.16})
    assert "correct_steps=1 is not run" in caplog.text
    assert noise.to_dict()["snr"] == 0.16


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_image_is_that_of_diffusers_own_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, net, scheduler = saved(tmp_path, name)
    sampler, family = checkpoint.default_sampler, checkpoint.noise.family
    plan = checkpoint.plan(sampler, STEPS, clip=False if family == "betas" and sampler in NO_CLIP else None)
    channels = net.config.in_channels
    x_T = noise_of(0, channels)
    got = sample(checkpoint.net, plan, x_T, lambda k: noise_of(1 + k, channels))
    x = to_theirs(checkpoint.noise, x_T, plan)
    theirs = loop_of_diffusers(net, scheduler, x, STEPS, monkeypatch)
    if name.startswith("ve"):
        theirs = 2 * theirs - 1
    torch.testing.assert_close(got, theirs, rtol=0, atol=1e-4 + 3e-6 * theirs.abs().max().item())
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


# --- exact networks of a Gaussian data set, each written in the terms of its own paper ----------------------------

MEAN, STD = 0.3, 0.4
MODELS: dict[str, NoiseConfig] = {
    "epsilon": NoiseConfig(clip_sample=False),
    "v_prediction": NoiseConfig(prediction_type="v_prediction", clip_sample=False),
    "edm": NoiseConfig(prediction_type="edm", default_sampler="euler", clip_sample=False),
    "edm_v_prediction": NoiseConfig(prediction_type="edm_v_prediction", default_sampler="euler", clip_sample=False),
    "cm_edm": NoiseConfig(prediction_type="edm", default_sampler="heun", precondition_type="cm_edm", clip_sample=False),
    "flow": NoiseConfig(prediction_type="flow", default_sampler="euler", shift=2.0, clip_sample=False),
    "score": NoiseConfig(
        prediction_type="score", sigma_min=0.01, sigma_max=50.0, sampling_eps=1e-12, clip_sample=False
    ),
}


def posterior_mean(y: Tensor, scale: float, sigma: float, mean: float, std: float) -> Tensor:
    """E[x_0 | y] for y = scale x_0 + sigma eps and x_0 ~ N(mean, std^2)."""
    return mean + scale * std**2 / (scale**2 * std**2 + sigma**2) * (y - scale * mean)


def exact_network(name: str, noise: NoiseConfig, std: float) -> Forward:
    schedule = noise.schedule()

    def net(given: Tensor, t: Tensor, _labels: Tensor | None = None) -> Tensor:
        time = float(t[0])
        if name in ("epsilon", "v_prediction"):
            alpha_bar = float(schedule.alpha_bar_at([time]))
            signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
            x_0 = posterior_mean(given, signal, sigma, MEAN, std)
            eps = (given - signal * x_0) / sigma
            return eps if name == "epsilon" else signal * eps - sigma * x_0
        if name == "flow":  # Lipman et al. 2023
            sigma = time / noise.num_train_timesteps
            return (given - posterior_mean(given, 1 - sigma, sigma, MEAN, std)) / sigma
        if name == "score":  # Song et al. 2021 (SDE), of images in [0, 1]; what is given is 2 y - 1
            y, mean, std_y = (given + 1) / 2, (MEAN + 1) / 2, std / 2
            return -(y - mean) / (std_y**2 + time**2)
        sigma = math.exp(time / (250 if name == "cm_edm" else 1 / 4))  # Karras et al. 2022, table 1
        root = (sigma**2 + 0.25) ** 0.5
        y = given * root
        F = (posterior_mean(y, 1.0, sigma, MEAN, std) - 0.25 / root**2 * y) * root / (0.5 * sigma)
        return -F if name == "edm_v_prediction" else F

    return net


def run(name: str, sampler: str, steps: int, std: float) -> tuple[Tensor, Tensor, float]:
    """x_T, the image of a plan, and alpha_bar of x_T, in float64."""
    noise = MODELS[name]
    plan = compile_plan(noise, noise.schedule(), sampler, steps, spacing=None, fractional=True)
    x_T = noise_of(0).double()
    image = sample(exact_network(name, noise, std), plan, x_T, lambda k: noise_of(1 + k).double())
    return x_T, image, float(plan.alpha_bar[0])


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_in_the_one_image_of_a_data_set(name: str, sampler: str) -> None:
    if name == "flow" and SAMPLER_FACTS[sampler].needs_signal:
        with pytest.raises(ValueError, match=f"{sampler} cannot start from alpha_bar = 0"):
            run(name, sampler, 5, std=0.0)
        return
    for steps in (1, 2, 5, 20):
        _, image, _ = run(name, sampler, steps, std=0.0)
        torch.testing.assert_close(image, torch.full_like(image, MEAN), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if SAMPLER_FACTS[name].noise != "always"])
def test_every_sampler_without_noise_comes_to_the_exact_image_of_a_gaussian(name: str, sampler: str) -> None:
    """The probability flow keeps a normal variable's quantile: an image is its mean and std at the level of x_T."""
    if name == "flow" and SAMPLER_FACTS[sampler].needs_signal:
        return
    errors = []
    for steps in (10, 160):
        x_T, image, alpha_bar = run(name, sampler, steps, STD)
        quantile = (x_T - alpha_bar**0.5 * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar) ** 0.5
        errors.append((image - MEAN - STD * quantile).abs().max().item())
    assert errors[1] < 0.06
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("name", [name for name in MODELS if MODELS[name].is_continuous])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_steps_are_points_from_the_noisiest_level_to_the_cleanest(name: str, sampler: str) -> None:
    T = MODELS[name].num_train_timesteps
    for steps in (1, 2, 7, 100):
        t = make_timesteps(sampler, MODELS[name].default_spacing(sampler), steps, T, continuous=True)
        assert len(t) == steps
        assert t[0] == T - 1
        assert steps == 1 or t[-1] == 0
        assert np.allclose(np.diff(t), -(T - 1) / max(1, steps - 1))


@pytest.mark.parametrize("name", MODELS)
def test_the_bound_of_an_exact_network_has_no_term_of_a_step(name: str) -> None:
    noise = dataclasses.replace(MODELS[name], num_train_timesteps=20)
    net = exact_network(name, noise, 0.0)
    x_0 = torch.full((2, 1, 4, 4), MEAN, dtype=torch.float64)
    bound = variational_bound(net, noise, noise.schedule(), x_0)
    torch.testing.assert_close(bound.L_steps, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-3)
    wrong = variational_bound(lambda *given: net(*given) + 0.1, noise, noise.schedule(), x_0)
    assert bool((wrong.L_steps > bound.L_steps + 0.001).all())
