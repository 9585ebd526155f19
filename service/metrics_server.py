"""/metrics on a port of its own: in a thread, by uvicorn, with the bounds of any connection here."""

import socket
import threading

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tminus.service.api.http_protocol import http_protocol
from tminus.service.metrics import Metrics

MOST = 16  # connections at once: a Prometheus has one, and a person now and then another


def serve_metrics(listener: socket.socket, metrics: Metrics) -> None:
    """Answer until the process ends."""

    async def get_metrics(_request: Request) -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE_LATEST)

    config = uvicorn.Config(
        Starlette(routes=[Route("/metrics", get_metrics)]),
        http=http_protocol(MOST),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=MOST,
    )
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([listener],), name="tminus-metrics", daemon=True).start()
