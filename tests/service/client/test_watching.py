"""Frames over a WebSocket, sync and async."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosedError
from websockets.frames import Close

from tests.service.client.conftest import SPEC, Connect, MakeServed, Served
from tests.service.client.hostile import ACCEPTED, DONE, FRAME, PNG, streaming
from tests.service.conftest import pixels
from tests.service.fakes import PATIENCE_S, fake_pixels, make_spec, wait_until
from tminus.service.api.stream import SEND_S
from tminus.service.client import Accepted, Cancelled, ClientError, Done, Frame, Problem, UnexpectedAnswer, Unreachable
from tminus.service.client.reading import IMAGE_BYTES
from tminus.service.client.transport import closed
from tminus.service.startup.server import PING_S, PONG_S


def test_a_job_is_watched_to_its_end(served: Served, connect: Connect) -> None:
    tminus = connect(served.url)
    accepted, *frames, done = tminus.watch(every=1, show=["x_t", "x_0"], layout="images", **SPEC)
    assert isinstance(accepted, Accepted)
    assert (accepted.seed, accepted.position, len(accepted.id)) == (5, 0, 32)
    assert all(isinstance(frame, Frame) for frame in frames)
    for frame in frames:
        assert (frame.steps, frame.t) == (4, 1000 - 250 * (frame.step + 1))
        colour = fake_pixels(make_spec(**SPEC), frame.step)[frame.image][0, 0, 0]
        assert pixels(frame.data)[0, 0] == (colour if frame.show == "x_t" else 255 - colour)
    assert isinstance(done, Done)
    assert list(done.images) == tminus.sample(accept="application/zip", **SPEC).pngs
    assert done.frames_dropped + len({frame.step for frame in frames}) == 3


def test_leaving_the_loop_cancels_the_job(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    served.engine.gate.let(2)
    for message in connect(served.url).watch(every=1, n=1, steps=1000):
        if isinstance(message, Frame):
            break
    served.open_when_told()
    wait_until(lambda: served.engine.jobs == {})
    assert len(served.engine.batches) < 1000


def test_leaving_with_cancels_a_job_whose_loop_is_not_finished(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    with connect(served.url).watch(every=1, n=1, steps=1000) as messages:
        kept = iter(messages)
        assert isinstance(next(kept), Accepted)
        served.engine.next_begun()
    served.open_when_told()
    wait_until(lambda: served.engine.jobs == {})
    assert len(served.engine.batches) < 1000
    kept.close()


def test_a_job_is_cancelled_and_says_so(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    busy = connect(served.url).submit(n=1, steps=1)  # keeps the worker within a tick, so that commands wait
    served.engine.next_begun()
    watching = connect(served.url).watch(every=1, n=1, steps=1000)
    watching.cancel()  # there is no job yet
    got = []
    for message in watching:
        got.append(message)
        if isinstance(message, Accepted):
            watching.cancel()
            served.open_when_told(2)  # the job and its cancellation
    assert isinstance(got[-1], Cancelled)
    assert got[-1].id == got[0].id
    watching.cancel()
    assert list(watching) == []
    busy.wait(PATIENCE_S)


def test_a_refused_stream_raises_a_problem(make_served: MakeServed, connect: Connect) -> None:
    served = make_served(max_streams_per_address=1)
    tminus = connect(served.url)
    with pytest.raises(Problem, match="steps must be an integer") as caught:
        list(tminus.watch(steps=0))
    assert caught.value.field == "steps"
    served.engine.gate.shut()
    with tminus.watch(steps=2) as messages:
        kept = iter(messages)
        next(kept)
        with pytest.raises(Problem) as caught:  # before the connection is open
            list(tminus.watch(steps=2))
        kept.close()
    assert (caught.value.status, caught.value.code, caught.value.retry_after_s) == (429, "too_many_streams", 1)
    served.engine.gate.open()


def test_a_server_that_stops_during_a_job_is_unreachable(served: Served, connect: Connect) -> None:
    served.engine.gate.shut()
    messages = iter(connect(served.url, patience_s=60).watch(steps=2))
    assert isinstance(next(messages), Accepted)
    served.engine.next_begun()
    threading.Thread(target=served.open_when_told).start()
    served.worker.close()
    with pytest.raises(ClientError) as caught:
        list(messages)
    assert isinstance(caught.value, Problem | Unreachable), "not tried again: that would be another job"


def test_a_busy_reader_is_left_to_the_server_to_judge(served: Served, connect: Connect) -> None:
    """While its loop is busy a client reads no pong."""
    served.engine.gate.shut()
    with connect(served.url).watch(steps=2) as watching:
        kept = iter(watching)
        next(kept)
        assert watching._ws.ping_timeout > max(PING_S + PONG_S, SEND_S)
        kept.close()
    served.engine.gate.open()


def test_who_closed_is_told() -> None:
    ours, theirs = Close(1011, "keepalive ping timeout"), Close(1012, "restart")
    for error, who in (
        (ConnectionClosedError(None, ours), "the client closed"),
        (ConnectionClosedError(theirs, ours, rcvd_then_sent=False), "the client closed"),
        (ConnectionClosedError(theirs, theirs, rcvd_then_sent=True), "the server closed"),
        (ConnectionClosedError(None, None), "the server closed"),
    ):
        found = closed(error, 1)
        assert isinstance(found, Unreachable)
        assert str(found).startswith(f"{who} before the job was done (")


# --- hostile servers ---

SPEC_50 = {"steps": 50, "every": 1}


def endless_frames() -> Iterator[str | bytes | dict[str, Any]]:
    yield ACCEPTED
    for step in itertools.count(1):
        yield FRAME | {"step": step, "steps": step}
        yield PNG


def the_same_frame() -> Iterator[str | bytes | dict[str, Any]]:
    yield ACCEPTED
    while True:
        yield FRAME
        yield PNG


HOSTILE: dict[str, tuple[Callable[[], Any], str]] = {
    "frames without end": (endless_frames, "step 102 of 102, where 101 are the most"),
    "the same frame without end": (the_same_frame, "more frames of step 1"),
    "accepted without end": (lambda: itertools.repeat(ACCEPTED), "'accepted' came at the wrong time"),
    "a huge frame": (lambda: [ACCEPTED, FRAME, bytes(IMAGE_BYTES + 1)], "longer than"),
    "a huge text": (lambda: [" " * (IMAGE_BYTES + 1)], "longer than"),
    "a frame that is text": (lambda: [ACCEPTED, FRAME, "text"], "101"),
    "a message of another kind": (lambda: [{"type": "news"}], "101"),
    "a frame that is no image": (lambda: [ACCEPTED, FRAME, b"text"], "no image/png"),
    "a million images": (lambda: [ACCEPTED, DONE | {"images": 10**6}], "1000000 images, where 1 were asked for"),
    "no time left": (lambda: [ACCEPTED | {"eta_s": None}], "no number: None"),
    "deep JSON": (lambda: ['{"type": ' * 20_000], "nested too deeply"),
    "many values": (lambda: ["[" + "1," * 2**20 + "1]"], "more than 1048576 values"),
    "a pause that is none": (lambda: [{"type": "error", "status": 429, "retry_after_s": "x"}], "no number"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_stream_that_no_job_sends_is_left_with_one_error(name: str, connect: Connect) -> None:
    messages, says = HOSTILE[name]
    with streaming(messages) as hostile:
        began_s = time.monotonic()
        with pytest.raises(UnexpectedAnswer, match=says):
            list(connect(hostile.url, patience_s=60).watch(**SPEC_50))
        assert time.monotonic() - began_s < PATIENCE_S
    assert hostile.sent < 10_000, "then nothing more was read"
