from dataclasses import replace
from pathlib import Path

import pytest

from tests.model.formats.conftest import randomised, save
from tests.model.formats.guided import Guided
from tests.tiny import TINY
from tminus.model.checkpoint import Labels, save_checkpoint
from tminus.model.formats.conversion import GivenFacts
from tminus.model.formats.describe import describe
from tminus.model.noise import NoiseConfig
from tminus.model.unet import UNet2D
from tminus.service.engine.protocol import BUNDLED


def test_folder_is_told_with_all_that_is_known() -> None:
    found = describe(BUNDLED, GivenFacts())
    lines = dict(found.lines)
    assert lines["format"] == "a folder of diffusers"
    assert lines["network"] == "UNet2DModel: widths 32, 64*, 128 (* with attention); 1 layer a level"
    assert lines["details"] == "the timestep is added, resampled by convolutions, heads of 32 channels"
    assert lines["parameters"] == "2.59 M"
    assert lines["images"] == "32x32, one channel"
    assert lines["classes"].startswith("10 (t-shirt, trouser")
    assert lines["classes"].endswith("; null class 10")
    assert lines["noise"] == "T = 1000, linear 0.0001 to 0.02"
    assert lines["predicts"] == "v_prediction; variance fixed_small; x_0 is clipped to ±1"
    assert found.checkpoint is not None
    assert found.settings is not None
    assert lines["recommended"] == str(found.settings) == "8 steps of tuned"
    assert lines["scheduler"] == "ddpm, for requests that name steps and no sampler"
    with pytest.raises(ValueError, match="--heads says nothing about a checkpoint folder"):
        describe(BUNDLED, GivenFacts(heads=2))


def test_every_class_of_a_folder_is_named_in_whole(tmp_path: Path) -> None:
    names = tuple(f"a class of a long name, number {number}" for number in range(1, 7))
    net = UNet2D(replace(TINY, num_class_embeds=len(names)))
    save_checkpoint(tmp_path, net.state_dict(), net.config, NoiseConfig(), Labels(names), {})
    classes = dict(describe(tmp_path, GivenFacts()).lines)["classes"]
    assert classes == f"6 ({', '.join(names)}); no null class, so no guidance"


def test_file_is_told_without_what_is_missing_and_with_the_flags_for_it(tmp_path: Path) -> None:
    file = save(randomised(Guided(mult=(1, 2, 3), attends=(1, 2), heads=4, classes=7)), tmp_path / "ema.pt")
    lines = describe(file, GivenFacts(image_size=32)).lines
    assert ("network", "U-Net: widths 32, 64*, 96* (* with attention); 2 layers a level") in lines
    assert ("details", "the timestep is added, resampled by convolutions") in lines
    assert ("images", "32x32, 3 channels") in lines
    assert ("classes", "7, no null class") in lines
    missing = [text.split()[0] for name, text in lines if name == "missing"]
    assert missing == [
        *("--timesteps", "--beta-schedule", "--prediction", "--variance", "--heads", "--attention-order"),
        "--rescale-timesteps",
    ]
    assert lines[-1][1].startswith(f"tminus convert {file} FOLDER --timesteps … ")
    assert not [text for name, text in lines if name in ("noise", "predicts", "taken")]
