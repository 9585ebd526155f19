"""The parameters of /sample and /noise, as pydantic models. `to_spec` turns them into plain values."""

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from tminus.model.catalogue import MAX_GUIDANCE, SAMPLER_FACTS, SAMPLERS, TABLE_SAMPLERS
from tminus.model.sampler_tables import Table, nearest, steps_and_guidances
from tminus.model.timesteps import SPACINGS
from tminus.service.api.request.classes import class_bound, class_numbers
from tminus.service.api.request.fields import (
    ENCODED_IMAGE,
    MAX_ITEMS,
    MAX_SEED,
    SEED_BITS,
    SEED_BOUND,
    Bool,
    Float,
    Int,
    Picture,
    RequestSchema,
    Whole,
)
from tminus.service.errors import BodyTooLarge, InvalidField
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.spec import Inputs, SampleSpec

MAX_INDEX = 2**32 - 1
MAX_DEADLINE_S = 86_400.0
EDIT_PARAMETERS = {"strength", "image", "mask", "image_sha256", "mask_sha256"}
PICTURES = ("image", "mask")  # fields that may have megabytes of base64, or be files of a form
SHA256 = "^[0-9a-f]{64}$"
RESCALE_BOUND = "a number in 0..1"


class SampleRequest(RequestSchema):
    """The parameters of a sampling request, in query or JSON body. GET /model tells the bounds that vary by model."""

    n: Int = Field(1, description="how many images, 1..64 unless the server says otherwise; default 1")
    steps: Int | None = Field(None, description="denoising steps, 1..T; default T")
    sampler: str | None = Field(None, description=f"one of {', '.join(SAMPLERS)}; default: the checkpoint's own")
    eta: Float | None = Field(None, description="noise of ddim, 0..1; default 0")
    seed: Int | None = Field(None, description="0..2^64-1; drawn if absent, always echoed")
    index: Int = Field(
        0, description="index of the first image: image k of a request is made alone with index=k, n=1; default 0"
    )
    to_seed: Int | None = Field(
        None, description="another seed, 0..2^64-1: with mix, the noise is between those of the two; default: none"
    )
    mix: Float | None = Field(None, description="how far from seed (0) to to_seed (1); given where to_seed is")
    class_label: Whole | str | Annotated[list[Whole | str | None], Field(fail_fast=True)] | None = Field(
        None, description="a class by number or name, one for all images or a list of n; absent: no class"
    )
    guidance: Float = Field(1.0, description="classifier-free guidance scale, 0..50; 1, the default, is off")
    guidance_interval: Annotated[list[Int], Field(fail_fast=True)] | None = Field(
        None, description="the two timesteps, lowest and highest, between which guidance is on; default: all"
    )
    guidance_rescale: Float | None = Field(
        None, description="how far guidance is brought back to the spread of the conditional output, 0..1; default 0"
    )
    timestep_spacing: str | None = Field(
        None,
        description="leading, trailing, linspace or karras; default: the checkpoint's own, or karras for later solvers",
    )
    nearest: Bool | None = Field(
        None, description="with a sampler of tables: take the nearest steps and guidance that there are; default: false"
    )
    table: str | None = Field(
        None, pattern="^[0-9a-f]{16}$", description="hash that the checkpoint's table must have; default: any"
    )
    clip: Bool | None = Field(
        None, description="clip x_0 to the data range at each step; default: the checkpoint's own"
    )
    deadline_s: Float | None = Field(
        None, description="seconds from now: refused at once if it cannot be met, given up when it passes"
    )
    strength: Float | None = Field(
        None, description="with an image: share of the steps to run again, above 0, at most 1"
    )
    image: Picture | None = Field(
        None, description="image to start from (with strength) or to edit (with mask): PNG, JPEG or WebP"
    )
    mask: Picture | None = Field(
        None, description="white where the image is regenerated, black where it is kept: PNG, JPEG or WebP"
    )
    image_sha256: str | None = Field(
        None, pattern=SHA256, description="SHA-256 that the decoded image must have, at the model's size; default: any"
    )
    mask_sha256: str | None = Field(
        None, pattern=SHA256, description="SHA-256 that the decoded mask must have, at the model's size; default: any"
    )

    @classmethod
    def parse(cls, parameters: Mapping[str, Any], model: ModelInfo, limits: Limits) -> "SampleRequest":
        """Check names and types. Raises InvalidField, InvalidImage or UnknownField for the first thing wrong."""
        max_items = max(limits.max_n, MAX_ITEMS)
        return cls.from_parameters(parameters, lambda field: _bounds(model, limits)[field], max_items)

    def to_spec(self, model: ModelInfo, limits: Limits, draw: Callable[[int], int] = secrets.randbits) -> SampleSpec:
        """Check the values against the model and the limits, and fill in what was left out. Raises InvalidField."""
        sampler = model.default_sampler if self.sampler is None else self.sampler
        if sampler not in model.samplers:
            raise InvalidField.of("sampler", _bounds(model, limits)["sampler"], sampler)
        most = SAMPLER_FACTS[sampler].max_steps(model.num_timesteps)
        table = self._table(model, sampler)
        steps = table.steps if table is not None else most if self.steps is None else self.steps
        seed = draw(SEED_BITS) if self.seed is None else self.seed
        spacing = model.timestep_spacings[sampler] if self.timestep_spacing is None else self.timestep_spacing
        for field, ok in (
            ("n", 1 <= self.n <= limits.max_n),
            ("steps", 1 <= steps <= model.num_timesteps),
            ("eta", self.eta is None or 0 <= self.eta <= 1),
            ("seed", 0 <= seed <= MAX_SEED),
            ("to_seed", self.to_seed is None or 0 <= self.to_seed <= MAX_SEED),
            ("mix", self.mix is None or 0 <= self.mix <= 1),
            ("index", 0 <= self.index <= MAX_INDEX + 1 - self.n),
            ("timestep_spacing", spacing in SPACINGS or table is not None),
            ("deadline_s", self.deadline_s is None or 0 < self.deadline_s <= MAX_DEADLINE_S),
            ("strength", self.strength is None or 0 < self.strength <= 1),
        ):
            if not ok:
                raise InvalidField.of(field, _bounds(model, limits)[field], getattr(self, field))
        if steps > most:
            raise InvalidField.of("steps", f"1..{most} for {sampler}, which takes more passes than steps", steps)
        if self.eta is not None and sampler != "ddim":
            raise InvalidField.of("eta", f"absent for sampler {sampler}: only ddim has it", self.eta)
        self._check_walk(seed)
        self._check_edit(limits.max_image_bytes)
        labels = class_numbers(self.class_label, self.n, model)
        self._check_guidance(model, labels)
        if self.clip and model.latent is not None and not model.clip:
            raise InvalidField.of("clip", "absent or false: latents have no range to clip to", self.clip)
        return SampleSpec(
            n=self.n,
            steps=steps,
            sampler=sampler,
            eta=self.eta or 0.0,
            seed=seed,
            index=self.index,
            class_labels=labels,
            guidance=table.guidance if table is not None else self.guidance,
            guidance_interval=self._interval(model.num_timesteps),
            guidance_rescale=self.guidance_rescale,
            timestep_spacing=spacing,
            clip=model.clip if self.clip is None else self.clip,
            strength=self.strength,
            table=table.hash if table is not None else None,
            to_seed=self.to_seed,
            mix=self.mix,
        )

    def _check_walk(self, seed: int) -> None:
        if (self.to_seed is None) != (self.mix is None):
            missing, given = ("to_seed", "mix") if self.to_seed is None else ("mix", "to_seed")
            raise InvalidField.of(missing, f"given where {given} is", None)
        if self.to_seed == seed:  # the sum of a noise with itself is no noise
            raise InvalidField.of("to_seed", "another than seed", self.to_seed)

    def _table(self, model: ModelInfo, sampler: str) -> Table | None:
        """The checkpoint's table for this request; None for a sampler that has none. Raises InvalidField."""
        if not 0 <= self.guidance <= MAX_GUIDANCE:
            raise InvalidField.of("guidance", f"a number in 0..{MAX_GUIDANCE:g}", self.guidance)
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
        if self.steps is not None and not 1 <= self.steps <= model.num_timesteps:
            raise InvalidField.of("steps", f"an integer in 1..{model.num_timesteps}", self.steps)
        return choose_table(
            model, sampler, self.steps, self.guidance, take_nearest=bool(self.nearest), table_hash=self.table
        )

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

    def _check_edit(self, max_image_bytes: int) -> None:
        for name in ("strength", "mask", "image_sha256", "mask_sha256"):
            if self.image is None and getattr(self, name) is not None:
                raise InvalidField.of("image", f"given where {name} is", None)
        if self.mask is None and self.mask_sha256 is not None:
            raise InvalidField.of("mask", "given where mask_sha256 is", None)
        if self.image is not None and self.mask is None and self.strength is None:
            bound = "given with an image, or else a mask: it says how much is to change"
            raise InvalidField.of("strength", bound, None)
        for name, data in (("image", self.image), ("mask", self.mask)):
            if data is not None and len(data) > max_image_bytes:
                raise BodyTooLarge(len(data), max_image_bytes, name)

    def _check_guidance(self, model: ModelInfo, labels: tuple[int | None, ...] | None) -> None:
        if self.guidance == 1.0:
            for name in ("guidance_interval", "guidance_rescale"):
                if getattr(self, name) is not None:
                    raise InvalidField.of(name, "absent where guidance is 1 (off)", getattr(self, name))
        elif labels is None or model.null_class is None:
            what = "has no classes" if labels is None else "has no null class"
            raise InvalidField.of("guidance", f"1 (off): this model {what}", self.guidance)
        elif None in labels:
            raise InvalidField.of("guidance", "1 (off) where an image has no class_label", self.guidance)
        if self.guidance_rescale is not None and not 0 <= self.guidance_rescale <= 1:
            raise InvalidField.of("guidance_rescale", RESCALE_BOUND, self.guidance_rescale)

    def _interval(self, num_timesteps: int) -> tuple[int, int] | None:
        given = self.guidance_interval
        if given is None:
            return None
        if len(given) != 2 or not 0 <= given[0] <= given[1] < num_timesteps:
            raise InvalidField.of("guidance_interval", _interval_bound(num_timesteps), given)
        return given[0], given[1]


