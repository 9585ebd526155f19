"""Pydantic models of the responses below /v1, in OpenAI's format, and their OpenAPI descriptions.

Descriptions mark the members that tminus adds to OpenAI's.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic.json_schema import models_json_schema

from tminus.service.api.answers.headers import OF_JOB, with_headers
from tminus.service.api.answers.openapi import (
    FILE,
    IDEMPOTENCY_KEY,
    Contract,
    Described,
    closed_object,
    ref,
)
from tminus.service.api.openai.schemas import EditsCall, ImagesCall, bounds_of_images
from tminus.service.api.request.multipart import FORM
from tminus.service.api.request.schemas import DIFFUSERS_NAMES
from tminus.service.images.encoder import JSON
from tminus.service.spec import SampleSpec

OURS = "An addition of tminus: "
EVENTS = "text/event-stream"
FILES = {
    "image": "The image to edit, in the model's size: PNG, JPEG or WebP. Without `mask` and `strength`, it is its own "
    "mask.",
    "mask": "Transparent where the image is made new: PNG or WebP, in the same size.",
}


class ErrorMembers(BaseModel):
    """What went wrong."""

    message: str = Field(description="What is wrong, for people.")
    type: str = Field(description="The kind of error, by its status.")
    param: str | None = Field(description="The member that has to be changed.")
    code: str = Field(description="What programs go by: it stays the same.")


class ErrorAnswer(BaseModel):
    """An error in OpenAI's format."""

    error: ErrorMembers


class ModelEntry(BaseModel):
    """A served model."""

    id: str = Field(description="The name of the model.")
    object: Literal["model"] = "model"
    created: int = Field(description="When the model was loaded: Unix time in seconds.")
    owned_by: Literal["tminus"] = "tminus"


class ModelEntries(BaseModel):
    """The served models, the default model first."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class TokenDetails(BaseModel):
    """Always zero: this server does not count tokens."""

    image_tokens: int = 0
    text_tokens: int = 0


class Usage(BaseModel):
    """Always zero: this server does not count tokens, but typed clients require these members."""

    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int = 0
    input_tokens_details: TokenDetails = TokenDetails()


class Recipe(BaseModel):
    """The parameters that produced an image."""

    revised_prompt: str = Field(description="The name of the class that was used; empty for none.")
    seed: int = Field(description=OURS + "the seed of the noise, together with `index`, `to_seed` and `mix`.")
    to_seed: int | None = Field(description=OURS + "the second seed. Null where there is one seed.")
    mix: float | None = Field(
        description=OURS + "how far the noise is from `seed` (0) to `to_seed` (1). Null where there is one seed."
    )
    index: int = Field(
        description=OURS + "the index of the image. `POST /sample` makes it alone with this `index` and `n=1`."
    )
    steps: int = Field(description=OURS + "the number of denoising steps.")
    sampler: str = Field(description=OURS + "the sampler.")
    guidance: float = Field(description=OURS + "the guidance scale. 1 is off.")
    guidance_interval: list[int] | None = Field(
        description=OURS + "the timesteps at which guidance is on. Null for all."
    )
    class_label: int | None = Field(description=OURS + "the class, by its number.")
    fingerprint: str = Field(description=OURS + "the fingerprint of the build that made the image.")
    job_id: str = Field(description=OURS + "the id of the job that made it.")


class ImageEntry(Recipe):
    """One image, either as `b64_json` or as `url`."""

    b64_json: str | None = Field(None, json_schema_extra={"format": "byte"})
    url: str | None = Field(None, description="Where the image is, for as long as the job is kept; it may want a key.")


class ImagesAnswer(BaseModel):
    """All images of a request."""

    created: int = Field(description="Unix time in seconds.")
    background: Literal["opaque", "transparent"]
    output_format: str
    quality: str
    size: str
    usage: Usage = Usage()
    data: list[ImageEntry]


class PartialImage(BaseModel):
    """An event with a preview of one image: the current estimate of x_0."""

    type: str
    b64_json: str
    partial_image_index: int = Field(description="From 0.")
    created_at: int
    size: str
    quality: str
    background: Literal["opaque", "transparent"]
    output_format: str
    image_index: int = Field(description=OURS + "which of the n images, from 0.")


class CompletedImage(Recipe):
    """An event with one finished image."""

    type: str
    b64_json: str
    created_at: int
    size: str
    quality: str
    background: Literal["opaque", "transparent"]
    output_format: str
    usage: Usage = Usage()
    image_index: int = Field(description=OURS + "which of the n images, from 0.")


def recipe_of(spec: SampleSpec, k: int, class_names: tuple[str, ...], fingerprint: str, job_id: str) -> dict[str, Any]:
    """Return the members of a Recipe for image k of a job."""
    label = spec.class_labels[k] if spec.class_labels is not None else None
    return {
        "revised_prompt": "" if label is None else class_names[label],
        "seed": spec.seed,
        "to_seed": spec.to_seed,
        "mix": spec.mix,
        "index": spec.index + k,
        "steps": spec.steps,
        "sampler": spec.sampler,
        "guidance": spec.guidance,
        "guidance_interval": None if spec.guidance_interval is None else list(spec.guidance_interval),
        "class_label": label,
        "fingerprint": fingerprint,
        "job_id": job_id,
    }


IMAGES: Described = {
    "description": "The images; with `stream` server-sent events, each a PartialImage or a CompletedImage",
    "content": {JSON: {"schema": ref("ImagesAnswer")}, EVENTS: {"schema": {"type": "string"}}},
    **with_headers(*OF_JOB, "Server-Timing", "Cache-Control"),
}
GENERATIONS: Described = {
    "requestBody": {"required": True, "content": {JSON: {"schema": ref("ImageGenerationRequest")}}},
    "parameters": [IDEMPOTENCY_KEY],
}
EDITS: Described = {
    "requestBody": {"required": True, "content": {FORM: {"schema": ref("ImageEditForm")}}},
    "parameters": [IDEMPOTENCY_KEY],
}


def components(contract: Contract) -> dict[str, Described]:
    """Return the schema components that the descriptions above refer to."""
    shown = [(model, "serialization") for model in (ErrorAnswer, ImagesAnswer, PartialImage, CompletedImage)]
    _, answers = models_json_schema(shown, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    members = _fields(contract, ImagesCall, as_text=False)
    # A member may also be null, which means the same as leaving it out.
    members = {name: field if name == "prompt" else _or_null(field) for name, field in members.items()}
    fields = _fields(contract, EditsCall, as_text=True)
    files = {name: FILE | {"description": described} for name, described in FILES.items()}
    return {
        **answers["$defs"],
        "ImageGenerationRequest": closed_object("What to sample, in OpenAI's members.", members)
        | {"required": ["prompt"]},
        "ImageEditForm": closed_object("What to edit, in OpenAI's members.", fields | files)
        | {"required": ["prompt", "image"]},
    }


def _fields(contract: Contract, kind: type[ImagesCall], *, as_text: bool) -> dict[str, Described]:
    bounds = bounds_of_images({}, contract.limits)
    fields = contract.fields(kind, as_text=as_text, bounds=bounds)
    others = {
        name: fields[ours] | {"description": f"Another name of `{ours}`."} for name, ours in DIFFUSERS_NAMES.items()
    }
    return fields | others


def _or_null(field: Described) -> Described:
    kinds = field["anyOf"] if "anyOf" in field else [{k: v for k, v in field.items() if k != "description"}]
    null = [] if {"type": "null"} in kinds else [{"type": "null"}]
    return {"description": field["description"], "anyOf": [*kinds, *null]}
