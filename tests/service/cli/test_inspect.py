from pathlib import Path

import click.testing
import pytest

from tests.model.formats.conftest import randomised, save
from tests.model.formats.ho import Ho
from tests.tiny import TINY
from tminus.model.catalogue import Recommended
from tminus.model.formats.describe import Description
from tminus.model.networks import build
from tminus.service.cli.inspect import _costs
from tminus.service.cli.main import main
from tminus.service.engine.options import BUNDLED


def inspect(*arguments: object) -> click.testing.Result:
    return click.testing.CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_folder_is_told_with_what_it_costs_here() -> None:
    result = inspect(BUNDLED)
    assert result.exit_code == 0, result.output
    lines = dict(line.strip().split("  ", 1) for line in result.output.splitlines())
    assert lines["parameters"] == "2.59 M"
    assert lines["memory"].startswith("10 MiB of weights, about ")
    assert " ms a pass of one row, " in lines["time"]
    assert f"of {lines['recommended'].split()[2]} steps of {lines['recommended'].split()[0]}, guidance" in lines["time"]


def test_passes_and_not_steps_are_counted() -> None:
    settings = Recommended("heun", 20, 2.0)
    description = Description((), build(TINY).eval(), settings, (8, 8))
    assert "78 passes" in dict(_costs(description))["time"]
    assert not _costs(Description(()))


def test_time_is_not_measured_where_no_row_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tminus.service.engine.devices.available_bytes", lambda _device: 1000)
    assert "not measured: 0 MiB are free" in inspect(BUNDLED).output


def test_file_is_told_with_what_is_missing(tmp_path: Path) -> None:
    file = save(randomised(Ho()), tmp_path / "model.ckpt")
    result = inspect(file)
    assert result.exit_code == 0, result.output
    assert "missing  --variance (fixed_small or fixed_large, of ancestral sampling)" in result.output
    assert " a pass of one row" not in result.output


def test_what_is_no_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    result = inspect(tmp_path)
    assert (result.exit_code, result.output) == (1, f"tminus: {tmp_path}: the folder is empty\n")
