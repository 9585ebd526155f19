"""GET /model, /healthz, /readyz and /metrics: what is loaded, and how it is doing."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST

from service.api import problems
from service.errors import Draining, EngineFailed, NotReady
from service.metrics import Metrics
from service.model_info import Limits, ModelInfo
from service.worker.worker import CRASHED, Worker


def system_routes(worker: Worker, model: ModelInfo, limits: Limits, metrics: Metrics) -> APIRouter:
    """Make the routes."""
    router = APIRouter(tags=["system"])

    @router.get("/model", summary="What is loaded, and the limits")
    async def get_model() -> dict[str, Any]:
        document = asdict(model) | {"limits": asdict(limits)}
        del document["log_sigmas"]  # T numbers: /model/schedule has them
        return document

    @router.get("/model/schedule", summary="The noise schedule: alpha_bar_t and beta_t of t = 0..T-1")
    async def get_schedule() -> dict[str, list[float]]:
        alpha_bar = [model.alpha_bar(t) for t in range(model.num_timesteps)]
        before = [1.0, *alpha_bar[:-1]]
        beta = [1 - now / then if then else 1.0 for now, then in zip(alpha_bar, before, strict=True)]
        return {"alpha_bar": alpha_bar, "beta": beta}

    @router.get("/healthz", summary="Liveness: the process answers and its worker runs", response_class=JSONResponse)
    async def healthz() -> Response:
        if worker.crashed:
            return problems.render(EngineFailed(CRASHED))
        return JSONResponse({"status": "alive"})

    @router.get("/readyz", summary="Readiness: a tick has run and work is taken", response_class=JSONResponse)
    async def readyz() -> Response:
        # Rendered, not raised: a probe that is told to wait is no rejected request.
        if worker.crashed:
            return problems.render(EngineFailed(CRASHED))
        if worker.draining:
            return problems.render(Draining())
        return JSONResponse({"status": "ready"}) if worker.ready else problems.render(NotReady())

    @router.get("/metrics", summary="Prometheus", response_class=Response)
    async def get_metrics() -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    return router
