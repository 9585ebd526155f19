"""What quality means."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import TABLES_OF_50
from tests.service.fakes import INFO
from tminus.model.catalogue import Recommended
from tminus.model.checkpoint import load_checkpoint
from tminus.model.sampler_tables import Table
from tminus.service.api.openai.schemas import Quality, settings_of_quality
from tminus.service.api.request.specs import settings_of
from tminus.service.model_info import ModelInfo

ROOT = Path(__file__).parents[4]


def tuned(steps: int, guidance: float = 1.0, sampler: str = "tuned") -> Table:
    return replace(TABLES_OF_50[0], sampler=sampler, steps=steps, guidance=guidance)


BARE = INFO
ADVISED = replace(INFO, recommended=Recommended("ddim", 20, 1.5))
TUNED = replace(ADVISED, samplers=(*INFO.samplers, "tuned"), tables=(tuned(5), tuned(8)))
STUDENT = replace(
    INFO,
    samplers=("consistency",),
    default_sampler="consistency",
    tables=tuple(tuned(steps, sampler="consistency") for steps in (1, 2, 4)),
    recommended=Recommended("consistency", 2),
)
FITTED = replace(TUNED, recommended=Recommended("tuned", 8))
QUALITIES: tuple[Quality, ...] = ("low", "medium", "high")


def settings(model: ModelInfo, quality: Quality, *, has_class: bool = True, **given: Any) -> tuple[object, ...]:
    can_guide = has_class and model.null_class is not None
    made = given | settings_of_quality(quality, given, model, can_guide=can_guide)
    own = settings_of(made, model, can_guide=can_guide)
    return own.sampler, own.steps, own.guidance


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (BARE, [("dpmpp_2m", 10, 1), ("dpmpp_2m", 20, 1), ("dpmpp_2m", 40, 1)]),
        (ADVISED, [("ddim", 10, 1.5), ("ddim", 20, 1.5), ("ddim", 40, 1.5)]),
        (TUNED, [("tuned", 8, 1), ("ddim", 20, 1.5), ("ddim", 40, 1.5)]),
        (FITTED, [("tuned", 5, 1), ("tuned", 8, 1), ("tuned", 8, 1)]),
        (STUDENT, [("consistency", 1, 1), ("consistency", 2, 1), ("consistency", 4, 1)]),
    ],
    ids=["nothing recommended", "recommended", "with tables", "a table recommended", "a student"],
)
def test_low_is_half_or_a_table_and_high_is_double(model: ModelInfo, expected: list[tuple[object, ...]]) -> None:
    assert [settings(model, quality) for quality in QUALITIES] == expected


def test_a_table_with_the_recommended_guidance_goes_before_one_without() -> None:
    both = replace(TUNED, tables=(tuned(8), tuned(5, 1.5)))
    assert settings(both, "low") == ("tuned", 5, 1.5)
    assert settings(both, "low", has_class=False) == ("tuned", 8, 1)


def test_without_a_class_or_a_null_class_there_is_no_guidance() -> None:
    assert settings(ADVISED, "medium", has_class=False) == ("ddim", 20, 1)
    guided = replace(FITTED, tables=(tuned(8, 2.0),), recommended=Recommended("tuned", 8, 2.0))
    assert [settings(guided, quality) for quality in QUALITIES] == [("tuned", 8, 2)] * 3
    assert [settings(guided, quality, has_class=False) for quality in QUALITIES] == [
        ("dpmpp_2m", 10, 1), ("dpmpp_2m", 20, 1), ("dpmpp_2m", 40, 1),
    ]  # fmt: skip
    assert settings(replace(ADVISED, null_class=None), "medium") == ("ddim", 20, 1)


def test_who_names_steps_or_a_table_gets_them_at_every_quality() -> None:
    for quality in QUALITIES:
        for named in ({"steps": 5}, {"steps": 7, "sampler": "tuned"}, {"table": TUNED.tables[0].hash}):
            assert settings_of_quality(quality, named, TUNED, can_guide=True) == {}


SHORT = replace(INFO, num_timesteps=30)


@pytest.mark.parametrize(
    ("model", "quality", "given", "expected"),
    [
        # Whoever names what a table has gets it, and with other settings the recommended sampler.
        (TUNED, "low", {"sampler": "tuned"}, ("tuned", 5, 1)),
        (TUNED, "low", {"guidance": 1.0, "clip": True, "seed": 3}, ("tuned", 8, 1)),
        (TUNED, "low", {"guidance_interval": [0, 9]}, ("ddim", 10, 1.5)),
        (TUNED, "low", {"guidance": 3}, ("ddim", 10, 3)),
        (TUNED, "low", {"sampler": "ddim"}, ("ddim", 10, 1.5)),
        (TUNED, "low", {"timestep_spacing": "trailing"}, ("ddim", 10, 1.5)),
        # Where a table is recommended, other settings are by a sampler that takes any.
        (FITTED, "low", {"guidance": 3.0}, ("dpmpp_2m", 10, 3)),
        (FITTED, "high", {"timestep_spacing": "trailing"}, ("dpmpp_2m", 40, 1)),
        # Another sampler has its own number of steps.
        (ADVISED, "low", {"sampler": "ddpm"}, ("ddpm", 50, 1)),
        (ADVISED, "high", {"sampler": "heun"}, ("heun", 50, 1)),
        (TUNED, "high", {"sampler": "tuned"}, ("tuned", 8, 1)),
        # Steps stay below the most that there are.
        (SHORT, "high", {}, ("dpmpp_2m", 30, 1)),
        (SHORT, "high", {"sampler": "heun"}, ("heun", 15, 1)),
    ],
)
def test_what_a_request_gives_decides_the_rest(
    model: ModelInfo, quality: Quality, given: dict[str, object], expected: tuple[object, ...]
) -> None:
    assert settings(model, quality, **given) == expected


def test_what_is_wrong_is_left_to_be_refused() -> None:
    for wrong in ({"sampler": "x"}, {"sampler": "tuned"}):
        assert settings_of_quality("low", wrong, ADVISED, can_guide=True) == {}
    assert settings_of_quality("low", {"sampler": "tuned", "guidance": 3.0}, TUNED, can_guide=True) == {}


def test_the_table_of_the_page_is_that_of_the_bundled_checkpoint() -> None:
    page = (ROOT / "docs" / "openai.md").read_text("utf-8")
    rows = re.findall(r"^\| (`\w+`.*?) \|.*\| `(\w+)`, (\d+) steps, guidance (\S+) \|$", page, re.MULTILINE)
    found = {re.findall(r"`(\w+)`", names)[0]: (sampler, int(steps), float(g)) for names, sampler, steps, g in rows}
    bundled = load_checkpoint(ROOT / "checkpoints" / "fashion-mnist-32")
    samplers = (*INFO.samplers, "tuned")
    model = replace(INFO, recommended=bundled.settings, tables=bundled.tables, samplers=samplers)
    assert found == {quality: settings(model, quality) for quality in QUALITIES}
