"""Inference in KServe's protocol: tensors to parameters of POST /sample, and an answer of tensors. Pure.

The protocol is inference_rest.md of kserve/open-inference-protocol. Bytes behind the JSON are Triton's extension
binary_tensor_data: little-endian, row by row, each element of BYTES with its length before it.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tminus.service.api.request.classes import DIGITS, class_label_of, class_of_prompt
from tminus.service.api.request.defaults import SETTINGS
from tminus.service.api.request.reading import from_body
from tminus.service.api.request.schemas import EDIT_PARAMETERS, MAX_DEADLINE_S, MAX_EXACT, SampleRequest, check_names
from tminus.service.errors import ConflictingField, DeadlinePassed, InvalidField, ServiceError, UnknownField, short
from tminus.service.images.encoder import JSON
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.spec import Images, SampleSpec

HEADER_LENGTH = "Inference-Header-Content-Length"  # of the JSON, where bytes of tensors follow
ANY = -1  # a length that varies
NUMBERS: Mapping[str, np.dtype[Any]] = {
    "INT64": np.dtype("<i8"),
    "UINT64": np.dtype("<u8"),
    "INT32": np.dtype("<i4"),
    "FP32": np.dtype("<f4"),
    "UINT8": np.dtype("<u1"),
}
BYTES = "BYTES"
MAX_FP32 = float(np.finfo(np.float32).max)
IMAGES, SEED, CLASS_LABEL = "images", "seed", "class_label"
BINARY = "application/octet-stream"
NO_CLASS = -1  # in class_label
MAX_ID = 255
TIMEOUT, BINARY_OUTPUT = "timeout", "binary_data_output"  # Triton's: microseconds; whether all outputs are bytes
# Each number with its comma, in as many bytes, so that numpy writes a million of them: JSON may have blanks.
AS_JSON = np.array([f"{value:3d}," for value in range(256)], "S4")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor that the model takes or gives."""

    name: str
    datatypes: tuple[str, ...]  # the first is the one that is told of
    shape: tuple[int, ...]

    @property
    def shape_in_words(self) -> str:
        """The shape as an error names it: n is a length that varies."""
        return f"[{', '.join('n' if length == ANY else str(length) for length in self.shape)}]"


# What is no number, or is asked for seldom, is a parameter of the request.
TAKEN = (
    TensorInfo(CLASS_LABEL, ("INT64", BYTES), (ANY,)),
    TensorInfo(SEED, ("UINT64",), (1,)),
    TensorInfo("steps", ("INT32",), (1,)),
    TensorInfo("guidance", ("FP32",), (1,)),
    TensorInfo("guidance_interval", ("INT32",), (2,)),
)
# Of a request, beside its tensors: an edit has no place in this protocol.
PARAMETERS = tuple(
    name
    for name in SampleRequest.model_fields
    if name not in EDIT_PARAMETERS | {"bit_depth"} | {each.name for each in TAKEN}  # the images are UINT8
)


def inputs_of(model: ModelInfo) -> tuple[TensorInfo, ...]:
    """The tensors that a model takes; a request may leave out each."""
    return TAKEN if model.conditional else tuple(each for each in TAKEN if each.name in (SEED, "steps"))


def outputs_of(model: ModelInfo) -> tuple[TensorInfo, ...]:
    """The tensors that a model gives."""
    shape = (ANY, model.height_px, model.width_px, model.channels)
    return TensorInfo(IMAGES, ("UINT8",), shape), TensorInfo(SEED, ("UINT64",), (1,))


def header_length(header: str | None, body_bytes: int) -> int:
    """How many bytes of a body are its JSON. Raises InvalidField."""
    if header is None:
        return body_bytes
    if not (DIGITS.fullmatch(header) and len(header) < 10 and 0 < int(header) <= body_bytes):
        raise InvalidField.of(HEADER_LENGTH, f"the bytes of the JSON, 1..{body_bytes}", header)
    return int(header)


