"""Values of tensors, in JSON and as bytes, and all that clients may get wrong in them."""

import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.service.api.kserve.requests import as_bytes, numbers, tensor, texts
from tests.service.fakes import INFO
from tminus.service.api.kserve.infer import header_length, inputs_of, outputs_of, read_inputs
from tminus.service.errors import ConflictingField, InvalidField, ServiceError, UnknownField

MAX_N = 64
NO_DATA = {"name": "steps", "datatype": "INT32", "shape": [1]}


def read(*tensors: Any, rest: bytes = b"", model: Any = INFO) -> dict[str, list[Any]]:
    return read_inputs(list(tensors), memoryview(rest), model, MAX_N)


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
        "class_label": [0, 2, -1],
        "seed": [2**64 - 1],
        "steps": [20],
        "guidance": [1.5],
        "guidance_interval": [5, 900],
    }
    assert all(type(value) in (int, float) for values in as_binary.values() for value in values)


def test_bytes_are_little_endian_as_the_extension_says() -> None:
    described, _ = as_bytes("steps", "INT32", b"1234", [1])
    assert read(described, rest=bytes([2, 1, 0, 0])) == {"steps": [258]}


def test_names_of_classes_come_as_texts() -> None:
    described, data = as_bytes("class_label", "BYTES", texts(b"cat", "3d-pr\u00efnt".encode(), b""), [3])
    assert read(described, rest=data) == {"class_label": ["cat", "3d-pr\u00efnt", ""]}
    assert read(tensor("class_label", "BYTES", "cat", "dog")) == {"class_label": ["cat", "dog"]}


@given(st.floats(0, 50, width=32))
def test_a_number_of_float32_is_the_shortest_that_is_the_same(value: float) -> None:
    found = read(tensor("guidance", "FP32", value))["guidance"][0]
    assert np.float32(found) == np.float32(value)
    assert len(repr(found)) <= len(repr(value))
    described, data = as_bytes("guidance", "FP32", struct.pack("<f", value), [1])
    assert read(described, rest=data)["guidance"] == [found]


