"""From a request's JSON and tensors to the parameters of POST /sample, and from images to an answer."""

import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.api.kserve.requests import as_bytes, numbers, plain, tensor
from tests.service.fakes import INFO, LIMITS
from tminus.service.api.kserve.infer import (
    AS_JSON,
    InferCall,
    InferRequest,
    inputs_of,
    outputs_of,
    outputs_wanted,
    read_request,
)
from tminus.service.api.request.schemas import bounds_of
from tminus.service.errors import (
    DeadlinePassed,
    DeadlineUnmeetable,
    InvalidField,
    ServiceError,
)
from tminus.service.model_info import ModelInfo


def parse(model: ModelInfo = INFO, **members: Any) -> tuple[InferRequest, dict[str, Any]]:
    members.setdefault("inputs", [])
    return read_request(json.dumps(members).encode(), None, model, LIMITS)


def called(**members: Any) -> InferCall:
    return InferCall.parse(parse(**members)[1], bounds_of(INFO, LIMITS))


def outputs_of_request(**members: Any) -> dict[str, bool]:
    return outputs_wanted(parse(**members)[0], called(**members))


def test_tensors_and_parameters_are_those_of_post_sample() -> None:
    asked, parameters = parse(
        id="42",
        inputs=plain(tensor("class_label", "INT64", 1, 2), tensor("guidance_interval", "INT32", 5, 900)),
        parameters={"sampler": "ddim", "eta": 0.5, "index": 3, "clip": True},
    )
    assert asked.id == "42"
    assert parameters == {
        "steps": 4, "seed": 7, "class_label": [1, 2], "n": 2, "guidance_interval": [5, 900],
        "sampler": "ddim", "eta": 0.5, "index": 3, "clip": True,
    }  # fmt: skip
    assert parse(inputs=[tensor("class_label", "INT64", 0, -1)])[1]["class_label"] == [0, None]
    _, named = parse(inputs=[tensor("class_label", "BYTES", "Cat", "3d print", "", "1")])
    assert named["class_label"] == [0, 2, None, 1]
    assert parse(parameters={"n": 3})[1] == {"n": 3}
    for n in (1, 1.0, "1"):
        assert called(parameters={"n": n}, inputs=[tensor("class_label", "INT64", 0)]).n == 1


def test_a_deadline_is_told_of_in_the_unit_of_the_request() -> None:
    timed = called(parameters={"timeout": 1_500_000})
    early = timed.in_its_words(InvalidField.of("deadline_s", "at least 2 s for this work", 1.5))
    assert (early.field, early.value, early.bound) == (
        "timeout", 1_500_000, "at least 2 s for this work, in microseconds",
    )  # fmt: skip
    assert early.detail == "timeout must be at least 2 s for this work, in microseconds, got 1500000"
    busy = timed.in_its_words(DeadlineUnmeetable("…", value=1.5, bound="at least 9 s at this load"))
    assert (busy.status, busy.detail) == (
        429,
        "timeout must be at least 9 s at this load, in microseconds, got 1500000",
    )
    late = timed.in_its_words(DeadlinePassed.of(1.5))
    assert (late.field, late.detail) == (
        "timeout",
        "timeout must be a longer time, in microseconds, got 1500000",
    )
    other = timed.in_its_words(InvalidField.of("n", "at most 3", 4))
    assert other.problem() == InvalidField.of("n", "at most 3", 4).problem()
    as_it_came = called(parameters={"deadline_s": 1.5}).in_its_words(DeadlinePassed.of(1.5))
    assert as_it_came.problem() == DeadlinePassed.of(1.5).problem()


def test_outputs_are_all_or_those_that_are_named() -> None:
    assert outputs_of_request() == outputs_of_request(outputs=[]) == {"images": False, "seed": False}
    assert outputs_of_request(parameters={"binary_data_output": True}) == {"images": True, "seed": True}
    assert outputs_of_request(outputs=[{"name": "seed"}]) == {"seed": False}
    both = [{"name": "seed", "parameters": {"binary_data": False}}, {"name": "images"}]
    assert outputs_of_request(outputs=both, parameters={"binary_data_output": True}) == {"seed": False, "images": True}


