"""Inference in KServe's protocol: converts input tensors to parameters of POST /sample, and images to output tensors.

The protocol is described by inference_rest.md in kserve/open-inference-protocol. Binary data after the JSON is a Triton
extension, binary_tensor_data: little-endian values in row-major order. In a BYTES tensor, each element is preceded by
its length.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from tminus.service.api.request.classes import DIGITS, class_label_of, class_of_prompt
from tminus.service.api.request.reading import from_body
from tminus.service.api.request.schemas import (
    EDIT_PARAMETERS,
    MAX_DEADLINE_S,
    SETTINGS,
    SampleRequest,
    Whole,
    check_names,
)
from tminus.service.errors import (
    ConflictingField,
    InvalidField,
    ServiceError,
    UnknownField,
    ValidationErrors,
)
from tminus.service.images.encoder import JSON
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.spec import Images, SampleSpec

HEADER_LENGTH = "Inference-Header-Content-Length"  # length of the JSON in bytes, if binary data follows the JSON
BINARY = "application/octet-stream"
ANY = -1  # a dimension of any length
NO_CLASS = -1  # the value of class_label that means no class
IMAGES, SEED, CLASS_LABEL = "images", "seed", "class_label"
MAX_FP32 = float(np.finfo(np.float32).max)
ABSENT: Any = None  # default of a member that may be absent but not null
# The text of each pixel value and a comma, padded to 4 bytes so that numpy can write a million values at once. JSON
# allows the extra spaces.
AS_JSON = np.array([f"{value:3d}," for value in range(256)], "S4")


def _shortest(value: float) -> float:
    """Return the shortest decimal number that rounds to `value` in float32: 7.3 instead of 7.300000190734863."""
    return float(str(np.float32(value)))


def _integers(low: int, high: int) -> TypeAdapter[list[Any]]:
    return TypeAdapter(list[Annotated[Whole, Field(ge=low, le=high)]])


Fp32 = Annotated[float, Field(strict=True, ge=-MAX_FP32, le=MAX_FP32)]
VALUES: Mapping[str, TypeAdapter[list[Any]]] = {
    "INT64": _integers(-(2**63), 2**63 - 1),
    "UINT64": _integers(0, 2**64 - 1),
    "INT32": _integers(-(2**31), 2**31 - 1),
    "FP32": TypeAdapter(
        list[Annotated[float, Field(strict=True, ge=-MAX_FP32, le=MAX_FP32), AfterValidator(_shortest)]]
    ),
    "BYTES": TypeAdapter(list[str]),
}
NUMBERS = {"INT64": "<i8", "UINT64": "<u8", "INT32": "<i4", "FP32": "<f4"}  # numpy dtypes


def _without_null(schema: dict[str, Any]) -> None:
    for member in schema.get("properties", {}).values():
        if member.get("default", "") is None:
            del member["default"]


class Members(BaseModel):
    """A JSON object of the protocol. Unknown members are refused."""

    model_config = ConfigDict(
        extra="forbid", strict=True, use_attribute_docstrings=True, json_schema_extra=_without_null
    )

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, members: object) -> object:
        if isinstance(members, dict):
            check_names(members, cls.model_fields)
        return members


class TensorMetadata(BaseModel):
    """An input or output tensor of a model."""

    name: str
    datatype: str
    shape: list[int] = Field(description="The lengths. -1 is any length.")


# The parameters that are tensors. Rarely used parameters, and those that are not numbers, are sent in `parameters`.
INPUTS = (
    TensorMetadata(name=CLASS_LABEL, datatype="INT64", shape=[ANY]),  # BYTES is also accepted
    TensorMetadata(name=SEED, datatype="UINT64", shape=[1]),
    TensorMetadata(name="steps", datatype="INT32", shape=[1]),
    TensorMetadata(name="guidance", datatype="FP32", shape=[1]),
    TensorMetadata(name="guidance_interval", datatype="INT32", shape=[2]),
)


def inputs_of(model: ModelInfo) -> list[TensorMetadata]:
    """Return the input tensors of a model. All inputs are optional."""
    return [each for each in INPUTS if model.conditional or each.name in (SEED, "steps")]


def outputs_of(model: ModelInfo) -> list[TensorMetadata]:
    """Return the output tensors of a model."""
    shape = [ANY, model.height_px, model.width_px, model.channels]
    images = TensorMetadata(name=IMAGES, datatype="UINT8", shape=shape)
    return [images, TensorMetadata(name=SEED, datatype="UINT64", shape=[1])]


@dataclass(slots=True)
class Context:
    """What the validators need: the allowed inputs, and the binary data that no input has consumed yet."""

    inputs: Mapping[str, TensorMetadata]
    max_n: int
    rest: bytes


class TensorParameters(Members):
    """Triton's parameters for a tensor."""

    binary_data_size: Annotated[int, Field(ge=0)] = ABSENT
    """How many of the bytes behind the JSON are the values."""