def test_seven_point_three_is_that_of_post_sample() -> None:
    assert read(tensor("guidance", "FP32", 7.3)) == {"guidance": [7.3]}
    described, data = as_bytes("guidance", "FP32", numbers("FP32", 7.3), [1])
    assert read(described, rest=data) == {"guidance": [7.3]}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (tensor("class_label", "INT64", shape=[0]), "class_label.shape"),
        (tensor("class_label", "INT64", *[0] * 65), "class_label.shape"),
        (tensor("class_label", "INT64", 0, shape=[2**70]), "class_label.shape"),
        (tensor("class_label", "INT64", 0, shape=[-1]), "class_label.shape"),
        (tensor("class_label", "INT64", 0, shape=[1, 1]), "class_label.shape"),
        (tensor("class_label", "INT64", 0, shape=[]), "class_label.shape"),
        (tensor("class_label", "INT64", 0, shape=[True]), "class_label.shape"),
        (tensor("class_label", "INT64", 0, shape=[1.0]), "class_label.shape"),
        (tensor("class_label", "INT64", 0, shape="1"), "class_label.shape"),
        (tensor("class_label", "INT64", 0, shape={"0": 1}), "class_label.shape"),
        (tensor("steps", "INT32", 20, 20), "steps.shape"),
        (tensor("steps", "INT64", 20), "steps.datatype"),
        (tensor("guidance", "FP64", 1.5), "guidance.datatype"),
        (tensor("guidance", "fp32", 1.5), "guidance.datatype"),
        (tensor("guidance", ["FP32"], 1.5), "guidance.datatype"),  # type: ignore[arg-type]
        (tensor("class_label", "INT64", 0, 1, shape=[3]), "class_label.data"),
        (tensor("class_label", "INT64", [0], shape=[1]), "class_label.data"),
        (tensor("class_label", "INT64", "cat"), "class_label.data"),
        (tensor("class_label", "BYTES", 1), "class_label.data"),
        (tensor("class_label", "INT64", None), "class_label.data"),
        (tensor("class_label", "INT64", True), "class_label.data"),
        (tensor("class_label", "INT64", 1.5), "class_label.data"),
        (tensor("class_label", "INT64", 2**63), "class_label.data"),
        (tensor("seed", "UINT64", -1), "seed.data"),
        (tensor("seed", "UINT64", 2**64), "seed.data"),
        (tensor("steps", "INT32", 2**31), "steps.data"),
        (tensor("guidance", "FP32", 1e39), "guidance.data"),
        (tensor("guidance", "FP32", 10**400), "guidance.data"),
        (tensor("guidance", "FP32", float("inf")), "guidance.data"),
        (tensor("guidance", "FP32", "1.5"), "guidance.data"),
        (tensor("guidance", "FP32", data={"0": 1.5}, shape=[1]), "guidance.data"),
        (tensor("images", "UINT8", 1), "inputs"),
        ({"shape": [1], "datatype": "INT32", "data": [1]}, "inputs"),
        ({"name": 3, "shape": [1], "datatype": "INT32", "data": [1]}, "inputs"),
        ({"name": "steps", "shape": [1], "datatype": "INT32"}, "steps.data"),
        ({"name": "steps", "datatype": "INT32", "data": [4]}, "steps.shape"),
        ({"name": "steps", "shape": [1], "data": [4]}, "steps.datatype"),
        ("steps", "inputs"),
        (tensor("steps", "INT32", 4, parameters=[1]), "steps.parameters"),
    ],
)
def test_a_tensor_that_is_wrong_is_refused_by_name(given: Any, field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        read(given)
    assert caught.value.field == field
    assert len(caught.value.detail) < 500


@pytest.mark.parametrize(
    ("given", "field"),
    [
        (as_bytes("class_label", "INT64", bytes(8), [2]), "class_label.binary_data_size"),
        (as_bytes("class_label", "INT64", bytes(7), [1]), "class_label.binary_data_size"),
        (as_bytes("class_label", "INT64", b"", [1]), "class_label.binary_data_size"),
        (as_bytes("steps", "INT32", bytes(4), [1], size=2**62), "steps.binary_data_size"),
        (as_bytes("steps", "INT32", bytes(4), [1], size=-4), "steps.binary_data_size"),
        (as_bytes("steps", "INT32", bytes(4), [1], size="4"), "steps.binary_data_size"),
        (({**NO_DATA, "parameters": {"binary_data_size": None}}, b""), "steps.binary_data_size"),
        (as_bytes("steps", "INT32", bytes(4), [1], size=True), "steps.binary_data_size"),
        (as_bytes("steps", "INT32", bytes(4), [1], size=4.0), "steps.binary_data_size"),
        (as_bytes("guidance", "FP32", struct.pack("<f", float("nan")), [1]), "guidance.data"),
        (as_bytes("guidance", "FP32", struct.pack("<f", float("inf")), [1]), "guidance.data"),
        (as_bytes("class_label", "BYTES", texts(b"cat"), [2]), "class_label.binary_data_size"),
        (as_bytes("class_label", "BYTES", texts(b"cat", b"dog"), [1]), "class_label.binary_data_size"),
        (as_bytes("class_label", "BYTES", b"\xff\xff\xff\xffcat", [1]), "class_label.binary_data_size"),
        (as_bytes("class_label", "BYTES", b"\x01\x00", [1]), "class_label.binary_data_size"),
        (as_bytes("class_label", "BYTES", texts(b"\xff\xfe"), [1]), "class_label.data"),
        (as_bytes("class_label", "BYTES", b"", [1]), "class_label.binary_data_size"),
    ],
)
def test_bytes_that_are_wrong_are_refused_by_name(given: tuple[dict[str, Any], bytes], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        read(given[0], rest=given[1])
    assert caught.value.field == field


def test_bytes_that_are_no_finite_number_are_told() -> None:
    described, data = as_bytes("guidance", "FP32", struct.pack("<f", float("nan")), [1])
    with pytest.raises(InvalidField, match=r"^guidance\.data must be finite, got 'nan'$"):
        read(described, rest=data)


def test_bytes_that_belong_to_no_tensor_are_refused() -> None:
    with pytest.raises(InvalidField, match="3 bytes behind the JSON"):
        read(tensor("steps", "INT32", 4), rest=b"abc")


def test_a_tensor_that_comes_twice_or_has_two_values_is_refused() -> None:
    with pytest.raises(ConflictingField, match="twice"):
        read(tensor("steps", "INT32", 4), tensor("steps", "INT32", 4))
    with pytest.raises(ConflictingField, match="both"):
        read(tensor("steps", "INT32", 4, parameters={"binary_data_size": 4}), rest=bytes(4))


@pytest.mark.parametrize("name", ["shared_memory_region", "shared_memory_byte_size", "anything"])
def test_parameters_of_tensors_that_there_are_not_are_refused(name: str) -> None:
    with pytest.raises(UnknownField) as caught:
        read(tensor("steps", "INT32", 4, parameters={name: "x"}))
    assert caught.value.field == name


@pytest.mark.parametrize("given", [None, {}, "x", 1, [tensor("steps", "INT32", 4)] * 6])
def test_inputs_are_a_short_list(given: object) -> None:
    with pytest.raises(InvalidField) as caught:
        read_inputs(given, memoryview(b""), INFO, MAX_N)
    assert caught.value.field == "inputs"


@pytest.mark.parametrize("header", ["0", "-1", "11", "1e1", "", " 5", "99999999999999999999", "0x5", "\u0665"])
def test_a_length_of_the_json_that_lies_is_refused(header: str) -> None:
    with pytest.raises(InvalidField) as caught:
        header_length(header, 10)
    assert caught.value.field == "Inference-Header-Content-Length"


def test_a_length_of_the_json_is_taken_at_its_word() -> None:
    assert [header_length(header, 10) for header in (None, "10", "3")] == [10, 10, 3]


def test_what_a_model_takes_is_what_is_read_of_it() -> None:
    assert [each.name for each in inputs_of(INFO)][:3] == ["class_label", "seed", "steps"]
    plain = replace(INFO, conditional=False, class_names=(), null_class=None)
    assert [each.name for each in inputs_of(plain)] == ["seed", "steps"]
    with pytest.raises(InvalidField) as caught:
        read(tensor("class_label", "INT64", 0), model=plain)
    assert caught.value.field == "inputs"
    images, seed = outputs_of(INFO)
    assert (images.name, images.datatypes, images.shape) == ("images", ("UINT8",), (-1, 4, 6, 1))
    assert (seed.name, seed.datatypes, seed.shape) == ("seed", ("UINT64",), (1,))


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
        found = read(*tensors, rest=rest)
    except ServiceError as error:
        assert error.status == 422
        return
    assert sum(len(values) for values in found.values()) <= 3 * MAX_N
