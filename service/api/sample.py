"""POST and GET /sample: run a job and respond with its images, an animation or a trajectory."""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.trajectory import LEAST_ETA, Trajectory
from tminus.service.api.answers.openapi import (
    BODY_ERRORS,
    CACHE_CONTROL,
    IF_NONE_MATCH,
    IMAGES_OR_STEPS,
    NOT_MODIFIED,
    SAMPLE_BODY,
    WORK_ERRORS,
    Contract,
    Described,
    failures,
)
from tminus.service.api.answers.operations import described
from tminus.service.api.answers.progress import finished_or_gone, head_answer, result_of, server_timing
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.models import Models, Services
from tminus.service.api.request.reading import cache_directives, has_answer, negotiate, parse_call, read_parameters
from tminus.service.api.request.schemas import SampleCall
from tminus.service.api.request.specs import refuse_float_depth
from tminus.service.api.submission import cache_headers, pixel_headers, prepare_job, spec_headers, submit
from tminus.service.errors import InvalidField, PreconditionFailed
from tminus.service.images.encoder import (
    JSON,
    MEDIA_TYPES,
    NPY,
    WEBP,
    WEBP_VERSION,
    as_pictures,
    encode_path,
    encode_result,
    encode_sheets,
    encode_trajectory,
    etag,
    etag_form,
    metric_label,
)
from tminus.service.images.trajectory import TRAJECTORY, TRAJECTORY_VERSION
from tminus.service.model_info import ModelInfo
from tminus.service.preview import SHOWS, Show
from tminus.service.spec import Images, Pixels, SampleSpec
from tminus.service.work import JobResult, noisy_passes, select_passes, timesteps_of
from tminus.service.worker.recording import Recorder, Recording, TrajectoryRecorder, frame_count
from tminus.service.worker.running_job import NewJob

WITHOUT_EVERY = (*MEDIA_TYPES, NPY, TRAJECTORY)
# The media types on offer, and the end of the error message that lists them.
WITHOUT_FRAMES = (WITHOUT_EVERY, ", or image/webp together with the parameter `every`")
WITH_FRAMES = ((WEBP, JSON), f"; {NPY} has finished images alone, and {TRAJECTORY} the latents of each step")
MAX_FRAME_BYTES = 16 * 2**20  # limit on the pixels of a job's frames
MAX_TRAJECTORY_BYTES = 32 * 2**20  # limit on the size of a trajectory file


def sample_routes(models: Models, contract: Contract) -> APIRouter:
    """Return a router with POST and GET /sample."""
    router = APIRouter(tags=["sample"])
    handler, query = models.handler(sample, "sample"), contract.query(SampleCall)
    responses: dict[int | str, Described] = {
        200: IMAGES_OR_STEPS,
        **failures(406, *BODY_ERRORS, *WORK_ERRORS),
    }
    router.post(
        "/sample",
        **described("sample_images"),
        response_class=Response,
        responses=responses | failures(412),
        openapi_extra={
            "parameters": [*query, IF_NONE_MATCH, CACHE_CONTROL],
            "requestBody": SAMPLE_BODY,
        },
    )(handler)
    router.get(
        "/sample",
        **described("sample_images_by_get"),
        response_class=Response,
        responses=responses | {304: NOT_MODIFIED},
        openapi_extra={"parameters": [*query, IF_NONE_MATCH, CACHE_CONTROL]},
    )(handler)
    return router


@dataclass(frozen=True, slots=True)
class Answer:
    """Describes a response before its job runs: what to record during the job, and how to encode the result."""

    media_type: str
    etag_form: str  # all that determines the bytes, besides the spec
    metric_label: str  # label for the encoding time in the metrics
    make: Callable[[Any], bytes]  # encodes what `read` returns
    read: Callable[[JobResult], Any] = lambda result: result.read()  # can wait for a GPU and raise NotFinite
    recording: Recorder[Any] | None = None  # receives rows during the job
    held_bytes: int = 0  # memory in use until the encoding ends, besides the images
    held_for: str = "n"  # the parameter that held_bytes depends on
    headers: dict[str, str] = field(default_factory=dict)


