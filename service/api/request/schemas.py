"""The parameters of each kind of call, as pydantic models that check names, types and bounds.

specs.py makes the checks that depend on the model, and converts these pydantic models to plain values.
"""

import binascii
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from tminus.model.catalogue import MAX_GUIDANCE
from tminus.model.timesteps import SPACINGS
from tminus.service.api.request.classes import DIGITS, class_bound
from tminus.service.errors import (
    MOST_FAULTS,
    ConflictingField,
    InvalidField,
    InvalidImage,
    ServiceError,
    UnknownField,
    ValidationErrors,
)
from tminus.service.images.encoder import NPY
from tminus.service.images.trajectory import TRAJECTORY
from tminus.service.jobs.webhooks.webhook import (
    EVENTS,
    MAX_URL,
    AllowedReceivers,
    Event,
    Receiver,
    Webhook,
    origin_of,
    refused,
)
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.preview import SHOWS, Pace, Show
from tminus.service.spec import TrajectoryType

Schema = dict[str, Any]  # part of a JSON Schema
MAX_SEED = 2**64 - 1
MAX_EXACT = 2**53
ENCODED_IMAGE = "base64 of an image, or a data: URL with it"
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
MAX_INDEX = 2**32 - 1
MAX_DEADLINE_S = 86_400.0
EDIT_PARAMETERS = {"strength", "image", "mask", "image_sha256", "mask_sha256"}
PICTURES = ("image", "mask")  # may have megabytes of base64, or be files in a form
DIFFUSERS_NAMES = {"num_inference_steps": "steps", "guidance_scale": "guidance"}  # diffusers' name: our name
BOUND = "x-bound"  # JSON schema key: the bound in words, if the type does not state it
DEFAULT = "x-default"  # JSON schema key: the default in words
MAX_FPS, DEFAULT_FPS = 60.0, 10.0
SETTINGS = ("sampler", "steps", "guidance")
# The parameters that determine the defaults of the SETTINGS.
DECISIVE = (*SETTINGS, "table", "nearest", "timestep_spacing")
NOT_ADAPTIVE = (*DECISIVE, "eta", "guidance_interval", "guidance_rescale")  # refused beside quality=adaptive
BIT_DEPTHS = (8, 16, 32)
MAX_ITEMS = 16  # longer lists are refused unchecked, unless the field allows them
OF_MODEL = ("sampler", "n", "steps", "bit_depth", "t")  # the parameters that `check_bounds` checks
OFF = "absent: this server sends no webhooks, as it has no --webhook-secret-file"

# Numbers and booleans are accepted in one syntax only, as text or in JSON. Python's int and float and pydantic's bool
# would accept many more spellings.


def _whole(value: object) -> int:
    """Return an integer, or a float with an integer value as an int. Raises ValueError for anything else.

    JSON Schema, and therefore OpenAPI, counts 5.0 as an integer. A float above 2^53 is refused, because it may differ
    from the number that was sent.
    """
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT:
        return int(value)
    raise ValueError("not an integer")


def _integer(value: object) -> int:
    return int(value) if isinstance(value, str) and DIGITS.fullmatch(value) else _whole(value)


def _number(value: object) -> float:
    if isinstance(value, str) and NUMBER.fullmatch(value):
        return float(value)
    if type(value) in (int, float):
        return value  # type: ignore[return-value]
    raise ValueError("not a number")


def _boolean(value: object) -> bool:
    if value in ("true", "false"):
        return value == "true"
    if isinstance(value, bool):
        return value
    raise ValueError("neither true nor false")


