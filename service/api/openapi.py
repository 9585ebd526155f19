"""OpenAPI descriptions of parameters, headers and bodies that handlers read themselves. No handler lives here."""

from typing import Any

from service.api.fields import RequestSchema
from service.api.multipart import BYTES, FORM
from service.api.previews import PreviewRequest
from service.api.schemas import PICTURES, AnimationRequest, NoiseRequest, SampleRequest

Described = dict[str, Any]  # a part of an OpenAPI document

FILE: Described = {"type": "string", "format": "binary"}


def _query(schema: type[RequestSchema]) -> list[Described]:
    """A schema's fields as parameters of the query; pictures do not fit there."""
    return [
        {"name": name, "in": "query", "schema": field, "description": field["description"]}
        for name, field in schema.model_json_schema()["properties"].items()
        if name not in PICTURES
    ]


def _header(name: str, schema: Described, description: str) -> Described:
    return {"name": name, "in": "header", "schema": schema, "description": description}


def _sample_body() -> Described:
    schema = SampleRequest.model_json_schema()
    properties = schema["properties"]
    files = {name: FILE | {"description": properties[name]["description"]} for name in PICTURES}
    form = schema | {"properties": properties | files}
    return {"content": {"application/json": {"schema": schema}, FORM: {"schema": form}}}


def _noise_body() -> Described:
    properties = {"image": FILE, **NoiseRequest.model_json_schema()["properties"]}
    form = {"type": "object", "properties": properties, "required": ["image"]}
    images = ("image/png", "image/jpeg", "image/webp", BYTES)
    return {"required": True, "content": {**{kind: {"schema": FILE} for kind in images}, FORM: {"schema": form}}}


SAMPLE_QUERY = _query(SampleRequest) + _query(AnimationRequest)
SAMPLE_BODY = _sample_body()
NOISE_QUERY = _query(NoiseRequest)
NOISE_BODY = _noise_body()
PREVIEW_QUERY = _query(PreviewRequest)
IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    {"type": "string", "maxLength": 255},
    "makes a retry safe: the same key and parameters are the same job",
)
LAST_EVENT_ID = _header("Last-Event-ID", {"type": "string"}, "what was received last; only what is newer is sent")


def contents(*media_types: str) -> Described:
    """A response's content by media type, none of which is described further."""
    return {"content": {media_type: {} for media_type in media_types}}
