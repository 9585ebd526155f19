"""`tminus approve`: what it prints, how it ends, and what it refuses."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from tests.service.engine.test_approval import harm
from tests.tiny import TINY, randomize
from tminus.__main__ import main
from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint
from tminus.model.noise import NoiseConfig
from tminus.model.unet import UNet2D
from tminus.service.engine import loading, openvino_executor
from tminus.service.engine.protocol import BUNDLED

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_approval.py: nets this small wait long for a second thread on a busy machine."""
    monkeypatch.setattr(loading, "CORES", 1)


@pytest.fixture
def net() -> UNet2D:
    net = UNet2D(TINY)
    randomize(net)
    return net.requires_grad_(False)


def approve(folder: Path, net: UNet2D, *arguments: str) -> Result:
    save_checkpoint(folder, net.state_dict(), net.config, NoiseConfig(), Labels(), {})
    cache = ("--cache-dir", str(folder.parent / "cache"))
    return CliRunner().invoke(
        main, ["approve", str(folder), "--executor", "eager", "--device", "cpu", *cache, *arguments]
    )


def test_it_notes_in_the_folder_that_bfloat16_does_no_harm(tmp_path: Path, net: UNet2D) -> None:
    result = approve(tmp_path / "model", net, "--images", "5")
    assert result.exit_code == 0, result.output
    assert load_checkpoint(tmp_path / "model").approved.keys() == {("eager", "bfloat16")}
    (check,) = json.loads((tmp_path / "model" / "tminus.json").read_text())["approved"]
    assert check["samples"].startswith("5 images by dpmpp_2m, 20 steps")


def test_it_ends_with_1_where_bfloat16_does_harm(tmp_path: Path, net: UNet2D) -> None:
    harm(net)
    assert approve(tmp_path / "model", net, "--images", "4").exit_code == 1
    assert load_checkpoint(tmp_path / "model").approved == {}


def test_a_processor_without_bfloat16_and_a_bad_folder_are_one_clear_line(
    tmp_path: Path, net: UNet2D, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_executor, "available", lambda: True)
    monkeypatch.setattr(openvino_executor, "precisions", lambda: ("float32",))
    result = approve(tmp_path / "model", net, "--executor", "openvino")
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "precision bfloat16 cannot be computed by this processor with openvino" in result.output
    result = CliRunner().invoke(main, ["approve", str(tmp_path / "nowhere")])
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "nowhere: no such folder" in result.output


def test_a_network_that_does_not_fit_into_memory_is_refused_before_it_is_read(
    tmp_path: Path, net: UNet2D, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "free_memory_bytes", lambda: 2**10)
    result = approve(tmp_path / "model", net)
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "GiB of memory are free" in result.output


def test_a_student_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    student = BUNDLED.parent / "fashion-mnist-32-student"
    result = CliRunner().invoke(main, ["approve", str(student), "--cache-dir", str(tmp_path)])
    assert (result.exit_code, result.output.count("\n")) == (1, 1), result.output
    assert "a student is sampled by its own tables alone" in result.output
