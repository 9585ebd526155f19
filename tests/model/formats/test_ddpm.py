"""Against tests/model/formats/ho.py, which is written from the paper and knows nothing of model/."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.formats.conftest import close_to_scale, randomised, save
from tests.model.formats.ho import Ho
from tminus.model.checkpoint import load_checkpoint
from tminus.model.formats.conversion import GivenFacts, MissingFacts
from tminus.model.formats.read import convert, read_foreign

CIFAR = GivenFacts(image_size=16, timesteps=1000, beta_schedule="linear", prediction="epsilon", variance="fixed_large")


@pytest.mark.parametrize(
    "settings",
    [
        {"mult": (1, 2, 2), "attends": (1,)},
        {"mult": (1, 1, 2), "attends": (2,), "blocks": 1},
        {"mult": (1,), "attends": ()},
        {"channels": 1, "attends": (0, 1)},
    ],
    ids=["cifar10", "lsun", "one level", "grey"],
)
def test_converted_network_equals_the_oracle_here_and_in_diffusers(
    settings: dict[str, Any], batch: dict[str, Any], tmp_path: Path
) -> None:
    from diffusers import DDPMPipeline

    theirs = randomised(Ho(**settings))
    convert(save(theirs, tmp_path / "model-790000.ckpt"), tmp_path / "out", CIFAR)
    ours, pipeline = load_checkpoint(tmp_path / "out"), DDPMPipeline.from_pretrained(tmp_path / "out")
    x, t = batch["x"][:, : settings.get("channels", 3)], batch["t"]
    with torch.no_grad():
        close_to_scale(ours.net(x, t), theirs(x, t))
        close_to_scale(pipeline.unet(x, t).sample, theirs(x, t))
    assert ours.noise.variance_type == "fixed_large"
    assert pipeline.scheduler.config.variance_type == "fixed_large"


def test_what_the_file_does_not_say_is_asked_for_and_what_it_has_not_is_refused(tmp_path: Path) -> None:
    file = save(randomised(Ho()), tmp_path / "model.ckpt")
    with pytest.raises(MissingFacts) as missing:
        read_foreign(file, GivenFacts(image_size=32))
    assert missing.value.names == ("timesteps", "beta_schedule", "prediction", "variance")
    with pytest.raises(ValueError, match="--heads says nothing about a file of the PyTorch port"):
        read_foreign(file, GivenFacts(heads=4))
