"""Messages of a job that could not come from a server that does what it was asked."""

import base64
import json
from typing import Any

import pytest

from tests.service.client.conftest import job_members
from tests.service.client.hostile import PNG
from tests.service.client.test_patience import Clock
from tminus.service.api.sample import MAX_TRAJECTORY_BYTES
from tminus.service.client import Cancelled, Ended, Frame, Progress, UnexpectedAnswer, Unreachable
from tminus.service.client.patience import RESTART_S, Patience
from tminus.service.client.reading import (
    ANSWER_BYTES,
    IMAGE_BYTES,
    Expected,
    Following,
    FrameOrder,
    Reading,
    ServerSentEvent,
    event_of,
)
from tminus.service.client.results import Done, Message

GREETING = b"retry: 2000\n\n"
EXPECTED = Expected.of({"steps": 9})
PNG_IN_TEXT = base64.b64encode(PNG).decode()
CUT = Unreachable("cut", reached=True)


def frame(step: int, show: str = "x_t", image: int | None = None, steps: int = 50, data: bytes = PNG) -> Frame:
    return Frame(step=step, steps=steps, t=0, show=show, eta_s=0.0, image=image, data=data)


def take(frames: list[Frame], **parameters: Any) -> None:
    order = FrameOrder(Expected.of({"steps": 50} | parameters))
    for each in frames:
        order.check(each)


def test_frames_as_they_are_asked_for_are_taken() -> None:
    take([frame(step) for step in range(1, 51)])
    take([frame(step) for step in (7, 10, 23, 50)], every=5)
    take([frame(1, show, image) for image in (4, 5) for show in ("x_t", "x_0")], n=2, layout="images",
         show=["x_t", "x_0"])  # fmt: skip
    take([frame(1, data=b"\xff\xd8\xff")], frame_format="jpeg")
    take([frame(step, steps=8) for step in range(1, 8)], steps=3, nearest=True)


@pytest.mark.parametrize(
    ("frames", "parameters"),
    [
        ([frame(3), frame(2)], {}),
        ([frame(5), frame(9)], {"every": 5}),
        ([frame(100_001, steps=100_001)], {"nearest": True}),
        ([frame(51)], {}),
        ([frame(1, "x_0")], {}),
        ([frame(1)], {"layout": "images"}),
        ([frame(1, image=k) for k in range(3)], {"layout": "images", "n": 2}),
        ([frame(1, data=b"no picture")], {}),
    ],
    ids=str,
)
def test_a_frame_too_many_or_out_of_order_is_refused(frames: list[Frame], parameters: dict[str, Any]) -> None:
    *before, last = frames
    order = FrameOrder(Expected.of({"steps": 50} | parameters))
    for each in before:
        order.check(each)
    with pytest.raises(ValueError, match=r"frame|image/"):
        order.check(last)


def test_events_have_no_frames_unless_they_are_asked_for() -> None:
    with pytest.raises(ValueError, match="not asked for"):
        FrameOrder(Expected.of({}, show=None)).check(frame(1))
    FrameOrder(Expected.of({"show": "x_t"}, show=None)).check(frame(1))


ACCEPTED = {"type": "accepted", "id": "x", "seed": 1, "eta_s": 0.5, "position": 0, "fingerprint": "f"}
FRAME = {"type": "frame", "step": 1, "steps": 2, "t": 3, "show": "x_t", "eta_s": 0.5}
DONE = {"type": "done", "images": 2, "queue_s": 1, "first_step_s": 2, "denoise_s": 3, "frames_dropped": 4}


def accepted(**parameters: Any) -> Reading:
    reading = Reading(Expected.of(parameters))
    assert reading.begin(json.dumps(ACCEPTED)) == 0
    reading.end([])
    return reading


def test_a_message_at_the_wrong_time_is_refused_before_its_images_are_read() -> None:
    with pytest.raises(UnexpectedAnswer, match="'frame' came at the wrong time"):
        Reading(EXPECTED).begin(json.dumps(FRAME))
    for members, says in ((ACCEPTED, "'accepted' came at the wrong time"), (DONE, "2 images, where 1 were asked for")):
        with pytest.raises(UnexpectedAnswer, match=says):
            accepted(n=4).begin(json.dumps(members))


@pytest.mark.parametrize(
    ("members", "images", "message"),
    [
        ({"type": "cancelled", "id": "x"}, [], Cancelled("x")),
        (FRAME, [PNG], Frame(1, 2, 3, "x_t", 0.5, None, PNG)),
        (DONE | {"images": 1}, [PNG], Done((PNG,), 1, 2, 3, 4)),
    ],
)
def test_a_message_is_read_with_the_images_that_follow_it(
    members: dict[str, Any], images: list[str | bytes], message: Message
) -> None:
    reading = accepted()
    assert reading.begin(json.dumps(members)) == len(images)
    assert reading.end(images) == message


