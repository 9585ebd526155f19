"""Tensors of KServe's protocol: what a model takes and gives, and their values in JSON or as bytes behind it. Pure.

The protocol is inference_rest.md of kserve/open-inference-protocol. Bytes behind the JSON are Triton's extension
binary_tensor_data: little-endian, row by row, each element of BYTES with its length before it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tminus.service.api.request.fields import DIGITS, MAX_EXACT
from tminus.service.errors import ConflictingField, InvalidField, UnknownField
from tminus.service.model_info import ModelInfo

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
    """Take a truth value. Raises InvalidField."""
    if not isinstance(value, bool):
        raise InvalidField.of(name, "true or false", value)
    return value


def check_names(members: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise UnknownField for a member that there is not."""
    for name, value in members.items():
        if name not in known:
            raise UnknownField.of(name, known, value)
