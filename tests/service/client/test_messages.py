import base64
import json
from typing import Any

import pytest

from tminus.service.client import Cancelled, Done, Frame, Problem, UnexpectedAnswer
from tminus.service.client.messages import Message, event_of, message_of, opening_of
from tminus.service.client.sse import ServerSentEvent


def test_a_frame_of_an_event_is_decoded() -> None:
    members = {"step": 1, "steps": 2, "t": 3, "eta_s": 0.5, "show": "x_t", "media_type": "image/png"}
    sent = ServerSentEvent("frame", json.dumps(members | {"data": base64.b64encode(b"p").decode()}), "1")
    assert event_of(sent) == Frame(step=1, steps=2, t=3, show="x_t", eta_s=0.5, image=None, data=b"p")
    assert event_of(ServerSentEvent("news", "{}", "")) is None, "a newer server may send more kinds"
    for bad in ("[]", "{}", "no JSON", json.dumps(members | {"data": "no base64"})):
        with pytest.raises(UnexpectedAnswer, match="the event 'frame' cannot be read"):
            event_of(ServerSentEvent("frame", bad, ""))


FRAME = {"type": "frame", "step": 1, "steps": 2, "t": 3, "show": "x_t", "eta_s": 0.5}
DONE = {"type": "done", "images": 2, "queue_s": 1, "first_step_s": 2, "denoise_s": 3, "frames_dropped": 4}


@pytest.mark.parametrize(
    ("members", "images", "message"),
    [
        ({"type": "cancelled", "id": "x"}, [], Cancelled("x")),
        (FRAME, [b"p"], Frame(1, 2, 3, "x_t", 0.5, None, b"p")),
        (FRAME | {"image": 1}, [b"p"], Frame(1, 2, 3, "x_t", 0.5, 1, b"p")),
        (DONE, [b"p", b"q"], Done((b"p", b"q"), 1, 2, 3, 4)),
    ],
)
def test_a_message_is_read_with_the_images_that_follow_it(
    members: dict[str, Any], images: list[str | bytes], message: Message
) -> None:
    opening = opening_of(json.dumps(members))
    assert opening.images == len(images)
    assert message_of(opening, images) == message


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("no JSON", []),
        ("[]", []),
        ("1", []),
        ("{}", []),
        (b"\xff", []),
        ('{"type": []}', []),
        ('{"type": "news"}', []),
        ('{"type": "accepted"}', []),
        ('{"type": "done"}', []),
        (json.dumps(DONE | {"images": "2"}), []),
        (json.dumps(FRAME), ["text"]),
        (json.dumps({"type": "frame"}), [b"p"]),
    ],
)
def test_a_message_that_cannot_be_read_is_unexpected(text: str | bytes, images: list[str | bytes]) -> None:
    with pytest.raises(UnexpectedAnswer, match="101"):
        message_of(opening_of(text), images)


def test_an_error_is_raised_with_its_time_to_return() -> None:
    with pytest.raises(Problem, match="429 too much") as caught:
        message_of(opening_of('{"type": "error", "status": 429, "detail": "too much", "retry_after_s": 3}'), [])
    assert caught.value.retry_after_s == 3
