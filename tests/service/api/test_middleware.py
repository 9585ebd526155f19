"""The id of a request and the bounds of its body, through the app."""

import asyncio
import json
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from tests.service.api.asgi import call, scope_of
from tests.service.conftest import Site, problem
from tminus.service.api.middleware import RequestContext
from tminus.service.api.pieces import PIECE_BYTES

QUICK = {"steps": 2, "seed": 5, "class_label": "cat"}


# --- the id of a request ---


@pytest.mark.parametrize("given", ["abc-123", "A.b:c_d", "x" * 64])
def test_a_sane_request_id_is_echoed(site: Site, given: str) -> None:
    assert site.client.get("/healthz", headers={"X-Request-ID": given}).headers["x-request-id"] == given


@pytest.mark.parametrize("given", ["", "x" * 65, "a b", "a\tb", "<script>", "a,b", "ü".encode("latin-1")])
def test_a_request_id_that_could_do_harm_is_replaced(site: Site, given: str | bytes) -> None:
    value = given if isinstance(given, bytes) else given.encode()
    answered = site.client.get("/healthz", headers=[(b"x-request-id", value)]).headers["x-request-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", answered)


def test_each_request_has_an_id_of_its_own(site: Site) -> None:
    assert len({site.client.get("/healthz").headers["x-request-id"] for _ in range(5)}) == 5


def test_an_unforeseen_error_has_the_requests_id_and_is_counted_as_500(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object) -> bytes:
        raise RuntimeError("secret")

    monkeypatch.setattr("tminus.service.images.encoder.encode_result", fail)
    response = site.post(json=QUICK, headers={"X-Request-ID": "mine"})
    assert response.headers.get("x-request-id") == "mine"
    assert site.metrics()['tminus_request_duration_seconds_count{"route": "/sample", "status": "500"}'] == 1


# --- the size of a body ---


def test_a_body_over_the_limit_is_refused_by_its_content_length(site: Site) -> None:
    document = problem(site.post(content=b" " * 4097), 413, "body_too_large")
    assert document["field"] == "body"
    assert "4096" in document["bound"]


def test_a_body_at_the_limit_is_read(site: Site) -> None:
    body = json.dumps(QUICK).encode()
    assert site.post(content=body.ljust(4096)).status_code == 200


def test_a_body_that_only_turns_out_too_large_is_not_read_to_its_end(site: Site) -> None:
    sent: list[int] = []

    def receive() -> Iterator[dict[str, Any]]:
        for i in range(1000):
            sent.append(i)
            yield {"type": "http.request", "body": b" " * 1000, "more_body": True}

    status, headers, body = call(site.app, receive())
    assert status == 413
    assert headers["content-type"] == "application/problem+json"
    assert json.loads(body)["code"] == "body_too_large"
    assert len(sent) == 5


# --- the log ---


def test_each_request_has_a_line_with_its_id_client_target_and_status(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        site.client.post("/sample?n=2", json=QUICK, headers={"X-Request-ID": "mine"})
        site.client.get("/nowhere", headers={"X-Request-ID": "lost"})
        site.client.get("/readyz", headers={"X-Request-ID": "probe"})
    lines = [record.getMessage() for record in caplog.records]
    assert any(re.fullmatch(r"request mine of testclient: POST /sample\?n=2 200 in \d\.\d+ s", line) for line in lines)
    assert any(line.startswith("request lost of testclient: GET /nowhere 404 in ") for line in lines)
    assert not any("probe" in line for line in lines)
    job = [line for line in lines if line.startswith("job ")]
    assert len(job) == 2, "accepted, done"
    assert all(" of request mine " in line for line in job)


def test_a_refusal_has_a_line_with_the_reason_on_one_line(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        site.client.post("/sample", json={"bogus\nrequest forged": 1}, headers={"X-Request-ID": "mine"})
    (line,) = [record.getMessage() for record in caplog.records if "unknown_field" in record.getMessage()]
    assert line.startswith("request mine: 422 unknown_field: ")
    assert "\n" not in line


def test_a_long_target_is_cut(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        site.client.get("/nowhere?" + "x" * 10_000)
    assert all(len(each.getMessage()) < 500 for each in caplog.records if each.name.startswith("tminus"))


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/docs",
        "/openapi.json",
        "/model",
        "/healthz",
        "/metrics",
        "/jobs",
        "/nowhere",
        "/sample?n=0",
        "/page/page.js",
    ],
)
def test_no_answer_may_be_taken_for_something_else(site: Site, path: str) -> None:
    assert site.client.get(path).headers["x-content-type-options"] == "nosniff"


# --- what is sent ---


@pytest.mark.parametrize("size", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES, 3 * PIECE_BYTES + 5])
@pytest.mark.parametrize("more", [False, True])
def test_a_long_answer_is_sent_in_pieces(size: int, more: bool) -> None:
    """So that uvicorn waits for a slow reader before it takes more."""
    body, sent = os.urandom(size), []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    asyncio.run(RequestContext(app, lambda *_: None)(scope_of(), receive, send))
    pieces = sent[1:]
    assert b"".join(each["body"] for each in pieces) == body
    assert all(len(each["body"]) <= PIECE_BYTES for each in pieces)
    assert len(pieces) == max(1, -(-size // PIECE_BYTES))
    assert [each["more_body"] for each in pieces] == [True] * (len(pieces) - 1) + [more]


def test_how_long_a_client_takes_to_read_is_not_how_long_its_request_took() -> None:
    observed: list[float] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(3 * PIECE_BYTES)})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        await asyncio.sleep(0.4 if message["type"] == "http.response.body" else 0)

    asyncio.run(
        RequestContext(app, lambda _route, _status, seconds: observed.append(seconds))(scope_of(), receive, send)
    )
    assert observed[0] < 0.4


def test_others_have_their_turn_between_two_pieces() -> None:
    """The loop of asyncio among them, which tells of a connection that is lost, as soon as it was written to."""
    sent: list[str] = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.body", "body": bytes(2 * PIECE_BYTES)})

    async def send(_message: Message) -> None:
        sent.append("a piece")
        asyncio.get_running_loop().call_soon(sent.append, "another")

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    asyncio.run(RequestContext(app, lambda *_: None)(scope_of(), receive, send))
    assert sent[:3] == ["a piece", "another", "a piece"]
