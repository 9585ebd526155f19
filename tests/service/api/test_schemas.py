import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.api.pictures import CAT, EDIT, INPUTS, MASK, b64
from tests.service.fakes import INFO, LIMITS
from tminus.service.api.jobs import JobsCall
from tminus.service.api.request import specs
from tminus.service.api.request.schemas import (
    MAX_ITEMS,
    MAX_SEED,
    NoiseCall,
    RequestSchema,
    SampleCall,
    SampleRequest,
    StreamCall,
    bounds_of,
    named_as_given,
)
from tminus.service.api.request.specs import SEED_BITS, parameters_of, with_inputs
from tminus.service.errors import InvalidField, ServiceError
from tminus.service.model_info import ModelInfo
from tminus.service.spec import SampleSpec

UNCONDITIONAL = replace(INFO, conditional=False, class_names=(), null_class=None)
NO_NULL_CLASS = replace(INFO, null_class=None)


def spec_of(parameters: dict[str, Any], model: ModelInfo = INFO, **kwargs: Any) -> SampleSpec:
    return specs.spec_of(SampleRequest.parse(parameters, bounds_of(model, LIMITS)), model, LIMITS, **kwargs)


def refusal(parameters: dict[str, Any], model: ModelInfo = INFO) -> InvalidField:
    with pytest.raises(InvalidField) as caught:
        spec_of(parameters, model)
    error = caught.value
    assert (error.status, error.code) == (422, "invalid_field")
    return error


# --- what is right ---


def test_left_out_parameters_take_their_defaults() -> None:
    spec = spec_of({}, draw=lambda bits: 5)
    assert spec == SampleSpec(
        n=1,
        steps=20,
        sampler="dpmpp_2m",
        eta=0.0,
        seed=5,
        index=0,
        class_labels=(None,),
        guidance=1.0,
        guidance_interval=None,
        timestep_spacing="karras",
        clip=True,
    )


def test_a_drawn_seed_fits_the_numbers_of_javascript_and_is_drawn_anew() -> None:
    asked: list[int] = []
    spec_of({}, draw=lambda bits: asked.append(bits) or 0)  # type: ignore[func-returns-value]
    assert asked == [SEED_BITS] == [53]
    seeds = {spec_of({}).seed for _ in range(10)}
    assert len(seeds) == 10
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_numbers_and_classes_may_come_as_text_and_bounds_are_included() -> None:
    right: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"n": "8", "steps": "1000", "seed": "18446744073709551615"}, {"n": 8, "steps": 1000, "seed": MAX_SEED}),
        ({"sampler": "ddim", "eta": "0.5"}, {"sampler": "ddim", "eta": 0.5}),
        ({"n": 64, "steps": 1}, {"n": 64, "steps": 1}),
        ({"guidance": "2.5", "class_label": "dOg"}, {"guidance": 2.5, "class_labels": (1,)}),
        ({"guidance": 50, "class_label": 1}, {"guidance": 50.0}),
        ({"index": 2**32 - 2, "n": 2}, {"index": 2**32 - 2}),
        ({"class_label": "1"}, {"class_labels": (1,)}),
        ({"class_label": 0, "n": 3}, {"class_labels": (0, 0, 0)}),
        ({"class_label": ["cat", "2", 1, None], "n": 4}, {"class_labels": (0, 2, 1, None)}),
        ({"class_label": None, "n": 2}, {"class_labels": (None, None)}),
    ]
    for parameters, expected in right:
        spec = spec_of(parameters)
        assert {name: getattr(spec, name) for name in expected} == expected
    upper = replace(INFO, class_names=("CAT", "Straße", "3d-print"))
    assert spec_of({"n": 2, "class_label": ["cat", "STRASSE"]}, upper).class_labels == (0, 1)


# --- what is wrong ---


class Untouched(list[object]):
    """A list whose items nobody may look at."""

    def __iter__(self) -> Iterator[object]:
        raise AssertionError("an item was looked at")


