"""The parameters of requests, as pydantic models that check names, types and bounds. `to_spec` makes plain values."""

import binascii
import re
import secrets
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, WithJsonSchema

from tminus.model.catalogue import MAX_GUIDANCE, SAMPLER_FACTS, TABLE_SAMPLERS, Recommended
from tminus.model.sampler_tables import Table, nearest, steps_and_guidances
from tminus.model.timesteps import SPACINGS
from tminus.service.api.request.classes import DIGITS, class_bound, class_numbers
from tminus.service.api.request.defaults import DECISIVE, settings_of
from tminus.service.api.request.faults import Faults
from tminus.service.errors import (
    MOST_FAULTS,
    BodyTooLarge,
    ConflictingField,
    InvalidField,
    InvalidImage,
    ServiceError,
    UnknownField,
)
from tminus.service.images.encoder import NPY
from tminus.service.images.trajectory import TRAJECTORY
from tminus.service.jobs.webhooks.webhook import EVENTS, AllowedReceivers, Receiver, Webhook, refused
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.preview import SHOWS, Pace, Show
from tminus.service.spec import Inputs, SampleSpec, TrajectoryType

MAX_SEED = 2**64 - 1
SEED_BOUND = f"an integer in 0..{MAX_SEED}"
SEED_BITS = 53  # a drawn seed survives JavaScript's numbers
MAX_EXACT = 2**53
EVERY_BOUND = "an integer of at least 1"
ENCODED_IMAGE = "base64 of an image, or a data: URL with it"
NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?")
MAX_ITEMS = 2  # of a list, but for one that has an item for each image
MAX_INDEX = 2**32 - 1
MAX_DEADLINE_S = 86_400.0
EDIT_PARAMETERS = {"strength", "image", "mask", "image_sha256", "mask_sha256"}
PICTURES = ("image", "mask")  # fields that may have megabytes of base64, or be files of a form
DIFFUSERS_NAMES = {"num_inference_steps": "steps", "guidance_scale": "guidance"}  # ours, by those of diffusers
SHA256 = "^[0-9a-f]{64}$"
BIT_DEPTHS = (8, 16, 32)
DEFAULT = "x-default"  # in the JSON schema of a field: what it is where it is left out, in words
MAX_FPS, DEFAULT_FPS = 60.0, 10.0
_PREVIEW_BOUNDS = {
    "every": EVERY_BOUND,
    "fps": f"a number above 0, at most {MAX_FPS:g}",
    "show": f"one of {', '.join(SHOWS)}, or a list of both",
    "frame_format": "one of png, webp, jpeg, as a preview is a picture; a trajectory has the floats of each step",
    "layout": "one of sheet, images",
    "keep_open": "true or false",
}
EVENTS_BOUND = f"a list of {', '.join(EVENTS)}, each at most once"
MOST_EVENTS = 16  # in a list that is looked at
OFF = "absent: this server sends no webhooks, as it has no --webhook-secret-file"

# One spelling for each value, in text as in JSON: Python's int and float, and pydantic's bool, know many more.


def _whole(value: object) -> int:
    """To JSON Schema, and so to OpenAPI, 5.0 is an integer; above 2^53 a float may not be the number that was sent."""
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
    """Decode base64, or a data: URL with it (RFC 2397); bytes, from a form's file, stay as they are."""
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
    except ValueError as error:  # binascii.Error, or the complaint about a letter that is not ASCII
        raise InvalidImage.of(field, ENCODED_IMAGE, f"{value[:40]!r} ({error})") from None


def default(words: str) -> dict[str, Any]:
    """Say a field's default in the OpenAPI document. A `default` there would be sent by generated clients."""
    return {DEFAULT: words}


