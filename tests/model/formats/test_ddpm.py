"""Against tests/model/formats/ho.py, which is written from the paper and knows nothing of model/."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.formats.conftest import close_to_scale, randomised, save
from tests.model.formats.ho import Ho
from tminus.model.checkpoint import load_checkpoint
from tminus.model.files import CheckpointError
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


def test_file_of_another_network_is_refused_by_what_it_is(tmp_path: Path) -> None:
    state = randomised(Ho()).state_dict()

    def refusal(changed: dict[str, Any]) -> str:
        torch.save(changed, tmp_path / "other.ckpt")
        with pytest.raises(CheckpointError) as caught:
            read_foreign(tmp_path / "other.ckpt", CIFAR)
        return str(caught.value)

    pooled = {key: value for key, value in state.items() if ".downsample." not in key}
    assert "without resamp_with_conv" in refusal(pooled)
    wide = {key.replace("nin_shortcut", "conv_shortcut"): value for key, value in state.items()}
    assert "conv_shortcut (3x3)" in refusal(wide)
    assert "ch_mult that does not begin with 1" in refusal({**state, "conv_in.weight": torch.ones(64, 3, 3, 3)})
    assert "which that has not" in refusal({**state, "extra.weight": torch.ones(2)})
    assert "looks like the PyTorch port" in refusal({k: v for k, v in state.items() if k != "conv_out.weight"})