def _image_bytes(value: object, info: ValidationInfo) -> bytes:
    """Decode base64, or a data: URL that contains base64 (RFC 2397). Bytes, from a file in a form, stay as they are."""
    if isinstance(value, bytes):
        return value
    field = info.field_name or ""
    if not isinstance(value, str):
        raise ValueError(f"{field} must be text")
    encoded = value
    if value[:5].lower() == "data:":
        head, _, encoded = value.partition(",")
        if not head.lower().endswith(";base64"):
            raise InvalidImage.of(field, ENCODED_IMAGE, f"a data: URL without base64: {head}")
    try:
        return binascii.a2b_base64("".join(encoded.split()), strict_mode=True)
    except ValueError as error:  # binascii.Error, or the text is not ASCII
        raise InvalidImage.of(field, ENCODED_IMAGE, f"{value[:40]!r} ({error})") from None


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value  # a query with a single item gives a str


def _each_once(values: list[Any]) -> list[Any]:
    if len({*values}) < len(values):
        raise ValueError("not a list of different values")
    return values


def in_words(default: str, bound: str = "") -> Any:
    """State a field's default in words, and its bound if the type does not state it.

    With a real `default` in the OpenAPI document, generated clients would send that value.
    """
    words = {DEFAULT: default, BOUND: bound}
    return Field(json_schema_extra={name: text for name, text in words.items() if text})


Whole = Annotated[int, BeforeValidator(_whole)]  # refuses text; for fields where text means something else
AsInteger = BeforeValidator(_integer)
Int = Annotated[int, AsInteger]
Bool = Annotated[bool, BeforeValidator(_boolean)]
# The bounds must come before the validator; otherwise OpenAPI does not show them.
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), AsInteger]
Index = Annotated[int, Field(ge=0, le=MAX_INDEX), AsInteger]
Step = Annotated[int, Field(ge=0), AsInteger]
Percent = Annotated[int, Field(ge=0, le=100), AsInteger]
Every = Annotated[int, Field(ge=1), AsInteger]
Rate = Annotated[float, Field(gt=0, le=MAX_FPS), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
PositiveShare = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
Scale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE), BeforeValidator(_number)]
Deadline = Annotated[float, Field(gt=0, le=MAX_DEADLINE_S), BeforeValidator(_number)]
Picture = Annotated[
    bytes,
    BeforeValidator(_image_bytes),
    WithJsonSchema({"type": "string", "format": "byte", BOUND: ENCODED_IMAGE}),
]
HEXADECIMAL = "64 hexadecimal digits, in small letters"
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Url = Annotated[str, Field(max_length=MAX_URL, json_schema_extra={"format": "uri"})]
Item = TypeVar("Item")
EachOnce = Annotated[
    list[Item],
    Field(min_length=1, json_schema_extra={"uniqueItems": True}),
    AfterValidator(_each_once),
]
Shows = Show | Annotated[EachOnce[Show], Field(max_length=len(SHOWS))]


# --- bounds: each is written once, as JSON Schema, for checks, for the OpenAPI document and for error messages ---


class Bound(NamedTuple):
    """A narrower bound than the field declares: one schema for each JSON type that the field's values may have."""

    integer: Schema | None = None  # also applies to the items of lists
    string: Schema | None = None
    array: Schema | None = None
    words: str = ""  # the whole bound in words, if the schemas do not state it

    def of_kind(self, kind: str) -> Schema:
        """Return the schema for values of a JSON type, or {} if the bound does not limit them."""
        return getattr(self, kind, None) or {}

    def allows(self, value: int | str) -> bool:
        """Return True if a value of a valid type is within the bound."""
        schema = self.of_kind("string" if isinstance(value, str) else "integer")
        if "enum" in schema:
            return value in schema["enum"]
        return isinstance(value, str) or schema["minimum"] <= value <= schema["maximum"]


Bounds = Mapping[str, Bound]


def bit_depths(channels: int) -> tuple[int, ...]:
    """Return the bit depths that a model's images may have. Only grey PNGs can have 16 bits."""
    return BIT_DEPTHS if channels == 1 else (8, 32)


def bounds_of(model: ModelInfo, limits: Limits) -> Bounds:
    """Return the bounds that depend on the model and the server's settings, keyed by parameter."""
    return _bounds(model.num_timesteps, model.samplers, model.class_names, model.channels, limits.max_n)


