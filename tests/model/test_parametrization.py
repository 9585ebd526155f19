"""Models that were trained on another x than ours: EDM, flow matching, VE. diffusers' own loops are the reference."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    ScoreSdeVePipeline,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from torch import Tensor

from tests.model import loops
from tests.model.formats.conftest import randomised
from tests.model.loops import loop_of_diffusers, to_theirs
from tests.tiny import TINY
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.samplers import sample

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
}


def noise_of(k: int) -> Tensor:
    return loops.noise_of((2, 1, 8, 8), k)


def saved(folder: Path, name: str) -> tuple[Checkpoint, UNet2DModel, Any]:
    cls, settings = CASES[name]
    fields = {key: value for key, value in TINY.to_dict().items() if key != "_class_name"}
    net = randomised(UNet2DModel(**fields | {"center_input_sample": name == "ve, centred"}))
    scheduler = cls(**settings)
    pipeline = ScoreSdeVePipeline if cls is ScoreSdeVeScheduler else DDPMPipeline
    pipeline(net, scheduler).save_pretrained(folder)
    return load_checkpoint(folder), net, scheduler


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_image_is_that_of_diffusers_own_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, net, scheduler = saved(tmp_path, name)
    plan = checkpoint.plan(checkpoint.default_sampler, STEPS)
    got = sample(checkpoint.net, plan, noise_of(0), lambda k: noise_of(1 + k))
    x = to_theirs(checkpoint.noise, noise_of(0), plan)
    theirs = loop_of_diffusers(net, scheduler, x, STEPS, monkeypatch)
    if name.startswith("ve"):
        theirs = 2 * theirs - 1
    torch.testing.assert_close(got, theirs, rtol=1e-5, atol=1e-4)
    assert got.std() > 0.05