def read_inputs(given: object, rest: memoryview, model: ModelInfo, max_n: int) -> dict[str, list[Any]]:
    """Read the values of each tensor, by name. Raises InvalidField, UnknownField, ConflictingField."""
    known = {each.name: each for each in inputs_of(model)}
    if not isinstance(given, list) or len(given) > len(known):
        raise InvalidField.of("inputs", f"a list of at most {len(known)} tensors: {', '.join(known)}", given)
    found: dict[str, list[Any]] = {}
    for tensor in given:
        members = object_of(tensor, "inputs")
        check_names(members, ("name", "shape", "datatype", "data", "parameters"))
        name = members.get("name")
        if not isinstance(name, str) or name not in known:
            raise InvalidField.of("inputs", f"tensors named {', '.join(known)}", name)
        if name in found:
            raise ConflictingField(f"the tensor {name} is given twice", field=name, value=members.get("data"))
        info = known[name]
        datatype, size = _datatype(members, info), _size(members, info, max_n)
        binary_size = _binary_size(members, name)
        if binary_size is None:
            found[name] = _from_json(members.get("data"), datatype, size, name)
        else:
            if binary_size > len(rest):
                raise InvalidField.of(f"{name}.binary_data_size", f"at most {len(rest)}, the bytes left", binary_size)
            found[name] = _from_bytes(rest[:binary_size], datatype, size, name)
            rest = rest[binary_size:]
    if len(rest):
        detail = f"{len(rest)} bytes behind the JSON belong to no tensor"
        raise InvalidField(detail, field=HEADER_LENGTH, value=len(rest), bound="the length of the JSON")
    return found


def _datatype(members: Mapping[str, Any], info: TensorInfo) -> str:
    datatype = members.get("datatype")
    if not isinstance(datatype, str) or datatype not in info.datatypes:
        raise InvalidField.of(f"{info.name}.datatype", " or ".join(info.datatypes), datatype)
    return datatype


def _size(members: Mapping[str, Any], info: TensorInfo, max_n: int) -> int:
    """How many values a tensor has."""
    shape = members.get("shape")
    wanted = f"{info.shape_in_words} with n in 1..{max_n}" if ANY in info.shape else info.shape_in_words
    if not isinstance(shape, list) or len(shape) != 1 or type(shape[0]) is not int:
        raise InvalidField.of(f"{info.name}.shape", wanted, shape)
    if not (1 <= shape[0] <= max_n if ANY in info.shape else shape[0] == info.shape[0]):
        raise InvalidField.of(f"{info.name}.shape", wanted, shape)
    return shape[0]


def _binary_size(members: Mapping[str, Any], name: str) -> int | None:
    """How many of the bytes behind the JSON are a tensor's; None: its values are in the JSON."""
    parameters = object_of(members.get("parameters", {}), f"{name}.parameters")
    check_names(parameters, ("binary_data_size",))
    if "binary_data_size" not in parameters:
        return None
    size = parameters["binary_data_size"]
    if "data" in members:
        raise ConflictingField(f"{name} has both data and binary_data_size", field=name, value=size)
    if type(size) is not int or size < 0:
        raise InvalidField.of(f"{name}.binary_data_size", "an integer of at least 0", size)
    return size


def _from_json(data: object, datatype: str, size: int, name: str) -> list[Any]:
    if not isinstance(data, list) or len(data) != size:
        raise InvalidField.of(f"{name}.data", f"a list of {size} values, as its shape says", data)
    return [_value(value, datatype, name) for value in data]


def _value(value: object, datatype: str, name: str) -> Any:
    if datatype == BYTES:
        if isinstance(value, str):
            return value
    elif datatype == "FP32":
        if type(value) in (int, float) and abs(value) <= MAX_FP32:  # type: ignore[arg-type]
            return _shortest(np.float32(value))  # type: ignore[arg-type]
    else:
        bounds = np.iinfo(NUMBERS[datatype])
        whole = int(value) if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT else value
        if type(whole) is int and bounds.min <= whole <= bounds.max:
            return whole
    raise InvalidField.of(f"{name}.data", f"values of {datatype}", value)


def _from_bytes(data: memoryview, datatype: str, size: int, name: str) -> list[Any]:
    if datatype == BYTES:
        return _texts(data, size, name)
    dtype = NUMBERS[datatype]
    if len(data) != size * dtype.itemsize:
        bound = f"{size * dtype.itemsize}: {size} of {datatype}, as its shape says"
        raise InvalidField.of(f"{name}.binary_data_size", bound, len(data))
    values = np.frombuffer(data, dtype)
    if datatype == "FP32":
        if not np.isfinite(values).all():
            found = ", ".join(str(value) for value in values)
            raise InvalidField.of(f"{name}.data", "finite", found)
        return [_shortest(value) for value in values]
    return list(values.tolist())