@pytest.mark.parametrize(
    ("parse", "schema", "longest"),
    [
        (lambda fields: SampleCall.parse(fields, bounds_of(INFO, LIMITS)), SampleCall, INFO.num_timesteps),
        (NoiseCall.parse, NoiseCall, MAX_ITEMS),
        (JobsCall.parse, JobsCall, MAX_ITEMS),
        (lambda fields: StreamCall.parse(fields, bounds_of(INFO, LIMITS)), StreamCall, LIMITS.max_n),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_list_longer_than_any_request_needs_is_refused_unread(
    parse: Callable[[dict[str, Any]], object], schema: type[RequestSchema], longest: int
) -> None:
    for name in schema.model_fields:
        with pytest.raises(InvalidField) as caught:
            parse({name: Untouched([[]] * (longest + 1))})
        assert caught.value.field == name
        assert caught.value.detail.endswith(f"got a list of {longest + 1}")
        assert len(json.dumps(caught.value.bound)) < 200


def test_what_the_model_has_not_is_refused() -> None:
    for parameters, model, field, value, says in (
        ({"class_label": 0}, UNCONDITIONAL, "class_label", 0, "absent: this model has no classes"),
        ({"guidance": 2}, UNCONDITIONAL, "guidance", 2.0, "1 (off): this model has no classes"),
        ({"guidance": 2, "class_label": 0}, NO_NULL_CLASS, "guidance", 2.0, "1 (off): this model has no null class"),
        ({"class_label": None, "n": 2}, NO_NULL_CLASS, "class_label", None, ""),
        ({"class_label": [0, None], "n": 2}, NO_NULL_CLASS, "class_label", [0, None], ""),
    ):
        error = refusal(parameters, model)
        assert (error.field, error.value) == (field, value)
        assert says in error.detail


def test_a_huge_value_is_not_echoed_whole() -> None:
    document = refusal({"steps": "9" * 100_000}).problem()
    assert len(json.dumps(document)) < 2000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from([*SampleRequest.model_fields, "extra"]) | st.text(max_size=5)


@given(st.dictionaries(names, json_values | st.sampled_from(["ddim", "cat", "5", "nan"]), max_size=4))
def test_any_parameters_make_a_spec_within_the_bounds_or_a_typed_refusal(parameters: dict[str, Any]) -> None:
    for model in (INFO, UNCONDITIONAL, NO_NULL_CLASS):
        try:
            spec = spec_of(parameters, model)
        except ServiceError as error:
            assert error.status == 422
            may_be_missing = {"class_label", "strength", "image", "mask", "to_seed", "mix"}
            assert error.field in parameters.keys() | may_be_missing
            assert re.search(r"must be .* got|no parameter", error.detail, re.DOTALL)
            json.dumps(error.problem(), allow_nan=False)
        else:
            assert 1 <= spec.n <= 64
            assert 1 <= spec.steps <= 1000
            assert spec.sampler in model.samplers
            assert 0 <= spec.eta <= 1
            assert 0 <= spec.seed <= MAX_SEED
            assert 0 <= spec.index <= spec.index + spec.n - 1 < 2**32
            assert (spec.class_labels is not None) == model.conditional
            assert spec.class_labels is None or len(spec.class_labels) == spec.n
            assert isinstance(spec.clip, bool)


# --- edits ---


def test_the_parameters_of_an_edit_lead_back_to_it() -> None:
    body = EDIT | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    asked = SampleRequest.parse(body, bounds_of(INFO, LIMITS))
    spec = with_inputs(specs.spec_of(asked, INFO, LIMITS), asked, INPUTS)
    told = parameters_of(spec)
    again = SampleRequest.parse(told | {"image": b64(CAT), "mask": b64(MASK)}, bounds_of(INFO, LIMITS))
    assert with_inputs(specs.spec_of(again, INFO, LIMITS), again, INPUTS) == spec
    assert type(spec).from_json(json.loads(json.dumps(spec.to_json()))) == spec
    assert hash(spec) != hash(replace(spec, mask_sha256=None))


def test_all_faults_of_a_request_have_the_names_that_it_gave() -> None:
    wrong = InvalidField.of("n", "an integer", "x")
    wrong.others = (InvalidField.of("steps", "an integer", "y"), InvalidField.of("guidance", "a number", "z"))
    with pytest.raises(InvalidField) as raised, named_as_given({"steps": "num_inference_steps"}):
        raise wrong
    assert [each.field for each in (raised.value, *raised.value.others)] == ["n", "num_inference_steps", "guidance"]