@lru_cache(maxsize=64)  # same for all requests to a model
def _bounds(
    num_timesteps: int, samplers: tuple[str, ...], class_names: tuple[str, ...], channels: int, max_n: int
) -> Bounds:
    last = num_timesteps - 1
    timesteps = {"minimum": 0, "maximum": last}
    return {
        "n": Bound({"minimum": 1, "maximum": max_n}),
        "steps": Bound({"minimum": 1, "maximum": num_timesteps}),
        "sampler": Bound(string={"enum": list(samplers)}),
        "class_label": Bound(
            {"minimum": 0, "maximum": max(0, len(class_names) - 1)},
            array={"minItems": 1, "maxItems": max_n},
            words=class_bound(class_names),
        ),
        "bit_depth": Bound(
            {"enum": list(bit_depths(channels))},
            words="8, 16 or 32" if channels == 1 else f"8 or 32 for {channels} channels; 16 is for one",
        ),
        "guidance_interval": Bound(
            timesteps,
            array={"minItems": 2, "maxItems": 2},
            words=f"two integers [lo, hi] with 0 <= lo <= hi <= {last}",
        ),
        "keep": Bound(
            timesteps,
            array={"minItems": 1, "maxItems": last + 1, "uniqueItems": True},
            words=f"a list of at most {last + 1} numbers of passes",
        ),
        "timestep_spacing": Bound(string={"enum": list(SPACINGS)}),
        "t": Bound(timesteps),
    }


def max_items(schema: Schema, bound: Bound) -> int:
    """Return the length of the longest list that is checked. schema: the field's JSON Schema."""
    kinds = (bound.of_kind("array"), *schema.get("anyOf", [schema]))
    return max(MAX_ITEMS, *(int(each.get("maxItems", 0)) for each in kinds))


def words_of(schema: Schema, bound: Bound) -> str:
    """Describe in words which values of a parameter are valid. schema: the field's JSON Schema."""
    kind = next(each for each in schema.get("anyOf", [schema]) if each["type"] != "null")
    if words := bound.words or schema.get(BOUND) or kind.get(BOUND):
        return str(words)
    kind = kind | bound.of_kind(kind["type"])
    if "const" in kind:
        return str(kind["const"])
    if "enum" in kind:
        return f"one of {', '.join(kind['enum'])}"
    if kind["type"] == "string":
        return f"text of at most {kind['maxLength']} characters" if "maxLength" in kind else "text"
    if kind["type"] == "boolean":
        return "true or false"
    noun = {"integer": "an integer", "number": "a number"}[kind["type"]]
    low, most = (_as_text(kind.get(name)) for name in ("minimum", "maximum"))
    if "exclusiveMinimum" in kind:
        return f"{noun} above {_as_text(kind['exclusiveMinimum'])}, at most {most}"
    if most:
        return f"{noun} in {low}..{most}"
    return f"{noun} of at least {low}" if low else noun


def _as_text(value: float | None) -> str:
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


# --- the calls ---


