"""POST /noise: turns an uploaded image into x_t by the forward process, with the model's own noise schedule."""

import asyncio
import hashlib
import json
import secrets
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from tminus.service.api.answers.openapi import (
    BODY_ERRORS,
    IF_NONE_MATCH,
    NOISE_BODY,
    NOISED,
    Contract,
    failures,
)
from tminus.service.api.answers.operations import described
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models, Services
from tminus.service.api.request.multipart import BYTES, FORM
from tminus.service.api.request.reading import (
    check_encoding,
    from_items,
    from_query,
    has_answer,
    is_form,
    media_type_of,
    merge,
    negotiate,
    read_body,
    read_form,
    while_connected,
)
from tminus.service.api.request.schemas import NoiseCall
from tminus.service.api.request.specs import SEED_BITS, check_uploads
from tminus.service.api.submission import cache_headers
from tminus.service.errors import BodyTooLarge, InvalidImage, PreconditionFailed, UnsupportedMediaType, ValidationErrors
from tminus.service.images.encoder import PNG, encode_png
from tminus.service.spec import Images


def noise_routes(models: Models, contract: Contract) -> APIRouter:
    """Return a router with POST /noise."""
    router = APIRouter(tags=["noise"])
    router.post(
        "/noise",
        **described("add_noise"),
        response_class=Response,
        responses={200: NOISED, **failures(406, 412, *BODY_ERRORS, 500, 503)},
        openapi_extra={
            "parameters": [*contract.query(NoiseCall), IF_NONE_MATCH],
            "requestBody": NOISE_BODY,
        },
    )(models.handler(add_noise, "noise"))
    return router


async def add_noise(services: Services, request: Request) -> Response:
    """Respond with x_t: the uploaded image with the noise of timestep t added."""
    model = services.model
    negotiate(request, (PNG,))
    check_encoding(request)
    check_uploads(model)
    query, errors = from_query(request)
    data, fields = await _read_upload(request, services.limits.max_image_bytes, errors)
    asked = NoiseCall.parse(merge(query, fields, errors), services.bounds, errors)
    asked.check_bounds(services.bounds, errors)
    errors.check()
    caller = caller_of(request)
    if services.is_unloaded:  # a caller without quota must not cause the model to load
        caller.check(row_steps=1, jobs=0)
        services = await services.ensure_loaded(request)
        model = services.model
    image = await while_connected(request, services.decoder.decode(data, model, caller))
    seed = secrets.randbits(SEED_BITS) if asked.seed is None else asked.seed
    alpha_bar = model.alpha_bar(asked.t)
    recipe: dict[str, object] = {
        "noise": {"t": asked.t, "seed": seed, "alpha_bar": alpha_bar},
        "fingerprint": model.fingerprint,
    }
    tag = None if asked.seed is None else _etag(recipe, image)
    headers = {"X-Seed": str(seed), "X-Alpha-Bar": repr(alpha_bar), "X-Fingerprint": model.fingerprint}
    headers |= cache_headers(tag)
    if tag is not None and has_answer(request, tag):
        services.metrics.count("tminus_answered_without_work_total", "not_modified")
        raise PreconditionFailed(tag)
    content = await while_connected(request, _made(services, caller.name, image, asked.t, seed, recipe))
    return Response(content, headers=headers, media_type=PNG)


async def _read_upload(request: Request, max_bytes: int, errors: ValidationErrors) -> tuple[bytes, dict[str, Any]]:
    """Read the image and the other form fields. The image is the whole body, or the file `image` in a form.

    Raises UnsupportedMediaType, BodyTooLarge, InvalidImage, or the errors of read_form.
    """
    if is_form(request):
        form = await read_form(request, max_bytes, ("image",))
        if "image" not in form.files:
            raise InvalidImage.of("image", "a file in the form", "a form without it")
        return form.files["image"], from_items(form.fields, "the form", errors)
    if (media_type := media_type_of(request)) not in ("", BYTES) and not media_type.startswith("image/"):
        raise UnsupportedMediaType.of(request.headers["content-type"], ("image/*", BYTES, FORM))
    data = await read_body(request)
    if len(data) > max_bytes:
        raise BodyTooLarge(len(data), max_bytes, "image")
    return data, {}


async def _made(services: Services, caller: str, image: Images, t: int, seed: int, recipe: dict[str, object]) -> bytes:
    read = await _noised(services, caller, image, t, seed)
    return await services.encoder.make(read, lambda pixels: encode_png(pixels, recipe), None, PNG, 1)


async def _noised(services: Services, caller: str, image: Images, t: int, seed: int) -> Callable[[], Images]:
    """Add noise to an image in the worker's thread, between ticks. Returns a function that returns the result.

    The returned function may wait for a GPU. For a latent model, the autoencoder's thread has already waited.

    A separate thread would not work as well. With torch, it would slow down every tick. With numpy, it would need a
    second, bit-identical implementation of the Philox generator. The worker gets one image at a time, so a tick is
    delayed by at most one image: 0.15 ms for 32x32 pixels, and 7 ms for 256x256 pixels in colour.
    """
    async with services.noise_turns.taken(caller):
        noising = services.worker.run(lambda engine: engine.noised(image[None], t, seed), model=services.number)
        read = await asyncio.wrap_future(noising)
        if services.model.latent is not None:
            noised = await asyncio.wrap_future(services.worker.run_autoencoder("noise", read))
            return lambda: noised[0]
    return lambda: read()[0]


def _etag(recipe: dict[str, object], image: Images) -> str:
    """Return an ETag that identifies the response's bytes: a hash of the recipe and the pixels."""
    name = hashlib.sha256(json.dumps([PNG, recipe, image.shape], sort_keys=True).encode() + image.tobytes())
    return f'"{name.hexdigest()[:32]}"'
