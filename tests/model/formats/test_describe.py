import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.model.formats.conftest import randomised, save
from tests.model.formats.guided import Guided
from tests.model.formats.ho import Ho
from tminus.model.catalogue import Recommended
from tminus.model.files import CheckpointError
from tminus.model.formats.conversion import Given
from tminus.model.formats.describe import describe
from tminus.model.formats.read import convert
from tminus.service.engine.options import BUNDLED

CIFAR = Given(image_size=16, timesteps=1000, beta_schedule="linear", prediction="epsilon", variance="fixed_large")


def test_folder_is_told_with_all_that_is_known() -> None:
    found = describe(BUNDLED, Given())
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
    assert found.net is not None
    assert found.settings is not None
    assert f"{found.settings.sampler} in {found.settings.steps} steps" in lines["recommended"]
    assert lines["default"] == "ddpm, for requests that name no sampler"
    with pytest.raises(ValueError, match="--heads says nothing about a checkpoint folder"):
        describe(BUNDLED, Given(heads=2))


def test_guidance_in_the_weights_is_told(tmp_path: Path) -> None:
    shutil.copytree(BUNDLED, tmp_path / "copy")
    meta = json.loads((BUNDLED / "tminus.json").read_text("utf-8"))
    (tmp_path / "copy" / "tminus.json").write_text(json.dumps({**meta, "folded_guidance": 2}), "utf-8")
    lines = dict(describe(tmp_path / "copy", Given()).lines)
    assert lines["guidance"] == "2 in the weights, which a request's own multiplies"


def test_file_is_told_without_what_is_missing_and_with_the_flags_for_it(tmp_path: Path) -> None:
    file = save(randomised(Guided(mult=(1, 2, 3), attends=(1, 2), heads=4, classes=7)), tmp_path / "ema.pt")
    lines = describe(file, Given(image_size=32)).lines
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


def test_file_of_which_all_is_known_is_told_whole(tmp_path: Path) -> None:
    file = save(randomised(Ho()), tmp_path / "model.ckpt")
    found = describe(file, CIFAR)
    lines = dict(found.lines)
    assert found.net is not None
    assert found.size == (16, 16)
    assert found.settings == Recommended("ddpm", 100)
    assert lines["network"] == "UNet2DModel: widths 32, 64* (* with attention); 2 layers a level"
    assert lines["details"].endswith("convolutions, one head")
    assert lines["predicts"] == "epsilon; variance fixed_large; x_0 is clipped to ±1"
    assert lines["then"] == f"tminus convert {file} FOLDER, with the same flags"
    assert lines["taken"] == "x_0 is clipped to [-1, 1]"
    assert "missing" not in lines


def test_converted_folder_of_a_network_of_our_own_says_so(tmp_path: Path) -> None:
    file = save(randomised(Guided(mult=(1, 2), attends=(0, 1), heads=4, shift=True, updown=True)), tmp_path / "ema.pt")
    facts = {"image_size": 16, "timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction": "epsilon"}
    convert(file, tmp_path / "out", Given(**facts, variance="fixed_small", heads=4, attention_order="legacy"))  # type: ignore[arg-type]
    lines = dict(describe(tmp_path / "out", Given()).lines)
    assert lines["format"] == "a folder of diffusers, for tminus alone"
    assert lines["details"] == "the timestep scales and shifts, resampled by resnets, 4 heads"
    assert lines["noise"] == "T = 1000, squaredcos_cap_v2"


def test_what_is_no_checkpoint_is_refused_as_everywhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the folder is empty"):
        describe(tmp_path, Given())
    torch.save({"a": torch.ones(1)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="of no format that is known"):
        describe(tmp_path / "a.pt", Given())


def test_schedule_whose_ends_are_missing_is_told_by_them(tmp_path: Path) -> None:
    file = save(randomised(Ho()), tmp_path / "model.ckpt")
    told = [
        text.split()[0]
        for name, text in describe(file, Given(beta_schedule="scaled_linear")).lines
        if name == "missing"
    ]
    assert told == ["--image-size", "--timesteps", "--beta-start", "--beta-end", "--prediction", "--variance"]
    told = [text.split()[0] for name, text in describe(file, Given(beta_start=0.001)).lines if name == "missing"]
    assert "--beta-schedule" in told


def test_long_chain_is_told_what_it_lacks_too(tmp_path: Path) -> None:
    file = save(randomised(Guided(heads=4)), tmp_path / "ema.pt")
    lines = describe(file, Given(timesteps=4000, heads=4)).lines
    assert ("missing", "--rescale-timesteps (yes or no: whether the network was given t * 1000 / T)") in lines
    assert ("network", "U-Net: widths 32, 64* (* with attention); 2 layers a level") in lines
