"""Every error as application/problem+json: the service's own, and the framework's."""

import json
import logging
from collections.abc import Collection, Mapping
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException

from tminus.service.errors import ServiceError, short
from tminus.service.metrics import Metrics
from tminus.service.request_id import REQUEST_ID
from tminus.service.tracing import PROBLEM, note

log = logging.getLogger(__name__)

PROBLEM_JSON = "application/problem+json"


def render(error: ServiceError) -> Response:
    """The response for an error of ours."""
    body = json.dumps(error.problem(), ensure_ascii=False)
    return Response(body, error.status, error.headers, media_type=PROBLEM_JSON)


def install(app: FastAPI, metrics: Metrics, allowed: Mapping[str, Collection[str]]) -> None:
    """Add the handlers to an app. allowed: the methods of each route, by its path."""

    async def on_service_error(_request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        note({PROBLEM: error.code})
        if error.refusal:
            metrics.rejected(error.code)
        log.info("request %s: %d %s: %s", REQUEST_ID.get(), error.status, error.code, ascii(short(error.detail)))
        return render(error)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = HTTPStatus(error.status_code).name.lower()
        headers = dict(error.headers or {})
        path = getattr(request.scope.get("route"), "path", request.url.path)
        if methods := allowed.get(path):  # the framework knows one route's methods only
            headers["Allow"] = ", ".join(sorted(methods))
        problem = {
            "type": f"urn:tminus:problem:{code}",
            "title": HTTPStatus(error.status_code).phrase,
            "status": error.status_code,
            "code": code,
            "detail": str(error.detail),
        }
        return Response(json.dumps(problem), error.status_code, headers, media_type=PROBLEM_JSON)

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_exception)
