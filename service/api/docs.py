"""GET /docs and /openapi.json: the API for people, by Swagger UI, and for programs. Nothing comes from elsewhere."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles

from tminus.service.api.page import FOLDER, HEADERS

# Swagger UI sets style attributes, and its stylesheet has its pictures in it.
DOCS_HEADERS = HEADERS | {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
}


def docs_routes(document: Callable[[Request], dict[str, Any]]) -> APIRouter:
    """Make the routes that show what can be asked for. document: makes the OpenAPI document for a request."""
    router = APIRouter(include_in_schema=False)
    pages, swagger_ui = StaticFiles(directory=FOLDER), StaticFiles(directory=_swagger_ui_folder())

    @router.api_route("/docs", methods=["GET", "HEAD"])
    async def get_docs(request: Request) -> Response:
        return _with_headers(await pages.get_response("docs.html", request.scope))

    @router.get("/docs/{name}")
    async def get_file(request: Request, name: str) -> Response:
        return _with_headers(await swagger_ui.get_response(name, request.scope))

    @router.api_route("/openapi.json", methods=["GET", "HEAD"])
    async def get_openapi(request: Request) -> JSONResponse:
        return JSONResponse(document(request))

    return router


def _swagger_ui_folder() -> Path:
    """Where the package that carries Swagger UI has its files; none of its code is run."""
    spec = find_spec("fastapi_offline")
    assert spec is not None, "pyproject.toml asks for it"
    assert spec.origin is not None
    return Path(spec.origin).parent / "static"


def _with_headers(response: Response) -> Response:
    response.headers.update(DOCS_HEADERS)
    return response
