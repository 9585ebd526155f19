"""Creates jobs from request parameters, for all kinds of requests.

All parameters are checked before a job is accepted.
"""

import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from hashlib import sha256

from fastapi import Request

from tminus.model.pixels import VALUE_RANGE
from tminus.service.access.access import Caller
from tminus.service.api.edge.authentication import caller_of
from tminus.service.api.edge.middleware import body_of
from tminus.service.api.models import Services
from tminus.service.api.request.reading import key_in_headers, off_loop, while_connected
from tminus.service.api.request.schemas import JobCall, SampleRequest
from tminus.service.api.request.specs import named_by, spec_of, spec_of_rung, with_inputs
from tminus.service.errors import DeadlineUnmeetable, InvalidField, ModelNotFound, Overloaded, QuotaExceeded
from tminus.service.images.encoder import NPY
from tminus.service.jobs.jobs import JobView
from tminus.service.jobs.store.records import Key
from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.model_info import ModelInfo
from tminus.service.spec import SampleSpec
from tminus.service.work import Ticket, timesteps_of, work_of
from tminus.service.worker.running_job import NewJob

MOSTLY_IMAGE = 0.5  # minimum alpha_bar_t at which an x_t counts as more image than noise


async def _ensure_loaded(
    services: Services, caller: Caller, parameters: SampleRequest, request: Request | None = None
) -> Services:
    """Wait until the model is in memory, and return its current Services. The deadline is shortened by the wait.

    The model is not loaded for HEAD, which the server can answer without it. It is not loaded for a caller without
    enough quota either, because `submit` will refuse the job. An invalid request raises before the model is loaded.

    request: the wait ends if this request's client disconnects; None for a WebSocket message. Raises the errors of
    spec_of and Services.ensure_loaded.
    """
    if not services.is_unloaded or (request is not None and request.method == "HEAD"):
        return services
    spec, began_s = spec_of(parameters, services.model, services.limits), time.monotonic()
    with suppress(QuotaExceeded):
        open_jobs = await services.new_jobs.open_jobs(caller.name, caller.limits.jobs)
        caller.check(work_of(spec, services.model, services.number).places, open_jobs)
        services = await services.ensure_loaded(request, parameters.deadline_s)
    if parameters.deadline_s is not None:
        parameters.deadline_s = max(1e-3, parameters.deadline_s - (time.monotonic() - began_s))
    return services


async def prepare_job(
    services: Services,
    caller: Caller,
    parameters: SampleRequest,
    request: Request | None = None,
    *,
    transparent: bool = False,
) -> tuple[Services, NewJob]:
    """Wait until the model is in memory, and make a job that is not durable.

    Returns the current Services of the job's model, and the job. For an adaptive request, that model may be another
    one. Decodes the images and removes them from the parameters.

    request: see `_ensure_loaded`. transparent: see decode_inputs. Raises the errors of spec_of, Services.ensure_loaded,
    Decoder.inputs and Worker.best_in_time.
    """
    services = await _ensure_loaded(services, caller, parameters, request)
    return (await _prepare(services, caller, parameters, request, transparent=transparent))[0]


async def _prepare(
    services: Services,
    caller: Caller,
    parameters: SampleRequest,
    request: Request | None,
    *,
    transparent: bool,
) -> list[tuple[Services, NewJob]]:
    """Make a job, durable or not. An adaptive job is followed by its versions at faster settings."""
    spec, inputs = spec_of(parameters, services.model, services.limits), None
    if parameters.image is not None:
        decoding = services.decoder.inputs(
            parameters.image, parameters.mask, services.model, caller, transparent=transparent
        )
        inputs = await (decoding if request is None else while_connected(request, decoding))
    adaptive = parameters.quality is not None and parameters.deadline_s is not None
    settings = (_rungs(services, parameters, spec) if adaptive else []) or [(services, spec)]
    parameters.image = parameters.mask = None
    if request is not None:
        body_of(request.scope).release()
    works = [work_of(each, own.model, own.number) for own, each in settings]
    new = [
        NewJob(
            uuid.uuid4().hex,
            with_inputs(each, parameters, inputs),
            work,
            caller.name,
            parameters.deadline_s,
            inputs,
            is_repeatable=parameters.seed is not None,
            best=works[0] if adaptive else None,
        )
        for (_, each), work in zip(settings, works, strict=True)
    ]
    # Do not await after the choice. Another request could then choose for the same free time.
    first = services.worker.best_in_time(new) if adaptive else 0
    (own, spec), metrics = settings[first], services.metrics
    with own.models.using(own):  # this use keeps the model from being unloaded as idle
        metrics.count("tminus_sample_requests_total", own.model.name, spec.sampler, named_by(parameters.decisive()))
    if parameters.quality is not None:
        metrics.count("tminus_quality_total", own.model.name, own.quality_of(spec) or "other")
    return [(own, each) for (own, _), each in zip(settings, new, strict=True)][first:]


def _rungs(services: Services, parameters: SampleRequest, spec: SampleSpec) -> list[tuple[Services, SampleSpec]]:
    """Return the spec of an adaptive request at each setting of the ladder that can answer it.

    A setting is left out if its table is gone, or its model is not served, not in memory or makes other images. spec:
    that of the recommended setting.
    """
    model, found = services.model, []
    for rung in model.ladder:
        with suppress(InvalidField, ModelNotFound):
            own = services if rung.model in (None, model.name) else services.models.named(rung.model)
            if own is services or (not own.is_unloaded and own.model.makes_images_of(model)):
                found.append((own, spec_of_rung(rung, parameters, spec, own.model, own.limits)))
    return found