Whole = Annotated[int, BeforeValidator(_whole)]  # no text: where a text is something else
Int = Annotated[int, BeforeValidator(_integer)]
Bool = Annotated[bool, BeforeValidator(_boolean)]
# The bounds come before the validator, or they would be missing in OpenAPI.
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), BeforeValidator(_integer)]
Index = Annotated[int, Field(ge=0, le=MAX_INDEX), BeforeValidator(_integer)]
Step = Annotated[int, Field(ge=0), BeforeValidator(_integer)]
Percent = Annotated[int, Field(ge=0, le=100), BeforeValidator(_integer)]
Every = Annotated[int, Field(ge=1), BeforeValidator(_integer)]
Rate = Annotated[float, Field(gt=0, le=MAX_FPS), BeforeValidator(_number)]
Share = Annotated[float, Field(ge=0, le=1), BeforeValidator(_number)]
PositiveShare = Annotated[float, Field(gt=0, le=1), BeforeValidator(_number)]
Scale = Annotated[float, Field(ge=0, le=MAX_GUIDANCE), BeforeValidator(_number)]
Deadline = Annotated[float, Field(gt=0, le=MAX_DEADLINE_S), BeforeValidator(_number)]
Picture = Annotated[bytes, BeforeValidator(_image_bytes), WithJsonSchema({"type": "string", "format": "byte"})]


def check_names(given: Mapping[str, Any], known: Collection[str]) -> None:
    """Raise UnknownField for names that are not known: for as many as an answer lists."""
    faults = Faults()
    for name in [name for name in given if name not in known][:MOST_FAULTS]:
        faults.add(UnknownField.of(name, known, given[name]))
    faults.check()