class Tensor(Members):
    """An input tensor. Its values are in `data` or in the binary data. Validation requires a Context."""

    name: Literal["class_label", "seed", "steps", "guidance", "guidance_interval"]
    datatype: Literal["INT64", "BYTES", "UINT64", "INT32", "FP32"]
    shape: list[int]
    parameters: TensorParameters = TensorParameters()
    data: list[Any] = ABSENT

    @model_validator(mode="after")
    def _read(self, info: ValidationInfo) -> Self:
        context: Context = info.context  # type: ignore[assignment]
        if (known := context.inputs.get(self.name)) is None:
            raise InvalidField.of("inputs", f"tensors named {', '.join(context.inputs)}", self.name)
        datatypes = [known.datatype, "BYTES"] if self.name == CLASS_LABEL else [known.datatype]
        if self.datatype not in datatypes:
            raise InvalidField.of(f"{self.name}.datatype", " or ".join(datatypes), self.datatype)
        varies = known.shape == [ANY] and len(self.shape) == 1 and 1 <= self.shape[0] <= context.max_n
        if self.shape != known.shape and not varies:
            words = f"[n] with n in 1..{context.max_n}" if known.shape == [ANY] else str(known.shape)
            raise InvalidField.of(f"{self.name}.shape", words, self.shape)
        bound = f"{self.shape[0]} values of {self.datatype}, as its shape says"
        if (size_bytes := self.parameters.binary_data_size) is not ABSENT:
            if self.data is not ABSENT:
                detail = f"{self.name} has both data and binary_data_size"
                raise ConflictingField(detail, field=self.name, value=size_bytes)
            if size_bytes > (left := len(context.rest)):
                raise InvalidField.of(f"{self.name}.binary_data_size", f"at most {left}, the bytes left", size_bytes)
            data, context.rest = context.rest[:size_bytes], context.rest[size_bytes:]
            found = _from_bytes(data, self.datatype)
            if found is None or len(found) != self.shape[0]:
                raise InvalidField.of(f"{self.name}.binary_data_size", f"that of {bound}", size_bytes)
            self.data = found
        try:
            self.data = VALUES[self.datatype].validate_python(self.data)
        except ValidationError:
            if any(isinstance(value, bytes) for value in self.data or ()):
                raise InvalidField.of(f"{self.name}.data", "UTF-8", repr(self.data)) from None
            raise InvalidField.of(f"{self.name}.data", bound, self.data) from None
        if len(self.data) != self.shape[0]:
            raise InvalidField.of(f"{self.name}.data", bound, self.data)
        return self


def _from_bytes(data: bytes, datatype: str) -> list[Any] | None:
    """Decode a tensor's values. Return None if the bytes end in the middle of a value."""
    if datatype != "BYTES":
        dtype = np.dtype(NUMBERS[datatype])
        return None if len(data) % dtype.itemsize else list(np.frombuffer(data, dtype).tolist())
    texts: list[Any] = []
    while data:
        end = 4 + int.from_bytes(data[:4], "little")
        if end > len(data):
            return None
        texts.append(data[4:end])
        data = data[end:]
    return texts


class OutputParameters(Members):
    """Triton's parameters for an output."""

    binary_data: bool = ABSENT
    """Whether the values are bytes behind the JSON. Default: `binary_data_output` of the request."""


class Output(Members):
    """An output that the response must contain."""

    name: Literal["images", "seed"]
    parameters: OutputParameters = OutputParameters()


class InferRequest(Members):
    """The inputs to sample from. With `Inference-Header-Content-Length`, the tensors' bytes follow the JSON."""

    model_name: str = ABSENT
    """The name in the path."""
    model_version: str = ABSENT
    """The version that is loaded."""
    id: Annotated[str, Field(max_length=255)] = ABSENT
    """Comes back in the answer."""
    parameters: dict[str, str | int | float | bool] = {}
    """Those of `POST /sample` that are not tensors, `timeout` in microseconds, and `binary_data_output`."""
    inputs: Annotated[list[Tensor], Field(max_length=len(INPUTS))]
    outputs: Annotated[list[Output], Field(max_length=2)] = []
    """All outputs where none is named."""


