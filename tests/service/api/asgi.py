"""Calls an app by messages of ASGI, or serves it for sockets: for clients that do what no HTTP library does."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import uvicorn
from fastapi import FastAPI

from tests.service.fakes import PATIENCE_S, wait_until
from tminus.service.api.edge.connections import StreamProtocol, stream_protocol
from tminus.service.api.edge.http_protocol import HttpProtocol, http_protocol


class Served:
    """An app on a real uvicorn with our protocols, in a thread."""

    def __init__(
        self, app: Any, http: type[HttpProtocol] | None = None, ws: type[StreamProtocol] | None = None, **options: Any
    ) -> None:
        config = uvicorn.Config(
            app,
            port=0,
            http=http or http_protocol(1000, 100),
            ws=ws or stream_protocol(),
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            **options,
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> Self:
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.address = self.server.servers[0].sockets[0].getsockname()
        return self

    def __exit__(self, *_error: object) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE_S)


def scope_of(path: str = "/sample", query: bytes = b"", headers: Sequence[tuple[bytes, bytes]] = ()) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": query,
        "headers": list(headers),
        "client": ("test", 1),
        "server": ("test", 80),
    }


def call(
    app: FastAPI,
    messages: Iterator[dict[str, Any]],
    scope: dict[str, Any] | None = None,
    before_last: Callable[[], object] = lambda: None,
) -> tuple[int, dict[str, str], bytes]:
    """Call an app with these messages, then a disconnect that waits for `before_last`. Status 0: nothing was sent."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        for message in messages:
            return message
        await asyncio.to_thread(before_last)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def main() -> None:
        await asyncio.wait_for(app(scope or scope_of(), receive, send), PATIENCE_S)  # type: ignore[arg-type]

    asyncio.run(main())
    start = sent[0] if sent else {"status": 0, "headers": []}
    headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
    return start["status"], headers, b"".join(message.get("body", b"") for message in sent)