def by_our_names(given: Mapping[str, Any], names: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Name parameters as POST /sample does; returns them, and the name that was given, by ours.

    names: ours, by the others. Raises ConflictingField for a parameter that is given by two names.
    """
    given_as: dict[str, str] = {}
    for name, value in given.items():
        if (other := given_as.setdefault(names.get(name, name), name)) != name:
            raise ConflictingField(f"the request has both {name} and {other}", field=name, value=value)
    return {ours: given[name] for ours, name in given_as.items()}, given_as


@contextmanager
def named_as_given(given_as: Mapping[str, str]) -> Iterator[None]:
    """Name a parameter in an error as the request does. given_as: see `by_our_names`."""
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
    """The parameters of one kind of request."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def own_of(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        """Take the parameters of this schema out of those of a request."""
        return {name: parameters.pop(name) for name in cls.model_fields if name in parameters}

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Any], bound_of: Callable[[str], str], max_items: int = MAX_ITEMS
    ) -> Self:
        """Check names and types, and the bounds that the fields declare; bound_of says a field's bound in words.

        A list of more than max_items is refused before its items are looked at: pydantic would build an error for each.
        Raises UnknownField, InvalidField, or InvalidImage, with all that is wrong.
        """
        faults = Faults()
        with faults.gathered():
            check_names(parameters, cls.model_fields)
        given = {name: value for name, value in parameters.items() if name in cls.model_fields}
        for name, value in parameters.items():
            if isinstance(value, list) and len(value) > max_items and name in given:
                detail = f"{name} must be {bound_of(name)}, got a list of {len(value)}"
                faults.add(InvalidField(detail, field=name, value=given.pop(name), bound=bound_of(name)))
        while True:
            try:
                checked = cls.model_validate(given)
                break
            except InvalidImage as error:  # it ends the validation: the others are looked at without this one
                faults.add(error)
                del given[error.field or ""]
            except ValidationError as error:
                for each in error.errors(include_url=False, include_context=False, include_input=False):
                    field = str(each["loc"][0])
                    if field not in faults:  # as a list may be that is too long to be shown
                        faults.add(InvalidField.of(field, bound_of(field), parameters.get(field)))
                break
        faults.check()
        return checked


class SampleRequest(RequestSchema):
    """The parameters of a sampling request, in query or JSON body. GET /model tells the bounds that vary by model."""

    n: Int = Field(
        1, description="The number of images. The server's `--max-n` sets the maximum.", json_schema_extra=default("1")
    )
    steps: Int | None = Field(
        None,
        description="The number of denoising steps. T at most, and fewer for a sampler that takes more passes than "
        "steps: see `max_steps` in `GET /model`. Samplers of tables take only the steps that they have tables for.",
        json_schema_extra=default("recommended for the model, or `good_steps` of the sampler in `GET /model`"),
    )
    sampler: str | None = Field(
        None,
        description="The sampler. `sampler_details` of `GET /model` says when to take which.",
        json_schema_extra=default(
            "recommended for the model; where `steps` is given, `default_sampler` of `GET /model`"
        ),
    )
    eta: Share | None = Field(
        None,
        description="The noise that `ddim` adds at each step. Other samplers refuse it.",
        json_schema_extra=default("0"),
    )
    seed: Seed | None = Field(
        None,
        description="The seed of the noise. The answer has it in `X-Seed`. In JSON, JavaScript has to send a seed "
        "above 2^53 as text.",
        json_schema_extra=default("drawn"),
    )
    index: Index = Field(
        0,
        description="The index of the first image. `index=k` with `n=1` makes image k of a larger request alone. The "
        "last image's index has the same bound.",
        json_schema_extra=default("0"),
    )
    to_seed: Seed | None = Field(
        None,
        description="A second seed. With `mix`, the noise lies between the noises of the two seeds.",
        json_schema_extra=default("none"),
    )
    mix: Share | None = Field(
        None,
        description="How far the noise is from `seed` (0) to `to_seed` (1). `mix` and `to_seed` need each other.",
        json_schema_extra=default("none"),
    )
    class_label: Whole | str | Annotated[list[Whole | str | None], Field(fail_fast=True)] | None = Field(
        None,
        description="The class of all images, or a list with the class of each. A class is its number, or its name in "
        "any case. Where names are numbers, put `name:` or `number:` before it. In a query or a form, repeat the "
        "parameter for a list.",
        json_schema_extra=default("no class"),
    )
    guidance: Scale | None = Field(
        None,
        description="The scale of classifier-free guidance. 1 turns it off; any other value needs a class for each "
        "image. Samplers of tables take only the guidance that they have tables for.",
        json_schema_extra=default(
            "recommended for the model where `steps` is not given and the sampler is the recommended one; with `table` "
            "that of the table; otherwise 1"
        ),
    )
    guidance_interval: Annotated[list[Int], Field(fail_fast=True)] | None = Field(
        None,
        description="The lowest and the highest timestep at which guidance is on. Only with guidance. In a query or a "
        "form, give the parameter twice.",
        json_schema_extra=default("all timesteps"),
    )
    guidance_rescale: Share | None = Field(
        None,
        description="How far a guided output is brought back to the spread of the conditional one. Only with guidance.",
        json_schema_extra=default("0"),
    )
    timestep_spacing: str | None = Field(
        None,
        description="How the steps are spread over the timesteps. Samplers of tables refuse it.",
        json_schema_extra=default("by sampler, in `timestep_spacings` of `GET /model`"),
    )
    nearest: Bool | None = Field(
        None,
        description="With a sampler of tables (`tuned`, `consistency`): take the nearest steps and guidance that have "
        "a table, where those asked for have none. Other samplers refuse it.",
        json_schema_extra=default("false"),
    )
    table: str | None = Field(
        None,
        pattern="^[0-9a-f]{16}$",
        description="With a sampler of tables: the hash that the table must have.",
        json_schema_extra=default("any"),
    )
    clip: Bool | None = Field(
        None,
        description="Whether x_0 is clipped to the data range at every step. Latent models cannot turn it on.",
        json_schema_extra=default("the checkpoint's, `clip` in `GET /model`"),
    )
    bit_depth: Int | None = Field(
        None,
        description="The bits of each value of the images: 8; 16 in PNGs of a model of one channel; 32 for the floats "
        "of `application/x-npy`.",
        json_schema_extra=default("8, or 32 with `Accept: application/x-npy`"),
    )
    deadline_s: Deadline | None = Field(
        None,
        description="Seconds from now. A deadline that cannot be met is refused at once; one that passes is answered "
        "504.",
        json_schema_extra=default("none"),
    )
    strength: PositiveShare | None = Field(
        None,
        description="With `image`: the share of the denoising steps that run again.",
        json_schema_extra=default("none"),
    )
    image: Picture | None = Field(
        None,
        description="An image to start from (with `strength`), or to keep where `mask` is black. PNG, JPEG or WebP; "
        "base64 or a `data:` URL in JSON, a file in a form.",
        json_schema_extra=default("none"),
    )
    mask: Picture | None = Field(
        None,
        description="With `image`: white where the image is made new. PNG, JPEG or WebP, given as `image` is.",
        json_schema_extra=default("none"),
    )
    image_sha256: str | None = Field(
        None,
        pattern=SHA256,
        description="The SHA-256 that the pixels of `image` must have, decoded and at the model's size.",
        json_schema_extra=default("any"),
    )
    mask_sha256: str | None = Field(
        None,
        pattern=SHA256,
        description="The SHA-256 that the pixels of `mask` must have, decoded and at the model's size.",
        json_schema_extra=default("any"),
    )

    @classmethod
    def parse(cls, parameters: Mapping[str, Any], model: ModelInfo, limits: Limits) -> "SampleRequest":
        """Check names and types. Raises UnknownField, InvalidField or InvalidImage, with all that is wrong."""
        max_items, faults, asked = max(limits.max_n, MAX_ITEMS), Faults(), None
        with faults.gathered():
            asked = cls.from_parameters(parameters, lambda field: _bounds(model, limits)[field], max_items)
        if asked is None:
            right = {name for name in parameters if name in cls.model_fields and name not in (*PICTURES, *faults)}
            cls.model_validate({name: parameters[name] for name in right}).check_bounds(model, limits, faults)
            faults.refuse()
        return asked

    def to_spec(self, model: ModelInfo, limits: Limits, draw: Callable[[int], int] = secrets.randbits) -> SampleSpec:
        """Check the values against the model and the limits, and fill in what was left out.

        Raises InvalidField, with all that is wrong.
        """
        faults, bounds = Faults(), _bounds(model, limits)
        self.check_bounds(model, limits, faults)
        labels: tuple[int | None, ...] | None = None
        if "n" not in faults:
            with faults.gathered():
                labels = class_numbers(self.class_label, self.n, model)
        seed = draw(SEED_BITS) if self.seed is None else self.seed
        for check in (partial(self._check_walk, seed), partial(self._check_edit, limits.max_image_bytes, model)):
            with faults.gathered():
                check()
        if self.clip and model.latent is not None and not model.clip:
            faults.add(InvalidField.of("clip", "absent or false: latents have no range to clip to", self.clip))
        interval = None
        with faults.gathered():
            interval = self._interval(model.num_timesteps)
        if "sampler" in faults:  # all else depends on it
            faults.check()
        can_guide = model.null_class is not None and labels is not None and None not in labels
        settings = settings_of(self.decisive(), model, can_guide=can_guide)
        sampler, steps, table = settings.sampler, settings.steps, None
        if not any(name in faults for name in ("n", "steps", "class_label")):
            with faults.gathered():
                table = self._table(model, settings)
        spacing = model.timestep_spacings[sampler] if self.timestep_spacing is None else self.timestep_spacing
        if sampler not in TABLE_SAMPLERS and spacing not in SPACINGS:
            faults.add(InvalidField.of("timestep_spacing", bounds["timestep_spacing"], spacing))
        if steps > (most := SAMPLER_FACTS[sampler].max_steps(model.num_timesteps)):
            faults.add(InvalidField.of("steps", f"1..{most} for {sampler}, which takes more passes than steps", steps))
        if self.eta is not None and sampler != "ddim":
            faults.add(InvalidField.of("eta", f"absent for sampler {sampler}: only ddim has it", self.eta))
        if not any(name in faults for name in ("n", "steps", "class_label", "guidance")):
            with faults.gathered():
                self._check_guidance(settings.guidance, model, labels)
        faults.check()
        return SampleSpec(
            n=self.n,
            steps=steps if table is None else table.steps,
            sampler=sampler,
            eta=self.eta or 0.0,
            seed=seed,
            index=self.index,
            class_labels=labels,
            guidance=settings.guidance if table is None else table.guidance,
            guidance_interval=interval,
            guidance_rescale=self.guidance_rescale,
            timestep_spacing=spacing,
            clip=model.clip if self.clip is None else self.clip,
            strength=self.strength,
            table=table.hash if table is not None else None,
            to_seed=self.to_seed,
            mix=self.mix,
            bit_depth=None if self.bit_depth == 8 else self.bit_depth,
        )

    def check_bounds(self, model: ModelInfo, limits: Limits, faults: Faults) -> None:
        """Add the parameters that are out of bounds, whatever the others are."""
        for field, ok in (
            ("sampler", self.sampler in (None, *model.samplers)),
            ("n", 1 <= self.n <= limits.max_n),
            ("steps", self.steps is None or 1 <= self.steps <= model.num_timesteps),
            ("index", self.index <= MAX_INDEX + 1 - self.n),
            ("bit_depth", self.bit_depth in (None, *bit_depths(model))),
        ):
            if not ok:
                faults.add(InvalidField.of(field, _bounds(model, limits)[field], getattr(self, field)))

    def decisive(self) -> dict[str, Any]:
        """Return the parameters, of those that are given, by which the settings are chosen; see defaults.py."""
        return {name: value for name in DECISIVE if (value := getattr(self, name)) is not None}

    def _check_walk(self, seed: int) -> None:
        if (self.to_seed is None) != (self.mix is None):
            missing, given = ("to_seed", "mix") if self.to_seed is None else ("mix", "to_seed")
            raise InvalidField.of(missing, f"given together with {given}", None)
        if self.to_seed == seed:  # the sum of a noise with itself is no noise
            raise InvalidField.of("to_seed", "different from seed", self.to_seed)

    def _table(self, model: ModelInfo, settings: Recommended) -> Table | None:
        """The checkpoint's table for this request; None for a sampler that has none. Raises InvalidField."""
        sampler = settings.sampler
        if sampler not in TABLE_SAMPLERS:
            for name in ("nearest", "table"):
                if getattr(self, name) is not None:
                    raise InvalidField.of(
                        name, f"absent for sampler {sampler}, which has no tables", getattr(self, name)
                    )
            return None
        if self.timestep_spacing is not None:
            bound = f"absent for sampler {sampler}: its table has the timesteps"
            raise InvalidField.of("timestep_spacing", bound, self.timestep_spacing)
        return choose_table(model, settings, take_nearest=bool(self.nearest), table_hash=self.table)

    def with_inputs(self, spec: SampleSpec, inputs: Inputs | None) -> SampleSpec:
        """Add the hashes of the inputs to the spec. Raises InvalidField where the request names other hashes."""
        if inputs is None:
            return spec
        for name, wanted, got in (
            ("image_sha256", self.image_sha256, inputs.image_sha256),
            ("mask_sha256", self.mask_sha256, inputs.mask_sha256),
        ):
            if wanted not in (None, got):
                raise InvalidField.of(name, f"that of the pixels sent, {got}", wanted)
        return replace(spec, image_sha256=inputs.image_sha256, mask_sha256=inputs.mask_sha256)

    def _check_edit(self, max_image_bytes: int, model: ModelInfo) -> None:
        if self.image is not None:
            check_uploads(model)
        for name in ("strength", "mask", "image_sha256", "mask_sha256"):
            if self.image is None and getattr(self, name) is not None:
                raise InvalidField.of("image", f"given together with {name}", None)
        if self.mask is None and self.mask_sha256 is not None:
            raise InvalidField.of("mask", "given together with mask_sha256", None)
        if self.image is not None and self.mask is None and self.strength is None:
            bound = "given with an image, or else a mask: it says how much is to change"
            raise InvalidField.of("strength", bound, None)
        for name, data in (("image", self.image), ("mask", self.mask)):
            if data is not None and len(data) > max_image_bytes:
                raise BodyTooLarge(len(data), max_image_bytes, name)

    def _check_guidance(self, guidance: float, model: ModelInfo, labels: tuple[int | None, ...] | None) -> None:
        if guidance == 1.0:
            for name in ("guidance_interval", "guidance_rescale"):
                if getattr(self, name) is not None:
                    raise InvalidField.of(name, "absent if guidance is 1 (off)", getattr(self, name))
        elif labels is None or model.null_class is None:
            what = "has no classes" if labels is None else "has no null class"
            raise InvalidField.of("guidance", f"1 (off): this model {what}", guidance)
        elif None in labels:
            raise InvalidField.of("guidance", "1 (off) if an image has no class_label", guidance)

    def _interval(self, num_timesteps: int) -> tuple[int, int] | None:
        given = self.guidance_interval
        if given is None:
            return None
        if len(given) != 2 or not 0 <= given[0] <= given[1] < num_timesteps:
            raise InvalidField.of("guidance_interval", _interval_bound(num_timesteps), given)
        return given[0], given[1]


def check_uploads(model: ModelInfo) -> None:
    """Raise InvalidField where no picture that can be sent is an image of the model."""
    if not model.fits_pictures:
        bound = f"absent: a picture holds {model.shown_channels} of this model's {model.channels} channels"
        raise InvalidField(f"image must be {bound}", field="image", value="a picture", bound=bound)


def _interval_bound(num_timesteps: int) -> str:
    return f"two integers [lo, hi] with 0 <= lo <= hi <= {num_timesteps - 1}"


def bit_depths(model: ModelInfo) -> tuple[int, ...]:
    """List the bit depths that a model's images come in: no format of pictures but PNG, of grey, is read in 16."""
    return BIT_DEPTHS if model.channels == 1 else (8, 32)


def check_pictures(spec: SampleSpec, model: ModelInfo, where: str) -> None:
    """Raise InvalidField for floats, where pictures alone are given."""
    if spec.depth == 32:
        depths = " or ".join(str(depth) for depth in bit_depths(model) if depth != 32)
        raise InvalidField.of("bit_depth", f"{depths} {where}", spec.depth)


def _bounds(model: ModelInfo, limits: Limits) -> dict[str, str]:
    """Say in words what each parameter must be."""
    return {
        "n": f"an integer in 1..{limits.max_n}",
        "steps": f"an integer in 1..{model.num_timesteps}",
        "sampler": f"one of {', '.join(model.samplers)}",
        "eta": "a number in 0..1",
        "seed": SEED_BOUND,
        "to_seed": SEED_BOUND,
        "mix": "a number in 0..1",
        "index": f"an integer in 0..{MAX_INDEX} less n - 1",
        "class_label": class_bound(model),
        "guidance": f"a number in 0..{MAX_GUIDANCE:g}",
        "guidance_interval": _interval_bound(model.num_timesteps),
        "guidance_rescale": "a number in 0..1",
        "timestep_spacing": f"one of {', '.join(SPACINGS)}",
        "nearest": "true or false",
        "table": "16 hexadecimal digits, in small letters",
        "clip": "true or false",
        "bit_depth": "8, 16 or 32" if model.channels == 1 else f"8 or 32 for {model.channels} channels; 16 is for one",
        "deadline_s": f"a number of seconds above 0, at most {MAX_DEADLINE_S:g}",
        "strength": "a number above 0, at most 1",
        "image": ENCODED_IMAGE,
        "mask": ENCODED_IMAGE,
        "image_sha256": "64 hexadecimal digits, in small letters",
        "mask_sha256": "64 hexadecimal digits, in small letters",
    }


def parameters_of(spec: SampleSpec) -> dict[str, Any]:
    """List the parameters that make this spec again, but for the pixels; the way back from `to_spec`."""
    parameters = spec.to_json()
    parameters["class_label"] = parameters.pop("class_labels")
    if spec.sampler != "ddim":
        del parameters["eta"]
    if spec.table is not None:
        del parameters["timestep_spacing"]
    as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}
    return {name: value for name, value in as_json.items() if value is not None}


