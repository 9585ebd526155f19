"""From a request to what it asks for: parameters in query and body, images, and the headers that say how to answer."""

import hashlib
import json
import re
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from service.api import parameters
from service.api.multipart import FORM, is_form, read_form
from service.api.parameters import PICTURES
from service.api.schemas import SampleRequest
from service.errors import BodyTooLarge, InvalidField, JobCancelled
from service.images.decoder import Decoder
from service.jobs.store import Key
from service.model_info import Limits, ModelInfo
from service.spec import Inputs, SampleSpec

KEY = re.compile(r"[\x20-\x7e]{1,255}")
EDIT_PARAMETERS = {"strength", "image", "mask", "image_sha256", "mask_sha256"}
_SCHEMA = SampleRequest.model_json_schema()
QUERY_PARAMETERS = [
    {"name": name, "in": "query", "schema": schema, "description": schema.get("description", "")}
    for name, schema in _SCHEMA["properties"].items()
    if name not in PICTURES
]
_FILES = {
    name: {"type": "string", "format": "binary", "description": _SCHEMA["properties"][name]["description"]}
    for name in PICTURES
}
REQUEST_BODY = {
    "content": {
        "application/json": {"schema": _SCHEMA},
        FORM: {"schema": _SCHEMA | {"properties": _SCHEMA["properties"] | _FILES}},
    }
}


async def read_request(request: Request, model: ModelInfo, limits: Limits) -> SampleRequest:
    """Read the parameters of a job. Raises what read_parameters and SampleRequest.parse do."""
    return SampleRequest.parse(await read_parameters(request, limits), model, limits)


async def read_parameters(request: Request, limits: Limits) -> dict[str, Any]:
    """Read parameters from query and body. Raises what parameters and forms do."""
    query = parameters.from_query(request.query_params.multi_items())
    for name in query.keys() & PICTURES:
        bound = f"in the body, base64 in JSON or a file of a form (curl -F {name}=@file), not in the query"
        raise InvalidField.of(name, bound, query[name])
    try:
        body = await (_read_form if is_form(request) else _read_json)(request, limits)
    except ClientDisconnect:
        raise JobCancelled("the client went away") from None
    return parameters.merge(query, body)


async def _read_form(request: Request, limits: Limits) -> dict[str, Any]:
    form = await read_form(request, limits.max_image_bytes, PICTURES)
    return {**parameters.from_query(form.fields, "the form"), **form.files}


async def _read_json(request: Request, limits: Limits) -> dict[str, Any]:
    """Read a JSON body, which may be large for its pictures only; else it is not read to its end."""
    body, dear = bytearray(), 0
    async for chunk in request.stream():
        body += chunk
        dear += parameters.structure_bytes(chunk)
        if dear > limits.max_body_bytes:
            raise BodyTooLarge(dear, limits.max_body_bytes)
    return parameters.from_body(bytes(body), limits.max_body_bytes)


async def to_job(
    asked: SampleRequest, model: ModelInfo, limits: Limits, decoder: Decoder
) -> tuple[SampleSpec, Inputs | None]:
    """Check the parameters, then decode the images. Raises what SampleRequest.to_spec and Decoder.inputs do."""
    spec = asked.to_spec(model, limits)
    inputs = await decoder.inputs(asked.image, asked.mask)
    return asked.with_inputs(spec, inputs), inputs


def idempotency_key(request: Request, asked: SampleRequest) -> Key | None:
    """The Idempotency-Key, with a hash of what it came with; a structured-field string may be quoted or not."""
    header = request.headers.get("idempotency-key")
    if header is None:
        return None
    name = header.strip().removeprefix('"').removesuffix('"').strip()
    if not KEY.fullmatch(name):
        raise InvalidField.of("Idempotency-Key", "1 to 255 printable ASCII characters", header)
    # Without what has its default, so that a key outlives a version that knows more parameters.
    given = asked.model_dump(exclude=EDIT_PARAMETERS, exclude_defaults=True)
    document = json.dumps(given | _edit_of(asked), sort_keys=True)
    return Key(name, hashlib.sha256(document.encode()).hexdigest())


def _edit_of(asked: SampleRequest) -> dict[str, object]:
    """What is asked for of an edit, the images by their hashes; of no edit nothing."""
    given = asked.model_dump(include=EDIT_PARAMETERS, exclude_none=True)
    return {k: hashlib.sha256(v).hexdigest() if isinstance(v, bytes) else v for k, v in given.items()}


def prefers_async(request: Request) -> bool:
    """Whether Prefer has respond-async (RFC 7240, section 4.1)."""
    headers = ",".join(request.headers.getlist("prefer"))
    return any(part.partition(";")[0].strip().lower() == "respond-async" for part in headers.split(","))
