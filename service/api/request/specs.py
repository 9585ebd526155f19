"""Creates specs from request parameters, with the checks that depend on the model or on several parameters."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from tminus.model.catalogue import SAMPLER_FACTS, TABLE_SAMPLERS, Recommended, Rung, usual_settings
from tminus.model.sampler_tables import Table, nearest, steps_and_guidances
from tminus.model.timesteps import SPACINGS
from tminus.service.api.request.classes import class_numbers
from tminus.service.api.request.schemas import NOT_ADAPTIVE, SETTINGS, SampleRequest, bit_depths, bounds_of
from tminus.service.errors import BodyTooLarge, InvalidField, ValidationErrors
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.spec import Inputs, SampleSpec

SEED_BITS = 53  # number of bits in a seed drawn by the server; JavaScript's numbers hold it exactly
Labels = tuple[int | None, ...] | None


def spec_of(
    parameters: SampleRequest, model: ModelInfo, limits: Limits, draw: Callable[[int], int] = secrets.randbits
) -> SampleSpec:
    """Check the parameters against the model and the limits, and fill in the defaults.

    Raises InvalidField, which carries all errors, and BodyTooLarge.
    """
    errors, bounds = ValidationErrors(), bounds_of(model, limits)
    parameters.check_bounds(bounds, errors)
    _check_quality(parameters, errors)
    labels: Labels = None
    if "n" not in errors:
        with errors.collect():
            labels = class_numbers(parameters.class_label, parameters.n, model)
    seed = draw(SEED_BITS) if parameters.seed is None else parameters.seed
    for check in (partial(_check_seed_mix, seed), partial(_check_edit, limits.max_image_bytes, model)):
        with errors.collect():
            check(parameters)
    if parameters.clip and model.latent is not None and not model.clip:
        errors.add(InvalidField.of("clip", "absent or false: latents have no range to clip to", parameters.clip))
    interval = parameters.guidance_interval
    if interval is not None and not (len(interval) == 2 and 0 <= interval[0] <= interval[1] < model.num_timesteps):
        errors.add(InvalidField.of("guidance_interval", parameters.words("guidance_interval", bounds), interval))
    if "sampler" in errors:  # the other checks depend on the sampler
        errors.check()
    can_guide = model.null_class is not None and labels is not None and None not in labels
    settings = settings_of(parameters.decisive(), model, can_guide=can_guide)
    sampler, steps, table = settings.sampler, settings.steps, None
    if not errors.has("n", "steps", "class_label"):
        with errors.collect():
            table = _table_of(parameters, model, settings)
    spacing = model.timestep_spacings[sampler] if parameters.timestep_spacing is None else parameters.timestep_spacing
    if sampler not in TABLE_SAMPLERS and spacing not in SPACINGS:
        errors.add(InvalidField.of("timestep_spacing", parameters.words("timestep_spacing", bounds), spacing))
    if steps > (most := SAMPLER_FACTS[sampler].max_steps(model.num_timesteps)):
        errors.add(InvalidField.of("steps", f"1..{most} for {sampler}, which takes more passes than steps", steps))
    if parameters.eta is not None and sampler != "ddim":
        errors.add(InvalidField.of("eta", f"absent for sampler {sampler}: only ddim has it", parameters.eta))
    if not errors.has("n", "steps", "class_label", "guidance"):
        with errors.collect():
            _check_guidance(parameters, settings.guidance, model, labels)
    errors.check()
    return SampleSpec(
        n=parameters.n,
        steps=steps if table is None else table.steps,
        sampler=sampler,
        eta=parameters.eta or 0.0,
        seed=seed,
        index=parameters.index,
        class_labels=labels,
        guidance=settings.guidance if table is None else table.guidance,
        guidance_interval=None if interval is None else (interval[0], interval[1]),
        guidance_rescale=parameters.guidance_rescale,
        timestep_spacing=spacing,
        clip=model.clip if parameters.clip is None else parameters.clip,
        strength=parameters.strength,
        table=table.hash if table is not None else None,
        to_seed=parameters.to_seed,
        mix=parameters.mix,
        bit_depth=None if parameters.bit_depth == 8 else parameters.bit_depth,
    )


def spec_of_rung(
    rung: Rung, parameters: SampleRequest, spec: SampleSpec, model: ModelInfo, limits: Limits
) -> SampleSpec:
    """Return the spec of an adaptive request at one setting of a ladder. Raises InvalidField if the model lacks it.

    spec: that of the recommended setting. model, limits: those of the model that the rung names.
    """
    settings = settings_of_rung(rung, can_guide=_can_guide(spec)) | {"seed": spec.seed, "quality": None}
    return spec_of(parameters.model_copy(update=settings), model, limits)


def settings_of_rung(rung: Rung, *, can_guide: bool) -> dict[str, Any]:
    """Return the parameters that ask for a setting of a ladder. can_guide: see `settings_of`."""
    return {"sampler": rung.sampler, "steps": rung.steps, "guidance": rung.guidance if can_guide else 1.0}


def place_of(spec: SampleSpec, model: ModelInfo, ladder: Sequence[Rung], *, own: bool) -> str | None:
    """Return the place of a spec's setting in a ladder, such as 2/5, or None if it has none there.

    model: the model that makes the images. own: True if the ladder is this model's.
    """
    if spec.timestep_spacing != model.timestep_spacings.get(spec.sampler) or spec.eta:
        return None
    if spec.guidance_interval is not None or spec.guidance_rescale:
        return None
    for place, rung in enumerate(ladder, 1):
        settings = settings_of_rung(rung, can_guide=_can_guide(spec))
        is_its = rung.model == model.name or (own and rung.model is None)
        if is_its and settings == {name: getattr(spec, name) for name in SETTINGS}:
            return f"{place}/{len(ladder)}"
    return None


def _can_guide(spec: SampleSpec) -> bool:
    return spec.class_labels is not None and None not in spec.class_labels


def _check_quality(parameters: SampleRequest, errors: ValidationErrors) -> None:
    for name in NOT_ADAPTIVE if parameters.quality is not None else ():
        if (value := getattr(parameters, name)) is not None:
            errors.add(InvalidField.of(name, "absent with quality=adaptive, which chooses the setting", value))


def _check_seed_mix(seed: int, parameters: SampleRequest) -> None:
    if (parameters.to_seed is None) != (parameters.mix is None):
        missing, given = ("to_seed", "mix") if parameters.to_seed is None else ("mix", "to_seed")
        raise InvalidField.of(missing, f"given together with {given}", None)
    if parameters.to_seed == seed:  # a mix of a noise with itself would not have unit variance
        raise InvalidField.of("to_seed", "different from seed", parameters.to_seed)


def _check_edit(max_image_bytes: int, model: ModelInfo, parameters: SampleRequest) -> None:
    image, mask = parameters.image, parameters.mask
    if image is not None:
        check_uploads(model)
    for name in ("strength", "mask", "image_sha256", "mask_sha256"):
        if image is None and getattr(parameters, name) is not None:
            raise InvalidField.of("image", f"given together with {name}", None)
    if mask is None and parameters.mask_sha256 is not None:
        raise InvalidField.of("mask", "given together with mask_sha256", None)
    if image is not None and mask is None and parameters.strength is None:
        raise InvalidField.of("strength", "given with an image, or else a mask: it says how much is to change", None)
    for name, data in (("image", image), ("mask", mask)):
        if data is not None and len(data) > max_image_bytes:
            raise BodyTooLarge(len(data), max_image_bytes, name)


def check_uploads(model: ModelInfo) -> None:
    """Raise InvalidField if the model has more channels than a picture can hold."""
    if not model.fits_pictures:
        bound = f"absent: a picture holds {model.shown_channels} of this model's {model.channels} channels"
        raise InvalidField(f"image must be {bound}", field="image", value="a picture", bound=bound)


def _check_guidance(parameters: SampleRequest, guidance: float, model: ModelInfo, labels: Labels) -> None:
    if guidance == 1.0:
        for name in ("guidance_interval", "guidance_rescale"):
            if getattr(parameters, name) is not None:
                raise InvalidField.of(name, "absent if guidance is 1 (off)", getattr(parameters, name))
    elif labels is None or model.null_class is None:
        what = "has no classes" if labels is None else "has no null class"
        raise InvalidField.of("guidance", f"1 (off): this model {what}", guidance)
    elif None in labels:
        raise InvalidField.of("guidance", "1 (off) if an image has no class_label", guidance)


def refuse_float_depth(spec: SampleSpec, model: ModelInfo, where: str) -> None:
    """Raise InvalidField if the spec asks for floats. where: how the error's text ends."""
    if spec.depth == 32:
        depths = " or ".join(str(depth) for depth in bit_depths(model.channels) if depth != 32)
        raise InvalidField.of("bit_depth", f"{depths} {where}", spec.depth)