def choose_table(
    model: ModelInfo, settings: Recommended, *, take_nearest: bool = False, table_hash: str | None = None
) -> Table:
    """Choose the table for these settings.

    take_nearest: of the tables that are guided, or not, as asked. Raises InvalidField, which lists what there is.
    """
    sampler, steps, guidance = settings.sampler, settings.steps, settings.guidance
    tables = [table for table in model.tables if table.sampler == sampler]
    there = steps_and_guidances(tables)
    of_kind = [table for table in tables if (table.guidance == 1) == (guidance == 1)]
    if not of_kind:
        raise InvalidField.of("guidance", f"one that {sampler} has a table for: {there}", guidance)
    if take_nearest:
        table = nearest(of_kind, steps, guidance)
    else:
        with_steps = [table for table in tables if table.steps == steps]
        fitting = [table for table in with_steps if table.guidance == guidance]
        if not fitting:
            field, value = ("guidance", guidance) if with_steps else ("steps", steps)
            raise InvalidField.of(field, f"one that {sampler} has a table for, or nearest=true: {there}", value)
        (table,) = fitting
    if table_hash not in (None, table.hash):
        raise InvalidField.of("table", f"that of the chosen table, {table.hash}", table_hash)
    return table


class NoiseRequest(RequestSchema):
    """How far an image is to go towards noise, and with which noise; in the query or in the form."""

    t: Int = Field(description="The timestep, from 0 (least noise) to T - 1. Required.")
    seed: Seed | None = Field(
        None, description="The seed of the noise. The answer has it in `X-Seed`.", json_schema_extra=default("drawn")
    )

    @classmethod
    def parse(cls, parameters: Mapping[str, Any], model: ModelInfo) -> "NoiseRequest":
        """Check names, types and bounds. Raises UnknownField or InvalidField."""
        bounds = {"t": f"an integer in 0..{model.num_timesteps - 1}", "seed": SEED_BOUND}
        request = cls.from_parameters(parameters, bounds.__getitem__)
        if not 0 <= request.t < model.num_timesteps:
            raise InvalidField.of("t", bounds["t"], request.t)
        return request


