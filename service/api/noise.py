"""POST /noise: the forward process. An uploaded image to x_t, by the model's own noise schedule."""

import asyncio
import hashlib
import json
from typing import Any

from fastapi import APIRouter, Request, Response
from starlette.requests import ClientDisconnect

from service.api import parameters
from service.api.conditional import matches
from service.api.multipart import BYTES, FORM, read_upload
from service.api.negotiation import negotiate
from service.api.noise_schemas import NoiseRequest
from service.errors import JobCancelled
from service.images.decoder import Decoder
from service.images.encoder import PNG, Encoder
from service.metrics import Metrics
from service.model_info import Limits, ModelInfo
from service.spec import Images
from service.worker.worker import Worker


def noise_routes(
    worker: Worker, decoder: Decoder, encoder: Encoder, metrics: Metrics, model: ModelInfo, limits: Limits
) -> APIRouter:
    """Make the route."""
    router = APIRouter(tags=["noise"])
    # One image at a time is with the worker, so that a tick of the running jobs does not wait for many: one of 32x32
    # pixels takes 0.15 ms, of 256x256 in colour 7 ms.
    turn = asyncio.Lock()

    async def noise(request: Request) -> Response:
        negotiate(", ".join(request.headers.getlist("accept")), (PNG,))
        query = parameters.from_query(request.query_params.multi_items())
        try:
            upload = await read_upload(request, limits.max_image_bytes)
        except ClientDisconnect:
            raise JobCancelled("the client went away") from None
        form = parameters.from_query(upload.fields, "the form")
        asked = NoiseRequest.parse(parameters.merge(query, form), model)
        assert asked.t is not None
        t, seed, alpha_bar = asked.t, asked.seed_or_drawn(), model.alpha_bar(asked.t)
        image = await decoder.decode(upload.data)
        recipe: dict[str, object] = {
            "noise": {"t": t, "seed": seed, "alpha_bar": alpha_bar},
            "fingerprint": model.fingerprint,
        }
        headers = {"X-Seed": str(seed), "X-Alpha-Bar": repr(alpha_bar), "X-Fingerprint": model.fingerprint}
        if asked.seed is None:
            headers["Cache-Control"] = "no-store"
        else:
            tag = _etag(recipe, image)
            headers |= {"ETag": tag, "Cache-Control": "no-cache"}
            if matches(request, tag):
                metrics.answered_without_work("not_modified")
                return Response(status_code=304, headers=headers)
        # In the worker's thread: another one that runs torch would slow every tick (see `load_engine`), and a second
        # Philox, in numpy, would be one more to keep equal to the bit.
        async with turn:
            read = await asyncio.wrap_future(worker.run(lambda engine: engine.noised(image[None], t, seed)))
        content = await encoder.encode_picture(lambda: read()[0], recipe)
        return Response(content, headers=headers, media_type=PNG)

    properties = NoiseRequest.model_json_schema()["properties"]
    file = {"type": "string", "format": "binary"}
    form_schema = {"type": "object", "properties": {"image": file, **properties}, "required": ["image"]}
    kinds = ("image/png", "image/jpeg", "image/webp", BYTES)
    openapi: dict[str, Any] = {
        "parameters": [
            {"name": name, "in": "query", "schema": schema, "description": schema["description"]}
            for name, schema in properties.items()
        ],
        "requestBody": {
            "required": True,
            "content": {**{kind: {"schema": file} for kind in kinds}, FORM: {"schema": form_schema}},
        },
        "responses": {
            "200": {"description": "x_t", "content": {PNG: {}}},
            "304": {"description": "The client has it: If-None-Match names this answer's ETag"},
        },
    }
    router.post(
        "/noise",
        summary="An image at step t of the forward process",
        response_class=Response,
        openapi_extra=openapi,
    )(noise)
    return router


def _etag(recipe: dict[str, object], image: Images) -> str:
    """The name of the answer's bytes: they are a function of what is asked and the pixels it is asked of."""
    name = hashlib.sha256(json.dumps([PNG, recipe, image.shape], sort_keys=True).encode() + image.tobytes())
    return f'"{name.hexdigest()[:32]}"'
