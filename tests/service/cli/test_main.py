"""How Ctrl-C ends the commands; tests/e2e/test_train.py has `train`, which saves before."""

import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from tminus.model import checkpoint
from tminus.service.cli.main import main
from tminus.service.engine import loading


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["evaluate"], "interrupted"),
        (["distill", "--checkpoint", "teacher", "--out", "run"], "interrupted"),
        (["tune"], "stopped; the same command goes on after the last round"),
        (["sample"], "interrupted"),
    ],
)
def test_ctrl_c_ends_a_command_with_130_and_one_line(
    command: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "load_checkpoint", load)
    monkeypatch.setattr(loading, "read_checkpoint", load)
    result = CliRunner().invoke(main, command)
    assert (result.exit_code, result.stderr) == (130, f"tminus: {says}\n")
