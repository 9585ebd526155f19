"""What the OpenAPI document says of /v1: bodies, answers, and errors in OpenAI's form."""

from pydantic.json_schema import models_json_schema

from tminus.service.api.answers.openapi import FAILURES, FILE, IDEMPOTENCY_KEY, Contract, Described, closed_object, ref
from tminus.service.api.openai.answers import CompletedImage, ErrorAnswer, ImagesAnswer, PartialImage
from tminus.service.api.openai.schemas import EXTENSIONS, MAX_N, OF_EDITS, EditsRequest, ImagesRequest
from tminus.service.api.request.multipart import FORM
from tminus.service.api.request.schemas import PICTURES, SampleRequest
from tminus.service.images.encoder import JSON

EVENTS = "text/event-stream"
OF_THESE = {400: "A member is invalid, unknown or given twice, or the body cannot be parsed", 404: FAILURES[404]}
FILES = {
    "image": "the image to edit, of the model's size: PNG, JPEG or WebP; without mask and strength it is its own mask",
    "mask": "transparent where the image is made new: PNG or WebP, of the same size",
}


def openai_failures(*statuses: int) -> dict[int | str, Described]:
    """Describe the errors of a call, by status."""
    content = {JSON: {"schema": ref("ErrorAnswer")}}
    return {status: {"description": OF_THESE.get(status, FAILURES[status]), "content": content} for status in statuses}


IMAGES: Described = {
    "description": "The images; with `stream` server-sent events, each a PartialImage or a CompletedImage",
    "content": {JSON: {"schema": ref("ImagesAnswer")}, EVENTS: {"schema": {"type": "string"}}},
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
    """Make the components that the above refers to."""
    shown = [(model, "serialization") for model in (ErrorAnswer, ImagesAnswer, PartialImage, CompletedImage)]
    _, answers = models_json_schema(shown, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    members = _fields(contract, ImagesRequest, EXTENSIONS, as_text=False)
    # A member that is null counts as left out.
    members = {name: field if name == "prompt" else _or_null(field) for name, field in members.items()}
    fields = _fields(contract, EditsRequest, OF_EDITS, as_text=True)
    files = {name: FILE | {"description": described} for name, described in FILES.items()}
    return {
        **answers["$defs"],
        "ImageGenerationRequest": closed_object("What to sample, in OpenAI's members.", members)
        | {"required": ["prompt"]},
        "ImageEditForm": closed_object("What to edit, in OpenAI's members.", fields | files)
        | {"required": ["prompt", "image"]},
    }


def _fields(
    contract: Contract, schema: type[ImagesRequest], extensions: tuple[str, ...], *, as_text: bool
) -> dict[str, Described]:
    bounds = {"n": {"integer": {"minimum": 1, "maximum": min(MAX_N, contract.limits.max_n)}}}
    more = contract.fields(SampleRequest, as_text=as_text)
    own = contract.fields(schema, as_text=as_text, bounds=bounds)
    assert not own.keys() & {*extensions, *PICTURES}
    return own | {name: more[name] for name in extensions}


def _or_null(field: Described) -> Described:
    kinds = field["anyOf"] if "anyOf" in field else [{k: v for k, v in field.items() if k != "description"}]
    null = [] if {"type": "null"} in kinds else [{"type": "null"}]
    return {"description": field["description"], "anyOf": [*kinds, *null]}