def _texts(data: memoryview, size: int, name: str) -> list[str]:
    texts, at = [], 0
    for _ in range(size):
        length = int.from_bytes(data[at : at + 4], "little")
        text = bytes(data[at + 4 : at + 4 + length])
        if at + 4 > len(data) or len(text) != length:
            break
        try:
            texts.append(text.decode())
        except UnicodeDecodeError:
            raise InvalidField.of(f"{name}.data", "UTF-8", repr(text[:40])) from None
        at += 4 + length
    if len(texts) != size or at != len(data):
        bound = f"the bytes of {size} elements, each its length in 4 bytes and then so many"
        raise InvalidField.of(f"{name}.binary_data_size", bound, len(data))
    return texts


def _shortest(value: np.float32) -> float:
    """The shortest number that is this one in float32: 7.3 is that of POST /sample, and not 7.300000190734863."""
    return float(str(value))


def object_of(value: object, name: str) -> Mapping[str, Any]:
    """Take a JSON object. Raises InvalidField."""
    if not isinstance(value, dict):
        raise InvalidField.of(name, "a JSON object", value)
    return value


def flag_of(value: object, name: str) -> bool:
    """Take a boolean. Raises InvalidField."""
    if not isinstance(value, bool):
        raise InvalidField.of(name, "true or false", value)
    return value


@dataclass(frozen=True, slots=True)
class InferRequest:
    """What a request asks for."""

    parameters: dict[str, Any]  # those of POST /sample
    id: str | None
    outputs: Mapping[str, bool]  # by name: whether as bytes
    timeout_us: int | None  # where the client says the deadline so

    @classmethod
    def parse(cls, body: bytes, header: str | None, model: ModelInfo, limits: Limits) -> "InferRequest":
        """Read a body. header: HEADER_LENGTH.

        Raises InvalidField, UnknownField, ConflictingField, MalformedBody, BodyTooLarge.
        """
        length = header_length(header, len(body))
        document, rest = from_body(body[:length], limits.max_body_bytes), memoryview(body)[length:]
        check_names(document, ("id", "model_name", "model_version", "parameters", "inputs", "outputs"))
        # The protocol has both in the path only, but KServe's own client writes its name into each body.
        for name, there in (("model_name", model.name), ("model_version", version_of(model))):
            if name in document and document[name] != there:
                raise InvalidField.of(name, f"absent or that of the model in the path, {there}", document[name])
        request_id = document.get("id")
        if "id" in document and not (isinstance(request_id, str) and len(request_id) <= MAX_ID):
            raise InvalidField.of("id", f"text of at most {MAX_ID} characters", request_id)
        given = dict(object_of(document.get("parameters", {}), "parameters"))
        for info in inputs_of(model):
            if info.name in given:
                bound = f"an input of datatype {' or '.join(info.datatypes)} and shape {info.shape_in_words}"
                detail = f"{info.name} is no parameter here but {bound}"
                raise UnknownField(detail, field=info.name, value=given[info.name], bound=bound)
        check_names(given, (*PARAMETERS, TIMEOUT, BINARY_OUTPUT))
        binary = flag_of(given.pop(BINARY_OUTPUT, False), BINARY_OUTPUT)
        inputs = read_inputs(document.get("inputs"), rest, model, limits.max_n)
        outputs, timeout_us = _read_outputs(document.get("outputs", []), binary, model), given.get(TIMEOUT)
        return cls(_parameters(given, inputs, model), request_id, outputs, timeout_us)

    def in_its_words(self, error: ServiceError) -> ServiceError:
        """Name a deadline that is refused, or has passed, as the request does."""
        if self.timeout_us is None or error.field != "deadline_s":
            return error
        error.field, error.value, error.bound = TIMEOUT, self.timeout_us, f"{error.bound}, in microseconds"
        if isinstance(error, DeadlinePassed):
            error.detail = f"timeout={self.timeout_us} microseconds passed before the job was done"
        else:
            error.detail = f"timeout must be {error.bound}, got {self.timeout_us}"
        return error


