"""From a request's JSON and tensors to the parameters of POST /sample, and from images to an answer."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.service.api.kserve.requests import plain, tensor
from tests.service.fakes import INFO, LIMITS, fake_pixels, make_spec
from tminus.service.api.kserve.infer import AS_JSON, InferRequest, Tensors, version_of, with_id
from tminus.service.errors import (
    ConflictingField,
    DeadlinePassed,
    DeadlineUnmeetable,
    InvalidField,
    MalformedBody,
    UnknownField,
)
from tminus.service.model_info import ModelInfo


def parse(model: ModelInfo = INFO, **members: Any) -> InferRequest:
    members.setdefault("inputs", [])
    return InferRequest.parse(json.dumps(members).encode(), None, model, LIMITS)


def test_tensors_and_parameters_are_those_of_post_sample() -> None:
    asked = parse(
        id="42",
        inputs=plain(tensor("class_label", "INT64", 1, 2), tensor("guidance_interval", "INT32", 5, 900)),
        parameters={"sampler": "ddim", "eta": 0.5, "index": 3, "clip": True},
    )
    assert asked.id == "42"
    assert asked.parameters == {
        "steps": 4, "seed": 7, "class_label": [1, 2], "n": 2, "guidance_interval": [5, 900],
        "sampler": "ddim", "eta": 0.5, "index": 3, "clip": True,
    }  # fmt: skip


def test_a_class_is_a_number_a_name_or_none() -> None:
    assert parse(inputs=[tensor("class_label", "INT64", 0, -1)]).parameters["class_label"] == [0, None]
    named = parse(inputs=[tensor("class_label", "BYTES", "Cat", "3d print", "", "1")])
    assert named.parameters["class_label"] == [0, 2, None, 1]
    with pytest.raises(InvalidField, match="cat, dog"):
        parse(inputs=[tensor("class_label", "BYTES", "cat", "a dog")])


def test_the_number_of_images_is_that_of_classes_or_a_parameter() -> None:
    assert parse(parameters={"n": 3}).parameters == {"n": 3}
    for n in (1, 1.0, "1"):
        assert parse(parameters={"n": n}, inputs=[tensor("class_label", "INT64", 0)]).parameters["n"] == n
    with pytest.raises(ConflictingField):
        parse(parameters={"n": 3}, inputs=[tensor("class_label", "INT64", 0)])


def test_triton_s_timeout_is_a_deadline() -> None:
    assert parse(parameters={"timeout": 1_500_000}).parameters == {"deadline_s": 1.5}
    with pytest.raises(ConflictingField):
        parse(parameters={"timeout": 1, "deadline_s": 1})
    for wrong in (0, -1, 1.5, "1", True, 10**400):
        with pytest.raises(InvalidField, match="timeout must be"):
            parse(parameters={"timeout": wrong})


def test_a_body_may_name_the_model_of_its_path() -> None:
    """As InferRequest.to_rest of kserve 0.21 does with the name."""
    assert parse(model_name="fake", model_version=version_of(INFO)).parameters == {}


def test_a_deadline_is_told_of_in_the_unit_of_the_request() -> None:
    timed = parse(parameters={"timeout": 1_500_000})
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
    assert (late.field, late.detail) == ("timeout", "timeout=1500000 microseconds passed before the job was done")
    other = timed.in_its_words(InvalidField.of("n", "at most 3", 4))
    assert other.problem() == InvalidField.of("n", "at most 3", 4).problem()
    as_it_came = parse(parameters={"deadline_s": 1.5}).in_its_words(DeadlinePassed.of(1.5))
    assert as_it_came.problem() == DeadlinePassed.of(1.5).problem()


def test_outputs_are_all_or_those_that_are_named() -> None:
    assert parse().outputs == {"images": False, "seed": False}
    assert parse(outputs=[]).outputs == {"images": False, "seed": False}
    assert parse(parameters={"binary_data_output": True}).outputs == {"images": True, "seed": True}
    assert parse(outputs=[{"name": "seed"}]).outputs == {"seed": False}
    both = [{"name": "seed", "parameters": {"binary_data": False}}, {"name": "images"}]
    assert parse(outputs=both, parameters={"binary_data_output": True}).outputs == {"seed": False, "images": True}


@pytest.mark.parametrize(
    ("members", "error", "field"),
    [
        ({"id": 42}, InvalidField, "id"),
        ({"id": None}, InvalidField, "id"),
        ({"outputs": None}, InvalidField, "outputs"),
        ({"parameters": None}, InvalidField, "parameters"),
        ({"parameters": {"sampler": None}}, InvalidField, "sampler"),
        ({"parameters": {"timeout": None}}, InvalidField, "timeout"),
        ({"id": "x" * 256}, InvalidField, "id"),
        ({"parameters": []}, InvalidField, "parameters"),
        ({"parameters": {"sampler": ["ddim"]}}, InvalidField, "sampler"),
        ({"parameters": {"eta": {}}}, InvalidField, "eta"),
        ({"parameters": {"steps": 4}}, UnknownField, "steps"),
        ({"parameters": {"class_label": 0}}, UnknownField, "class_label"),
        ({"parameters": {"image": "x"}}, UnknownField, "image"),
        ({"parameters": {"strength": 0.5}}, UnknownField, "strength"),
        ({"parameters": {"sequence_id": 1}}, UnknownField, "sequence_id"),
        ({"parameters": {"priority": 1}}, UnknownField, "priority"),
        ({"parameters": {"binary_data_output": 1}}, InvalidField, "binary_data_output"),
        ({"outputs": {}}, InvalidField, "outputs"),
        ({"outputs": [{"name": "latents"}]}, InvalidField, "outputs"),
        ({"outputs": [{"name": ["seed"]}]}, InvalidField, "outputs"),
        ({"outputs": ["seed"]}, InvalidField, "outputs"),
        ({"outputs": [{"name": "seed"}, {"name": "seed"}]}, ConflictingField, "outputs"),
        ({"outputs": [{"name": "images"}] * 3}, InvalidField, "outputs"),
        ({"outputs": [{"name": "images", "parameters": {"classification": 3}}]}, UnknownField, "classification"),
        ({"outputs": [{"name": "images", "parameters": {"binary_data": "yes"}}]}, InvalidField, "binary_data"),
        ({"instances": [1]}, UnknownField, "instances"),
        ({"model_name": "other"}, InvalidField, "model_name"),
        ({"model_name": None}, InvalidField, "model_name"),
        ({"model_version": "1"}, InvalidField, "model_version"),
        ({"model_version": None}, InvalidField, "model_version"),
    ],
)
def test_a_request_that_is_wrong_is_refused_by_name(members: Any, error: type[Exception], field: str) -> None:
    with pytest.raises(error) as caught:
        parse(**members)
    assert caught.value.field == field  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"inputs": [NaN]}', b'{"inputs": ' + b"[" * 9000 + b"]" * 9000 + b"}"]
)
def test_a_body_that_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises((MalformedBody, InvalidField)):
        InferRequest.parse(body, None, INFO, replace(LIMITS, max_body_bytes=2**20))


@pytest.mark.parametrize(
    "outputs", [{"images": False, "seed": False}, {"seed": True, "images": False}, {"images": True}]
)
def test_an_answer_has_the_very_pixels_and_the_seed(outputs: dict[str, bool]) -> None:
    spec = make_spec(n=3, seed=2**64 - 1)
    images = fake_pixels(spec, 3) + np.arange(24, dtype=np.uint8).reshape(4, 6, 1)
    made = Tensors(spec, INFO, outputs)
    without = made.body(images)
    body = b"".join(with_id(without, 'a "42"'))
    assert "id" not in json.loads(without[: len(without) - made.binary_bytes])
    head_bytes = len(body) - made.binary_bytes
    document, behind = json.loads(body[:head_bytes]), body[head_bytes:]
    assert document["model_name"] == "fake"
    assert document["model_version"] == version_of(INFO) == INFO.weights_hash[:16]
    assert document["id"] == 'a "42"'
    assert document["parameters"] == {"fingerprint": INFO.fingerprint}
    assert [each["name"] for each in document["outputs"]] == list(outputs)
    for each in document["outputs"]:
        kind = {"UINT8": "<u1", "UINT64": "<u8"}[each["datatype"]]
        if outputs[each["name"]]:
            size = each["parameters"]["binary_data_size"]
            values, behind = np.frombuffer(behind[:size], kind), behind[size:]
        else:
            values = np.array(each["data"], kind)
        wanted = images if each["name"] == "images" else np.array([2**64 - 1], np.uint64)
        np.testing.assert_array_equal(values.reshape(each["shape"]), wanted)
    assert behind == b""
    assert made.media_type == ("application/octet-stream" if any(outputs.values()) else "application/json")


def test_every_byte_is_written_as_the_number_it_is() -> None:
    assert json.loads(b"[" + AS_JSON[np.arange(256)].tobytes()[:-1] + b"]") == list(range(256))


def test_answers_of_other_bytes_are_of_another_kind() -> None:
    spec = make_spec()
    kinds = {
        Tensors(spec, model, outputs).kind
        for model in (INFO, replace(INFO, name="other"))
        for outputs in ({"images": True}, {"images": False}, {"images": False, "seed": False})
    }
    assert len(kinds) == 6