class OutputTensor(TensorMetadata):
    """An output tensor. Its values are in `data`, or follow the JSON as bytes."""

    parameters: TensorParameters | None = None
    data: list[int] | None = Field(default=None, description="The values, row by row.")


class InferResponse(BaseModel):
    """The images and the seed."""

    id: str | None = None
    model_name: str
    model_version: str
    parameters: dict[str, str | float] = Field(description="The sampler, steps and guidance, and the fingerprint.")
    outputs: list[OutputTensor]


def version_of(model: ModelInfo) -> str:
    """Return the version of a model in this protocol: the first 16 hex digits of its weights' hash."""
    return model.weights_hash[:16]


class InferCall(SampleRequest):
    """The parameters of POST /sample, and those that Triton adds."""

    timeout: Annotated[int, Field(strict=True, gt=0, le=int(MAX_DEADLINE_S * 1e6))] | None = None
    """`deadline_s` in microseconds."""
    binary_data_output: StrictBool = False
    """Whether outputs are bytes behind the JSON where they do not say it themselves."""

    @field_validator("timeout")
    @classmethod
    def _one_deadline(cls, value: int | None, info: ValidationInfo) -> int | None:
        if info.data.get("deadline_s") is not None:
            raise ConflictingField("the request has both timeout and deadline_s", field="timeout", value=value)
        return value

    def in_its_words(self, error: ServiceError) -> ServiceError:
        """If the request used `timeout`, make an error about `deadline_s` name `timeout` instead."""
        if self.timeout is not None and error.field == "deadline_s":
            error.field, error.value, error.bound = "timeout", self.timeout, f"{error.bound}, in microseconds"
            error.detail = f"timeout must be {error.bound}, got {self.timeout}"
        return error


# Edits and bit_depth are left out: this protocol cannot express edits, and its images are always UINT8.
PARAMETERS = InferCall.model_fields.keys() - EDIT_PARAMETERS - {"bit_depth"} - {each.name for each in INPUTS}


def read_request(
    body: bytes, header: str | None, model: ModelInfo, limits: Limits
) -> tuple[InferRequest, dict[str, Any]]:
    """Parse a request body. Returns the request, and the parameters for an InferCall.

    header: the value of the HEADER_LENGTH header. Raises InvalidField, UnknownField, ConflictingField, MalformedBody or
    BodyTooLarge.
    """
    length = len(body)
    if header is not None:
        if not (DIGITS.fullmatch(header) and len(header) < 10 and 0 < int(header) <= length):
            raise InvalidField.of(HEADER_LENGTH, f"the bytes of the JSON, 1..{length}", header)
        length = int(header)
    context = Context({each.name: each for each in inputs_of(model)}, limits.max_n, body[length:])
    request = _validated(from_body(body[:length], limits.max_body_bytes), context)
    if context.rest:
        detail = f"{len(context.rest)} bytes behind the JSON belong to no tensor"
        raise InvalidField(detail, field=HEADER_LENGTH, value=len(context.rest), bound="the length of the JSON")
    # The protocol puts the model's name only in the path, but KServe's own client also sends it in every body.
    for name, there in (("model_name", model.name), ("model_version", version_of(model))):
        if getattr(request, name) not in (ABSENT, there):
            bound = f"absent or that of the model in the path, {there}"
            raise InvalidField.of(name, bound, getattr(request, name))
    parameters: dict[str, Any] = dict(request.parameters)
    for info in context.inputs.values():
        if info.name in parameters:
            bound = f"an input of datatype {info.datatype} and shape {info.shape}"
            detail = f"{info.name} is no parameter here but {bound}"
            raise UnknownField(detail, field=info.name, value=parameters[info.name], bound=bound)
    check_names(parameters, sorted(PARAMETERS))
    for tensor in request.inputs:
        if tensor.name in parameters and tensor.name in context.inputs:
            raise ConflictingField(f"the tensor {tensor.name} is given twice", field=tensor.name, value=tensor.data)
        parameters[tensor.name] = tensor.data if len(tensor.data) > 1 else tensor.data[0]
        if tensor.name == CLASS_LABEL:
            parameters[tensor.name] = [_class_label(value, model) for value in tensor.data]
            parameters.setdefault("n", len(tensor.data))
    return request, parameters