class NoiseRequest(RequestSchema):
    """How far an image is to go towards noise, and with which noise; in the query or in the form."""

    t: Int = Field(description="the timestep, 0 (least noise) .. T-1; required")
    seed: Int | None = Field(None, description="0..2^64-1; drawn if absent, always echoed")

    @classmethod
    def parse(cls, parameters: Mapping[str, Any], model: ModelInfo) -> "NoiseRequest":
        """Check names, types and bounds. Raises InvalidField or UnknownField for the first thing wrong."""
        bounds = {"t": f"an integer in 0..{model.num_timesteps - 1}", "seed": SEED_BOUND}
        request = cls.from_parameters(parameters, bounds.__getitem__)
        if not 0 <= request.t < model.num_timesteps:
            raise InvalidField.of("t", bounds["t"], request.t)
        if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
            raise InvalidField.of("seed", bounds["seed"], request.seed)
        return request


def _interval_bound(num_timesteps: int) -> str:
    return f"two integers [lo, hi] with 0 <= lo <= hi <= {num_timesteps - 1}"


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
        "guidance_rescale": RESCALE_BOUND,
        "timestep_spacing": f"one of {', '.join(SPACINGS)}",
        "nearest": "true or false",
        "table": "16 hexadecimal digits, in small letters",
        "clip": "true or false",
        "deadline_s": f"a number of seconds above 0, at most {MAX_DEADLINE_S:g}",
        "strength": "a number above 0, at most 1",
        "image": ENCODED_IMAGE,
        "mask": ENCODED_IMAGE,
        "image_sha256": "64 hexadecimal digits, in small letters",
        "mask_sha256": "64 hexadecimal digits, in small letters",
    }