async def sample(services: Services, request: Request) -> Response:
    """Run a job and respond with its images."""
    values, errors = await read_parameters(request, services.limits)
    offered, hint = WITHOUT_FRAMES if values.get("every") is None else WITH_FRAMES
    # Errors in the parameters are reported first, before an error in Accept.
    media_type = offered[0] if errors else negotiate(request, offered, hint)
    if media_type == NPY:
        values = {"bit_depth": 32} | values
    parameters = await parse_call(SampleCall, values, services.bounds, errors, media_type)
    del values  # frees the picture, if any
    services, new = await prepare_job(services, caller_of(request), parameters, request)
    return await respond(services, request, new, answer_of(parameters, media_type, new.spec, services.model))


def answer_of(parameters: SampleCall, media_type: str, spec: SampleSpec, model: ModelInfo) -> Answer:
    """Describe the response in this media type. Raises InvalidField."""
    if parameters.every is not None:
        return (animated if media_type == WEBP else frames)(spec, parameters, parameters.every, model)
    if media_type == TRAJECTORY:
        return trajectory(spec, model, parameters)
    return still(media_type, spec, model, clip=parameters.clip_output)


async def respond(services: Services, request: Request, new: NewJob, answer: Answer) -> Response:
    """Respond from the client's cache or the server's cache, or else run the job and encode its result."""
    model, metrics = services.model, services.metrics
    is_known = model.fingerprint != ""  # empty for a model that was never loaded
    tag = etag(answer.etag_form, new.spec, model) if new.is_repeatable and model.exact and is_known else None
    headers = {"Vary": "Accept"} | ({"X-Fingerprint": model.fingerprint} if is_known else {})
    headers |= cache_headers(tag) | spec_headers(new.spec, services) | answer.headers
    directives = cache_directives(request)
    if tag is not None:
        if has_answer(request, tag):
            metrics.count("tminus_answered_without_work_total", "not_modified")
            if request.method == "POST":
                raise PreconditionFailed(tag)
            return Response(status_code=304, headers=headers)
        if "no-cache" not in directives and (kept := services.cache.get(tag)) is not None:
            metrics.count("tminus_answered_without_work_total", "cache_hit")
            return Response(kept, headers=headers | {"Cache-Status": "tminus; hit"}, media_type=answer.media_type)
    if request.method == "HEAD":  # the request is valid; HEAD runs no job
        return head_answer(headers, answer.media_type)
    loop = asyncio.get_running_loop()
    with services.recordings.taken(answer.held_bytes, answer.held_for) if answer.held_bytes else nullcontext():
        ticket = await submit(services, caller_of(request), new.recorded_by(answer.recording))
        result = await finished_or_gone(request, services.worker, new.id, result_of(ticket, new.deadline_s))
        started_s = loop.time()
        content = await services.encoder.make(
            lambda: answer.read(result), answer.make, answer.metric_label, answer.media_type, new.spec.n,
            slow=answer.recording is not None,
        )  # fmt: skip
        encode_s = loop.time() - started_s
    if tag is not None and "no-store" not in directives:
        with suppress(ValueError):  # raised if the content is larger than the whole cache
            services.cache[tag] = content
    headers |= {
        "X-Job-ID": new.id,
        "X-Queue-Position": str(ticket.outlook.position),
        "X-ETA-Seconds": f"{ticket.outlook.eta_s:.3f}",
        "Server-Timing": server_timing(result, encode_s, model),
    }
    return Response(content, headers=headers, media_type=answer.media_type)


