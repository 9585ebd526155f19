"""What a request gets that leaves its sampler, steps or guidance out."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from tests.service.api.pictures import CAT, b64
from tests.service.api.test_tables import table
from tests.service.fakes import INFO, LIMITS
from tminus.model.catalogue import SAMPLER_FACTS, SAMPLERS, TABLE, TABLE_SAMPLERS, Recommended, usual_settings
from tminus.service.api.answers.documents import SamplerAnswer
from tminus.service.api.request import specs
from tminus.service.api.request.schemas import SampleRequest, bounds_of
from tminus.service.api.request.specs import named_by
from tminus.service.errors import InvalidField
from tminus.service.model_info import ModelInfo
from tminus.service.spec import SampleSpec

GUIDANCES = st.sampled_from([1.0, 1.5, 2.0])


@st.composite
def models(draw: st.DrawFn) -> ModelInfo:
    """Models with and without classes, a null class and tables; some are students."""
    num_timesteps = draw(st.integers(12, 60))
    has_null = draw(st.booleans())
    null = {"null_class": 3 if has_null else None} | ({} if has_null or draw(st.booleans()) else {"conditional": False})
    if "conditional" in null:
        null["class_names"] = ()
    keys = draw(st.sets(st.tuples(st.sampled_from(TABLE_SAMPLERS), st.integers(1, 9), GUIDANCES), max_size=6))
    tables = tuple(table(steps, g, name) for name, steps, g in sorted(keys) if has_null or g == 1)
    own = tuple(dict.fromkeys(each.sampler for each in tables))
    is_student = bool(tables) and draw(st.booleans())
    samplers = own if is_student else (*SAMPLERS, *own)
    recommended = st.sampled_from([Recommended(each.sampler, each.steps, each.guidance) for each in tables] or [None])
    if not is_student:
        plain = st.builds(usual_settings, st.just(num_timesteps), st.sampled_from(SAMPLERS))
        guided = st.builds(replace, plain, guidance=GUIDANCES if has_null else st.just(1.0))
        recommended = recommended.filter(bool) | guided if tables else guided
    return replace(
        INFO,
        num_timesteps=num_timesteps,
        log_sigmas=INFO.log_sigmas[:num_timesteps],
        samplers=samplers,
        tables=tables,
        timestep_spacings=INFO.timestep_spacings | dict.fromkeys(own, TABLE),
        default_sampler=samplers[0],
        recommended=draw(recommended),
        **null,
    )


@st.composite
def requests(draw: st.DrawFn, model: ModelInfo) -> dict[str, Any]:
    """Requests with any of the settings, and with what has a bearing on them."""
    hashes = [each.hash for each in model.tables] or ["0" * 16]
    parameters: dict[str, st.SearchStrategy[Any]] = {
        "sampler": st.sampled_from(model.samplers),
        "steps": st.integers(1, model.num_timesteps),
        "guidance": GUIDANCES,
        "timestep_spacing": st.sampled_from(["leading", "karras"]),
        "nearest": st.booleans(),
        "table": st.sampled_from(hashes),
    }
    return draw(st.fixed_dictionaries({}, optional=parameters)) | draw(classes(model))


def classes(model: ModelInfo) -> st.SearchStrategy[dict[str, Any]]:
    if not model.conditional:
        return st.just({})
    given = [{"class_label": 0}, {"n": 2, "class_label": [0, 1]}]
    return st.sampled_from(given if model.null_class is None else [*given, {}, {"n": 2, "class_label": [0, None]}])


def spec_of(model: ModelInfo, parameters: dict[str, Any]) -> SampleSpec:
    return specs.spec_of(SampleRequest.parse({"seed": 1, **parameters}, bounds_of(model, LIMITS)), model, LIMITS)


def taken(model: ModelInfo, **parameters: Any) -> tuple[str, int, float]:
    spec = spec_of(model, parameters)
    return spec.sampler, spec.steps, spec.guidance


@given(st.data())
def test_what_a_request_names_is_taken_or_refused_and_to_name_what_is_taken_changes_nothing(
    data: st.DataObject,
) -> None:
    model = data.draw(models())
    asked = data.draw(requests(model))
    try:
        spec = spec_of(model, asked)
    except InvalidField:
        reject()
    named = {"sampler": spec.sampler, "steps": spec.steps, "guidance": spec.guidance}
    assert spec_of(model, asked | named) == spec
    assert asked.get("sampler", spec.sampler) == spec.sampler
    assert asked.get("table", spec.table) == spec.table
    if not asked.get("nearest"):
        assert asked.get("steps", spec.steps) == spec.steps
        assert asked.get("guidance", spec.guidance) == spec.guidance


@given(st.data())
def test_nothing_named_is_taken_as_recommended_guided_where_each_image_has_a_class(data: st.DataObject) -> None:
    model = data.draw(models())
    asked, own = data.draw(classes(model)), model.recommended
    has_classes = model.null_class is not None and "class_label" in asked and asked["class_label"] != [0, None]
    guidance = own.guidance if has_classes else 1.0
    try:
        spec = spec_of(model, asked)
    except InvalidField:
        assert len(model.samplers) < len(SAMPLERS), "a student may have no table for unguided images; others have all"
        assert guidance not in [each.guidance for each in model.tables if each.sampler == own.sampler]
        return
    assert spec.guidance == guidance
    if own.sampler in SAMPLERS or own.guidance == guidance:
        assert (spec.sampler, spec.steps) == (own.sampler, own.steps)
    elif spec.sampler == own.sampler:
        assert spec.steps in [each.steps for each in model.tables if (each.sampler, each.guidance) == (own.sampler, 1)]
    else:
        assert (spec.sampler, spec.steps) == ("dpmpp_2m", min(20, model.num_timesteps))


@given(st.data())
def test_steps_alone_are_those_of_the_checkpoints_scheduler_unguided(data: st.DataObject) -> None:
    model = data.draw(models())
    assume(model.default_sampler in SAMPLERS)
    steps = data.draw(st.integers(1, SAMPLER_FACTS[model.default_sampler].max_steps(model.num_timesteps)))
    spec = spec_of(model, data.draw(classes(model)) | {"steps": steps})
    assert (spec.sampler, spec.steps, spec.guidance) == (model.default_sampler, steps, 1)


@given(st.data())
def test_a_sampler_alone_takes_its_good_number_of_steps_or_all_that_is_recommended_with_it(
    data: st.DataObject,
) -> None:
    model = data.draw(models())
    asked, sampler = data.draw(classes(model)), data.draw(st.sampled_from(model.samplers))
    facts, own = SAMPLER_FACTS[sampler], model.recommended
    if sampler in TABLE_SAMPLERS and not guidable(model, asked):
        assume(any(each.guidance == 1 for each in model.tables if each.sampler == sampler))
        assume(sampler != own.sampler or own.guidance == 1)
    if sampler == own.sampler and own_is_had(model, asked):
        assert spec_of(model, asked | {"sampler": sampler}) == spec_of(model, asked)
    elif sampler in TABLE_SAMPLERS:
        spec = spec_of(model, asked | {"sampler": sampler})
        assert spec.sampler == sampler
        assert sampler == own.sampler or guidable(model, asked) is False or spec.steps == good_steps(model, sampler)
    else:
        steps = min(facts.good_steps, facts.max_steps(model.num_timesteps))
        assert taken(model, **asked, sampler=sampler) == (sampler, steps, 1)
        assert good_steps(model, sampler) == (own.steps if sampler == own.sampler else steps)


def guidable(model: ModelInfo, asked: dict[str, Any]) -> bool:
    """Whether each image has a class, and the model a null class."""
    return model.null_class is not None and "class_label" in asked and asked["class_label"] != [0, None]


def own_is_had(model: ModelInfo, asked: dict[str, Any]) -> bool:
    """Whether what is recommended can be had as it is."""
    return model.recommended.sampler not in TABLE_SAMPLERS or guidable(model, asked) or model.recommended.guidance == 1


def good_steps(model: ModelInfo, sampler: str) -> int:
    return SamplerAnswer.of(sampler, model).good_steps


def test_a_sampler_of_guided_tables_alone_takes_one_of_them() -> None:
    """As `tminus tune` leaves a model of one's own that recommends guidance, where no table was good enough."""
    guided = replace(
        INFO,
        samplers=(*SAMPLERS, "tuned"),
        tables=(table(4, 1.5), table(8, 1.5), table(16, 1.5)),
        timestep_spacings=INFO.timestep_spacings | {"tuned": TABLE},
        recommended=Recommended("dpmpp_2m", 20, 1.5),
    )
    assert taken(guided, sampler="tuned", class_label=0) == ("tuned", 8, 1.5)
    assert taken(guided, sampler="tuned", class_label=0, steps=4) == ("tuned", 4, 1.5)
    assert taken(guided, sampler="tuned", class_label=0, steps=15, nearest=True) == ("tuned", 16, 1.5)
    assert good_steps(guided, "tuned") == 8
    mixed = replace(guided, tables=(table(8), table(4, 1.5)))
    assert taken(mixed, sampler="tuned", class_label=0) == ("tuned", 8, 1)
    assert taken(mixed, sampler="tuned", class_label=0, guidance=1.5) == ("tuned", 4, 1.5)
    with pytest.raises(InvalidField, match="guidance must be one that tuned has a table for"):
        taken(guided, sampler="tuned")


