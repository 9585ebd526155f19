"""Puts the parts together: routes, middleware, and the parts that all models share. Nothing is global."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from tminus.service.access.access import Access
from tminus.service.api.admin import admin_routes
from tminus.service.api.answers import openapi, problems
from tminus.service.api.answers.openapi import Contract
from tminus.service.api.batch import batch_routes
from tminus.service.api.edge.authentication import Authentication, authentication_routes, is_open
from tminus.service.api.edge.middleware import MemoryLimit, RequestContext, RequestSpans
from tminus.service.api.edge.origin import EXPOSED_HEADERS, Doors, Gate
from tminus.service.api.edge.stream_limits import Streams
from tminus.service.api.events import event_routes
from tminus.service.api.hugging_face import BARE_PATH, hugging_face_routes
from tminus.service.api.jobs import job_routes
from tminus.service.api.kserve.routes import kserve_routes
from tminus.service.api.models import Models, Services
from tminus.service.api.noise import noise_routes
from tminus.service.api.openai import answers as openai
from tminus.service.api.openai.images import openai_routes
from tminus.service.api.page import Compression, docs_routes, page_routes
from tminus.service.api.request.multipart import FORM_BYTES
from tminus.service.api.sample import sample_routes
from tminus.service.api.stream import stream_routes
from tminus.service.api.system import model_routes, system_routes
from tminus.service.jobs.process_end import EndFile
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.results import Results
from tminus.service.jobs.webhooks.deliverer import Rules
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.startup.library import Library
from tminus.service.startup.model_changes import ModelChanges, Prepare, prepare_nothing
from tminus.service.startup.parts import Parts, Prepared
from tminus.service.tracing import TRACER
from tminus.service.worker.loop import note_nothing
from tminus.service.worker.worker import Worker

if TYPE_CHECKING:
    from tminus.service.startup.telemetry import Traces

VERSION = "0.1.0"
OF_A_MODEL = "/models/{model}"


@dataclass(frozen=True, slots=True)
class Application:
    """The app, and the parts that the entry point ends it by: it drains the worker, then waits for the streams."""

    app: FastAPI
    worker: Worker
    streams: Streams
    metrics: Metrics
    model: ModelInfo  # the default one, when it started
    parts: Parts


def create_app(
    first: Sequence[Prepared],
    limits: Limits,
    open_store: Callable[[str], JobStore],
    doors: Doors | None = None,
    *,
    library: Library | None = None,
    prepare: Prepare = prepare_nothing,
    access: Access | None = None,
    results: Results | None = None,
    webhooks: Rules | None = None,
    with_metrics: bool = True,
    with_docs: bool = True,
    traces: "Traces | None" = None,
    end_file: EndFile | None = None,
) -> Application:
    """Build the application around the models that it begins with, the default one first.

    limits: of the whole server. open_store: opens the store of the durable jobs of weights, by their hash; it is closed
    with the app. doors: by what names, and for which pages. library: what can be loaded, by `prepare`. access: who may
    ask; None: anybody, and nobody may load or unload models. results: where large ones of durable jobs go, if not into
    their store. webhooks: how they are sent, if they are. with_metrics, with_docs: whether /metrics, and /docs with
    /openapi.json, are answered. traces: sends spans; it is closed with the app. end_file: outlives the process where
    that ends by itself; it is closed with the app. The worker runs for as long as the app's lifespan.
    """
    doors = doors or Doors()
    access = access or Access()
    tracer = traces.tracer if traces is not None else None
    note = end_file.work_on if end_file is not None else note_nothing
    parts = Parts(list(first), limits, open_store, doors, access, results, webhooks, note)
    models, metrics = parts.models, parts.metrics
    changes = ModelChanges(parts, library or Library(), prepare)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        TRACER.set(tracer)  # for the tasks that go on with durable jobs
        await parts.start()
        yield
        await parts.close()
        if end_file is not None:
            end_file.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    model = models.default.model
    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,  # docs_routes has it, and the page made of it
        redirect_slashes=False,  # a redirect would name whatever host the request named
    )
    documents: dict[tuple[int, str], dict[str, Any]] = {}  # a tenth of a second each

    def general(contract: Contract) -> list[APIRouter]:
        return [
            admin_routes(models, changes, access),
            batch_routes(models),
            authentication_routes(access, limits.max_body_bytes),
            openai_routes(models),
            system_routes(parts.worker, parts.jobs, metrics if with_metrics else None),
            hugging_face_routes(models, contract, BARE_PATH),
            kserve_routes(models, changes, parts.worker, parts.jobs, VERSION),
        ]

    def document(request: Request) -> dict[str, Any]:
        """The OpenAPI document of a request's model, with its bounds; the default one's has the server's calls too."""
        services = models.of(request)
        prefix = f"/models/{services.model.name}" if "model" in request.path_params else ""
        key = services.number, prefix
        if key not in documents:
            served = {each.number for each in models}
            for old in [each for each in documents if each[0] not in served]:
                del documents[old]
            documents[key] = _document(models, services, None if prefix else general, prefix)
        return documents[key]

    contract = Contract(model, limits)
    absent = [name for name, served in (("docs", with_docs), ("metrics", with_metrics)) if not served]
    of_a_model = [*_of_a_model(models, contract, absent), *([docs_routes(document)] if with_docs else [])]
    allowed: dict[str, set[str]] = {}
    for prefix, routers in (("", [*of_a_model, *general(contract)]), (OF_A_MODEL, of_a_model)):
        for router in routers:
            app.include_router(router, prefix=prefix)
            for route in router.routes:
                if isinstance(route, Route) and route.methods:
                    allowed.setdefault(prefix + route.path, set()).update(route.methods)
    problems.install(app, metrics, allowed)
    larger = {"/noise": limits.max_image_bytes + FORM_BYTES}
    # For the images in it; the rest of a body is held to max_body_bytes in api/request/reading.py.
    larger |= dict.fromkeys(("/sample", "/jobs", "/v1/images/edits"), limits.max_edit_bytes)
    app.add_middleware(Compression)
    app.add_middleware(Authentication, access=access, refused=metrics.rejected)
    app.add_middleware(
        MemoryLimit,
        max_bytes=limits.max_body_bytes,
        max_bytes_by_path=larger,
        answers=parts.answers,
        refused=metrics.rejected,
    )
    if doors.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(doors.origins),
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=list(EXPOSED_HEADERS),
        )
    app.add_middleware(Gate, doors=doors, refused=metrics.rejected)
    app.add_middleware(RequestContext, observe=metrics.requested, draining=lambda: parts.worker.draining)
    if tracer is not None:
        app.add_middleware(RequestSpans, tracer=tracer)
    return Application(app, parts.worker, parts.streams, metrics, model, parts)


def _of_a_model(models: Models, contract: Contract, absent: Collection[str] = ()) -> list[APIRouter]:
    """The routes of the default model, and below a prefix of the model that the path names."""
    return [
        sample_routes(models, contract),
        noise_routes(models, contract),
        stream_routes(models),
        job_routes(models, contract),
        event_routes(models, contract),
        model_routes(models),
        hugging_face_routes(models, contract),
        page_routes(absent),
    ]


def _document(
    models: Models, services: Services, general: Callable[[Contract], Sequence[APIRouter]] | None, prefix: str
) -> dict[str, Any]:
    """Describe the routes with the bounds of a model; an app that is never run has them."""
    model, contract = services.model, Contract(services.model, services.limits)
    described = FastAPI(
        title="tminus",
        summary="Samples from a trained denoising diffusion U-Net.",
        description=f"Serving {model.name}: {model.height_px}x{model.width_px}, T={model.num_timesteps}.",
        version=VERSION,
        servers=[{"url": prefix}] if prefix else None,
    )
    for router in (*_of_a_model(models, contract), *(general(contract) if general is not None else ())):
        described.include_router(router)
    return openapi.document(described, contract, is_open, openai.components(contract) if general else {})
