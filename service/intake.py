"""From a request to what it asks for: parameters in query and body, and the headers that say how to answer."""

import hashlib
import json
import re

from fastapi import Request
from starlette.requests import ClientDisconnect

from service import parameters
from service.errors import InvalidField, JobCancelled
from service.job import Limits, ModelInfo
from service.schemas import SampleRequest
from service.store import Key

KEY = re.compile(r"[\x20-\x7e]{1,255}")


async def read_request(request: Request, model: ModelInfo, limits: Limits) -> SampleRequest:
    """Read the parameters of a job. Raises what parameters and SampleRequest.parse do."""
    query = parameters.from_query(request.query_params.multi_items())
    try:
        body = parameters.from_body(await request.body())
    except ClientDisconnect:
        raise JobCancelled("the client went away") from None
    return SampleRequest.parse(parameters.merge(query, body), model, limits)


def idempotency_key(request: Request, asked: SampleRequest) -> Key | None:
    """The Idempotency-Key, with a hash of what it came with; a structured-field string may be quoted or not."""
    given = request.headers.get("idempotency-key")
    if given is None:
        return None
    name = given.strip().removeprefix('"').removesuffix('"').strip()
    if not KEY.fullmatch(name):
        raise InvalidField.of("Idempotency-Key", "1 to 255 printable ASCII characters", given)
    document = json.dumps(asked.model_dump(), sort_keys=True)
    return Key(name, hashlib.sha256(document.encode()).hexdigest())


def prefers_async(request: Request) -> bool:
    """Whether Prefer has respond-async (RFC 7240, section 4.1)."""
    headers = ",".join(request.headers.getlist("prefer"))
    return any(part.partition(";")[0].strip().lower() == "respond-async" for part in headers.split(","))
