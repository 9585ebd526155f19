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

from tests.model import loops
from tests.model.formats.conftest import randomised
from tests.model.loops import loop_of_diffusers, to_theirs
from tests.model.test_unet import NCSNPP
from tests.tiny import TINY
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.files import CheckpointError
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


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_image_is_that_of_diffusers_own_loop(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, net, scheduler = saved(tmp_path, name)
    plan = checkpoint.plan(checkpoint.default_sampler, STEPS)
    channels = net.config.in_channels
    x_T = noise_of(0, channels)
    got = sample(checkpoint.net, plan, x_T, lambda k: noise_of(1 + k, channels))
    x = to_theirs(checkpoint.noise, x_T, plan)
    theirs = loop_of_diffusers(net, scheduler, x, STEPS, monkeypatch)
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