@pytest.mark.parametrize("given", ["many", None, -3, 0, float("nan"), [], 10**400])
def test_parameters_that_the_server_will_refuse_bound_as_the_largest_do(given: object) -> None:
    asked = Expected.of({"n": given, "steps": given, "every": given})
    assert asked.answer_bytes("image/png") <= ANSWER_BYTES
    assert asked.every >= 1
    assert Expected.of({"n": 2}).answer_bytes("application/zip") == 2 * IMAGE_BYTES
    assert Expected.of({"n": 64}).answer_bytes("application/vnd.tminus.trajectory") == 2 * MAX_TRAJECTORY_BYTES


def progress(step: int) -> bytes:
    members = {"step": step, "steps": 9, "t": 10 * step, "eta_s": 1.5}
    return f"event: progress\nid: {step}\ndata: {json.dumps(members)}\n\n".encode()


def test_a_new_connection_begins_after_the_last_event() -> None:
    following = Following("3", Patience(0), EXPECTED)
    assert following.begin_connection()["Last-Event-ID"] == "3"
    chunk = progress(4) + progress(5)
    assert list(following.read(chunk[:-1])) == [Progress(4, 9, 40, 1.5)]
    headers = following.begin_connection()
    assert headers == {"Accept": "text/event-stream", "Last-Event-ID": "4"}, "5 was not complete"
    assert list(following.read(progress(5))) == [Progress(5, 9, 50, 1.5)]
    assert "Last-Event-ID" not in Following("", Patience(0), EXPECTED).begin_connection()


def test_steps_come_again_from_the_next_holder_of_the_job_and_otherwise_not() -> None:
    def frame(step: int) -> bytes:
        members = {"step": step, "steps": 9, "t": 0, "eta_s": 1, "show": "x_t"}
        return f"event: frame\nid: {step}\ndata: {json.dumps(members | {'data': PNG_IN_TEXT})}\n\n".encode()

    waiting = b'event: waiting\ndata: {"position": null, "eta_s": null}\n\n'
    for begins in (progress(2), waiting):
        following = Following("", Patience(0), Expected.of({"steps": 9, "show": "x_t"}))
        following.begin_connection()
        first = [*following.read(GREETING + progress(0) + frame(3) + frame(4))]
        then = [*following.read(begins + frame(3) + frame(5))]
        assert [event.step for event in first + then if isinstance(event, Frame)] == [3, 4, 3, 5]
        with pytest.raises(UnexpectedAnswer, match="a frame of step 4 after one of step 5"):
            list(following.read(frame(4)))


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
def test_nothing_is_read_after_the_end(state: str) -> None:
    following = Following("", Patience(0), EXPECTED)
    end = f"event: {state}\nid: end\ndata: {json.dumps(job_members(state=state))}\n\n".encode()
    *before, ended = following.read(progress(8) + end + progress(9))
    assert before == [Progress(8, 9, 80, 1.5)]
    assert isinstance(ended, Ended)
    assert ended.job.state == state
    assert following.ended


@pytest.mark.parametrize("sent", [[progress(1)], [GREETING, b": still here\n\n"]])
def test_the_patience_starts_over_when_the_server_says_something(sent: list[bytes]) -> None:
    clock = Clock()
    patience = Patience(0, durable=True, known=True, clock=clock)
    following = Following("", patience, EXPECTED)
    patience.pause_s(CUT)
    clock.now_s += RESTART_S
    for chunk in sent:
        list(following.read(chunk))
    assert patience.pause_s(CUT) > 0


def test_a_greeting_is_no_progress_and_says_when_to_return() -> None:
    clock = Clock()
    patience = Patience(0, durable=True, known=True, clock=clock)
    following = Following("", patience, EXPECTED)
    patience.pause_s(CUT)
    for _ in range(2):
        following.begin_connection()
        assert list(following.read(GREETING)) == []
    clock.now_s += RESTART_S
    with pytest.raises(Unreachable):
        patience.pause_s(CUT)
    patience.renew()
    assert 1.5 <= patience.pause_s(CUT) <= 2


# --- messages and events ---


def test_a_frame_of_an_event_is_decoded() -> None:
    members = {"step": 1, "steps": 2, "t": 3, "eta_s": 0.5, "show": "x_t", "media_type": "image/png"}
    sent = ServerSentEvent("frame", json.dumps(members | {"data": base64.b64encode(b"p").decode()}), "1")
    assert event_of(sent) == Frame(step=1, steps=2, t=3, show="x_t", eta_s=0.5, image=None, data=b"p")
    assert event_of(ServerSentEvent("news", "{}", "")) is None, "a newer server may send more kinds"
    for bad in ("[]", "{}", "no JSON", json.dumps(members | {"data": "no base64"})):
        with pytest.raises(UnexpectedAnswer, match="the event 'frame' cannot be read"):
            event_of(ServerSentEvent("frame", bad, ""))
