"""The app that Serve gets, called as Ray's proxies call it, and which port a replica has of its own."""

import asyncio
from contextlib import closing
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message
from starlette.websockets import WebSocket, WebSocketDisconnect

from tests.postgres import free_port
from tests.service.api.asgi import call, scope_of
from tests.service.fakes import PATIENCE_S
from tminus.service.ray_serve.front import Front
from tminus.service.ray_serve.replica import listen_on_one

BODY = [{"type": "http.request", "body": b"", "more_body": False}]


async def hello(_request: Request) -> PlainTextResponse:
    return PlainTextResponse("hello", headers={"X-Request-ID": "ours", "X-Seed": "1"})


async def echo(ws: WebSocket) -> None:
    await ws.accept()
    try:
        while True:
            # As a job does: it listens while it runs, and stops listening when it has ended.
            listening = asyncio.ensure_future(ws.receive_text())
            await asyncio.wait([listening], timeout=0.01)
            if listening.done():
                await ws.send_text(listening.result())
            else:
                listening.cancel()
                await asyncio.wait([listening])
    except WebSocketDisconnect as gone:
        ws.scope["state"]["gone"] = gone.code


APP = Starlette(routes=[Route("/sample", hello, methods=["POST"]), WebSocketRoute("/stream", echo)])


def ask(front: Front, server: object) -> tuple[int, dict[str, str], bytes]:
    return call(front, iter(BODY), scope_of() | {"server": server})  # type: ignore[arg-type]


def test_whoever_asks_by_loopback_is_let_through_without_the_request_id_which_the_proxy_adds() -> None:
    for address in ("127.0.0.1", "127.3.2.1", "::1"):
        status, headers, body = ask(Front(APP, anybody=False), [address, 8000])
        assert (status, body, headers["x-seed"]) == (200, b"hello", "1")
        assert "x-request-id" not in headers


def test_without_keys_nobody_is_who_asks_by_another_address() -> None:
    for server in (["10.0.0.5", 8000], ["::", 8000], ["somewhere", 8000], [None, None], None, []):
        status, _, body = ask(Front(APP, anybody=False), server)
        assert (status, b"not_open" in body) == (403, True)
        assert ask(Front(APP, anybody=True), server)[0] == 200


# --- WebSockets ---


def stream(
    front: Front, *, texts: list[str], server: str = "127.0.0.1", end: bool = False
) -> tuple[list[Message], Any]:
    """What a client is sent that sends these texts, and then stays; `end`: until the replica ends. And the state."""
    state: dict[str, Any] = {}
    scope = {"type": "websocket", "path": "/stream", "headers": [], "query_string": b"", "state": state}
    scope |= {"server": [server, 8000], "client": ["127.0.0.1", 1], "root_path": "", "subprotocols": []}

    async def main() -> list[Message]:
        sent: list[Message] = []
        coming: asyncio.Queue[Message] = asyncio.Queue()
        coming.put_nowait({"type": "websocket.connect"})
        for text in texts:
            coming.put_nowait({"type": "websocket.receive", "text": text})
        echoed = asyncio.Event()

        async def send(message: Message) -> None:
            sent.append(message)
            if sum(each["type"] == "websocket.send" for each in sent) == len(texts):
                echoed.set()

        running = asyncio.ensure_future(front(scope, coming.get, send))
        async with asyncio.timeout(PATIENCE_S):
            if not end:
                await running
                return sent
            await echoed.wait()
            await asyncio.sleep(0.05)
            coming.put_nowait({"type": "websocket.receive", "text": "late"})
            while sent[-1].get("text") != "late":  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            front.end_streams()
            await running
        return sent

    return asyncio.run(main()), state


def test_a_stream_without_a_job_ends_with_the_replica_and_loses_nothing_before() -> None:
    sent, state = stream(Front(APP, anybody=False), texts=["a", "b", "c"], end=True)
    assert [each["text"] for each in sent if each["type"] == "websocket.send"] == ["a", "b", "c", "late"]
    assert sent[-1] == {"type": "websocket.close", "code": 1013, "reason": "draining"}
    assert state["gone"] == 1013


def test_a_stream_from_another_machine_is_not_accepted_without_keys() -> None:
    (answer,), _ = stream(Front(APP, anybody=False), texts=[], server="10.0.0.5")
    assert answer["type"] == "websocket.close"


def test_the_life_of_the_app_is_none_of_serves_business() -> None:
    async def main() -> list[str]:
        sent: list[str] = []
        phases = iter(["startup", "shutdown"])

        async def receive() -> Message:
            return {"type": f"lifespan.{next(phases)}"}

        async def send(message: Message) -> None:
            sent.append(message["type"])

        await Front(APP, anybody=False)({"type": "lifespan"}, receive, send)
        return sent

    assert asyncio.run(main()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


# --- the port of its own: tests/e2e/test_ray.py asks there ---


def test_the_first_free_port_is_taken_also_before_anything_is_answered() -> None:
    first = free_port()
    with closing(listen_on_one("127.0.0.1", [first])) as one:
        assert one.getsockname()[1] == first
        second = free_port()
        with closing(listen_on_one("127.0.0.1", [first, second])) as two:
            assert two.getsockname()[1] == second
            with pytest.raises(ValueError, match=r"--replica-ports .*: none of \d+\.\.\d+ is free on 127\.0\.0\.1"):
                listen_on_one("127.0.0.1", [first, second])
    with pytest.raises(OSError, match="assign"):
        listen_on_one("192.0.2.1", [8000, 8001])
