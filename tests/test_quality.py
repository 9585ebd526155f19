"""The figures of images: which are measured, how the file names them, and the tables made of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import image_tables, quality
from bench.result_file import ROOT, digest
from tminus.model.checkpoint import load_checkpoint
from tminus.model.evaluation.samples import Point

STUDENT = ROOT / "checkpoints" / "fashion-mnist-32-student"


def entry(sampler: str, steps: int, passes: int, distance: float, guidance: float = 1.0) -> dict[str, Any]:
    point = {"sampler": sampler, "steps": steps, "guidance": guidance, "passes": passes}
    return point | {"distance": distance, "class_accuracy": 0.9}


RESULT: dict[str, Any] = {
    "made": {"command": "python -m bench.quality", "images": 1000},
    "fashion-mnist-32": {
        "real": {"distance": 2.0, "class_accuracy": 0.93},
        "tuned-8": entry("tuned", 8, 8, 2.25),
        "dpmpp_2m-20": entry("dpmpp_2m", 20, 20, 3.5),
        "dpmpp_2m-20-guidance-1_5": entry("dpmpp_2m", 20, 20, 9.0, 1.5),
    },
}


def test_every_setting_has_a_name_of_its_own_without_a_dot_and_can_be_sampled() -> None:
    for name, points in quality.POINTS.items():
        checkpoint = load_checkpoint(ROOT / "checkpoints" / name)
        names = [quality.key_of(point) for point in points]
        assert len(set(names)) == len(names)
        assert not any("." in each for each in names)
        for point in points:
            quality.identity(checkpoint, point)
        assert set(image_tables.CARDS[name]) <= set(names), "the card speaks of what is measured"


def test_what_the_file_has_of_the_same_code_and_weights_is_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, file = load_checkpoint(STUDENT), tmp_path / "quality.json"
    monkeypatch.setattr(quality, "FILE", file)
    one, two = Point("consistency", 1), Point("consistency", 2)
    assert set(quality.lacking(STUDENT.name)) == {one, two}
    entry = quality.identity(checkpoint, one)
    code = {path: digest(ROOT / path) for path in (*quality.CODE, "bench/quality.py")}
    for same, changes, code_of_file in (
        (True, {}, code),
        (False, {"weights_hash": "of others"}, code),
        (False, {}, code | {"model": "of others"}),
    ):
        kept = {STUDENT.name: {quality.key_of(one): entry | changes}}
        file.write_text(json.dumps({"made": {"code": code_of_file}} | kept))
        assert quality.lacking(STUDENT.name) == ([two] if same else [*quality.POINTS[STUDENT.name]])


def test_the_table_of_guidance_leaves_out_a_checkpoint_without_figures() -> None:
    result = RESULT | {"avatars-64": {"real": {"distance": 1.0, "class_accuracy": 1.0}}}
    lines = image_tables.guidance(result).splitlines()
    assert lines[2:] == ["| fashion-mnist-32 | 3.5 (0.90) | 9.0 (0.90) | n/a | 2.0 (0.93) |"]


def test_a_card_counts_the_passes_of_a_guided_image_twice() -> None:
    guided = RESULT["fashion-mnist-32"]["dpmpp_2m-20-guidance-1_5"]
    result = RESULT | {"fashion-mnist-32": RESULT["fashion-mnist-32"] | {"dpmpp_2m-20-guidance-2": guided}}
    table = image_tables.card("fashion-mnist-32", result)
    assert "| `tuned`, 8 steps | 8 | 2.25 | 0.900 |" in table
    assert "| `dpmpp_2m`, 20 steps, guidance 1.5 | 40 | 9.00 | 0.900 |" in table
    assert image_tables.card("avatars-64", RESULT) == ""
