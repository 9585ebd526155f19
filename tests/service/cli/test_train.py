"""`tminus train` on a folder of a person's own, with no option but the folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.service.cli.running import refusal, run
from tminus.model.checkpoint import load_checkpoint
from tminus.model.training.train import TrainConfig, usual_batch, usual_steps

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
    assert "begun with class_names=('0', '1'" in refusal(*map(str, command), "--steps", "22")


def test_what_cannot_be_trained_on_is_one_clear_line(digits: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    assert "nothing: neither fashion-mnist nor a folder of images" in refusal("train", "--data", "nothing", *out)
    (tmp_path / "empty").mkdir()
    assert "no image files (.bmp, .gif" in refusal("train", "--data", tmp_path / "empty", *out)
    line = refusal("train", "--data", digits, "--size", "30", *out)
    assert "--size: the side of the images must divide by 4" in line
    assert "got 30, and 3 widths" in line
    assert not (tmp_path / "run").exists()
