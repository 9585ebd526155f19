"""`tminus train`, `sample` and `evaluate` as a user runs them, on a folder of pictures with a subfolder a class."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import click.testing
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from PIL import Image

from tests.documents import ROOT
from tests.e2e.conftest import run_cli
from tminus.model.checkpoint import load_checkpoint
from tminus.model.evaluation import report as compare
from tminus.service.cli import evaluate
from tminus.service.engine import autotune
from tminus.service.engine.autotune import Wish, find_candidates

ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # for so small a net, and on a busy machine, two are slower
SMALL = (
    "--size", "16", "--channels", "3", "--widths", "8,16", "--attention-at", "8", "--groups", "4", "--head-dim", "8",
    "--timesteps", "50", "--batch-size", "8", "--warmup-steps", "2", "--precision", "fp32", "--sheet-every", "5",
)  # fmt: skip


def save_pictures(folder: Path, seed: int) -> Path:
    """Red and blue squares, of various sizes and formats."""
    rng = np.random.default_rng(seed)
    for name, channel in (("red", 0), ("blue", 2)):
        (folder / name).mkdir(parents=True)
        for k in range(12):
            pixels = rng.integers(0, 60, (20 + k, 24, 3), np.uint8)
            pixels[..., channel] += 180
            Image.fromarray(pixels).save(folder / name / f"{k}.{('png', 'jpg', 'webp')[k % 3]}")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures") / "train", 0)


@pytest.mark.long
def test_train_then_sample_evaluate_and_load_in_diffusers(pictures: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    held_out = save_pictures(tmp_path / "held-out", 1)
    trained = run_cli("train", "--data", str(pictures), "--test-data", str(held_out), "--out", str(run),
                      "--steps", "10", *SMALL, **ONE_THREAD)  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "train: 24 images, 16x16, colour, 2 classes: blue, red\n" in trained.stdout
    assert "held out" in trained.stderr
    assert [line.split(",")[0] for line in (run / "losses.csv").read_text().splitlines()] == ["step", "5", "10"]
    assert "loss=" in trained.stderr
    assert "images_s=" in trained.stderr
    assert [sheet.name for sheet in sorted((run / "sheets").iterdir())] == ["0000005.png", "0000010.png"]
    assert (run / "samples.png").read_bytes() == (run / "sheets" / "0000010.png").read_bytes()
    with Image.open(run / "samples.png") as sheet:
        assert sheet.size == (16 * 32, 16 * 32), "four images of 16 pixels, as a person sees them"
    meta = json.loads((run / "tminus.json").read_text())
    assert meta["class_names"] == ["blue", "red"]
    assert meta["null_class"] == 2
    assert type(DDPMPipeline.from_pretrained(run)).__name__ == "DDPMPipeline"

    drawn = run_cli("sample", "--checkpoint", str(run), "-n", "3", "--class-label", "red", "--guidance", "2",
                    "--steps", "5", "--out", str(tmp_path / "sheet.png"))  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert (sheet.size, sheet.mode) == ((16 * 48, 16 * 16), "RGB")

    measure = ("evaluate", "--checkpoint", str(run), "--data", str(pictures), "--num-samples", "8", "--steps", "5",
               "--bound-images", "4", "--bound-timesteps", "5", "--batch-size", "8",
               "--executor", "eager")  # fmt: skip
    refused = run_cli(*measure)
    assert refused.returncode == 1
    assert "--test-data" in refused.stderr
    measured = run_cli(*measure, "--test-data", str(held_out), "--json", str(tmp_path / "figures.json"), **ONE_THREAD)
    assert measured.returncode == 0, measured.stderr
    assert "class accuracy" in measured.stdout
    assert "not FID" in measured.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["bound"]["total"] > 0
    assert (run / "classifier" / "classifier.safetensors").is_file()
    approve_bfloat16(run, (*measure, "--test-data", str(held_out)))


def approve_bfloat16(run: Path, measure: tuple[str, ...]) -> None:
    """`evaluate --approve` in this process, so that the verdict does not hang on a few samples of a raw net."""
    threads = torch.get_num_threads()

    def measured(frechet_ratio: float, *arguments: str) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(compare, "MAX_FRECHET_RATIO", frechet_ratio)
            patch.setattr(compare, "MAX_ACCURACY_LOSS", 1.0)
            torch.set_num_threads(1)
            patch.setattr(autotune, "TRIAL_S", 0.005)
            command = [*measure[1:], "--device", "cpu", *arguments]
            result = click.testing.CliRunner().invoke(evaluate.evaluate, command)
        torch.set_num_threads(threads)
        assert result.exit_code == 0, result.output
        return str(result.stdout)

    def candidates() -> set[tuple[str, str]]:
        """What serve's auto tries."""
        found = find_candidates(load_checkpoint(run), torch.device("cpu"), Wish())
        return {(each.executor, each.precision) for each in found}

    before = (run / "tminus.json").read_bytes()
    bfloat16 = ("--precision", "bfloat16", "--approve")
    assert "bfloat16: not approved" in measured(0.0, *bfloat16)
    measured(99.0, "--precision", "bfloat16")
    assert (run / "tminus.json").read_bytes() == before, "nothing is noted that was not approved or not to be"
    assert ("eager", "bfloat16") not in candidates()

    for _ in range(2):  # the second replaces the first
        assert "bfloat16: approved" in measured(99.0, *bfloat16)
    meta = json.loads((run / "tminus.json").read_text())
    (check,) = meta.pop("approved")
    assert meta == json.loads(before)
    assert (check["executor"], check["precision"]) == ("eager", "bfloat16")
    assert check["weights_hash"] == load_checkpoint(run).weights_hash
    assert check["frechet_ratio"] > 0
    assert load_checkpoint(run).approved.keys() == {("eager", "bfloat16")}
    assert ("eager", "bfloat16") in candidates()
    assert ("openvino", "bfloat16") not in candidates(), "that of one executor says nothing of another"


@pytest.mark.long
def test_ctrl_c_saves_and_the_same_command_ends_as_if_never_stopped(pictures: Path, tmp_path: Path) -> None:
    def command(run: str) -> list[str]:
        return ["train", "--data", str(pictures), "--out", str(tmp_path / run), "--steps", "30", *SMALL]

    stopped = subprocess.Popen(
        [sys.executable, "-m", "tminus", *command("stopped")],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        env=os.environ | ONE_THREAD,
    )
    assert stopped.stderr is not None
    with stopped.stderr:
        seen = b""
        while b"loss=" not in seen:  # ten steps have been taken
            chunk = os.read(stopped.stderr.fileno(), 4096)
            assert chunk, seen
            seen += chunk
        stopped.send_signal(signal.SIGINT)
        while chunk := os.read(stopped.stderr.fileno(), 4096):
            seen += chunk
        assert stopped.wait(60) == 130
    assert seen.endswith(b"tminus: interrupted and saved; the same command goes on\n")
    assert json.loads((tmp_path / "stopped" / "tminus.json").read_text())["provenance"]["step"] < 30

    for run in ("stopped", "straight"):
        assert run_cli(*command(run), **ONE_THREAD).returncode == 0
    hashes = {load_checkpoint(tmp_path / run).weights_hash for run in ("stopped", "straight")}
    assert len(hashes) == 1