def test_every_byte_is_written_as_the_number_it_is() -> None:
    assert json.loads(b"[" + AS_JSON[np.arange(256)].tobytes()[:-1] + b"]") == list(range(256))


def read(*tensors: Any, rest: bytes = b"", model: Any = INFO) -> dict[str, Any]:
    """The parameters of these tensors, whose JSON is followed by `rest`."""
    head = json.dumps({"inputs": list(tensors)}).encode()
    return read_request(head + rest, str(len(head)), model, replace(LIMITS, max_body_bytes=2**20))[1]


def test_values_are_the_same_in_json_and_as_bytes() -> None:
    in_json = read(
        tensor("class_label", "INT64", 0, 2, -1),
        tensor("seed", "UINT64", 2**64 - 1),
        tensor("steps", "INT32", 20),
        tensor("guidance", "FP32", 1.5),
        tensor("guidance_interval", "INT32", 5, 900),
    )
    pairs = [
        as_bytes("class_label", "INT64", numbers("INT64", 0, 2, -1), [3]),
        as_bytes("seed", "UINT64", numbers("UINT64", 2**64 - 1), [1]),
        as_bytes("steps", "INT32", numbers("INT32", 20), [1]),
        as_bytes("guidance", "FP32", numbers("FP32", 1.5), [1]),
        as_bytes("guidance_interval", "INT32", numbers("INT32", 5, 900), [2]),
    ]
    as_binary = read(*(described for described, _ in pairs), rest=b"".join(data for _, data in pairs))
    assert in_json == as_binary
    assert in_json == {
        "class_label": [0, 2, None],
        "n": 3,
        "seed": 2**64 - 1,
        "steps": 20,
        "guidance": 1.5,
        "guidance_interval": [5, 900],
    }


@given(st.floats(0, 50, width=32))
def test_a_number_of_float32_is_the_shortest_that_is_the_same(value: float) -> None:
    found = read(tensor("guidance", "FP32", value))["guidance"]
    assert np.float32(found) == np.float32(value)
    assert len(repr(found)) <= len(repr(value))
    described, data = as_bytes("guidance", "FP32", struct.pack("<f", value), [1])
    assert read(described, rest=data)["guidance"] == found


def test_what_a_model_takes_is_what_is_read_of_it() -> None:
    assert [each.name for each in inputs_of(INFO)][:3] == ["class_label", "seed", "steps"]
    plain = replace(INFO, conditional=False, class_names=(), null_class=None)
    assert [each.name for each in inputs_of(plain)] == ["seed", "steps"]
    with pytest.raises(InvalidField) as caught:
        read(tensor("class_label", "INT64", 0), model=plain)
    assert caught.value.field == "inputs"
    images, seed = outputs_of(INFO)
    assert (images.name, images.datatype, images.shape) == ("images", "UINT8", [-1, 4, 6, 1])
    assert (seed.name, seed.datatype, seed.shape) == ("seed", "UINT64", [1])


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
TENSORS = st.fixed_dictionaries(
    {
        "name": st.sampled_from(["class_label", "seed", "steps", "guidance", "guidance_interval", "x"]) | JSON_VALUES,
        "datatype": st.sampled_from(["INT64", "UINT64", "INT32", "FP32", "BYTES", "BOOL"]) | JSON_VALUES,
        "shape": st.lists(st.integers(-1, 3), max_size=2) | JSON_VALUES,
    },
    optional={
        "data": st.lists(JSON_VALUES, max_size=3) | JSON_VALUES,
        "parameters": st.fixed_dictionaries({"binary_data_size": st.integers(-1, 30) | JSON_VALUES}) | JSON_VALUES,
    },
)


@given(st.lists(TENSORS | JSON_VALUES, max_size=3), st.binary(max_size=40))
def test_whatever_comes_is_read_or_refused_and_nothing_else(tensors: list[Any], rest: bytes) -> None:
    try:
        read(*tensors, rest=rest)
    except ServiceError as error:
        assert error.status in (400, 422)
