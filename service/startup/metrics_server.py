"""/metrics and /healthz on a port of their own: in a thread, by uvicorn, with the bounds of any connection here.

Clients do not come here, so that a supervisor gets an answer also when they hold all connections of the server.
"""

import socket
import threading
from collections.abc import Callable

import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tminus.service.api.answers.documents import StatusAnswer
from tminus.service.api.answers.problems import render
from tminus.service.api.edge.http_protocol import ACCEPTED, http_protocol
from tminus.service.api.edge.origin import Doors
from tminus.service.api.system import alive
from tminus.service.errors import ForeignHost, NotReady
from tminus.service.startup.app import Application
from tminus.service.startup.starting import DETAIL

MOST = 16  # connections at once: a Prometheus and a supervisor have one each, and a person now and then another


def serve_metrics(listener: socket.socket, application: Callable[[], Application | None], doors: Doors) -> None:
    """Answer until the process ends. application: None until it is there, while the model is measured.

    Metrics need no key here, and have the names of all keys. So a page must not reach them by DNS rebinding.
    """

    async def get_metrics(request: Request) -> Response:
        try:
            doors.check_host(request.headers.get("host", ""))
        except ForeignHost as refusal:
            return render(refusal)
        if (there := application()) is None:
            return render(NotReady(DETAIL))
        return Response(there.metrics.render(), media_type=CONTENT_TYPE_LATEST)

    async def healthz(_request: Request) -> Response:
        there = application()
        answer = StatusAnswer(status="alive") if there is None else alive(there.worker)
        return JSONResponse(answer.model_dump()) if isinstance(answer, StatusAnswer) else answer

    config = uvicorn.Config(
        Starlette(routes=[Route("/metrics", get_metrics), Route("/healthz", healthz)]),
        http=http_protocol(MOST, MOST),
        backlog=ACCEPTED,
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
    )
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([listener],), name="tminus-metrics", daemon=True).start()
