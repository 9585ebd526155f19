"""How `tminus train` and `train-autoencoder` fail; tests/e2e/test_train.py has what they make."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tminus.service.cli.main import main


@pytest.mark.parametrize("command", [["train", "--head-dim", "4"], ["train-autoencoder"]])
def test_a_run_that_cannot_be_written_is_one_clear_line(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for k in range(4):
        Image.fromarray(np.full((8, 8, 3), k, np.uint8)).save(tmp_path / "images" / f"{k}.png")
    (tmp_path / "file").touch()
    small = ["--size", "8", "--widths", "8,8", "--groups", "4", "--steps", "1", "--batch-size", "2", "--device", "cpu"]
    data = ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "file" / "run"), "--precision", "fp32"]
    result = CliRunner().invoke(main, [*command, *data, *small])
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit), "no traceback"
    assert result.stderr.startswith("tminus: ")
    assert "Not a directory" in result.stderr
    assert len(result.stderr.splitlines()) == 1