def check_names(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise UnknownField for unknown parameters. The error lists at most MOST_FAULTS of them."""
    errors, names = ValidationErrors(), {*known}
    for name in [name for name in given if name not in names][:MOST_FAULTS]:
        # Errors are logged, and a webhook's URL may contain secrets.
        value = origin_of(str(given[name])) if name == "webhook" else given[name]
        errors.add(UnknownField.of(name, known, value))
    errors.check()


def by_our_names(given: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Rename another API's parameters to our names. Also return the names that the request used, keyed by our names.

    names: our names, keyed by the other API's names. Raises ConflictingField if the request has a parameter under both
    names.
    """
    given_as: dict[str, str] = {}
    for name, value in given.items():
        if (other := given_as.setdefault(names.get(name, name), name)) != name:
            raise ConflictingField(f"the request has both {name} and {other}", field=name, value=value)
    return {ours: given[name] for ours, name in given_as.items()}, given_as


@contextmanager
def named_as_given(given_as: Mapping[str, str]) -> Iterator[None]:
    """Make errors from the `with` block use the request's names. given_as: the second result of `by_our_names`."""
    try:
        yield
    except (InvalidField, InvalidImage) as error:
        named: ServiceError = _named(error, given_as)
        named.others = tuple(_named(other, given_as) for other in error.others)
        raise named from None


def _named(error: ServiceError, given_as: Mapping[str, str]) -> ServiceError:
    name = given_as.get(error.field or "")
    if name is None or name == error.field or error.bound is None:
        return error
    if isinstance(error, InvalidImage):
        return InvalidImage.of(name, error.bound, str(error.value))
    return InvalidField.of(name, error.bound, error.value) if isinstance(error, InvalidField) else error


class RequestSchema(BaseModel):
    """The parameters of one kind of call."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    other_names: ClassVar[Collection[str]] = ()  # names that are accepted but are not fields

    @classmethod
    def parse(
        cls,
        values: Mapping[str, Any],
        bounds: Bounds | None = None,
        errors: ValidationErrors | None = None,
        context: object = None,
    ) -> Self:
        """Check names, types and the bounds that the fields declare, and return the parsed parameters.

        bounds: bounds that depend on the model, for list lengths and error messages. Values are checked against them
        only if there are other errors; otherwise the caller must call `check_bounds`. errors: errors found earlier.
        context: passed to the class's validators. Raises UnknownField, InvalidField or InvalidImage; the error carries
        all others.
        """
        errors, bounds, parsed = errors or ValidationErrors(), bounds or {}, None
        with errors.collect():
            check_names(values, (*cls.model_fields, *cls.other_names))
        given = {name: value for name, value in values.items() if name in cls.model_fields}
        for name, value in list(given.items()):
            most = max_items(_schema_of(cls)[name], bounds.get(name, Bound()))
            if isinstance(value, list) and len(value) > most:  # otherwise, pydantic would check every item
                words = cls.words(name, bounds)
                detail = f"{name} must be {words}, got a list of {len(value)}"
                errors.add(InvalidField(detail, field=name, value=given.pop(name), bound=words))
        try:
            parsed = cls.model_validate(given, context=context)
        except ValidationError as wrong:
            for each in wrong.errors(include_url=False, include_input=False):
                name, error = str(each["loc"][0]), each.get("ctx", {}).get("error")
                given.pop(name, None)
                if name in errors:  # a required list that was removed above for its length
                    continue
                if not isinstance(error, ServiceError):
                    error = InvalidField.of(name, cls.words(name, bounds), values.get(name))
                errors.add(error)
        if parsed is None or errors:
            right = {name: value for name, value in given.items() if name not in (*PICTURES, *errors)}
            with suppress(ValidationError):  # a required parameter may be among the invalid ones
                cls.model_validate(right, context=context).check_bounds(bounds, errors)
            errors.raise_all()
        return parsed

    def check_bounds(self, bounds: Bounds, errors: ValidationErrors) -> None:
        """Add an error for each parameter that the model's bounds do not allow."""
        for name in OF_MODEL:
            value = getattr(self, name, None)
            if value is not None and name in bounds and not bounds[name].allows(value):
                errors.add(InvalidField.of(name, self.words(name, bounds), value))

    @classmethod
    def words(cls, name: str, bounds: Bounds) -> str:
        """Describe in words which values of a parameter are valid."""
        return words_of(_schema_of(cls)[name], bounds.get(name, Bound()))


@cache
def _schema_of(kind: type[RequestSchema]) -> Mapping[str, Schema]:
    return kind.model_json_schema()["properties"]  # type: ignore[no-any-return]


class Sampling(RequestSchema):
    """The parameters of sampling. GET /model lists the bounds that depend on the model."""

    n: Annotated[Int, in_words("1")] = 1
    """The number of images. The server's `--max-n` sets the maximum."""
    steps: Annotated[
        Int | None,
        in_words("recommended for the model, or `good_steps` of the sampler in `GET /model`"),
    ] = None
    """The number of denoising steps, at most T. A sampler that takes more passes than steps allows fewer: see
    `max_steps` in `GET /model`. Samplers of tables take only the steps that they have tables for.
    """
    sampler: Annotated[
        str | None, in_words("recommended for the model; where `steps` is given, `default_sampler` of `GET /model`")
    ] = None
    """The sampler. `sampler_details` of `GET /model` says when to use each."""
    eta: Annotated[Share | None, in_words("0")] = None
    """The noise that `ddim` adds at each step. Other samplers refuse it."""
    seed: Annotated[Seed | None, in_words("drawn")] = None
    """The seed of the noise. The answer has it in `X-Seed`. In JSON, JavaScript has to send a seed above 2^53 as
    text."""
    index: Annotated[Index, in_words("0", f"an integer in 0..{MAX_INDEX} less n - 1")] = 0
    """The index of the first image. `index=k` with `n=1` makes image k of a larger request alone. The last image's
    index has the same bound."""
    to_seed: Annotated[Seed | None, in_words("none")] = None
    """A second seed. With `mix`, the noise lies between the noises of the two seeds."""
    mix: Annotated[Share | None, in_words("none")] = None
    """How far the noise is from `seed` (0) to `to_seed` (1). `mix` and `to_seed` need each other."""
    guidance: Annotated[
        Scale | None,
        in_words(
            "recommended for the model where `steps` is not given and the sampler is the recommended one; with `table` "
            "that of the table; otherwise 1"
        ),
    ] = None
    """The scale of classifier-free guidance. 1 turns it off; any other value needs a class for each image. Samplers of
    tables take only the guidance that they have tables for."""
    guidance_interval: Annotated[Annotated[list[Int], Field(fail_fast=True)] | None, in_words("all timesteps")] = None
    """The lowest and the highest timestep at which guidance is on. Only with guidance. In a query or a form, give the
    parameter twice."""
    guidance_rescale: Annotated[Share | None, in_words("0")] = None
    """How far a guided output is brought back to the spread of the conditional one. Only with guidance."""
    timestep_spacing: Annotated[str | None, in_words("by sampler, in `timestep_spacings` of `GET /model`")] = None
    """How the steps are spread over the timesteps. Samplers of tables refuse it."""
    nearest: Annotated[Bool | None, in_words("false")] = None
    """With a sampler of tables (`tuned`, `consistency`): whether to take the nearest steps and guidance that have a
    table, if the requested ones have none. Other samplers refuse it.
    """
    table: Annotated[
        str | None, Field(pattern="^[0-9a-f]{16}$"), in_words("any", "16 hexadecimal digits, in small letters")
    ] = None
    """With a sampler of tables: the hash that the table must have."""
    clip: Annotated[Bool | None, in_words("the checkpoint's, `clip` in `GET /model`")] = None
    """Whether x_0 is clipped to the data range at every step. Latent models cannot turn it on."""
    deadline_s: Annotated[Deadline | None, in_words("none")] = None
    """Seconds from now. A deadline that cannot be met is refused at once; one that passes is answered 504."""

    def check_bounds(self, bounds: Bounds, errors: ValidationErrors) -> None:
        super().check_bounds(bounds, errors)
        if self.index > MAX_INDEX + 1 - self.n:
            errors.add(InvalidField.of("index", self.words("index", bounds), self.index))

    def decisive(self) -> dict[str, Any]:
        """Return the parameters in the request that determine its settings."""
        return {name: value for name in DECISIVE if (value := getattr(self, name)) is not None}


class Edit(RequestSchema):
    """The parameters of an edit, which starts from an image instead of noise."""

    strength: Annotated[PositiveShare | None, in_words("none")] = None
    """With `image`: the share of the denoising steps that run again."""
    image: Annotated[Picture | None, in_words("none")] = None
    """An image to start from (with `strength`), or to keep where `mask` is black. PNG, JPEG or WebP; base64 or a
    `data:` URL in JSON, a file in a form."""
    mask: Annotated[Picture | None, in_words("none")] = None
    """With `image`: white where the image is made new. PNG, JPEG or WebP, given as `image` is."""


class SampleRequest(Edit, Sampling):
    """The parameters that all calls that make images share: those of sampling and of edits."""

    class_label: Annotated[
        Whole | str | Annotated[list[Whole | str | None], Field(fail_fast=True)] | None, in_words("no class")
    ] = None
    """The class of all images, or a list with the class of each. A class is its number, or its name in any case. Where
    names are numbers, put `name:` or `number:` before it. In a query or a form, repeat the parameter for a list."""
    bit_depth: Annotated[Int | None, in_words("8, or 32 with `Accept: application/x-npy`")] = None
    """The bits of each value of the images: 8; 16 in PNGs of a model of one channel; 32 for the floats of
    `application/x-npy`."""
    quality: Annotated[Literal["adaptive"] | None, in_words("none")] = None
    """`adaptive`: the best setting in the `ladder` of `GET /model` that the forecast puts before `deadline_s`. Without
    `deadline_s`, it is the recommended setting. The parameters that make up a setting are refused beside it."""
    image_sha256: Annotated[Sha256 | None, in_words("any", HEXADECIMAL)] = None
    """The SHA-256 that the pixels of `image` must have, decoded and at the model's size."""
    mask_sha256: Annotated[Sha256 | None, in_words("any", HEXADECIMAL)] = None
    """The SHA-256 that the pixels of `mask` must have, decoded and at the model's size."""


class NoiseCall(RequestSchema):
    """The parameters of POST /noise, from the query or the form."""

    t: Int
    """The timestep, from 0 (least noise) to T - 1. Required."""
    seed: Annotated[Seed | None, in_words("drawn")] = None
    """The seed of the noise. The answer has it in `X-Seed`."""


class FloatsRequest(RequestSchema):
    """The parameter of responses that contain floats. The validation context is the response's media type."""

    clip_output: Annotated[Bool, in_words("true")] = True
    """With `Accept: application/x-npy`: whether values beyond the model's range are clipped to it. Not to be confused
    with `clip`, which acts on x_0 at every step."""

    @field_validator("clip_output", mode="before")
    @classmethod
    def _only_floats(cls, value: object, info: ValidationInfo) -> object:
        if info.context != NPY:
            bound = f"absent with Accept: {info.context}: pictures have no values beyond the range"
            raise InvalidField.of("clip_output", bound, value)
        return value


class PreviewRequest(RequestSchema):
    """The parameters of a running job's frames: how often, what they show, and in which format."""

    every: Annotated[Every | None, in_words("none")] = None
    """Send a frame after every so many steps, counted in passes."""
    fps: Annotated[Rate | None, in_words("10")] = None
    """Send so many frames a second. Give `every` or `fps`, not both."""
    show: Annotated[
        Shows,
        in_words(
            "`x_t` in a stream; for the events of a job none, which then have no pictures",
            f"one of {', '.join(SHOWS)}, or a list of both",
        ),
    ] = "x_t"
    """What the frames show: `x_t`, the noisy image; `x_0`, the network's current estimate of the image; or a list of
    both."""
    frame_format: Annotated[
        Literal["png", "webp", "jpeg"],
        in_words(
            "`png`",
            "one of png, webp, jpeg, as a preview is a picture; a trajectory has the floats of each step",
        ),
    ] = "png"
    """The format of the frames. `jpeg` is lossy and shows transparent parts over white."""
    layout: Annotated[Literal["sheet", "images"], in_words("`sheet`")] = "sheet"
    """`sheet`: one picture of all images. `images`: a picture for each image."""

    @field_validator("fps")
    @classmethod
    def _one_pace(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("every") is not None:
            raise InvalidField.of("fps", "absent together with every", value)
        return value

    @property
    def shows(self) -> tuple[Show, ...]:
        return (self.show,) if isinstance(self.show, str) else tuple(self.show)

    @property
    def pace(self) -> Pace:
        return Pace(every=self.every) if self.every is not None else Pace(fps=self.fps or DEFAULT_FPS)


class StreamCall(PreviewRequest, SampleRequest):
    """The parameters of a job in a WebSocket message."""

    keep_open: Annotated[Bool, in_words("false")] = False
    """After the job, wait for another one instead of closing."""


class SampleCall(FloatsRequest, SampleRequest):
    """The parameters of POST and GET /sample. The validation context is the response's media type."""

    every: Annotated[Every | None, in_words("no frames")] = None
    """With `Accept: image/webp` or `application/json`: a frame after every so many steps of each image, counted in
    passes. Required for `image/webp`."""
    show: Annotated[Shows, in_words("`x_t`", f"one of {', '.join(SHOWS)}, or with application/json a list of both")] = (
        "x_t"
    )
    """With `every`: what the frames show, `x_t` (the noisy image) or `x_0` (the network's estimate). With
    `application/json` also a list of both."""
    until: Annotated[Step | None, in_words("all steps")] = None
    """With `every` and `Accept: application/json`: the last step whose frame is wanted. No further step is taken or
    counted in a quota, and the answer has no images."""

    keep: Annotated[Annotated[list[Int], BeforeValidator(_listed)] | None, in_words("all")] = None
    """With `Accept: application/vnd.tminus.trajectory`: the passes that the file has, counted from 0, in rising order.
    At least one of them has to add noise."""
    dtype: Annotated[TrajectoryType, in_words("`float32`")] = "float32"
    """With `Accept: application/vnd.tminus.trajectory`: the type that x_t, x_0 and the mean are rounded to."""

    @field_validator("show", "until", mode="before")
    @classmethod
    def _only_of_frames(cls, value: object, info: ValidationInfo) -> object:
        if info.data.get("every", 1) is None:
            raise InvalidField.of(info.field_name or "", "absent without `every`", value)
        return value

    @field_validator("keep", "dtype", mode="before")
    @classmethod
    def _only_of_trajectories(cls, value: object, info: ValidationInfo) -> object:
        if info.context != TRAJECTORY:
            raise InvalidField.of(info.field_name or "", f"absent without Accept: {TRAJECTORY}", value)
        return value

    @property
    def shows(self) -> tuple[Show, ...]:
        return (self.show,) if isinstance(self.show, str) else tuple(self.show)


class JobCall(SampleRequest):
    """The parameters of POST /jobs: a sample, and a webhook whose parameters are named as in Cog.

    The validation context is an AllowedReceivers, or None if the server sends no webhooks.
    """

    webhook: Annotated[Url | None, in_words("none")] = None
    """The URL that receives the job at each of its events. Only for durable jobs, and only in the body, not in the
    query.
    """
    webhook_events_filter: Annotated[
        Event | Annotated[EachOnce[Event], Field(max_length=len(EVENTS))] | None,
        in_words("all", f"a list of {', '.join(EVENTS)}, each at most once"),
    ] = None
    """The events that are sent to `webhook`."""

    @field_validator("webhook", mode="before")
    @classmethod
    def _may_be_told(cls, value: object, info: ValidationInfo) -> object:
        if value is None:
            return value
        if not isinstance(value, str):
            raise refused("text", "")  # leave out the value: it may contain a URL, and errors are logged
        if not isinstance(info.context, AllowedReceivers):
            raise refused(OFF, value)
        Receiver.parse(value, info.context)
        return value

    @field_validator("webhook_events_filter", mode="before")
    @classmethod
    def _only_of_webhooks(cls, value: object, info: ValidationInfo) -> object:
        if value is not None and info.data.get("webhook", "") is None:
            raise InvalidField.of("webhook", "given together with webhook_events_filter", None)
        return value

    @property
    def receiver(self) -> Webhook | None:
        if self.webhook is None:
            return None
        named = self.webhook_events_filter or list(EVENTS)
        return Webhook(self.webhook, tuple(event for event in EVENTS if event == named or event in named))