def with_inputs(spec: SampleSpec, parameters: SampleRequest, inputs: Inputs | None) -> SampleSpec:
    """Add the hashes of the decoded inputs to the spec. Raises InvalidField if the request states different hashes."""
    if inputs is None:
        return spec
    for name, wanted, got in (
        ("image_sha256", parameters.image_sha256, inputs.image_sha256),
        ("mask_sha256", parameters.mask_sha256, inputs.mask_sha256),
    ):
        if wanted not in (None, got):
            raise InvalidField.of(name, f"that of the pixels sent, {got}", wanted)
    return replace(spec, image_sha256=inputs.image_sha256, mask_sha256=inputs.mask_sha256)


# --- defaults of settings; LEFT_OUT in answers/operations.py lists these rules in a table ---


def settings_of(given: Mapping[str, Any], model: ModelInfo, *, can_guide: bool) -> Recommended:
    """Return the sampler, steps and guidance of a request, with defaults for those that are missing. Checks nothing.

    given: the parameters in the request, by name. can_guide: True if the model has a null class and every image of the
    request has a class.
    """
    return replace(_left_out(given, model, can_guide), **{name: given[name] for name in SETTINGS if name in given})


def _left_out(given: Mapping[str, Any], model: ModelInfo, can_guide: bool) -> Recommended:
    own = model.recommended
    if "table" in given and model.tables:  # a wrong hash is refused later, so any table will do until then
        named = [table for table in model.tables if table.hash == given["table"]]
        return _settings_of_table((named or model.tables)[0])
    sampler = given.get("sampler", model.default_sampler if "steps" in given else own.sampler)
    if "steps" in given or sampler != own.sampler:
        usual = usual_settings(model.num_timesteps, sampler)
        settings = replace(usual, steps=given.get("steps", usual.steps))
        return _as_a_table(settings, given, model, can_guide) if sampler in TABLE_SAMPLERS else settings
    own = replace(own, guidance=given.get("guidance", own.guidance if can_guide else 1.0))
    if sampler not in TABLE_SAMPLERS:
        return own
    if tables := tables_for(given, model, sampler, own.guidance):
        return _settings_of_table(nearest(tables, own.steps, own.guidance))
    usual = usual_settings(model.num_timesteps)
    if given.keys() & {"sampler", "nearest"} or usual.sampler not in model.samplers:
        return own  # refused later, unless `nearest` is set
    return replace(usual, guidance=own.guidance)