@asynccontextmanager
async def charged(services: Services, caller: Caller, new: NewJob) -> AsyncIterator[None]:
    """Charge a caller for a job. If the `with` block raises, the charge is refunded. Raises QuotaExceeded.

    Each pass of each row costs one row-step. A guided pass costs two, and a skipped pass costs nothing.
    """
    row_steps = new.work.places
    with caller.charged(row_steps, await services.new_jobs.open_jobs(caller.name, caller.limits.jobs)):
        yield
    services.metrics.count("tminus_key_places_total", caller.name, by=row_steps)


async def submit(services: Services, caller: Caller, new: NewJob) -> Ticket:
    """Charge a caller for a job that is not durable, and submit it to the worker.

    Raises the errors of `charged` and Worker.submit. The retry time in Overloaded is the shortest of all the servers
    that share the job store.
    """
    try:
        async with charged(services, caller, new):
            return services.worker.submit(new)
    except Overloaded as error:
        raise await services.new_jobs.soonest(error, new) from None


async def create(
    services: Services, request: Request, parameters: JobCall, *, transparent: bool = False
) -> tuple[JobView, bool]:
    """Create a durable job, unless the Idempotency-Key already belongs to an earlier job.

    Returns the new or the earlier job, and True if it is the earlier one. transparent: see decode_inputs. Raises the
    errors of `prepare_job` and NewJobs.create. Does not wait for the model: a durable job waits in the store.
    """
    caller, webhook = caller_of(request), parameters.receiver
    size_bytes = len(parameters.image or b"") + len(parameters.mask or b"")
    key = await off_loop(size_bytes, _key, services, request, parameters, webhook, transparent=transparent)
    try:
        jobs = await _prepare(services, caller, parameters, request, transparent=transparent)
    except (DeadlineUnmeetable, InvalidField) as error:
        if key is None or parameters.quality is None or error.field != "deadline_s":
            raise
        if (found := await services.new_jobs.find_by_key(key, services.model.name)) is None:
            raise
        return found, True
    for own, new in jobs[:-1]:
        with suppress(DeadlineUnmeetable):  # other jobs were accepted since the choice
            return await own.new_jobs.create(new, key, webhook, charged=partial(charged, own, caller, new))
    own, new = jobs[-1]
    return await own.new_jobs.create(new, key, webhook, charged=partial(charged, own, caller, new))


def _key(
    services: Services, request: Request, parameters: JobCall, webhook: Webhook | None, *, transparent: bool
) -> Key | None:
    """Return the Idempotency-Key and a hash of its request, or None if the request has no key. Raises InvalidField.

    Keys of different owners are independent. transparent: see decode_inputs.
    """
    if (name := key_in_headers(request)) is None:
        return None
    # Leave out defaults, so that the hash does not change in a version with more parameters.
    given = parameters.model_dump(exclude_defaults=True, exclude={"webhook", "webhook_events_filter"})
    # Earlier versions left a guidance of 1 out of the hash. If `steps` is given, a missing guidance still means 1.
    if "steps" in given and given.get("guidance") == 1:
        del given["guidance"]
    given = {name: sha256(value).hexdigest() if isinstance(value, bytes) else value for name, value in given.items()}
    if webhook is not None:
        given["webhook"] = webhook.to_json()
    if transparent:  # regenerates other pixels for the same mask
        given["transparent"] = True
    if adaptive := parameters.quality is not None:
        given["model"] = services.model.name
    what = sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()
    return Key(name, what, caller_of(request).name, any_model=adaptive)


def cache_headers(etag: str | None) -> dict[str, str]:
    """Return a response's caching headers. A response without an ETag must not be stored."""
    return {"Cache-Control": "no-store"} if etag is None else {"ETag": etag, "Cache-Control": "no-cache"}


def spec_headers(spec: SampleSpec, services: Services) -> dict[str, str]:
    """Return headers with the parameters that the job uses, their place in the ladder, and any warning."""
    headers = {
        "X-Seed": str(spec.seed),
        "X-Sampler": spec.sampler,
        "X-Steps": str(spec.steps),
        "X-Guidance": str(float(spec.guidance)),
    }
    others = {"X-Quality": services.quality_of(spec), "X-Warning": warning_of(spec, services.model)}
    return headers | {name: value for name, value in others.items() if value is not None}


def pixel_headers(media_type: str, model: ModelInfo, *, clip: bool) -> dict[str, str]:
    """Return headers with the value range of floats, or the number of channels shown if pictures cannot show all."""
    if media_type == NPY:
        return {"X-Value-Range": "{:g}, {:g}".format(*VALUE_RANGE), "X-Clipped": str(clip).lower()}
    if model.fits_pictures:
        return {}
    return {"X-Shown-Channels": f"{model.shown_channels} of {model.channels}"}


def warning_of(spec: SampleSpec, model: ModelInfo) -> str | None:
    """Return a warning if the images will be noise, because the first step treats x_T as an x_t that is mostly image.

    This happens with a single step and the spacing `leading` or `linspace`: its timestep is 0, as in diffusers.
    """
    # An edit with strength starts from the image, with the noise of its first step.
    if spec.steps > 1 or spec.strength is not None:
        return None
    if spec.table is not None and not model.has_table(spec.table):  # the table was removed after the job ended
        return None
    first, last = timesteps_of(spec, model)[0], model.num_timesteps - 1
    if first == last or model.alpha_bar(first) < MOSTLY_IMAGE:
        return None
    return (
        f"the first step is at timestep {first}, where x_t is more image than noise: from noise it makes noise. "
        f"timestep_spacing=trailing begins at timestep {last}"
    )
