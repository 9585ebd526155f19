"""Tables of a checkpoint: files that are right are read as they were written, all others refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.test_samplers import walk
from tminus.model.noise import NoiseConfig
from tminus.model.sampler_tables import FOLDER, FORMAT, Table, read_tables, write_table
from tminus.model.samplers import compile_plan, table_plan

NOISE = NoiseConfig()
READ_TEXT = Path.read_text
HASH = "ab" * 32
TABLE = Table(
    "tuned",
    3,
    1.0,
    (999.0, 500.5, 20.0),
    ((0.9, 0.1, 0.0, 0.0, 0.0), (0.5, 0.7, -0.2, 0.0, 0.0), (0.1, 1.2, -0.4, 0.1, 0.0)),
    {"teacher": "many steps"},
)


def read(
    folder: Path, *, fractional: bool = True, null_class: bool = True, weights: str = HASH, noise: NoiseConfig = NOISE
) -> tuple[tuple[Table, ...], tuple[str, ...]]:
    return read_tables(
        folder, weights, noise.to_dict(), num_timesteps=1000, null_class=null_class, fractional=fractional
    )


def write(folder: Path, table: Table = TABLE, **changed: Any) -> Path:
    """Write a table's file, with other members than it should have."""
    file = write_table(folder, table, HASH, NOISE.to_dict())
    if changed:
        file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return file


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    guided = Table("tuned", 3, 1.5, TABLE.timesteps, TABLE.lines)
    student = Table("consistency", 1, 1.0, (999.0,), ((0.0, 1.0, 0.0, 0.0, 0.0),))
    for table in (TABLE, guided, student):
        write(tmp_path, table)
    assert read(tmp_path) == ((student, TABLE, guided), ())
    assert read(tmp_path)[0][1].about == TABLE.about
    assert len({table.hash for table in (TABLE, guided, student)}) == 3
    assert [file.name for file in sorted((tmp_path / FOLDER).iterdir())] == [
        "consistency-1.json",
        "tuned-3-guidance-1.5.json",
        "tuned-3.json",
    ]


FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "newer": ({"format": FORMAT + 1}, r"format must be 1 \(it is of a newer version of tminus\), got 2"),
    "unknown sampler": ({"sampler": "ddpm"}, "sampler must be one of tuned, consistency, got 'ddpm'"),
    "other weights": ({"weights_hash": "cd" * 32}, "weights_hash must be abab.* weights, got 'cdcd"),
    "other schedule": ({"noise": {}}, "noise must be the checkpoint's own noise schedule, got {}"),
    "no steps": ({"steps": 0}, r"steps must be an integer in 1\.\.1000, got 0"),
    "guidance": ({"guidance": 51}, r"guidance must be a number in 0\.\.50, got 51"),
    "too few timesteps": ({"timesteps": [999, 5]}, r"timesteps must be 3 falling numbers in 0\.\.999"),
    "timesteps that rise": ({"timesteps": [999, 500, 600]}, r"timesteps must be 3 falling numbers in 0\.\.999"),
    "NaN": ({"lines": [[1, 0, 0, 0, 0], [1, 0, math.nan, 0, 0], [1, 0, 0, 0, 0]]}, "lines must be 3 lists of 5"),
    "a number of 400 digits as guidance": ({"guidance": 10**400}, r"guidance must be a number in 0\.\.50, got 1000"),
    "a number of 400 digits in a line": ({"lines": [[10**400, 0, 0, 0, 0]] * 3}, "none above 1000 in size"),
    "negative noise": (
        {"lines": [[1, 0, 0, 0, -1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]},
        "lines must be without a negative s",
    ),
    "noise at the end": (
        {"lines": [[1, 0, 0, 0, 0]] * 2 + [[0, 1, 0, 0, 1]]},
        "lines must be without noise in the last",
    ),
}


@pytest.mark.parametrize(("changed", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_wrong_table_is_refused_by_name_and_the_others_are_read(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    other = Table("tuned", 1, 1.0, (999.0,), ((0.0, 1.0, 0.0, 0.0, 0.0),))
    write(tmp_path, other)
    write(tmp_path, **changed)
    tables, refused = read(tmp_path)
    assert tables == (other,)
    assert len(refused) == 1
    assert refused[0].startswith("samplers/tuned-3.json: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(refused[0])


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, Table("tuned", 1, 1.0, (999.0,), ((0.0, 1.0, 0.0, 0.0, 0.0),)))
    away = write(tmp_path)

    def read_text(self: Path, *args: Any, **kwargs: Any) -> str:
        if self == away:
            raise PermissionError(13, "Permission denied", str(self))
        return READ_TEXT(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)
    tables, refused = read(tmp_path)
    assert [table.steps for table in tables] == [1]
    assert refused == ("samplers/tuned-3.json: Permission denied",)


def test_a_file_that_was_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path)
    whole = file.read_bytes()
    for length in range(0, len(whole) - 2, 17):
        file.write_bytes(whole[:length])
        tables, (refused,) = read(tmp_path)
        assert tables == ()
        assert "not JSON" in refused


# --- plans --------------------------------------------------------------------------------------------------------


def test_the_plan_of_a_table_is_its_formula() -> None:
    """x' = a x + b x0 + c x0_previous + d (the x0 before that), by hand in float64."""
    noise = NoiseConfig(prediction_type="sample", clip_sample=False)
    plan = table_plan(noise, noise.schedule(), TABLE, clip=None)
    x0 = torch.randn(3, 2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x_T = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x_T
    for k, (a, b, c, d, _) in enumerate(TABLE.lines):
        x = a * x + b * x0[k] + (c * x0[k - 1] if k > 0 else 0) + (d * x0[k - 2] if k > 1 else 0)
    torch.testing.assert_close(walk(plan, x_T, lambda k, _x: x0[k])[-1][0], x, rtol=1e-12, atol=1e-12)
    assert plan.timesteps.tolist() == [999.0, 500.5, 20.0]
    assert plan.num_registers == 1
    assert not plan.adds_noise


def test_a_table_of_a_known_solver_is_that_solver() -> None:
    known = compile_plan(NOISE, NOISE.schedule(), "dpmpp_2m", 7)
    lines = tuple((a, b, c, 0.0, s) for a, b, c, s in known.lines[:, 2:6].tolist())
    table = Table("tuned", 7, 1.0, tuple(known.timesteps.tolist()), lines)
    plan = table_plan(NOISE, NOISE.schedule(), table, clip=None)
    assert torch.equal(plan.lines, known.lines)
    assert torch.equal(plan.known, known.known)


def test_a_table_that_begins_later_takes_its_first_x0_for_the_missing_ones() -> None:
    noise = NoiseConfig(prediction_type="sample", clip_sample=False)
    x_0 = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for start in (0, 1, 2):
        plan = table_plan(noise, noise.schedule(), TABLE, clip=None, start=start)
        assert len(plan) == 3 - start
        expected = x
        for k, (a, b, c, d, _) in enumerate(TABLE.lines[start:]):
            whole = b + (c if start or k > 0 else 0) + (d if start or k > 1 else 0)
            expected = a * expected + whole * x_0  # every x0 is the same
        torch.testing.assert_close(walk(plan, x, lambda _k, _x: x_0)[-1][0], expected, rtol=1e-12, atol=1e-12)
