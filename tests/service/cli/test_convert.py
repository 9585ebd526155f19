from pathlib import Path

import pytest
from PIL import Image

from tests.model.formats.conftest import randomised, save
from tests.model.formats.guided import Guided
from tests.model.formats.ho import Ho
from tests.service.cli.running import run
from tminus.service.engine.protocol import BUNDLED

HO = ["--image-size", "16", "--timesteps", "20", "--beta-schedule", "linear", "--prediction", "epsilon"]


def test_converted_file_is_sampled_like_any_checkpoint(tmp_path: Path) -> None:
    file = save(randomised(Ho()), tmp_path / "model.ckpt")
    result = run("convert", file, tmp_path / "out", *HO, "--variance", "fixed_small")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines() == [
        f"{tmp_path / 'out'}: written from the PyTorch port of Ho et al.'s DDPM",
        "taken: betas from 0.0001 to 0.02",
        "taken: x_0 is clipped to [-1, 1]",
        f"Try: tminus serve --checkpoint {tmp_path / 'out'}",
    ]
    made = run(
        *("sample", "--checkpoint", tmp_path / "out", "--steps", 5, "--seed", 7, "--out", tmp_path / "one.png"),
        *("--executor", "eager", "--precision", "float32", "--device", "cpu"),
    )
    assert made.exit_code == 0, made.output
    with Image.open(tmp_path / "one.png") as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")


def test_network_that_diffusers_has_not_is_told(tmp_path: Path) -> None:
    file = save(randomised(Guided(mult=(1, 2), attends=(0, 1), heads=4)), tmp_path / "ema.pt")
    own = ["--variance", "fixed_large", "--heads", 4, "--attention-order", "legacy", "--timesteps", 200]
    own += ["--rescale-timesteps", "no"]
    result = run("convert", file, tmp_path / "out", *HO, *own)
    assert result.exit_code == 0, result.output
    assert "diffusers has no such network: the folder is for tminus alone" in result.output


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "does not say all that is needed; give --image-size (Side of the images in pixels); --timesteps"),
        ([*HO, "--variance", "learned"], "--variance must be fixed_small or fixed_large, got 'learned'"),
        ([*HO, "--variance", "fixed_small", "--heads", "2"], "--heads says nothing about a file of the PyTorch port"),
    ],
)
def test_failure_is_one_clear_line_and_leaves_no_folder(arguments: list[str], line: str, tmp_path: Path) -> None:
    file = save(randomised(Ho()), tmp_path / "model.ckpt")
    result = run("convert", file, tmp_path / "out", *arguments)
    assert result.exit_code == 1
    assert line in result.output
    assert result.output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folder_is_told_with_what_it_costs_here() -> None:
    result = run("inspect", BUNDLED)
    assert result.exit_code == 0, result.output
    lines = dict(line.strip().split("  ", 1) for line in result.output.splitlines())
    assert lines["parameters"] == "2.59 M"
    assert lines["memory"].startswith("10 MiB of weights, about ")
    assert " ms a pass of one row, " in lines["time"]
    assert f"of {lines['recommended']}" in lines["time"]


def test_file_is_told_with_what_is_missing(tmp_path: Path) -> None:
    file = save(randomised(Ho()), tmp_path / "model.ckpt")
    result = run("inspect", file)
    assert result.exit_code == 0, result.output
    assert "missing  --variance (Variance of ancestral sampling: fixed_small or fixed_large)" in result.output
    assert " a pass of one row" not in result.output
