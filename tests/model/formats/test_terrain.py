"""A checkpoint that strangers trained: converted, and held against its own file under onnxruntime."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConsistencyModelPipeline

from tests.model.formats import terrain
from tests.model.formats.conftest import close_to_scale
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.formats.conversion import GivenFacts
from tminus.model.formats.read import convert
from tminus.model.samplers import sample

GIVEN = GivenFacts(image_size=128, timesteps=40, prediction="consistency", head_width=32, attention_order="new")
LABELS = [0, 49, 99]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("terrain")
    torch.save(terrain.state_dict(), place / "terrain.pt")
    convert(place / "terrain.pt", place / "out", GIVEN)
    return place / "out"


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Checkpoint:
    return load_checkpoint(folder)


def test_it_is_the_network_it_was(checkpoint: Checkpoint) -> None:
    assert sum(value.numel() for value in checkpoint.net.parameters()) == pytest.approx(10.46e6, rel=0.01)
    assert checkpoint.net.config.class_name == "UNet2DModel"
    assert checkpoint.net.config.widths == (32, 32, 64, 96, 128)
    assert checkpoint.labels.num_classes == 100


@torch.inference_mode()
def test_one_step_gives_the_terrain_of_its_own_file(checkpoint: Checkpoint) -> None:
    noise = torch.randn(3, 1, 128, 128, generator=torch.Generator().manual_seed(0))
    plan = checkpoint.plan("consistency", 1, clip=False)
    ours = sample(checkpoint.net, plan, noise, lambda _k: torch.zeros_like(noise), class_labels=torch.tensor(LABELS))
    theirs = terrain.denoised((noise * (1 + terrain.SIGMA_MAX**2) ** 0.5).numpy(), terrain.SIGMA_MAX, LABELS)
    close_to_scale(ours, torch.from_numpy(theirs), 1e-4)
    assert np.abs(theirs[0] - theirs[2]).max() > 0.1, "an easy terrain is another than a hard one"


@torch.inference_mode()
def test_it_loads_in_diffusers_and_is_the_same_there(folder: Path, checkpoint: Checkpoint) -> None:
    pipeline = ConsistencyModelPipeline.from_pretrained(folder)
    x, t = torch.randn(2, 1, 128, 128, generator=torch.Generator().manual_seed(1)), torch.tensor([1095.5, -300.25])
    labels = torch.tensor([3, 70])
    close_to_scale(checkpoint.net(x, t, labels), pipeline.unet(x, t, labels).sample)
    assert pipeline.scheduler.config.sigma_data == 0.5
