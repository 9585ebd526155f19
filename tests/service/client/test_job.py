"""Durable jobs and their events, sync and async; connections are broken on purpose."""

import base64
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.service.client.breaking import Breaking
from tests.service.client.conftest import SPEC, Connect, MakeServed, Served, job_members
from tests.service.client.hostile import PNG, answering, endless
from tests.service.fakes import PATIENCE_S
from tminus.service.api import events as routes_events
from tminus.service.client import Ended, Problem, Progress, UnexpectedAnswer, Waiting, reading


def test_a_job_is_submitted_awaited_and_fetched(served: Served, connect: Connect) -> None:
    tminus = connect(served.url)
    job = tminus.submit(**SPEC)
    assert (job.latest.seed, job.latest.steps, job.latest.durable) == (5, 4, True)
    state = job.wait(PATIENCE_S)
    assert (state.state, state.ended, state.step) == ("done", True, 4)
    assert job.latest == state
    image = job.image()
    assert image.data == tminus.sample(**SPEC).data
    assert (image.job_id, image.seed, image.timings_s) == (job.id, 5, {})
    assert len(tminus.job(job.id).image("application/zip").pngs) == 2
    assert tminus.job(job.id).state().parameters["n"] == 2


def test_a_wait_times_out_and_the_job_goes_on(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    job = connect(served.url).submit(**SPEC)
    with pytest.raises(TimeoutError, match=r"is (running|waiting) after 0.1 s"):
        job.wait(0.1)
    with pytest.raises(Problem) as caught:
        job.image()
    assert (caught.value.code, caught.value.status) == ("job_not_done", 409)
    assert caught.value.retry_after_s is not None
    served.engine.gate.open()
    assert job.wait(PATIENCE_S).state == "done"


def test_a_wait_keeps_its_time_where_nobody_answers(connect: Connect) -> None:
    """Neither a port that refuses nor one that is silent is waited for longer."""
    with socket.socket() as silent, socket.socket() as refusing:
        for listening in (silent, refusing):
            listening.bind(("127.0.0.1", 0))
        silent.listen()
        for listening in (silent, refusing):
            job = connect(f"http://127.0.0.1:{listening.getsockname()[1]}", patience_s=60).job("x")
            began_s = time.monotonic()
            with pytest.raises(TimeoutError, match=r"job x could not be looked at .* after 0.3 s"):
                job.wait(0.3)
            assert time.monotonic() - began_s < 5


def test_a_failed_job_says_why(served: Served, connect: Connect) -> None:
    served.engine.on_images = lambda rows: served.engine.nan.update(rows)
    job = connect(served.url).submit(**SPEC)
    state = job.wait(PATIENCE_S)
    assert (state.state, state.problem["code"]) == ("failed", "not_finite")
    with pytest.raises(Problem) as caught:
        job.image()
    assert caught.value.document["cause"]["code"] == "not_finite"


def test_cancel_keeps_the_job_and_delete_forgets_it(served: Served, connect: Connect) -> None:
    tminus = connect(served.url)
    served.engine.gate.shut()
    job, other = tminus.submit(steps=1000), tminus.submit(steps=1000)
    served.engine.next_begun()
    threading.Thread(target=served.open_when_told, args=(2,)).start()  # the other job and the cancel
    job.cancel()
    other.delete()
    assert job.wait(PATIENCE_S).state == "cancelled"
    job.cancel()
    assert [state.id for state in tminus.jobs()] == [job.id], "the deleted one is not listed"
    job.delete()
    job.delete()
    assert list(tminus.jobs()) == []
    with pytest.raises(Problem) as caught:
        job.state()
    assert caught.value.code == "job_not_found"


def test_a_cancel_whose_answer_is_lost_is_sent_again(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    tminus = connect(served.url, transport=Breaking(None, 0), patience_s=60)
    job = tminus.submit(steps=1000)
    served.engine.next_begun()
    threading.Thread(target=served.open_when_told).start()
    assert job.cancel().state == "cancelled"
    assert job.state().state == "cancelled"


def test_a_wait_goes_on_where_a_connection_breaks(served: Served, connect: Connect) -> None:
    transport = Breaking(None, 0)
    job = connect(served.url, transport=transport).submit(steps=1)
    assert job.wait(PATIENCE_S).state == "done"
    assert len(transport.requests) >= 3


# --- events ---


def test_the_events_of_a_job_end_with_its_end(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    job = connect(served.url).submit(**SPEC)
    events = []
    for event in job.events(every=1):
        events.append(event)
        served.engine.gate.open()
    *on_the_way, ended = events
    assert isinstance(ended, Ended)
    assert (ended.job.id, ended.job.state) == (job.id, "done")
    assert all(isinstance(event, Waiting | Progress) for event in on_the_way)
    again = list(job.events())
    assert [event.job.state for event in again] == ["done"]
    assert list(job.events(last_id="end")) == [], "after the end there is nothing more"


def slowly(served: Served) -> None:
    """Let a tick take as long as a real one, so that the events are read while it runs."""
    served.engine.on_step = lambda batch: time.sleep(0.002)


def test_a_stream_that_breaks_goes_on_where_it_was(
    served: Served, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes_events, "RECONNECT_MS", 20)
    slowly(served)
    transport = Breaking(None, 4, 1, 3)
    job = connect(served.url, transport=transport).submit(n=1, steps=300)
    *events, ended = job.events(every=1)
    assert isinstance(ended, Ended)
    steps = [event.step for event in events if isinstance(event, Progress)]
    assert steps == sorted(set(steps)), "nothing comes twice"
    requests = [request for request in transport.requests if request.url.path.endswith("/events")]
    assert len(requests) == 4
    assert "last-event-id" not in requests[0].headers
    assert int(requests[1].headers["last-event-id"]) <= int(requests[3].headers["last-event-id"]) < steps[-1]


def test_leaving_the_loop_closes_the_connection(make_served: MakeServed, connect: Connect) -> None:
    served = make_served(max_streams_per_address=1)
    served.engine.gate.shut()
    job = connect(served.url, patience_s=PATIENCE_S).submit(steps=2)
    for _ in range(3):
        for _ in job.events():
            break
    served.engine.gate.open()
    assert job.wait(PATIENCE_S).state == "done"


# --- hostile servers ---

EVENTS_HEAD = "Content-Type: text/event-stream\r\n"


def event(name: str, members: dict[str, Any]) -> bytes:
    return f"event: {name}\nid: 1\ndata: {json.dumps(members)}\n\n".encode()


PROGRESS = {"step": 1, "steps": 9, "t": 0, "eta_s": 1.0}
SHOWN = PROGRESS | {"show": "x_t", "data": base64.b64encode(PNG).decode()}
HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "an event without end": (lambda: endless(b"data: "), "an event of more than 1048576 bytes"),
    "lines without end": (lambda: itertools.repeat(b"data\n" * 1000), "an event of more than 1048576 bytes"),
    "a frame without end": (lambda: itertools.repeat(event("frame", SHOWN)), "more frames of step 1"),
    "an id that is no header": (lambda: [b"id: \x1b[2J\ndata: {}\n\n"], "no token"),
    "deep JSON": (lambda: [b"data: " + b"[" * 20_000 + b"\n\n"], "cannot be read"),
    "no image": (lambda: [event("frame", SHOWN | {"data": "aGVsbG8="})], "no image/png"),
    "an end of other types": (lambda: [event("done", job_members(state=5))], "not from a tminus server"),
    "compressed": (lambda: [b""], "compressed"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_events_that_no_job_sends_are_left_with_one_error(
    name: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "EVENT_BYTES", 2**20)
    pieces, says = HOSTILE[name]
    head = EVENTS_HEAD + ("Content-Encoding: gzip\r\n" if name == "compressed" else "")
    with answering(head, pieces) as hostile, pytest.raises(UnexpectedAnswer, match=says):
        list(connect(hostile.url, patience_s=60).job("x").events(show="x_t"))
    assert hostile.sent < 2**24
