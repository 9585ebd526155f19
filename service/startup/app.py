"""The ASGI app: the routes and middleware around the models of a server. There is no global state."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route

from tminus.service.api.admin import admin_routes
from tminus.service.api.answers import openapi, problems
from tminus.service.api.answers.openapi import Contract
from tminus.service.api.answers.operations import ABOUT
from tminus.service.api.batch import batch_routes
from tminus.service.api.edge.authentication import AccessControl, authentication_routes, is_open
from tminus.service.api.edge.middleware import MemoryLimit, RequestContext, RequestSpans
from tminus.service.api.edge.origin import EXPOSED_HEADERS
from tminus.service.api.events import event_routes
from tminus.service.api.hugging_face import BARE_PATH, hugging_face_routes
from tminus.service.api.jobs import job_routes
from tminus.service.api.kserve import routes as kserve
from tminus.service.api.models import Models, Services
from tminus.service.api.noise import noise_routes
from tminus.service.api.openai import answers as openai
from tminus.service.api.openai.images import openai_routes
from tminus.service.api.page import docs_routes, page_routes
from tminus.service.api.request.multipart import FORM_BYTES
from tminus.service.api.sample import sample_routes
from tminus.service.api.stream import stream_routes
from tminus.service.api.system import model_routes, system_routes
from tminus.service.startup.loader import ModelLoader
from tminus.service.startup.models import ServedModels
from tminus.service.tracing import TRACER

if TYPE_CHECKING:
    from tminus.service.startup.telemetry import Traces

VERSION = "1.0.0"
OF_A_MODEL = "/models/{model}"


@dataclass(frozen=True, slots=True)
class Application:
    """The app and its models. On shutdown, the server drains the models' worker and waits for open streams."""

    app: FastAPI
    served: ServedModels


def create_app(
    served: ServedModels,
    loader: ModelLoader,
    *,
    with_metrics: bool = True,
    traces: "Traces | None" = None,
) -> FastAPI:
    """Build the app around the models of a server. The app's lifespan starts and closes the models.

    with_metrics: whether the app serves /metrics. traces: sends spans; the lifespan closes it at the end.
    """
    models, access, metrics, limits = served.models, served.access, served.metrics, served.limits
    tracer = traces.tracer if traces is not None else None

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        TRACER.set(tracer)  # inherited by the tasks that resume durable jobs
        await served.start()
        loader.start()
        yield
        await loader.close()
        await served.close()
        if traces is not None:
            await asyncio.to_thread(traces.close)

    app = FastAPI(
        lifespan=lifespan,
        openapi_url=None,  # docs_routes serves the OpenAPI document and its page
        redirect_slashes=False,  # a redirect would lead to any host that the request names
    )

    general = partial(_general_routes, served, loader, with_metrics=with_metrics)
    contract = Contract(models.default.model, limits)
    of_a_model = _model_routes(models, contract, with_metrics=with_metrics)
    of_a_model.append(docs_routes(_Documents(models, general)))
    allowed: dict[str, set[str]] = {}
    for prefix, routers in (("", [*of_a_model, *general(contract)]), (OF_A_MODEL, of_a_model)):
        for router in routers:
            for route in router.routes:
                if isinstance(route, Route) and route.methods and "GET" in route.methods:
                    route.methods.add("HEAD")  # the server omits the body
            app.include_router(router, prefix=prefix)
            for route in router.routes:
                if isinstance(route, Route) and route.methods:
                    allowed.setdefault(prefix + route.path, set()).update(route.methods)
    problems.install(app, metrics, allowed)
    refused = partial(metrics.count, "tminus_rejected_total")
    larger = {"/noise": limits.max_image_bytes + FORM_BYTES}
    # The bodies of these routes contain images. api/request/reading.py limits the rest of each body to max_body_bytes.
    larger |= dict.fromkeys(("/sample", "/jobs", "/v1/images/edits"), limits.max_edit_bytes)
    app.add_middleware(AccessControl, allowed_sites=served.allowed_sites, access=access, refused=refused)
    app.add_middleware(
        MemoryLimit,
        max_bytes=limits.max_body_bytes,
        max_bytes_by_path=larger,
        answers=served.answers,
        refused=refused,
    )
    if served.allowed_sites.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(served.allowed_sites.origins),
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=EXPOSED_HEADERS,
        )
    app.add_middleware(RequestContext, observe=metrics.requested, draining=lambda: served.worker.state.draining)
    if tracer is not None:
        app.add_middleware(RequestSpans, tracer=tracer)
    return app


def _general_routes(
    served: ServedModels, loader: ModelLoader, contract: Contract, *, with_metrics: bool
) -> list[APIRouter]:
    models, metrics = served.models, served.metrics if with_metrics else None
    return [
        admin_routes(models, loader, served.access),
        batch_routes(models),
        authentication_routes(served.access, served.limits.max_body_bytes),
        openai_routes(models),
        system_routes(served.worker, served.jobs, metrics),
        hugging_face_routes(models, contract, BARE_PATH),
        kserve.kserve_routes(models, loader, served.worker, served.jobs, VERSION),
    ]


def _model_routes(models: Models, contract: Contract, *, with_metrics: bool = True) -> list[APIRouter]:
    """Create the routes that exist twice: for the default model, and below a path that names a model."""
    return [
        sample_routes(models, contract),
        noise_routes(models, contract),
        stream_routes(models),
        job_routes(models, contract),
        event_routes(models, contract),
        model_routes(models),
        hugging_face_routes(models, contract),
        page_routes(with_metrics=with_metrics),
    ]


class _Documents:
    """Creates the OpenAPI documents of the models. Caches each document, because creating it takes 0.1 s."""

    def __init__(self, models: Models, general: Callable[[Contract], list[APIRouter]]) -> None:
        self._models, self._general = models, general
        self._made: dict[tuple[int, str], dict[str, Any]] = {}

    def __call__(self, request: Request) -> dict[str, Any]:
        """Describe the routes of the request's model. If the path names no model, include the general routes."""
        services = self._models.of(request)
        prefix = f"/models/{services.model.name}" if "model" in request.path_params else ""
        key = services.number, prefix
        if key not in self._made:
            served = {each.number for each in self._models}
            self._made = {old: made for old, made in self._made.items() if old[0] in served}
            self._made[key] = self._make(services, prefix)
        return self._made[key]

    def _make(self, services: Services, prefix: str) -> dict[str, Any]:
        model, contract = services.model, Contract(services.model, services.limits)
        described = FastAPI(  # only for its OpenAPI document; this app never runs
            title="tminus",
            summary="Samples from a trained denoising diffusion U-Net.",
            description=f"Bounds are those of the model {model.name}: {model.height_px}x{model.width_px}, "
            f"T={model.num_timesteps}.\n\n{ABOUT}",
            version=VERSION,
            servers=[{"url": prefix}] if prefix else None,
        )
        for router in (*_model_routes(self._models, contract), *(() if prefix else self._general(contract))):
            described.include_router(router)
        more = {} if prefix else openai.components(contract) | kserve.components()
        return openapi.document(described, contract, is_open, more)
