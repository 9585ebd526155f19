"""The id of a request and the bounds of its body, through the app."""

import asyncio
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.service.api.asgi import call, scope_of
from tests.service.conftest import MakeSite, Site
from tests.service.fakes import INFO, PATIENCE_S, wait_until
from tminus.service.api.edge.middleware import PIECE_BYTES, RequestContext

QUICK = {"steps": 2, "seed": 5, "class_label": "cat"}


# --- the id of a request ---


def test_a_sane_request_id_is_echoed_and_one_that_could_do_harm_is_replaced(site: Site) -> None:
    for given in ("A.b:c_d", "x" * 64):
        assert site.client.get("/healthz", headers={"X-Request-ID": given}).headers["x-request-id"] == given
    for harmful in (b"x" * 65, b"a b", b"<script>", "ü".encode("latin-1")):
        answered = site.client.get("/healthz", headers=[(b"x-request-id", harmful)]).headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f]{32}", answered)


# --- the size of a body ---


@pytest.mark.parametrize(
    ("path", "kind", "piece", "pieces"),
    [("/sample", b"application/json", 1000, 5), ("/noise", b"image/png", 2**20, 9)],
)
def test_a_body_that_only_turns_out_too_large_is_not_read_to_its_end(
    site: Site, path: str, kind: bytes, piece: int, pieces: int
) -> None:
    sent: list[int] = []

    def receive() -> Iterator[dict[str, Any]]:
        for i in range(1000):
            sent.append(i)
            yield {"type": "http.request", "body": b" " * piece, "more_body": True}

    status, headers, body = call(site.app, receive(), scope_of(path, headers=[(b"content-type", kind)]))
    assert (status, headers["content-type"]) == (413, "application/problem+json")
    assert json.loads(body)["code"] == "body_too_large"
    assert len(sent) == pieces


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