class FloatsRequest(RequestSchema):
    """What is asked of an answer of floats."""

    clip_output: Bool = Field(
        True,
        description="With `Accept: application/x-npy`: whether values beyond the model's range are clipped to it. Not "
        "to be confused with `clip`, which acts on x_0 at every step.",
        json_schema_extra=default("true"),
    )

    @classmethod
    def take_from(cls, parameters: dict[str, Any], media_type: str) -> bool:
        """Take and check clip_output; true where it is not given. Raises InvalidField for another media type."""
        own = cls.own_of(parameters)
        if own and media_type != NPY:
            bound = f"absent with Accept: {media_type}: pictures have no values beyond the range"
            raise InvalidField.of("clip_output", bound, own["clip_output"])
        return cls.from_parameters(own, lambda _name: "true or false").clip_output


class PreviewRequest(RequestSchema):
    """The frames of a running job: how often, of what, and how encoded."""

    every: Every | None = Field(
        None,
        description="Send a frame after every so many steps, counted in passes.",
        json_schema_extra=default("none"),
    )
    fps: Rate | None = Field(
        None,
        description="Send so many frames a second. Give `every` or `fps`, not both.",
        json_schema_extra=default("10"),
    )
    show: Show | list[Show] = Field(
        "x_t",
        description="What the frames show: `x_t`, the noisy image; `x_0`, the network's current estimate of the image; "
        "or a list of both.",
        json_schema_extra=default("`x_t` in a stream; for the events of a job none, which then have no pictures"),
    )
    frame_format: Literal["png", "webp", "jpeg"] = Field(
        "png",
        description="The format of the frames. `jpeg` is lossy and shows transparent parts over white.",
        json_schema_extra=default("`png`"),
    )
    layout: Literal["sheet", "images"] = Field(
        "sheet",
        description="`sheet`: one picture of all images. `images`: a picture for each image.",
        json_schema_extra=default("`sheet`"),
    )

    @classmethod
    def parse(cls, parameters: Mapping[str, Any]) -> Self:
        """Check names, types and bounds. Raises UnknownField or InvalidField."""
        request = cls.from_parameters(parameters, _PREVIEW_BOUNDS.__getitem__)
        if not 0 < len(request.shows) == len({*request.shows}):
            raise InvalidField.of("show", _PREVIEW_BOUNDS["show"], request.show)
        if request.every is not None and request.fps is not None:
            raise InvalidField.of("fps", "absent together with every", request.fps)
        return request

    @property
    def shows(self) -> tuple[Show, ...]:
        """What is shown, in the order asked for."""
        return (self.show,) if isinstance(self.show, str) else tuple(self.show)

    @property
    def pace(self) -> Pace:
        """How often frames are due."""
        return Pace(every=self.every) if self.every is not None else Pace(fps=self.fps or DEFAULT_FPS)


