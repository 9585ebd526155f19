"""GET / and /docs: the web page, the API in Swagger UI, and the files that both use.

All of these files come from this server. The pages load nothing from other sites.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import Receive, Scope, Send

from tminus.service.api.answers.operations import described
from tminus.service.api.request.reading import qualities

FOLDER = Path(__file__).parents[1] / "page"
HEADERS = {
    "Cache-Control": "no-cache",
    # The page creates blob: URLs for its own data.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self' blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

# Swagger UI sets style attributes, and its stylesheet embeds images as data: URLs.
DOCS_HEADERS = HEADERS | {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
}

GZIP_LEVEL = 6


def compressed(request: Request, answer: Response) -> Response:
    """Return the response, compressed if the client accepts gzip. Use it only for long texts without secrets.

    The ETag becomes weak, because it identifies the compressed and the plain form alike (RFC 9110, section 8.8.1).
    """
    if (tag := answer.headers.get("etag")) is not None:
        answer.headers["etag"] = f"W/{tag}"
    encodings = qualities(",".join(request.headers.getlist("accept-encoding")))
    # Ranges count bytes of the plain file, not of its compressed form.
    is_whole = answer.status_code == 200 and "range" not in request.headers
    if is_whole and any(name == "gzip" and q > 0 for name, q in encodings):
        if request.method == "HEAD":  # the compressed length is not known
            answer.headers.update({"Content-Encoding": "gzip", "Vary": "Accept-Encoding"})
            del answer.headers["Content-Length"]
            return answer
        return _Compressed(answer)
    answer.headers["Vary"] = "Accept-Encoding"
    return answer


class _Compressed(Response):
    def __init__(self, answer: Response) -> None:
        super().__init__()
        self._compressing = GZipMiddleware(answer, minimum_size=0, compresslevel=GZIP_LEVEL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._compressing(scope, receive, send)


def page_routes(*, with_metrics: bool = True) -> APIRouter:
    """Return a router with the web page and its files. with_metrics: whether the page links to /metrics."""
    router = APIRouter(tags=["page"])
    files = StaticFiles(directory=FOLDER)  # responds with 304 if the client already has the file
    unlinked = (FOLDER / "index.html").read_text("utf-8").replace('<a id="metrics"', '<a id="metrics" hidden')

    @router.get("/", **described("get_page"), response_class=HTMLResponse)
    async def get_page(request: Request) -> Response:
        if not with_metrics:
            return _with_headers(HTMLResponse(unlinked))
        return _with_headers(await files.get_response("index.html", request.scope))

    @router.get("/page/{name}", include_in_schema=False)
    async def get_file(request: Request, name: str) -> Response:
        return compressed(request, _with_headers(await files.get_response(name, request.scope)))

    return router


def docs_routes(document: Callable[[Request], dict[str, Any]]) -> APIRouter:
    """Return a router with Swagger UI and the OpenAPI document. document: makes the document for a request."""
    router = APIRouter(include_in_schema=False)
    pages, swagger_ui = StaticFiles(directory=FOLDER), StaticFiles(directory=_swagger_ui_folder())

    @router.get("/docs")
    async def get_docs(request: Request) -> Response:
        return _with_headers(await pages.get_response("docs.html", request.scope), DOCS_HEADERS)

    @router.get("/docs/{name}")
    async def get_file(request: Request, name: str) -> Response:
        return _with_headers(await swagger_ui.get_response(name, request.scope), DOCS_HEADERS)

    @router.get("/openapi.json")
    async def get_openapi(request: Request) -> JSONResponse:
        return JSONResponse(document(request))

    return router


def _swagger_ui_folder() -> Path:
    """Return the folder of Swagger UI's files. It is part of the package fastapi_offline, which is not imported."""
    spec = find_spec("fastapi_offline")
    assert spec is not None, "pyproject.toml asks for it"
    assert spec.origin is not None
    return Path(spec.origin).parent / "static"


def _with_headers(response: Response, headers: Mapping[str, str] = HEADERS) -> Response:
    response.headers.update(headers)
    return response
