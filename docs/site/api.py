"""The OpenAPI document of a server with the bundled checkpoint, Swagger UI that shows it, and the list of its calls."""

import asyncio
import json
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fastapi_offline
import httpx
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html

from docs.site import reference

SWAGGER = ("swagger-ui.css", "swagger-ui-bundle.js")


@cache
def document() -> dict[str, Any]:
    """Return the OpenAPI document of a server that serves the bundled checkpoint with default settings."""
    from tminus.service.access.access import Access
    from tminus.service.engine.loading import load_engine
    from tminus.service.engine.protocol import BUNDLED
    from tminus.service.jobs.store.async_store import Stores
    from tminus.service.jobs.store.sqlite_store import SqliteStore
    from tminus.service.startup.app import create_app
    from tminus.service.startup.loader import ModelLoader
    from tminus.service.startup.models import Prepared, ServedModels
    from tminus.service.startup.serve import Preparer
    from tminus.service.startup.settings import Library, Settings

    settings = Settings.model_construct(executor="eager")  # otherwise the defaults, whatever the environment says
    loaded = load_engine(settings.load_options(BUNDLED), places_of=lambda _: 1)  # which measures nothing
    limits = settings.limits(loaded.speed.max_rows, loaded.speed.policy.max_batch)
    model = Prepared(loaded.engine, limits, loaded.speed)
    served = ServedModels([model], Stores(lambda _: SqliteStore(None)), settings.allowed_sites(), Access())
    loader = ModelLoader(served, Library(), Preparer(settings).load)
    return asyncio.run(_document_of(create_app(served, loader)))


async def _document_of(app: FastAPI) -> dict[str, Any]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        answer = await client.get("/openapi.json")
    document: dict[str, Any] = answer.raise_for_status().json()
    return document


def files() -> dict[str, bytes]:
    """Return what lies beside the page: the document, and Swagger UI with it inside, for file:// can fetch nothing."""
    static, (css, script) = Path(fastapi_offline.__file__).parent / "static", SWAGGER
    html = get_swagger_ui_html(
        openapi_url="",
        title="tminus: OpenAPI",
        swagger_js_url=script,
        swagger_css_url=css,
        swagger_favicon_url="../../assets/icon.svg",
        swagger_ui_parameters={"spec": document(), "supportedSubmitMethods": []},
    )
    return {name: (static / name).read_bytes() for name in SWAGGER} | {
        "openapi.json": json.dumps(document(), indent=1, ensure_ascii=False).encode(),
        # A file has no header that says how it is encoded.
        "openapi.html": bytes(html.body).replace(b"<head>", b'<head><meta charset="utf-8">'),
    }


def page() -> str:
    """Return the page that lists the calls, each with a link to where Swagger UI shows it."""
    lines = ["[Swagger UI](openapi.html) shows the [OpenAPI document](openapi.json).", "", "| call | |", "|---|---|"]
    for path, operations in document()["paths"].items():
        for method, each in operations.items():
            shown = f"openapi.html#/{quote(each['tags'][0])}/{each['operationId']}"
            lines.append(f"| [`{method.upper()} {path}`]({shown}) | {each['summary']} |")
    return reference.page("api", "\n".join(lines))