class StreamRequest(PreviewRequest):
    """The parameters of previews over a WebSocket, which may stay open for more jobs."""

    keep_open: Bool = Field(
        False, description="After the job, wait for another one instead of closing.", json_schema_extra=default("false")
    )


class AnimationRequest(RequestSchema):
    """What the frames of a job show, in an animation or as JSON; beside the parameters of SampleRequest."""

    every: Every = Field(
        description="With `Accept: image/webp` or `application/json`: a frame after every so many steps of each image, "
        "counted in passes. Required for `image/webp`.",
        json_schema_extra=default("no frames"),
    )
    show: Show | list[Show] = Field(
        "x_t",
        description="With `every`: what the frames show, `x_t` (the noisy image) or `x_0` (the network's estimate). "
        "With `application/json` also a list of both.",
        json_schema_extra=default("`x_t`"),
    )
    until: Step | None = Field(
        None,
        description="With `every` and `Accept: application/json`: the last step whose frame is wanted. No further "
        "step is taken or counted in a quota, and the answer has no images.",
        json_schema_extra=default("all steps"),
    )

    @classmethod
    def take_from(cls, parameters: dict[str, Any]) -> "AnimationRequest | None":
        """Take and check an animation's parameters; None where there are none. Raises InvalidField."""
        own = cls.own_of(parameters)
        if not own:
            return None
        if "every" not in own:
            name = next(iter(own))
            raise InvalidField.of(name, "absent without `every`", own[name])
        bounds = {
            "until": "an integer of at least 0",
            "every": EVERY_BOUND,
            "show": f"one of {', '.join(SHOWS)}, or with application/json a list of both",
        }
        asked = cls.from_parameters(own, bounds.__getitem__)
        if not 0 < len(asked.shows) == len(set(asked.shows)):
            raise InvalidField.of("show", bounds["show"], asked.show)
        return asked

    @property
    def shows(self) -> tuple[Show, ...]:
        """What is shown, in the order asked for."""
        return (self.show,) if isinstance(self.show, str) else tuple(self.show)


