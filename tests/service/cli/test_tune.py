"""The options of `tminus tune`: what is wrong is one line that names the option, its bound and its value."""

import json
from pathlib import Path

import pytest

from tests.service.cli.running import run
from tests.service.conftest import MakeCheckpoint
from tminus.model.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.slow
QUICK = ["--rows", "8", "--held-out", "4", "--teacher", "dpmpp_2m:12", "--iterations", "1", "--executor", "eager"]


@pytest.fixture
def folder(tmp_path: Path, make_checkpoint: MakeCheckpoint) -> Path:
    checkpoint = make_checkpoint()
    net = checkpoint.net
    save_checkpoint(tmp_path / "net", net.state_dict(), net.config, checkpoint.noise, checkpoint.labels, {})
    return tmp_path / "net"


def tune(*arguments: str) -> tuple[int, str]:
    result = run("tune", *arguments)
    return result.exit_code, result.output


def test_tables_are_written_beside_the_weights_and_the_command_says_so(folder: Path) -> None:
    code, said = tune("--checkpoint", str(folder), "--steps", "1,2", "--guidance", "1,2", *QUICK)
    assert code == 0, said
    assert "4 tables written" in said
    loaded = load_checkpoint(folder)
    assert {(table.steps, table.guidance) for table in loaded.tables} == {(1, 1), (2, 1), (1, 2), (2, 2)}
    value = json.loads((folder / "samplers" / "tuned-2.json").read_text())
    assert value["about"]["teacher"] == "dpmpp_2m:12"
    code, said = tune("--checkpoint", str(folder), "--steps", "1,2", "--guidance", "1,2", *QUICK)
    assert (code, said.count("tuned already")) == (0, 4)
