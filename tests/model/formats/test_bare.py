from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from tests.model.formats.conftest import close_to_scale, randomised
from tests.tiny import TINY
from tminus.model.checkpoint import load_checkpoint
from tminus.model.files import CheckpointError
from tminus.model.formats.describe import describe
from tminus.model.formats.given import Given, MissingFacts
from tminus.model.formats.read import convert, read_foreign

FACTS: dict[str, Any] = {"timesteps": 40, "beta_schedule": "linear", "prediction": "v_prediction"}
FIXED = Given(**FACTS, variance="fixed_small")


@pytest.fixture
def theirs() -> UNet2DModel:
    fields = {key: value for key, value in TINY.to_dict().items() if key != "_class_name"}
    net = randomised(UNet2DModel(**fields))
    assert isinstance(net, UNet2DModel)
    return net


@pytest.mark.parametrize("folder", ["", "unet"])
def test_network_alone_is_converted_with_the_scheduler_that_is_given(
    theirs: UNet2DModel, folder: str, tmp_path: Path
) -> None:
    theirs.save_pretrained(tmp_path / "bare" / folder)
    converted = convert(tmp_path / "bare", tmp_path / "out", FIXED)
    assert converted.format == "diffusers' UNet2DModel without a scheduler"
    ours, pipeline = load_checkpoint(tmp_path / "out"), DDPMPipeline.from_pretrained(tmp_path / "out")
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3, 39])
    with torch.no_grad():
        close_to_scale(ours.net(x, t), theirs(x, t).sample)
    assert (ours.noise.num_train_timesteps, ours.noise.prediction_type) == (40, "v_prediction")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"


def test_what_is_missing_is_asked_for_and_told(theirs: UNet2DModel, tmp_path: Path) -> None:
    theirs.register_to_config(sample_size=None)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(MissingFacts) as missing:
        read_foreign(tmp_path, Given())
    assert missing.value.names == ("timesteps", "beta_schedule", "prediction", "variance", "image_size")
    lines = describe(tmp_path, Given(image_size=8)).lines
    assert [text.split()[0] for name, text in lines if name == "missing"] == [
        *("--timesteps", "--beta-schedule", "--prediction", "--variance"),
    ]
    with pytest.raises(ValueError, match="--heads says nothing about a folder of diffusers"):
        read_foreign(tmp_path, Given(heads=2))


def test_folder_with_a_scheduler_needs_no_converting(theirs: UNet2DModel, tmp_path: Path) -> None:
    DDPMPipeline(theirs, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="a folder that tminus reads as it is"):
        read_foreign(tmp_path, FIXED)


def test_network_that_is_not_served_is_refused_by_name(theirs: UNet2DModel, tmp_path: Path) -> None:
    theirs.register_to_config(class_embed_type="timestep")
    theirs.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="class_embed_type must be null"):
        read_foreign(tmp_path, FIXED)


def test_network_of_another_pipeline_is_refused_by_that(theirs: UNet2DModel, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text('{"_class_name": "LDMTextToImagePipeline"}')
    with pytest.raises(CheckpointError, match="'LDMTextToImagePipeline' is not served"):
        read_foreign(tmp_path, FIXED)