def test_a_refusal_has_a_line_with_the_reason_on_one_line_and_a_long_target_is_cut(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        site.client.post("/sample", json={"bogus\nrequest forged": 1}, headers={"X-Request-ID": "mine"})
        site.client.get("/nowhere?" + "x" * 10_000)
    (line,) = [record.getMessage() for record in caplog.records if "unknown_field" in record.getMessage()]
    assert line.startswith("request mine: 422 unknown_field: ")
    assert "\n" not in line
    assert all(len(each.getMessage()) < 500 for each in caplog.records if each.name.startswith("tminus"))


def test_no_answer_may_be_taken_for_something_else(site: Site) -> None:
    for path in ("/", "/model", "/nowhere", "/sample?n=0"):
        assert site.client.get(path).headers["x-content-type-options"] == "nosniff"


# --- what is sent ---


def answer(body: bytes, send: Send, observe: Callable[..., object] = lambda *_: None, *, more: bool = False) -> None:
    """Let an app behind the middleware send this body to a client."""

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": more})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    asyncio.run(RequestContext(app, observe)(scope_of(), receive, send))


@pytest.mark.parametrize("size", [0, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 5])
@pytest.mark.parametrize("more", [False, True])
def test_a_long_answer_is_sent_in_pieces(size: int, more: bool) -> None:
    """So that uvicorn waits for a slow reader before it takes more."""
    body, sent = os.urandom(size), []

    async def send(message: Message) -> None:
        sent.append(message)

    answer(body, send, more=more)
    pieces = sent[1:]
    assert b"".join(each["body"] for each in pieces) == body
    assert all(len(each["body"]) <= PIECE_BYTES for each in pieces)
    whole = size <= PIECE_BYTES
    assert len(pieces) == (1 if whole else -(-size // PIECE_BYTES) + 1)
    assert whole or pieces[-1]["body"] == b"", "it is taken when all before it has left"
    assert [each["more_body"] for each in pieces] == [True] * (len(pieces) - 1) + [more]


class Reader:
    """A client that is sent an answer, and takes nothing of its body until the test lets it."""

    def __init__(self, app: ASGIApp, method: str, path: str, accept: str, body: bytes = b"") -> None:
        self.scope = scope_of(path, headers=[(b"accept", accept.encode())]) | {"method": method}
        self.app, self.body, self.begun, self.reads = app, body, asyncio.Event(), asyncio.Event()
        self.status, self.received = 0, b""

    async def ask(self) -> None:
        messages = iter([{"type": "http.request", "body": self.body}])

        async def receive() -> Message:
            return next(messages, None) or await asyncio.Future()

        async def send(message: Message) -> None:
            self.status = message.get("status", self.status)
            if message["type"] == "http.response.body":
                self.begun.set()
                await self.reads.wait()
                self.received += message["body"]

        await self.app(self.scope, receive, send)


def readers(site: Site, kind: str, count: int) -> list[Reader]:
    """Readers of one answer of a kind."""
    asked = {"steps": 2, "class_label": "cat", "guidance": 1}
    accept = "application/vnd.tminus.trajectory" if kind == "trajectory" else "application/json"
    given = ("POST", "/sample", accept, json.dumps(asked | ({"seed": 5} if kind == "kept" else {})).encode())
    if kind == "kept":
        site.client.post("/sample", content=given[3], headers={"Accept": accept}).raise_for_status()
    if kind == "a job's":
        job_id = site.client.post("/jobs", json=asked).json()["id"]
        wait_until(lambda: site.client.get(f"/jobs/{job_id}").json()["state"] == "done")
        given = ("GET", f"/jobs/{job_id}/image", accept, b"")
    if kind == "kept, but for its id":
        infer = "/v2/models/fake/infer"
        inputs = [{"name": "seed", "datatype": "UINT64", "shape": [1], "data": [5]}]
        site.client.post(infer, json={"inputs": inputs}).raise_for_status()
        bodies = [json.dumps({"id": str(k), "inputs": inputs}).encode() for k in range(count)]
        return [Reader(site.app, "POST", infer, accept, body) for body in bodies]
    return [Reader(site.app, *given) for _ in range(count)]


@pytest.fixture
def no_answer_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tminus.service.api.edge.middleware.SMALL_BYTES", 100)


@pytest.mark.usefixtures("no_answer_is_small")
@pytest.mark.parametrize("kind", ["kept", "kept, but for its id", "trajectory", "a job's"])
def test_an_answer_counts_until_its_last_byte_has_left_and_a_kept_one_once(make_site: MakeSite, kind: str) -> None:
    site, held = make_site(result_cache_bytes=10_000), list[int]()

    async def main() -> None:
        asking = readers(site, kind, 3)
        tasks = [asyncio.create_task(each.ask()) for each in asking]
        async with asyncio.timeout(PATIENCE_S):
            for each in asking:
                await each.begun.wait()
            held.append(site.answers.held_bytes)
            for each in asking:
                each.reads.set()
            await asyncio.gather(*tasks)
        size = len(asking[0].received)
        assert [each.status for each in asking] == [200] * 3
        assert [len(each.received) for each in asking] == [size] * 3
        if kind == "kept, but for its id":
            assert size < held[0] < size + 50, "the beginning of each, and the rest once"
        else:
            assert held[0] == (size if kind == "kept" else 3 * size)

    asyncio.run(main())
    assert site.answers.held_bytes == 0


@pytest.mark.usefixtures("no_answer_is_small")
@pytest.mark.parametrize("kind", ["kept", "trajectory", "a job's"])
def test_an_answer_that_does_not_fit_is_refused_before_it_has_begun(make_site: MakeSite, kind: str) -> None:
    site = make_site(result_cache_bytes=10_000)
    (asking,) = readers(site, kind, 1)
    with site.answers.hold() as of_others:
        of_others.add(site.answers.limit_bytes - 100)
        if kind == "trajectory":  # for whose making there is room
            site.answers.limit_bytes += 3000
            of_others.add(2900)
        asking.reads.set()
        asyncio.run(asyncio.wait_for(asking.ask(), PATIENCE_S))
    document = json.loads(asking.received)
    assert (asking.status, document["code"], document["field"]) == (429, "too_many_bytes", "body")
    assert site.answers.held_bytes == 0
    assert site.metrics()['tminus_rejected_total{"reason": "too_many_bytes"}'] == 1


def test_a_message_of_a_websocket_counts_and_one_that_does_not_fit_ends_it(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.api.edge.middleware.SMALL_BYTES", 500)  # more than any text here
    site = make_site(info=replace(INFO, height_px=64, width_px=64))
    with site.client.websocket_connect("/sample/stream") as ws, site.answers.hold() as of_others:
        of_others.add(site.answers.limit_bytes)
        ws.send_json({"n": 64, "steps": 2, "class_label": "cat"})
        told = [ws.receive_json()]
        while "code" not in told[-1]:  # raises where a picture comes
            told.append(ws.receive_json())
        assert told[0]["type"] == "accepted"
        assert told[-1]["code"] == "too_many_bytes", "in place of a picture"
    assert site.answers.held_bytes == 0


def test_how_long_a_client_takes_to_read_is_not_how_long_its_request_took() -> None:
    observed: list[float] = []

    async def send(message: Message) -> None:
        await asyncio.sleep(0.4 if message["type"] == "http.response.body" else 0)

    answer(bytes(3 * PIECE_BYTES), send, lambda _route, _status, seconds: observed.append(seconds))
    assert observed[0] < 0.4


def test_others_have_their_turn_between_two_pieces() -> None:
    """The loop of asyncio among them, which tells of a connection that is lost, as soon as it was written to."""
    sent: list[str] = []

    async def send(message: Message) -> None:
        if message["type"] == "http.response.body":
            sent.append("a piece")
            asyncio.get_running_loop().call_soon(sent.append, "another")

    answer(bytes(2 * PIECE_BYTES), send)
    assert sent[:3] == ["a piece", "another", "a piece"]
