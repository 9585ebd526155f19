"""Puts the parts together: engine, scheduler, admission, worker, encoder, routes. Nothing is global."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service.api import problems
from service.api.events import event_routes
from service.api.jobs import job_routes
from service.api.middleware import BodyLimit, RequestContext
from service.api.multipart import FORM_BYTES
from service.api.noise import noise_routes
from service.api.page import page_routes
from service.api.result_cache import ResultCache
from service.api.sample import sample_routes
from service.api.stream import stream_routes
from service.api.stream_limits import Streams
from service.api.system import system_routes
from service.engine.protocol import RowEngine
from service.images.decoder import Decoder
from service.images.encoder import Encoder
from service.jobs.async_store import AsyncStore
from service.jobs.jobs import Jobs
from service.jobs.lifecycle import Lifecycle
from service.jobs.snapshot_keeper import SnapshotKeeper
from service.jobs.standings import Standings
from service.jobs.store import JobStore
from service.metrics import Metrics
from service.model_info import Limits
from service.scheduling.admission import Admission
from service.scheduling.scheduler import Scheduler, Sharing
from service.worker.worker import Worker


def create_app(
    engine: RowEngine,
    limits: Limits,
    tick_times: Sequence[tuple[int, float]],
    sharing: Sharing,
    store: JobStore,
    allowed_origins: frozenset[str] = frozenset(),
) -> FastAPI:
    """Build the application around an engine. The worker runs for as long as the app's lifespan.

    tick_times are the measured (places, seconds) of a tick; sharing says how the scheduler gives out its places; store
    keeps the durable jobs, and is closed with the app;
    allowed_origins are those whose pages may open WebSockets beside the server's own.
    `app.state.worker` is for the entry point, which drains it on SIGTERM, and then waits for `app.state.streams`.
    """
    model = engine.info
    metrics = Metrics(model)
    admission = Admission(limits, sharing)
    admission.calibrate(tick_times)
    async_store = AsyncStore(store)
    keeper = SnapshotKeeper(async_store, model.fingerprint, metrics)
    worker = Worker(engine, Scheduler(sharing), admission, metrics, keeper=keeper)
    standings = Standings(worker)
    lifecycle = Lifecycle(async_store, worker, model.fingerprint, limits, metrics)
    jobs = Jobs(async_store, worker, standings, lifecycle)
    encoder, decoder = Encoder(model, metrics.encoded), Decoder(model)
    metrics.watch(
        tasks=lambda: len(asyncio.all_tasks()),  # /metrics is answered in the event loop
        rows_active=lambda: worker.rows_active,
        rows_waiting=lambda: max(0, admission.rows - worker.rows_active),
        backlog_s=lambda: admission.backlog_s,
        device_memory_bytes=engine.memory_bytes,
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

    app = FastAPI(
        title="tminus",
        summary="Samples from a trained denoising diffusion U-Net.",
        description=f"Serving {model.name}: {model.height_px}x{model.width_px}, T={model.num_timesteps}.",
        version="0.1.0",
        lifespan=lifespan,
        redoc_url=None,
    )
    app.state.worker = worker
    streams = app.state.streams = Streams(limits.max_streams, limits.max_streams_per_address)
    cache = ResultCache(limits.result_cache_bytes)
    app.include_router(sample_routes(worker, jobs, decoder, encoder, cache, metrics, model, limits))
    app.include_router(noise_routes(worker, decoder, encoder, metrics, model, limits))
    app.include_router(
        stream_routes(worker, standings, decoder, encoder, streams, metrics, model, limits, allowed_origins)
    )
    app.include_router(job_routes(jobs, decoder, encoder, model, limits))
    app.include_router(event_routes(jobs, worker, standings, encoder, streams, metrics, model))
    app.include_router(page_routes())
    app.include_router(system_routes(worker, model, limits, metrics))
    problems.install(app, metrics)
    larger = {"/noise": limits.max_image_bytes + FORM_BYTES}
    # For the images in it; what else is in a body is held to max_body_bytes in intake.py.
    larger |= dict.fromkeys(("/sample", "/jobs"), limits.max_edit_bytes)
    app.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, max_bytes_by_path=larger)
    app.add_middleware(RequestContext, observe=metrics.requested)
    return app