class TrajectoryRequest(RequestSchema):
    """What of a trajectory its file has; beside the parameters of SampleRequest."""

    keep: list[Int] | None = Field(
        None,
        description=f"With `Accept: {TRAJECTORY}`: the passes that the file has, counted from 0, in rising order. At "
        "least one of them has to add noise.",
        json_schema_extra=default("all"),
    )
    dtype: TrajectoryType = Field(
        "float32",
        description=f"With `Accept: {TRAJECTORY}`: the type that x_t, x_0 and the mean are rounded to.",
        json_schema_extra=default("`float32`"),
    )

    @classmethod
    def take_from(cls, parameters: dict[str, Any], num_timesteps: int, *, is_wanted: bool) -> Self:
        """Take and check the parameters of a trajectory. Raises InvalidField, also where none is wanted.

        num_timesteps: of the model; no sampler takes more passes.
        """
        own = cls.own_of(parameters)
        if own and not is_wanted:
            name = next(iter(own))
            raise InvalidField.of(name, f"absent without Accept: {TRAJECTORY}", own[name])
        if isinstance(alone := own.get("keep"), str):  # of a query
            own["keep"] = [alone]
        bounds = {"keep": f"a list of at most {num_timesteps} numbers of passes", "dtype": "float32 or float16"}
        return cls.from_parameters(own, bounds.__getitem__, num_timesteps)