def parameters_of(spec: SampleSpec) -> dict[str, Any]:
    """List the parameters that make this spec again, but for the pixels; the way back from `to_spec`."""
    labels = list(spec.class_labels) if spec.class_labels is not None else None
    parameters = {
        "n": spec.n,
        "steps": spec.steps,
        "sampler": spec.sampler,
        "eta": spec.eta if spec.sampler == "ddim" else None,
        "seed": spec.seed,
        "index": spec.index,
        "to_seed": spec.to_seed,
        "mix": spec.mix,
        "class_label": labels,
        "guidance": spec.guidance,
        "guidance_interval": list(spec.guidance_interval) if spec.guidance_interval is not None else None,
        "guidance_rescale": spec.guidance_rescale,
        "timestep_spacing": spec.timestep_spacing if spec.table is None else None,
        "table": spec.table,
        "clip": spec.clip,
        "strength": spec.strength,
        "image_sha256": spec.image_sha256,
        "mask_sha256": spec.mask_sha256,
    }
    return {name: value for name, value in parameters.items() if value is not None}


def choose_table(
    model: ModelInfo,
    sampler: str,
    steps: int | None,
    guidance: float,
    *,
    take_nearest: bool = False,
    table_hash: str | None = None,
) -> Table:
    """Choose the table for these steps and this guidance, where 1 is off; steps None takes those recommended.

    take_nearest: of the tables that are guided, or not, as asked. Raises InvalidField, which lists what there is.
    """
    tables = [table for table in model.tables if table.sampler == sampler]
    there = steps_and_guidances(tables)
    of_kind = [table for table in tables if (table.guidance == 1) == (guidance == 1)]
    if steps is None:
        own = model.recommended
        steps = own.steps if own is not None and own.sampler == sampler else max(table.steps for table in tables)
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
        raise InvalidField.of("table", f"that of the table taken, {table.hash}", table_hash)
    return table
