"""GET / and /docs: the web page, the API for people by Swagger UI, and the files they need.

All of it is served from here; nothing comes from elsewhere.
"""

from collections.abc import Callable, Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tminus.service.api.edge.origin import OF_A_MODEL
from tminus.service.api.request.reading import qualities

FOLDER = Path(__file__).parents[1] / "page"
HEADERS = {
    "Cache-Control": "no-cache",
    # blob: is what the page itself has made.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self' blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

# Swagger UI sets style attributes, and its stylesheet has its pictures in it.
DOCS_HEADERS = HEADERS | {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
}

COMPRESSED = ("/page/", "/model/schedule")  # long texts without secrets, and no images: those are compressed already
GZIP_LEVEL = 6
SUFFIX = "-gzip"  # of the ETag of compressed bytes, which are others (RFC 9110, section 8.8.3.3)


class Compression:
    """Sends the files of the page compressed, to clients that take gzip. Everything else is sent as it is."""

    def __init__(self, app: ASGIApp) -> None:
        self._app, self._compressing = app, GZipMiddleware(app, compresslevel=GZIP_LEVEL)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        compresses = scope["type"] == "http" and OF_A_MODEL.sub("", scope["path"]).startswith(COMPRESSED)
        if not compresses:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        encodings = qualities(",".join(headers.getlist("accept-encoding")))
        # A range is one of the file's bytes, which the compressed ones are not.
        whole = "range" not in headers and any(name == "gzip" and q > 0 for name, q in encodings)
        named = f'{SUFFIX}"' in ",".join(headers.getlist("if-none-match"))

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(raw=message["headers"])
                # What is too short to be compressed has none yet, nor has a 304.
                if "Accept-Encoding" not in answer.get("vary", ""):
                    answer.add_vary_header("Accept-Encoding")
                packed = answer.get("content-encoding") == "gzip" or (message["status"] == 304 and named)
                if whole and packed and "etag" in answer:
                    answer["etag"] = f'{answer["etag"][:-1]}{SUFFIX}"'
            await send(message)

        if whole and named:
            scope = {**scope, "headers": [_without_suffix(*header) for header in scope["headers"]]}
        await (self._compressing if whole else self._app)(scope, receive, send_named)


def page_routes(without: Collection[str] = ()) -> APIRouter:
    """Make the routes. without: links of the page that lead nowhere here, as docs and metrics may."""
    router = APIRouter(tags=["page"])
    files = StaticFiles(directory=FOLDER)  # answers 304 to clients that have a file already
    page = (FOLDER / "index.html").read_text("utf-8")
    for link in without:
        page = page.replace(f'<a id="{link}"', f'<a id="{link}" hidden')

    @router.head("/", include_in_schema=False)
    @router.get("/", summary="The web page", response_class=HTMLResponse)
    async def get_page(request: Request) -> Response:
        if without:
            return _with_headers(HTMLResponse(page))
        return _with_headers(await files.get_response("index.html", request.scope))

    @router.get("/page/{name}", include_in_schema=False)
    async def get_file(request: Request, name: str) -> Response:
        return _with_headers(await files.get_response(name, request.scope))

    return router


def docs_routes(document: Callable[[Request], dict[str, Any]]) -> APIRouter:
    """Make the routes that show what can be asked for. document: makes the OpenAPI document for a request."""
    router = APIRouter(include_in_schema=False)
    pages, swagger_ui = StaticFiles(directory=FOLDER), StaticFiles(directory=_swagger_ui_folder())

    @router.api_route("/docs", methods=["GET", "HEAD"])
    async def get_docs(request: Request) -> Response:
        return _with_headers(await pages.get_response("docs.html", request.scope), DOCS_HEADERS)

    @router.get("/docs/{name}")
    async def get_file(request: Request, name: str) -> Response:
        return _with_headers(await swagger_ui.get_response(name, request.scope), DOCS_HEADERS)

    @router.api_route("/openapi.json", methods=["GET", "HEAD"])
    async def get_openapi(request: Request) -> JSONResponse:
        return JSONResponse(document(request))

    return router


def _swagger_ui_folder() -> Path:
    """Find the files of the package that carries Swagger UI; none of its code is run."""
    spec = find_spec("fastapi_offline")
    assert spec is not None, "pyproject.toml asks for it"
    assert spec.origin is not None
    return Path(spec.origin).parent / "static"


def _without_suffix(name: bytes, value: bytes) -> tuple[bytes, bytes]:
    """If-None-Match as the files' own ETags have it; other headers as they are."""
    return name, value.replace(f'{SUFFIX}"'.encode(), b'"') if name == b"if-none-match" else value


def _with_headers(response: Response, headers: Mapping[str, str] = HEADERS) -> Response:
    response.headers.update(headers)
    return response
