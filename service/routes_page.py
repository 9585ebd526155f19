"""GET /: the web page, and the files it needs. All of it is served from here; nothing comes from elsewhere."""

from pathlib import Path

from fastapi import APIRouter, Response
from fastapi.responses import FileResponse

FOLDER = Path(__file__).parent / "page"
MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Cache-Control": "no-cache",  # FileResponse gives an ETag, so that asking again costs nothing
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self' blob: ws: wss:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> APIRouter:
    """Make the routes."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: path for path in FOLDER.iterdir() if path.suffix in MEDIA_TYPES}

    @router.get("/")
    async def get_page() -> Response:
        return FileResponse(FOLDER / "index.html", media_type="text/html; charset=utf-8", headers=HEADERS)

    @router.get("/page/{name}")
    async def get_file(name: str) -> Response:
        if name not in files:
            return Response(status_code=404)
        media_type = MEDIA_TYPES[files[name].suffix]
        return FileResponse(files[name], media_type=media_type, headers=HEADERS)

    return router
