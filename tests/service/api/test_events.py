"""GET /jobs/{id}/events, through the app on a fake engine."""

import asyncio
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

import pytest
from starlette.types import Message

from tests.service.api.test_middleware import scope_of
from tests.service.conftest import MakeSite, Restarts, Site, problem
from tests.service.durable import SPEC, events, post, wait_for, wait_for_viewer
from tests.service.fakes import PATIENCE_S, wait_until
from tminus.service.api.answers import progress
from tminus.service.api.answers.progress import EventStream
from tminus.service.api.edge.middleware import PIECE_BYTES


def test_events_tell_of_each_step_and_the_end(held: Site) -> None:
    job_id = post(held).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(held.client.get, f"/jobs/{job_id}/events?every=2")
        wait_for_viewer(held)
        for _ in range(6):
            held.engine.gate.let()
            held.engine.next_begun()
        held.engine.gate.open()
        response = reading.result(PATIENCE_S)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.text.startswith("retry: 2000\n\n")
    found = [event for event in events(response.text) if event[0] != "waiting"]
    assert found[-1][0] == "done"
    assert found[-1][1]["id"] == job_id
    assert found[-1][2] == "end"
    steps = [data["step"] for name, data, _ in found if name == "progress"]
    assert steps == sorted(set(steps))
    assert set(steps) <= {2, 4, 6}, "newest wins"
    assert [event_id for _, _, event_id in found[:-1]] == [str(step) for step in steps]


def test_events_of_a_job_that_has_ended_are_its_end(site: Site) -> None:
    job_id = post(site).json()["id"]
    wait_for(site, job_id)
    (event,) = events(site.client.get(f"/jobs/{job_id}/events").text)
    assert (event[0], event[2]) == ("done", "end")
    known = site.client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "end"})
    assert (known.status_code, known.content) == (204, b""), "an EventSource then stops"


def test_frames_come_as_pictures_when_they_are_asked_for(held: Site) -> None:
    job_id = post(held, SPEC | {"steps": 3}).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        query = "every=1&show=x_t&show=x_0&frame_format=webp&layout=images"
        reading = pool.submit(held.client.get, f"/jobs/{job_id}/events?{query}")
        wait_for_viewer(held)
        held.engine.gate.let(2)  # during the first the worker does not know the viewer yet
        wait_until(lambda: held.metrics().get("tminus_frames_sent_total") == 1)
        held.engine.gate.open()
        found = events(reading.result(PATIENCE_S).text)
    first = [(data, event_id) for name, data, event_id in found if name == "frame" and data["step"] == 2]
    assert [(data["show"], data["image"]) for data, _ in first] == [("x_t", 0), ("x_t", 1), ("x_0", 0), ("x_0", 1)]
    assert [event_id for _, event_id in first] == [None, None, None, "2"], "with the last of them the step is known"
    assert {data["media_type"] for data, _ in first} == {"image/webp"}


def test_too_many_viewers_are_refused(make_site: MakeSite) -> None:
    site = make_site(max_streams_per_address=1)
    site.engine.gate.shut()
    job_id = post(site).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(site.client.get, f"/jobs/{job_id}/events")
        wait_for_viewer(site)
        problem(site.client.get(f"/jobs/{job_id}/events"), 429, "too_many_streams")
        site.engine.gate.open()
        assert reading.result(PATIENCE_S).status_code == 200
    assert site.client.get(f"/jobs/{job_id}/events").status_code == 200, "there is room again"


def test_a_client_that_comes_back_ahead_of_the_job_is_told_where_it_stands(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    job_id = post(site, {"steps": 300}).json()["id"]
    site.engine.gate.let(3)
    for _ in range(4):
        site.engine.next_begun()
    with ThreadPoolExecutor(1) as pool:
        ahead = {"Last-Event-ID": "250"}
        reading = pool.submit(site.client.get, f"/jobs/{job_id}/events?every=100", headers=ahead)
        wait_for_viewer(site)
        site.engine.gate.open()
        found = events(reading.result(PATIENCE_S).text)
    steps = [data["step"] for name, data, _ in found if name == "progress"]
    assert 1 <= steps[0] <= 4, "at once, and without an id"
    assert found[0][2] is None
    assert steps[-1] in (100, 200), "what is done again is shown again"
    assert found[-1][0] == "done"


def test_event_streams_end_when_the_server_stops(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    job_id = post(site).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(site.client.get, f"/jobs/{job_id}/events?every=1")
        wait_for_viewer(site)
        site.worker.drain()
        site.engine.gate.open()
        text = reading.result(PATIENCE_S).text
    assert not {"done", "failed", "cancelled"} & {name for name, _, _ in events(text)}, "it has not ended"


async def receive() -> Message:
    await asyncio.sleep(60)
    return {"type": "http.disconnect"}


@pytest.mark.parametrize(("piece_s", "arrives"), [(0.05, 6 * PIECE_BYTES), (60.0, 0)])
def test_a_large_event_may_take_a_reader_as_long_as_its_pieces_may_and_who_reads_nothing_is_disconnected(
    monkeypatch: pytest.MonkeyPatch, piece_s: float, arrives: int
) -> None:
    monkeypatch.setattr(progress, "SEND_S", 0.2)
    closed, arrived = [], []

    async def events() -> AsyncGenerator[bytes]:
        yield bytes(6 * PIECE_BYTES)

    async def send(message: Message) -> None:
        if body := message.get("body", b""):
            await asyncio.sleep(piece_s * len(body) / PIECE_BYTES)
            arrived.append(len(body))

    asyncio.run(EventStream(events(), lambda: closed.append(1))(scope_of(), receive, send))
    assert (sum(arrived), len(closed)) == (arrives, 1)


def test_who_reads_nothing_leaves_no_events_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SEND_S", 0.05)
    monkeypatch.setattr(progress, "QUIET_S", 0.05)
    ends: list[str] = []

    async def events() -> AsyncGenerator[bytes]:
        try:
            yield b"the first"
            await asyncio.Event().wait()
        finally:
            ends.append("events")

    async def send(message: Message) -> None:
        await asyncio.sleep(60 if message.get("body", b"").startswith(b":") else 0)  # a comment is not read

    async def answer() -> None:
        await EventStream(events(), lambda: ends.append("answer"))(scope_of(), receive, send)
        assert ends == ["answer", "events"]  # not only when the garbage is collected

    asyncio.run(answer())
