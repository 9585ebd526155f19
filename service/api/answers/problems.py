"""Renders errors as application/problem+json, or in the error format of another vendor's API."""

import json
import logging
import re
from collections.abc import Callable, Collection, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.types import Scope

from tminus.service.errors import ServiceError, short
from tminus.service.metrics import Metrics
from tminus.service.tracing import PROBLEM, REQUEST_ID, note

log = logging.getLogger(__name__)

PROBLEM_JSON, JSON = "application/problem+json", "application/json"
HUGGING_FACE = re.compile(r"/|/models/[^/]+/?")  # paths to which Hugging Face clients POST; see hugging_face.py
STATUS = {422: 400, 409: 503}  # OpenAI does not use 422, and its clients retry every 409
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
Form = Callable[[Mapping[str, Any]], tuple[int, Mapping[str, Any]]]


def as_openai(problem: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
    """Convert a problem to a status code and an OpenAI error body."""
    status: int = STATUS.get(problem["status"], problem["status"])
    error = {
        "message": problem["detail"],
        "type": TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": problem.get("field"),
        "code": problem["code"],
    }
    return status, {"error": error}


def as_error_text(problem: Mapping[str, Any]) -> tuple[int, Mapping[str, Any]]:
    """Convert a problem to a status code and an error body for KServe and Hugging Face clients.

    The body has the error's text as `error`, and also our error code. Triton, the reference server for KServe's
    protocol, answers every invalid request with 400.
    """
    status = 400 if problem["status"] == 422 else problem["status"]
    kept = {name: problem[name] for name in ("code", "field", "value", "bound") if name in problem}
    return status, {"error": problem["detail"], **kept}


# The error formats of other vendors' APIs, keyed by the first segment of the path.
FORMS: Mapping[str, Form] = {"v1": as_openai, "v2": as_error_text}


def render(error: ServiceError, scope: Scope | None = None) -> Response:
    """Return the response for an error. scope: the request, whose API determines the error format."""
    return respond(error.problem(), error.headers, scope)


def respond(problem: Mapping[str, Any], headers: Mapping[str, str], scope: Scope | None) -> Response:
    """Return the response for a problem. scope: the request, whose API determines the error format."""
    status, body, media_type = problem["status"], problem, PROBLEM_JSON
    if scope is not None and (form := error_form(scope["method"], scope["path"])) is not None:
        (status, body), media_type = form(problem), JSON
    return Response(json.dumps(body, ensure_ascii=False), status, dict(headers), media_type=media_type)


def error_form(method: str, path: str) -> Form | None:
    """Return the error format for a request, or None for problem documents."""
    if method == "POST" and HUGGING_FACE.fullmatch(path):
        return as_error_text
    return FORMS.get(path.removeprefix("/").partition("/")[0])


def note_error(error: ServiceError, metrics: Metrics) -> None:
    """Record a request's error in its trace, the metrics and the log."""
    note({PROBLEM: error.code})
    if error.refusal:
        metrics.count("tminus_rejected_total", error.code)
    log.info("request %s: %d %s: %s", REQUEST_ID.get(), error.status, error.code, ascii(short(error.detail)))


def install(app: FastAPI, metrics: Metrics, allowed: Mapping[str, Collection[str]]) -> None:
    """Add the error handlers to an app. allowed: the methods of every route, keyed by path."""

    async def on_service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        note_error(error, metrics)
        return render(error, request.scope)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code = HTTPStatus(error.status_code).name.lower()
        headers = dict(error.headers or {})
        path = getattr(request.scope.get("route"), "path", request.url.path)
        asked, detail = short(request.url.path), str(error.detail)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED and (methods := allowed.get(path)):
            # starlette lists the methods of only one of the routes with this path.
            headers["Allow"] = ", ".join(sorted(methods))
            detail = f"the method on {asked!r} must be one of {headers['Allow']}, got {short(request.method)!r}"
        elif error.status_code == HTTPStatus.NOT_FOUND:
            detail = f"there is no path {asked!r}; /docs lists the calls"
        problem = {
            "type": f"urn:tminus:problem:{code}",
            "title": HTTPStatus(error.status_code).phrase,
            "status": error.status_code,
            "code": code,
            "detail": detail,
        }
        return respond(problem, headers, request.scope)

    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_exception)