def _parameters(given: dict[str, Any], inputs: Mapping[str, list[Any]], model: ModelInfo) -> dict[str, Any]:
    """Join what the request's parameters and its tensors say to the parameters of POST /sample."""
    if TIMEOUT in given:
        timeout = given.pop(TIMEOUT)
        if type(timeout) is not int or not 0 < timeout <= MAX_DEADLINE_S * 1e6:
            raise InvalidField.of(TIMEOUT, f"an integer of microseconds, 1..{MAX_DEADLINE_S * 1e6:.0f}", timeout)
        if "deadline_s" in given:
            raise ConflictingField("the request has both timeout and deadline_s", field=TIMEOUT, value=timeout)
        given["deadline_s"] = timeout / 1e6
    for name in given:
        if not isinstance(given[name], (str, int, float)):
            raise InvalidField.of(name, "text, a number or a boolean", given[name])
    for name, values in inputs.items():
        if name == CLASS_LABEL:
            given[name] = [_class(value, model) for value in values]
            if str(given.setdefault("n", len(values))) not in (str(len(values)), f"{len(values)}.0"):
                detail = f"n is {short(given['n'])}, and class_label has {len(values)} values"
                raise ConflictingField(detail, field="n", value=given["n"])
        else:
            given[name] = values if len(values) > 1 else values[0]
    return given


def _class(value: int | str, model: ModelInfo) -> int | str | None:
    if isinstance(value, str):
        return class_label_of(class_of_prompt(value, model, CLASS_LABEL), model.class_names)
    return None if value == NO_CLASS else value


def _read_outputs(given: object, binary: bool, model: ModelInfo) -> dict[str, bool]:
    """The outputs that are wanted, and whether as bytes; all where none is named."""
    known = [each.name for each in outputs_of(model)]
    if given == []:
        return dict.fromkeys(known, binary)
    if not isinstance(given, list) or len(given) > len(known):
        raise InvalidField.of("outputs", f"a list of at most {len(known)}: {', '.join(known)}", given)
    found: dict[str, bool] = {}
    for output in given:
        members = object_of(output, "outputs")
        check_names(members, ("name", "parameters"))
        name = members.get("name")
        if not isinstance(name, str) or name not in known:
            raise InvalidField.of("outputs", f"named {', '.join(known)}", name)
        if name in found:
            raise ConflictingField(f"the output {name} is asked for twice", field="outputs", value=name)
        parameters = object_of(members.get("parameters", {}), f"{name}.parameters")
        check_names(parameters, ("binary_data",))
        found[name] = flag_of(parameters.get("binary_data", binary), "binary_data")
    return found


def version_of(model: ModelInfo) -> str:
    """The version of a model in this protocol: the first digits of the hash of its weights."""
    return model.weights_hash[:16]


@dataclass(frozen=True, slots=True)
class Tensors:
    """An answer with the pixels of the images, and their seed. What it begins with is each request's own."""

    spec: SampleSpec
    model: ModelInfo
    outputs: Mapping[str, bool]

    @property
    def media_type(self) -> str:
        """The media type of the body, as Triton has it."""
        return BINARY if any(self.outputs.values()) else JSON

    @property
    def etag_form(self) -> str:
        """Name all that the bytes depend on beside the spec."""
        return json.dumps(["tensors", self.model.name, list(self.outputs.items())])

    @property
    def binary_bytes(self) -> int:
        """The size of the tensors behind the JSON."""
        sizes = {IMAGES: math.prod(self._shape), SEED: NUMBERS["UINT64"].itemsize}
        return sum(sizes[name] for name, binary in self.outputs.items() if binary)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (self.spec.n, self.model.height_px, self.model.width_px, self.model.channels)

    def body(self, images: Images) -> bytes:
        """Make the body of the pixels [n, H, W, C], but for the brace or the id that it begins with."""
        seed = np.array([self.spec.seed], NUMBERS["UINT64"])
        outputs, behind = [], []
        for name, binary in self.outputs.items():
            datatype, values = ("UINT8", images) if name == IMAGES else ("UINT64", seed)
            described: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(values.shape)}
            if binary:
                behind.append(values.tobytes())
                described["parameters"] = {"binary_data_size": len(behind[-1])}
                outputs.append(json.dumps(described).encode())
            else:
                data = AS_JSON[images].tobytes()[:-1] if name == IMAGES else str(self.spec.seed).encode()
                outputs.append(b"".join([json.dumps(described).encode()[:-1], b', "data": [', data, b"]}"]))
        document: dict[str, Any] = {"model_name": self.model.name, "model_version": version_of(self.model)}
        settings = {name: getattr(self.spec, name) for name in SETTINGS}
        document |= {"parameters": {"fingerprint": self.model.fingerprint, **settings}}
        head = json.dumps(document).encode()[1:-1]
        return b"".join([head, b', "outputs": [', b", ".join(outputs), b"]}", *behind])
