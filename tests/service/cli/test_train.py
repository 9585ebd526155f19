"""`tminus train` on a folder of a person's own, with no option but the folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.service.cli.running import refusal, run
from tminus.model.checkpoint import load_checkpoint
from tminus.model.training.config import TrainConfig, usual_batch, usual_steps
from tminus.service.cli.train import CONTINUOUS, PREDICTIONS

SMALL = ("--size", "8", "--widths", "8,8", "--groups", "4", "--head-dim", "4", "--device", "cpu", "--precision", "fp32")


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    """Sixty grey pictures, six of each class 0 to 9, as bright as their number."""
    for number in range(60):
        folder = tmp_path / "digits" / str(number % 10)
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.full((28, 28), 20 * (number % 10) + number // 10, np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return tmp_path / "digits"


def test_what_is_not_given_is_chosen_by_the_images(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[TrainConfig] = []

    def descend(_run: object, config: TrainConfig, *_: Any) -> bool:
        seen.append(config)
        return True

    monkeypatch.setattr("tminus.model.training.train.Run.descend", descend)
    result = run("train", "--data", digits, "--out", tmp_path / "run", *SMALL)
    assert result.exit_code == 0, result.output
    (config,) = seen
    assert (config.steps, config.batch_size) == (usual_steps(60), usual_batch(60)) == (500, 30)
    assert result.stdout.splitlines() == [
        "digits: 60 images, 8x8, grey, 10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9",
        f"{tmp_path / 'run'}: 500 steps of 30 images; see samples.png and loss.svg in it",
        f"{tmp_path / 'run'}: done",
        f"More --steps go on from here. Try: tminus serve --checkpoint {tmp_path / 'run'}",
    ]


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_its_folder_says_what_the_network_predicts(prediction: str, digits: Path, tmp_path: Path) -> None:
    command = ("train", "--data", digits, "--out", tmp_path / "run", *SMALL, "--prediction", prediction)
    assert run(*command, "--steps", "1").exit_code == 0
    noise = load_checkpoint(tmp_path / "run").noise
    assert (noise.prediction_type, noise.clip_sample) == (prediction, prediction not in CONTINUOUS)


def test_a_network_of_the_score_is_served_and_not_trained(digits: Path, tmp_path: Path) -> None:
    result = run("train", "--data", digits, "--out", tmp_path / "run", *SMALL, "--prediction", "score")
    assert result.exit_code == 2
    assert "'score' is not one of 'epsilon', 'sample', 'v_prediction', 'flow', 'edm'" in result.output


def test_a_run_is_a_checkpoint_with_a_sheet_and_a_plot_beside_it(digits: Path, tmp_path: Path) -> None:
    command = ("train", "--data", digits, "--out", tmp_path / "run", *SMALL, "--timesteps", "40")
    assert run(*command, "--steps", "20").exit_code == 0
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.labels.class_names == tuple(map(str, range(10)))
    assert (checkpoint.image_shape, checkpoint.noise.prediction_type) == ((1, 8, 8), "v_prediction")
    with Image.open(tmp_path / "run" / "samples.png") as sheet:
        assert (sheet.size, sheet.mode) == ((5 * 8 * 25, 4 * 8 * 25), "L"), "twenty images, as a person sees them"
    assert (tmp_path / "run" / "loss.svg").read_text("utf-8").count("<polyline") == 2
    assert run(*command, "--steps", "21").exit_code == 0, "the same command goes on"
    (digits / "0").rename(digits / "x")
    assert "begun with class_names=[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], got [1, " in refusal(*map(str, command))


def test_a_run_that_is_resumed_keeps_its_steps_its_batch_and_the_classes_that_a_person_renamed(
    digits: Path, tmp_path: Path
) -> None:
    command = ("train", "--data", digits, "--out", tmp_path / "run", *SMALL, "--timesteps", "40")
    assert run(*command, "--steps", "4", "--batch-size", "7").exit_code == 0
    names = [f"digit {k}" for k in range(10)]
    file = tmp_path / "run" / "tminus.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"class_names": names}), "utf-8")
    result = run(*command, "--steps", "5")
    assert result.exit_code == 0, result.output
    assert "5 steps of 7 images" in result.stdout
    assert load_checkpoint(tmp_path / "run").labels.class_names == tuple(names)
    assert "5 steps of 7 images" in run(*command).stdout, "and not 500"
    for number in range(4):
        shutil.copy(digits / "0" / "0.png", digits / "0" / f"more-{number}.png")
    assert "begun with data='digits, 60 images', got 'digits, 64 images'" in refusal(*map(str, command))


def test_on_latents_images_have_the_channels_of_the_autoencoder(digits: Path, tmp_path: Path) -> None:
    encoder, out = tmp_path / "encoder", ("--out", tmp_path / "run")
    small = ("--widths", "4,4", "--groups", "2", "--steps", "1", "--batch-size", "2", "--device", "cpu")
    result = run("train-autoencoder", "--data", digits, "--channels", "3", "--size", "8", "--out", encoder, *small)
    assert result.exit_code == 0, result.output
    command = ("train", "--data", digits, *out, *SMALL, "--latent", encoder, "--steps", "1", "--timesteps", "40")
    assert "3 channels (--channels) and sides (--size)" in refusal(*map(str, command), "--channels", "1")
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "run").image_shape == (3, 8, 8)


def test_images_whose_sides_do_not_divide_are_refused(digits: Path, tmp_path: Path) -> None:
    line = refusal("train", "--data", digits, "--size", "30", "--out", tmp_path / "run")
    assert "--size: the side of the images must divide by 4" in line
    assert "got 30, and 3 widths" in line
    assert not (tmp_path / "run").exists()