def outputs_wanted(request: InferRequest, call: InferCall) -> dict[str, bool]:
    """Return the outputs to send. The value is True for binary data. Raises ConflictingField."""
    wanted: dict[str, bool] = {}
    for output in request.outputs or [Output(name="images"), Output(name="seed")]:
        if output.name in wanted:
            detail = f"the output {output.name} is asked for twice"
            raise ConflictingField(detail, field="outputs", value=output.name)
        in_bytes = output.parameters.binary_data
        wanted[output.name] = call.binary_data_output if in_bytes is ABSENT else in_bytes
    return wanted


def _class_label(value: int | str, model: ModelInfo) -> int | str | None:
    if isinstance(value, str):
        return class_label_of(class_of_prompt(value, model, CLASS_LABEL), model.class_names)
    return None if value == NO_CLASS else value


def _validated(document: dict[str, Any], context: Context) -> InferRequest:
    """Check names, types and tensors. Raises UnknownField, InvalidField or ConflictingField."""
    try:
        return InferRequest.model_validate(document, context=context)
    except ValidationError as wrong:
        errors = ValidationErrors()
        for each in wrong.errors(include_url=False):
            error, is_missing = each.get("ctx", {}).get("error"), each["type"] == "missing"
            if not isinstance(error, InvalidField):
                bound = "given" if is_missing else re.sub(r"^.*? should (be|have) ", "", each["msg"])
                if each["loc"][0] == "parameters" and len(each["loc"]) > 1:  # one error per allowed type
                    bound = "text, a number or a boolean"
                error = InvalidField.of(_field(each["loc"], document), bound, None if is_missing else each["input"])
            errors.add(error)
        errors.raise_all()


def _field(loc: tuple[int | str, ...], document: dict[str, Any]) -> str:
    """Return the name of a faulty member, such as `steps.shape`, or the list's name if a list item has no name."""
    match loc:
        case ("parameters", name, *_) | ("outputs", _, "parameters", name):
            return str(name)
        case (str(kind), int(k), str(member), *rest) if member != "name":
            member = str(rest[0]) if member == "parameters" and rest else member
            return f"{document[kind][k].get('name')}.{member}"
        case _:
            return str(loc[0])


@dataclass(frozen=True, slots=True)
class Tensors:
    """The response to an inference: the images' pixels and the seed.

    Requests that differ only in their id share one body, so the body does not include the id.
    """

    spec: SampleSpec
    model: ModelInfo
    outputs: Mapping[str, bool]

    @property
    def media_type(self) -> str:
        return BINARY if any(self.outputs.values()) else JSON

    @property
    def etag_form(self) -> str:
        """Return a text that identifies the body's format: the model and the outputs."""
        return json.dumps(["tensors", self.model.name, list(self.outputs.items())])

    @property
    def binary_bytes(self) -> int:
        """Return the total size in bytes of the tensors after the JSON."""
        images = self.spec.n * self.model.height_px * self.model.width_px * self.model.channels
        return sum({IMAGES: images, SEED: 8}[name] for name, binary in self.outputs.items() if binary)

    def body(self, images: Images) -> bytes:
        """Return the body for pixels [n, H, W, C], except for what comes first: the opening brace and the id."""
        outputs, behind = [], []
        for name, binary in self.outputs.items():
            datatype, values = ("UINT8", images) if name == IMAGES else ("UINT64", np.array([self.spec.seed], "<u8"))
            described = OutputTensor(name=name, datatype=datatype, shape=list(values.shape))
            if binary:
                behind.append(values.tobytes())
                described.parameters = TensorParameters(binary_data_size=len(behind[-1]))
            member = json.dumps(described.model_dump(exclude_none=True)).encode()
            if not binary:
                data = AS_JSON[images].tobytes()[:-1] if name == IMAGES else str(self.spec.seed).encode()
                member = b"".join([member[:-1], b', "data": [', data, b"]}"])
            outputs.append(member)
        settings = {name: getattr(self.spec, name) for name in SETTINGS}
        whole = InferResponse(
            model_name=self.model.name,
            model_version=version_of(self.model),
            parameters={"fingerprint": self.model.fingerprint, **settings},
            outputs=[],
        )
        head = json.dumps(whole.model_dump(exclude_none=True, exclude={"outputs"})).encode()[1:-1]
        return b"".join([head, b', "outputs": [', b", ".join(outputs), b"]}", *behind])
