"""What quality means."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import TABLES_OF_50
from tests.service.fakes import INFO, LIMITS
from tminus.model.catalogue import Recommended, Rung
from tminus.model.checkpoint import load_checkpoint
from tminus.service.api.openai.schemas import ImagesCall
from tminus.service.api.request.specs import spec_of
from tminus.service.model_info import ModelInfo

ROOT = Path(__file__).parents[4]
TABLE = replace(TABLES_OF_50[0], sampler="tuned", steps=8, guidance=1.0)
GUIDED = replace(
    INFO,
    samplers=(*INFO.samplers, "tuned"),
    tables=(TABLE,),
    recommended=Recommended("ddim", 20, 1.5),
    ladder=(
        Rung("ddim", 40, 1.5), Rung("ddim", 20, 1.5), Rung("tuned", 8), Rung("tuned", 5),
        Rung("consistency", 1, model="student"),
    ),
)  # fmt: skip


def settings(model: ModelInfo, quality: str, prompt: str = "cat", **given: Any) -> tuple[object, ...]:
    call = ImagesCall.parse({"prompt": prompt, "quality": quality, **given}).sampling(model, LIMITS)
    spec = spec_of(call, model, LIMITS)
    return spec.sampler, spec.steps, spec.guidance


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        ("low", ("tuned", 8, 1)),  # the last rung is another model's, and the one before it has no table
        ("medium", ("ddim", 20, 1.5)),
        ("standard", ("ddim", 20, 1.5)),
        ("auto", ("ddim", 20, 1.5)),
        ("high", ("ddim", 40, 1.5)),
        ("hd", ("ddim", 40, 1.5)),
    ],
)
def test_each_quality_is_a_rung(quality: str, expected: tuple[object, ...]) -> None:
    assert settings(GUIDED, quality) == expected


def test_without_a_class_there_is_no_guidance() -> None:
    assert settings(GUIDED, "high", prompt="") == ("ddim", 40, 1)
    assert settings(GUIDED, "low", prompt="") == ("tuned", 8, 1)


def test_a_request_that_names_a_setting_gets_it_at_every_quality() -> None:
    for quality in ("low", "medium", "high", "auto"):
        assert settings(GUIDED, quality, sampler="euler", steps=7, deadline_s=9) == ("euler", 7, 1)
        assert settings(GUIDED, quality, table=TABLE.hash) == ("tuned", 8, 1)


def test_auto_with_a_deadline_is_adaptive() -> None:
    def quality(**given: Any) -> str | None:
        return ImagesCall.parse({"prompt": "cat", **given}).sampling(GUIDED, LIMITS).quality

    assert quality(deadline_s=3) == quality(deadline_s=3, quality="auto") == "adaptive"
    for given in ({}, {"deadline_s": 3, "quality": "medium"}, {"deadline_s": 3, "steps": 5}):
        assert quality(**given) is None, given


def test_the_table_of_the_page_is_that_of_the_bundled_checkpoint() -> None:
    page = (ROOT / "docs" / "openai.md").read_text("utf-8")
    rows = re.findall(r"^\| (`\w+`.*?) \|.*\| `(\w+)`, (\d+) steps, guidance (\S+) \|$", page, re.MULTILINE)
    found = {
        name: (sampler, int(steps), float(scale))
        for names, sampler, steps, scale in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    bundled = load_checkpoint(ROOT / "checkpoints" / "fashion-mnist-32")
    samplers = (*INFO.samplers, "tuned")
    model = replace(INFO, recommended=bundled.settings, ladder=bundled.ladder, tables=bundled.tables, samplers=samplers)
    qualities = ("auto", "low", "medium", "high", "standard", "hd")
    assert found == {quality: settings(model, quality) for quality in qualities}
