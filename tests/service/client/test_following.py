import base64
import json

import pytest

from tests.service.client.conftest import job_members
from tests.service.client.hostile import PNG
from tests.service.client.test_patience import Clock
from tminus.service.client import Ended, Frame, Progress, UnexpectedAnswer, Unreachable
from tminus.service.client.bounds import Asked
from tminus.service.client.following import Following
from tminus.service.client.patience import RESTART_S, Patience

GREETING = b"retry: 2000\n\n"
ASKED = Asked.of({"steps": 9})
PNG_IN_TEXT = base64.b64encode(PNG).decode()
CUT = Unreachable("cut", reached=True)


def progress(step: int) -> bytes:
    members = {"step": step, "steps": 9, "t": 10 * step, "eta_s": 1.5}
    return f"event: progress\nid: {step}\ndata: {json.dumps(members)}\n\n".encode()


def test_a_new_connection_begins_after_the_last_event() -> None:
    following = Following("3", Patience(0), ASKED)
    assert following.begin_connection()["Last-Event-ID"] == "3"
    chunk = progress(4) + progress(5)
    assert list(following.read(chunk[:-1])) == [Progress(4, 9, 40, 1.5)]
    headers = following.begin_connection()
    assert headers == {"Accept": "text/event-stream", "Last-Event-ID": "4"}, "5 was not complete"
    assert list(following.read(progress(5))) == [Progress(5, 9, 50, 1.5)]
    assert "Last-Event-ID" not in Following("", Patience(0), ASKED).begin_connection()


def test_steps_come_again_from_the_next_holder_of_the_job_and_otherwise_not() -> None:
    def frame(step: int) -> bytes:
        members = {"step": step, "steps": 9, "t": 0, "eta_s": 1, "show": "x_t"}
        return f"event: frame\nid: {step}\ndata: {json.dumps(members | {'data': PNG_IN_TEXT})}\n\n".encode()

    waiting = b'event: waiting\ndata: {"position": null, "eta_s": null}\n\n'
    for begins in (progress(2), waiting):
        following = Following("", Patience(0), Asked.of({"steps": 9, "show": "x_t"}))
        following.begin_connection()
        first = [*following.read(GREETING + progress(0) + frame(3) + frame(4))]
        then = [*following.read(begins + frame(3) + frame(5))]
        assert [event.step for event in first + then if isinstance(event, Frame)] == [3, 4, 3, 5]
        with pytest.raises(UnexpectedAnswer, match="a frame of step 4 after one of step 5"):
            list(following.read(frame(4)))


def test_an_event_that_a_newer_server_knows_counts_as_read() -> None:
    following = Following("", Patience(0), ASKED)
    assert list(following.read(b"event: news\nid: 7\ndata: {}\n\n")) == []
    assert following.begin_connection()["Last-Event-ID"] == "7"


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
def test_nothing_is_read_after_the_end(state: str) -> None:
    following = Following("", Patience(0), ASKED)
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
    following = Following("", patience, ASKED)
    patience.pause_s(CUT)
    clock.now_s += RESTART_S
    for chunk in sent:
        list(following.read(chunk))
    assert patience.pause_s(CUT) > 0


def test_a_greeting_is_no_progress_and_says_when_to_return() -> None:
    clock = Clock()
    patience = Patience(0, durable=True, known=True, clock=clock)
    following = Following("", patience, ASKED)
    patience.pause_s(CUT)
    for _ in range(2):
        following.begin_connection()
        assert list(following.read(GREETING)) == []
    clock.now_s += RESTART_S
    with pytest.raises(Unreachable):
        patience.pause_s(CUT)
    patience.renew()
    assert 1.5 <= patience.pause_s(CUT) <= 2