class WebhookRequest(RequestSchema):
    """Who is told of a job, and of what: Cog's names."""

    webhook: str | None = Field(
        None,
        description="The URL that is sent the job when something happens to it. Only for durable jobs, and only in the "
        "body, not in the query.",
        json_schema_extra=default("none"),
    )
    webhook_events_filter: str | list[str] | None = Field(
        None,
        description="The events that `webhook` is told.",
        json_schema_extra=default("all"),
    )

    @classmethod
    def take_from(cls, parameters: dict[str, Any], allowed: AllowedReceivers | None) -> Webhook | None:
        """Take and check the parameters of a webhook; None where there are none. Raises InvalidField.

        allowed: who may be told beside public receivers; None: nobody may.
        """
        own = {name: value for name, value in cls.own_of(parameters).items() if value is not None}
        if not own:
            return None
        url = own.get("webhook")
        if url is None:
            raise InvalidField.of("webhook", "given together with webhook_events_filter", None)
        if not isinstance(url, str):
            raise refused("text", "")  # it may have a URL somewhere, and errors are logged
        if allowed is None:
            raise refused(OFF, url)
        asked = cls.from_parameters(
            own, {"webhook": "text", "webhook_events_filter": EVENTS_BOUND}.__getitem__, MOST_EVENTS
        )
        Receiver.parse(url, allowed)
        return Webhook(url, _events(asked.webhook_events_filter))


def _events(given: str | list[str] | None) -> tuple[Any, ...]:
    if given is None:
        return EVENTS
    names = [given] if isinstance(given, str) else given
    if not names or len({*names}) < len(names) or not {*names} <= {*EVENTS}:
        raise InvalidField.of("webhook_events_filter", EVENTS_BOUND, given)
    return tuple(event for event in EVENTS if event in names)
