"""The checkpoints that come with tminus: each loads, tells its classes, recommends what it can do, and is small."""

import json
from pathlib import Path

import pytest

from tminus.model.checkpoint import load_checkpoint

FOLDER = Path(__file__).parents[1] / "checkpoints"
LARGEST = {"fashion-mnist-32": 12e6, "fashion-mnist-32-student": 12e6, "pixel-art-32": 12e6, "avatars-64": 20e6}
BUNDLED = sorted(path.parent.name for path in FOLDER.glob("*/unet"))


def test_these_are_bundled() -> None:
    assert set(BUNDLED) == LARGEST.keys()


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_checkpoint_is_whole_and_small(name: str) -> None:
    folder = FOLDER / name
    found = load_checkpoint(folder)
    assert found.name == name
    assert found.refused_tables == ()
    assert found.labels.null_class == found.labels.num_classes, "guidance works"
    assert found.recommended is not None
    recommended = found.recommended
    found.plan(recommended.sampler, recommended.steps, guidance=recommended.guidance)
    weights = sum(file.stat().st_size for file in folder.rglob("*.safetensors") if "classifier" not in file.parts)
    assert weights < LARGEST[name]


@pytest.mark.parametrize("name", BUNDLED)
def test_its_card_tells_of_these_weights(name: str) -> None:
    card = (FOLDER / name / "README.md").read_text("utf-8")
    found = load_checkpoint(FOLDER / name)
    assert f"weights sha256 {found.weights_hash[:16]}" in card
    meta = json.loads((FOLDER / name / "tminus.json").read_text())
    assert meta["provenance"]["trained_by"] == ("tminus train" if found.student is None else "tminus distill")
    for class_name in found.labels.class_names:
        assert class_name in card