def _as_a_table(settings: Recommended, given: Mapping[str, Any], model: ModelInfo, can_guide: bool) -> Recommended:
    """Return the settings with the guidance of a matching table, and with its steps if the request sets no steps."""
    tables = [table for table in model.tables if table.sampler == settings.sampler]
    if "steps" in given and not given.get("nearest"):
        tables = [table for table in tables if table.steps == settings.steps]
    fitting = [table for table in tables if table.guidance == given.get("guidance", 1.0)]
    if not fitting and can_guide and "guidance" not in given:
        fitting = tables
    if not fitting:
        return settings  # refused later
    table = nearest(fitting, settings.steps, settings.guidance)
    return replace(settings, steps=given.get("steps", table.steps), guidance=table.guidance)


def tables_for(given: Mapping[str, Any], model: ModelInfo, sampler: str, guidance: float) -> list[Table]:
    """Return a sampler's tables with this guidance, or none if the request sets timestep_spacing."""
    if "timestep_spacing" in given:  # a table has its own timesteps
        return []
    return [table for table in model.tables if (table.sampler, table.guidance) == (sampler, guidance)]


def _settings_of_table(table: Table) -> Recommended:
    return Recommended(table.sampler, table.steps, table.guidance)


def named_by(given: Mapping[str, Any]) -> str:
    """Return which settings the request sets, as a metric label: table, both, sampler, steps or none."""
    if "table" in given:
        return "table"
    if given.keys() >= {"sampler", "steps"}:
        return "both"
    return next((name for name in ("sampler", "steps") if name in given), "none")


# --- tables ---


def _table_of(parameters: SampleRequest, model: ModelInfo, settings: Recommended) -> Table | None:
    """Return the checkpoint's table for this request, or None if the sampler uses no tables. Raises InvalidField."""
    sampler = settings.sampler
    if sampler not in TABLE_SAMPLERS:
        for name in ("nearest", "table"):
            if getattr(parameters, name) is not None:
                raise InvalidField.of(
                    name, f"absent for sampler {sampler}, which has no tables", getattr(parameters, name)
                )
        return None
    if parameters.timestep_spacing is not None:
        bound = f"absent for sampler {sampler}: its table has the timesteps"
        raise InvalidField.of("timestep_spacing", bound, parameters.timestep_spacing)
    return choose_table(model, settings, take_nearest=bool(parameters.nearest), table_hash=parameters.table)


def choose_table(
    model: ModelInfo, settings: Recommended, *, take_nearest: bool = False, table_hash: str | None = None
) -> Table:
    """Return the sampler table for these settings. Raises InvalidField, which lists the tables.

    take_nearest: also accept the nearest table. Even then, a guided request gets only guided tables, and an unguided
    request only unguided ones.
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


def parameters_of(spec: SampleSpec) -> dict[str, Any]:
    """Return parameters that make the same spec again, without the pixels. The inverse of `spec_of`."""
    parameters = spec.to_json()
    parameters["class_label"] = parameters.pop("class_labels")
    if spec.sampler != "ddim":
        del parameters["eta"]
    if spec.table is not None:
        del parameters["timestep_spacing"]
    as_json = {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}
    return {name: value for name, value in as_json.items() if value is not None}