def still(media_type: str, spec: SampleSpec, model: ModelInfo, *, clip: bool = True) -> Answer:
    """Describe a response with the finished images. Raises InvalidField if the media type cannot have the bit depth."""
    if media_type == NPY:
        if spec.depth != 32:
            raise InvalidField.of("bit_depth", f"32 or absent with Accept: {NPY}", spec.depth)
    else:
        refuse_float_depth(spec, model, f"with Accept: {media_type}; {NPY} has 32")
    return of_images(media_type, spec, model, clip=clip)


def of_images(media_type: str, spec: SampleSpec, model: ModelInfo, *, clip: bool) -> Answer:
    """Describe a response with images as PNG, zip, JSON or floats. clip: whether to clip floats to the value range."""
    form = etag_form(media_type, clip=clip)
    make = partial(encode_result, media_type, spec, model=model, clip=clip)
    # Transposing floats takes a second copy.
    held_bytes = 8 * spec.n * model.height_px * model.width_px * model.channels if media_type == NPY else 0
    headers = pixel_headers(media_type, model, clip=clip)
    return Answer(media_type, form, metric_label(media_type), make, held_bytes=held_bytes, headers=headers)


def animated(spec: SampleSpec, asked: SampleCall, every: int, model: ModelInfo) -> Answer:
    """Describe an animated WebP that shows the steps from noise to the images. Raises InvalidField."""
    _check_depth(spec, "every")
    if len(asked.shows) > 1:
        raise InvalidField.of("show", f"one of {', '.join(SHOWS)} in an animation", asked.show)
    if asked.until is not None:
        raise InvalidField.of("until", "absent in an animation", asked.until)
    (show,), held_bytes = asked.shows, _frame_bytes(spec, asked, every, model)
    recording = Recording(every, asked.shows, spec.n, spec.num_passes)

    def read(result: JobResult) -> list[Pixels]:
        return [*(frame[show] for frame in recording.frames().values()), as_pictures(result.read(), model)]

    form = f"{WEBP}; every={every}; show={show}; {WEBP_VERSION}"
    return Answer(WEBP, form, "animation", encode_sheets, read, recording, held_bytes, "every")


def frames(spec: SampleSpec, asked: SampleCall, every: int, model: ModelInfo) -> Answer:
    """Describe a JSON response with PNG frames. Raises InvalidField.

    The response also contains the finished images, unless the request sets `until`.
    """
    _check_depth(spec, "every")
    until, held_bytes = asked.until, _frame_bytes(spec, asked, every, model, from_noise=True)
    recording = Recording(every, asked.shows, spec.n, spec.num_passes, from_noise=True, until=until)
    make = partial(encode_path, spec=spec, timesteps=timesteps_of(spec, model), model=model)

    def read(result: JobResult) -> tuple[dict[int, dict[Show, Images]], Pixels | None]:
        return recording.frames(), result.read() if until is None else None

    form = f"{JSON}; from noise; every={every}; until={until}; show={','.join(asked.shows)}"
    return Answer(JSON, form, "path", make, read, recording, held_bytes, "every")


