"""GET /model and GET /model/schedule, the health probes, and GET /metrics."""

from operator import itemgetter

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from tminus.service.api.answers import problems
from tminus.service.api.answers.documents import ModelAnswer, ScheduleAnswer, StatusAnswer
from tminus.service.api.answers.headers import with_headers
from tminus.service.api.answers.openapi import Described, failures
from tminus.service.api.answers.operations import described
from tminus.service.api.models import Models
from tminus.service.api.page import compressed
from tminus.service.api.request.reading import BARE, qualities
from tminus.service.errors import Draining, EngineFailed, NotReady, ServiceError
from tminus.service.images.encoder import JSON
from tminus.service.jobs.jobs import Jobs
from tminus.service.metrics import Metrics
from tminus.service.worker.worker import CRASHED, Worker

OPENMETRICS = "application/openmetrics-text"
METRICS: Described = {"content": {OPENMETRICS: {"schema": {"type": "string"}}}, **with_headers("Vary")}


def model_routes(models: Models) -> APIRouter:
    """Return a router with GET /model and GET /model/schedule."""
    router = APIRouter(tags=["system"])

    @router.get("/model", **described("get_model"), dependencies=BARE, responses=failures(422))
    async def get_model(request: Request) -> ModelAnswer:
        services = models.of(request)
        return ModelAnswer.of(services.model, services.limits)

    @router.get(
        "/model/schedule",
        **described("get_noise_schedule"),
        response_model=ScheduleAnswer,
        dependencies=BARE,
        responses={200: with_headers("Vary"), **failures(422)},
    )
    async def get_schedule(request: Request) -> Response:
        schedule = ScheduleAnswer.of(models.of(request).model)
        return compressed(request, Response(schedule.model_dump_json(), media_type=JSON))

    return router


def system_routes(worker: Worker, jobs: Jobs, metrics: Metrics | None) -> APIRouter:
    """Return a router with the health probes and /metrics. metrics: None leaves out /metrics."""
    router = APIRouter(tags=["system"])

    @router.get("/healthz", **described("get_liveness"), response_model=StatusAnswer, responses=failures(500, 503))
    async def healthz() -> StatusAnswer | Response:
        return alive(worker)

    unready = failures(500, 503, 507)

    @router.get("/health", **described("get_health"), response_model=StatusAnswer, responses=unready)
    @router.get("/readyz", **described("get_readiness"), response_model=StatusAnswer, responses=unready)
    async def readyz() -> StatusAnswer | Response:
        reason = why_unready(worker, jobs)
        return StatusAnswer(status="ready") if reason is None else problems.render(reason)

    if metrics is not None:

        @router.get("/metrics", **described("get_metrics"), response_class=PlainTextResponse, responses={200: METRICS})
        async def get_metrics(request: Request) -> Response:
            return metrics_answer(metrics, request)

    return router


# Return problems instead of raising them, so that a failed probe does not count as a rejected request.


def metrics_answer(metrics: Metrics, request: Request) -> Response:
    """Return the response to /metrics: OpenMetrics if Accept lists it and does not prefer plain text, else plain text.

    As in Prometheus' own exporters, other media types in Accept are ignored.
    """
    liked = dict(sorted(qualities(", ".join(request.headers.getlist("accept"))), key=itemgetter(1)))
    quality = liked.get(OPENMETRICS, 0.0)
    body, media_type = metrics.render(as_openmetrics=quality > 0 and quality >= liked.get("text/plain", 0.0))
    return Response(body, media_type=media_type, headers={"Vary": "Accept"})


def alive(worker: Worker) -> StatusAnswer | Response:
    """Return the response to /healthz. Safe to call from any thread."""
    reason = fatal_error(worker)
    return StatusAnswer(status="alive") if reason is None else problems.render(reason)


def fatal_error(worker: Worker) -> ServiceError | None:
    """Return the error that calls for a restart, such as a crash or a hung thread. Safe to call from any thread."""
    return EngineFailed(CRASHED) if worker.state.crashed else worker.state.stall


def why_unready(worker: Worker, jobs: Jobs) -> ServiceError | None:
    """Return the error that new work would get now, or None if the server accepts work."""
    if (reason := fatal_error(worker)) is not None:
        return reason
    if worker.state.draining:
        return Draining()
    if not worker.state.ready:
        return NotReady()
    # Failures of a shared store do not count, because they affect every server. If all servers became unready, none
    # would answer the calls that need no store.
    return jobs.store_failure(of_shared=False)