TUNED = replace(
    INFO,
    samplers=(*SAMPLERS, "tuned"),
    tables=(table(5), table(8), table(5, 2.0)),
    timestep_spacings=INFO.timestep_spacings | {"tuned": TABLE},
    recommended=Recommended("tuned", 8),
)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        # There is a table for this guidance, and none for that one.
        ({"class_label": 0, "guidance": 2}, ("tuned", 5, 2)),
        ({"class_label": 0, "guidance": 3}, ("dpmpp_2m", 20, 3)),
        ({"class_label": 0, "guidance": 3, "nearest": True}, ("tuned", 5, 2)),
        ({"timestep_spacing": "trailing"}, ("dpmpp_2m", 20, 1)),
        ({"strength": 0.5, "image": b64(CAT)}, ("tuned", 8, 1)),
        ({"table": table(5, 2.0).hash, "class_label": 0}, ("tuned", 5, 2)),
        ({"table": table(5).hash}, ("tuned", 5, 1)),
    ],
)
def test_a_recommended_table_gives_way_to_what_it_cannot_do(
    asked: dict[str, Any], expected: tuple[object, ...]
) -> None:
    assert taken(TUNED, **asked) == expected


def test_it_is_known_which_settings_a_request_names() -> None:
    asked: list[tuple[dict[str, Any], str]] = [
        ({}, "none"),
        ({"guidance": 2}, "none"),
        ({"sampler": "ddim"}, "sampler"),
        ({"steps": 5}, "steps"),
        ({"sampler": "ddim", "steps": 5}, "both"),
        ({"table": "0" * 16, "sampler": "tuned"}, "table"),
    ]
    for given_by_it, expected in asked:
        assert named_by(given_by_it) == expected