def _frame_bytes(spec: SampleSpec, asked: SampleCall, every: int, model: ModelInfo, *, from_noise: bool = False) -> int:
    """Return the total size in bytes of the frames before the result, with x_T if `from_noise`.

    Raises InvalidField if the frames and the result together would exceed MAX_FRAME_BYTES.
    """
    frame_bytes = len(asked.shows) * spec.n * model.height_px * model.width_px * model.channels
    steps = spec.num_passes if asked.until is None else min(spec.num_passes, asked.until + 1)
    most, count = max(1, MAX_FRAME_BYTES // frame_bytes), frame_count(every, steps)
    if count > most:
        least = -(-steps // most)
        raise InvalidField.of("every", f"at least {least} for this number of images and steps", every)
    return frame_bytes * (count - 1 + from_noise)


def trajectory(spec: SampleSpec, model: ModelInfo, asked: SampleCall) -> Answer:
    """Describe a trajectory file, with the latents of selected steps and the distributions of those that add noise.

    `keep` selects the steps; None selects all of them. Raises InvalidField if the steps add too little noise or the
    file would be too large.
    """
    _check_depth(spec, f"Accept: {TRAJECTORY}")
    if SAMPLER_FACTS[spec.sampler].noise == "eta" and spec.eta < LEAST_ETA:
        bound = f"at least {LEAST_ETA} with Accept: {TRAJECTORY}: of less noise float32 leaves no exact log p"
        raise InvalidField.of("eta", bound, spec.eta)
    noisy = noisy_passes(spec, model)
    if not noisy:
        raise _without_noise(spec, model)
    if spec.mask_sha256 is not None:
        bound = f"absent with Accept: {TRAJECTORY}: what is kept is drawn from the image, not by the model"
        raise InvalidField.of("mask", bound, spec.mask_sha256)
    try:
        selection = select_passes(asked.keep, spec, model)
    except ValueError as error:
        raise InvalidField.of("keep", str(error), asked.keep) from None
    pixels = model.height_px * model.width_px * model.channels
    latents = pixels if model.latent is None else model.latent.channels * model.latent.height * model.latent.width
    with_noise = len({*noisy}.intersection(selection.passes))
    by_value = model.variance_type == "learned_range" and spec.sampler == "ddpm"  # each value has its own std, s
    rounded = len(selection.points) + len(selection.predictions) + with_noise
    image_bytes = latents * (np.dtype(asked.dtype).itemsize * rounded + 4 * with_noise * by_value) + pixels
    most = MAX_TRAJECTORY_BYTES // image_bytes
    if most == 0:
        name, value = ("steps", spec.steps) if asked.keep is None else ("keep", asked.keep)
        raise InvalidField.of(name, f"fewer with Accept: {TRAJECTORY}, for images of this size", value)
    if spec.n > most:
        raise InvalidField.of("n", f"1..{most} with Accept: {TRAJECTORY}, for this number of steps", spec.n)
    # Packing takes the most memory: it holds the arrays, their bytes and the file. The float32 arrays before that are
    # smaller.
    path, held_bytes = TrajectoryRecorder(spec, selection, asked.dtype), 3 * spec.n * image_bytes

    def read(result: JobResult) -> tuple[Trajectory, Pixels]:
        return path.trajectory(), result.read()

    form = f"{TRAJECTORY}; keep={asked.keep}; dtype={asked.dtype}; {TRAJECTORY_VERSION}"
    make = partial(encode_trajectory, spec=spec, model=model)
    return Answer(TRAJECTORY, form, "trajectory", make, read, path, held_bytes)


def _without_noise(spec: SampleSpec, model: ModelInfo) -> InvalidField:
    """Return the error for a spec that adds no noise, and so has no log p. It names the parameter to change."""
    noise = SAMPLER_FACTS[spec.sampler].noise
    if noise != "none" and spec.strength is not None:
        bound = f"enough for two steps with Accept: {TRAJECTORY}: the last adds no noise"
        return InvalidField.of("strength", bound, spec.strength)
    if noise != "none":
        bound = f"at least 2 with Accept: {TRAJECTORY}: the last adds no noise"
        return InvalidField.of("steps", bound, spec.steps)
    said = {"eta": f" (eta at least {LEAST_ETA})", "always": ""}
    noises = {name: SAMPLER_FACTS[name].noise for name in model.samplers}
    noisy = [f"{name}{said[noise]}" for name, noise in noises.items() if noise != "none"]
    bound = f"one of {', '.join(noisy)} with Accept: {TRAJECTORY}: the steps of others add no noise, and have no log p"
    return InvalidField.of("sampler", bound, spec.sampler)


def _check_depth(spec: SampleSpec, beside: str) -> None:
    if spec.depth != 8:
        raise InvalidField.of("bit_depth", f"8 or absent with {beside}, whose pictures have 8 bits", spec.depth)
