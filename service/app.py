"""Puts the parts together: engine, scheduler, admission, worker, encoder, routes. Nothing is global."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from tminus.service.api import openapi, problems
from tminus.service.api.caching import ResultCache
from tminus.service.api.docs import docs_routes
from tminus.service.api.events import event_routes
from tminus.service.api.jobs import job_routes
from tminus.service.api.middleware import BodyLimit, RequestContext
from tminus.service.api.multipart import FORM_BYTES
from tminus.service.api.noise import noise_routes
from tminus.service.api.origin import EXPOSED_HEADERS, Doors, Gate
from tminus.service.api.page import page_routes
from tminus.service.api.sample import sample_routes
from tminus.service.api.services import Services
from tminus.service.api.stream import stream_routes
from tminus.service.api.stream_limits import Streams
from tminus.service.api.system import system_routes
from tminus.service.engine.protocol import RowEngine
from tminus.service.images.decoder import Decoder
from tminus.service.images.encoder import Encoder
from tminus.service.jobs.async_store import AsyncStore
from tminus.service.jobs.jobs import Jobs
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.snapshot_keeper import SnapshotKeeper
from tminus.service.jobs.standings import Standings
from tminus.service.jobs.store import JobStore
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.scheduler import Scheduler, Sharing
from tminus.service.worker.recording import RecordingRoom
from tminus.service.worker.worker import Worker

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Application:
    """The app, and the parts that the entry point ends it by: it drains the worker, then waits for the streams."""

    app: FastAPI
    worker: Worker
    streams: Streams
    model: ModelInfo


def create_app(
    engine: RowEngine,
    limits: Limits,
    tick_times: Sequence[tuple[int, float]],
    sharing: Sharing,
    store: JobStore,
    doors: Doors | None = None,
    *,
    coding_s: tuple[float, float] = (0.0, 0.0),
) -> Application:
    """Build the application around an engine. The worker runs for as long as the app's lifespan.

    tick_times are the measured (places, seconds) of a tick; sharing says how the scheduler gives out its places; store
    keeps the durable jobs, and is closed with the app; doors say who may ask; coding_s is how long an image of a latent
    model takes to decode, and to encode.
    """
    doors = doors or Doors()
    services, lifespan = _services(
        engine=engine,
        limits=limits,
        tick_times=tick_times,
        coding_s=coding_s,
        sharing=sharing,
        store=store,
        doors=doors,
    )
    model = engine.info
    app = FastAPI(
        title="tminus",
        summary="Samples from a trained denoising diffusion U-Net.",
        description=f"Serving {model.name}: {model.height_px}x{model.width_px}, T={model.num_timesteps}.",
        version="0.1.0",
        lifespan=lifespan,
        openapi_url=None,  # docs_routes has it, and the page made of it
        redirect_slashes=False,  # a redirect would name whatever host the request named
    )
    app.include_router(sample_routes(services))
    app.include_router(noise_routes(services))
    app.include_router(stream_routes(services))
    app.include_router(job_routes(services))
    app.include_router(event_routes(services))
    app.include_router(page_routes())
    app.include_router(docs_routes(app))
    app.include_router(system_routes(services))
    problems.install(app, services.metrics)
    openapi.install(app, openapi.Contract(model, limits))
    larger = {"/noise": limits.max_image_bytes + FORM_BYTES}
    # For the images in it; the rest of a body is held to max_body_bytes in api/request.py.
    larger |= dict.fromkeys(("/sample", "/jobs"), limits.max_edit_bytes)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, max_bytes_by_path=larger)
    if doors.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(doors.origins),
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=list(EXPOSED_HEADERS),
        )
    app.add_middleware(Gate, doors=doors, refused=services.metrics.rejected)
    app.add_middleware(RequestContext, observe=services.metrics.requested)
    return Application(app, services.worker, services.streams, engine.info)


def _services(
    *,
    engine: RowEngine,
    limits: Limits,
    tick_times: Sequence[tuple[int, float]],
    coding_s: tuple[float, float],
    sharing: Sharing,
    store: JobStore,
    doors: Doors,
) -> tuple[Services, Lifespan]:
    """Build the parts, and what starts and stops those of them that run."""
    model = engine.info
    metrics = Metrics(model)
    admission = Admission(limits, sharing)
    admission.calibrate(tick_times, *coding_s)
    async_store = AsyncStore(store)
    keeper = SnapshotKeeper(async_store, model.fingerprint, metrics)
    worker = Worker(engine, Scheduler(sharing), admission, metrics, keeper=keeper)
    standings = Standings(worker)
    lifecycle = Lifecycle(async_store, worker, model.fingerprint, limits, metrics)
    decoder, encoder = Decoder(model), Encoder(model, metrics.encoded)
    streams = Streams(limits.max_streams, limits.max_streams_per_address)
    metrics.watch(
        tasks=lambda: len(asyncio.all_tasks()),  # /metrics is answered in the event loop
        rows_active=lambda: worker.rows_active,
        rows_waiting=lambda: max(0, admission.rows - worker.rows_active),
        backlog_s=lambda: admission.backlog_s,
        device_memory_bytes=engine.memory_bytes,
        store_up=lambda: async_store.failure is None,
        streams_open=lambda: streams.open,
        stalled_s=lambda: worker.stalled_s,
        tick_time_ratio=lambda: admission.tick_time_ratio,
    )

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        await lifecycle.start()
        yield
        worker.close()
        keeper.close()
        await lifecycle.close()
        decoder.close()
        encoder.close()

    services = Services(
        model=model,
        limits=limits,
        doors=doors,
        metrics=metrics,
        worker=worker,
        jobs=Jobs(async_store, worker, standings, lifecycle),
        standings=standings,
        decoder=decoder,
        encoder=encoder,
        cache=ResultCache(limits.result_cache_bytes),
        streams=streams,
        recordings=RecordingRoom(),
        noise_turn=asyncio.Lock(),
    )
    return services, lifespan
