import io
import json
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import WebSocketDenialResponse, WebSocketTestSession
from starlette.websockets import WebSocketDisconnect

from tests.service.api.pictures import CAT, EDIT, MASK, MASK_PIXELS, PICTURE, b64, got, same
from tests.service.conftest import MakeSite, Site, pixels
from tests.service.fakes import INFO, PATIENCE_S, fake_pixels, make_spec, wait_until
from tminus.service.api import stream as routes_stream
from tminus.service.images.encoder import contact_sheet, encode_result

SPEC = {"n": 2, "steps": 4, "seed": 5, "class_label": "cat"}


class Client:
    """The other end of a stream, message by message."""

    def __init__(self, ws: WebSocketTestSession) -> None:
        self.ws = ws

    def send(self, **message: object) -> None:
        self.ws.send_text(json.dumps(message))

    def get(self, kind: str) -> dict[str, Any]:
        message = self.ws.receive_json()
        assert message["type"] == kind, message
        return message

    def picture(self) -> bytes:
        return self.ws.receive_bytes()

    def run(self, **message: object) -> tuple[dict[str, Any], list[bytes]]:
        """Ask for a job, and let its frames pass; returns how it was accepted, and its pictures."""
        self.send(**message)
        accepted = self.get("accepted")
        while (told := self.ws.receive_json())["type"] == "frame":
            self.picture()
        assert told["type"] == "done", told
        return accepted, [self.picture() for _ in range(told["images"])]

    def closed(self) -> tuple[int, str]:
        with pytest.raises(WebSocketDisconnect) as caught:
            self.ws.receive_json()
        return caught.value.code, caught.value.reason or ""

    def refused(self, code: str, close: int) -> dict[str, Any]:
        error = self.get("error")
        assert error["code"] == code
        assert error["status"]
        assert error["detail"]
        assert self.closed() == (close, code)
        return error


@contextmanager
def connect(site: Site, path: str = "/sample/stream", **headers: str) -> Iterator[Client]:
    session = site.client.websocket_connect(path, headers=headers)
    ws = session.__enter__()
    try:
        yield Client(ws)
    finally:
        # The test client cancels the app right after its goodbye; which of the two the app hears first is chance.
        with suppress(CancelledError):
            session.__exit__(None, None, None)


def gray(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("L"))


def held(make_site: MakeSite, **limits: object) -> Site:
    """A site that is ready, and whose next tick waits for the test."""
    site = make_site(gate_shut=True, **limits)
    site.engine.gate.let()  # the warm-up
    site.wait_until_ready()
    return site


# --- one job ---


def test_a_job_is_accepted_shown_and_delivered(make_site: MakeSite) -> None:
    site = held(make_site)
    with connect(site) as client:
        client.send(**SPEC, every=1)
        accepted = client.get("accepted")
        assert accepted["seed"] == 5
        assert accepted["position"] == 0
        assert accepted["fingerprint"] == INFO.fingerprint
        for step in (1, 2, 3):
            site.engine.gate.let()
            frame = client.get("frame")
            # Leading spacing of 4 in 1000 starts from 750, 500, 250, 0; a frame shows where the next step starts.
            assert frame == {"type": "frame", "step": step, "steps": 4, "t": 750 - 250 * step, "show": "x_t"} | {
                "eta_s": frame["eta_s"]
            }
            expected = contact_sheet(fake_pixels(make_spec(n=2, seed=5), step))
            np.testing.assert_array_equal(pixels(client.picture()), expected[:, :, 0])
        site.engine.gate.let()
        done = client.get("done")
        assert done["images"] == 1
        assert done["media_type"] == "image/png"
        assert done["frames_dropped"] == 0
        assert done["queue_s"] >= 0 < done["denoise_s"]
        whole = client.picture()
        assert client.closed()[0] == 1000
    site.engine.gate.open()
    assert whole == site.post(json=SPEC).content, "the same bytes as from POST /sample"
    metrics = site.metrics()
    assert metrics["tminus_frames_sent_total"] == 3
    assert metrics["tminus_frames_dropped_total"] == 0


@pytest.mark.parametrize(
    ("frame_format", "show", "layout"),
    [("png", "x_0", "sheet"), ("webp", ["x_0", "x_t"], "images"), ("jpeg", "x_t", "images")],
)
def test_what_is_shown_is_chosen_by_the_client(
    make_site: MakeSite, frame_format: str, show: str | list[str], layout: str
) -> None:
    site = held(make_site)
    with connect(site) as client:
        client.send(**SPEC, index=7, every=2, show=show, frame_format=frame_format, layout=layout)
        client.get("accepted")
        site.engine.gate.let(2)
        images = fake_pixels(make_spec(n=2, seed=5, index=7), 2)
        for name in [show] if isinstance(show, str) else show:
            shown = images if name == "x_t" else 255 - images
            for k, expected in enumerate(shown if layout == "images" else [contact_sheet(shown)]):
                frame = client.get("frame")
                assert (frame["step"], frame["show"]) == (2, name)
                assert frame.get("image") == (7 + k if layout == "images" else None)
                picture = client.picture()
                with Image.open(io.BytesIO(picture)) as image:
                    assert image.format == frame_format.upper()
                np.testing.assert_allclose(gray(picture), expected[:, :, 0], atol=2 if frame_format == "jpeg" else 0)
        site.engine.gate.let(2)
        assert client.get("done")["images"] == (2 if layout == "images" else 1)
        finals = [client.picture() for _ in range(2 if layout == "images" else 1)]
        assert client.closed()[0] == 1000
    site.engine.gate.open()
    if layout == "images":
        assert finals == [site.post(json=SPEC | {"n": 1, "index": 7 + k}).content for k in range(2)]


def test_jobs_run_one_after_the_other_over_one_connection(site: Site) -> None:
    with connect(site) as client:
        for seed in range(3):
            accepted, (sheet,) = client.run(**SPEC | {"seed": seed}, every=1000, keep_open=seed < 2)
            assert accepted["seed"] == seed
            expected = contact_sheet(fake_pixels(make_spec(n=2, seed=seed), 4))
            np.testing.assert_array_equal(pixels(sheet), expected[:, :, 0])
            if seed < 2:
                client.send(type="cancel")  # too late: let pass
        assert client.closed()[0] == 1000


# --- its end ---


@pytest.mark.parametrize("keep_open", [False, True])
def test_a_cancel_frees_the_rows_and_says_so(make_site: MakeSite, keep_open: bool) -> None:
    site = held(make_site)
    with connect(site) as client:
        client.send(**SPEC | {"steps": 1000}, every=1, keep_open=keep_open)
        accepted = client.get("accepted")
        site.engine.gate.let()
        client.get("frame")
        client.picture()
        site.engine.next_begun()
        site.engine.next_begun()
        client.send(type="cancel")
        site.open_when_told()
        while (message := client.ws.receive_json())["type"] == "frame":  # of the tick that ran
            client.picture()
        assert message == {"type": "cancelled", "id": accepted["id"]}
        if keep_open:
            client.run(**SPEC, every=1000)
        assert client.closed()[0] == 1000
    assert site.metrics()['tminus_jobs_aborted_total{"reason": "client_cancelled"}'] == 1


def test_a_client_that_goes_away_frees_its_rows(make_site: MakeSite) -> None:
    site = held(make_site)
    with connect(site) as client:
        client.send(**SPEC | {"steps": 1000}, every=1)
        client.get("accepted")
        site.engine.gate.let()
        client.get("frame")
        site.engine.next_begun()
        site.engine.next_begun()
    site.open_when_told()
    wait_until(lambda: not site.engine.jobs)
    assert site.metrics()['tminus_jobs_aborted_total{"reason": "client_gone"}'] == 1


@pytest.mark.parametrize("code", ["not_ready", "draining"])
def test_a_server_that_starts_or_drains_refuses_the_handshake_so_that_a_proxy_can_ask_another(
    make_site: MakeSite, code: str
) -> None:
    site = make_site(gate_shut=True)
    if code == "draining":
        site.worker.drain()
    with pytest.raises(WebSocketDenialResponse) as refused, connect(site):
        pass
    assert (refused.value.status_code, refused.value.json()["code"]) == (503, code)


# --- a viewer's trouble is its own ---


def test_a_frame_that_cannot_be_encoded_is_left_out_and_a_result_is_an_internal_error_with_its_reason_in_the_log(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("tminus.service.images.encoder.encode_frame", fail)
    with connect(site) as client:
        client.run(**SPEC, every=1, keep_open=True)
        monkeypatch.setattr("tminus.service.images.encoder.encode_result", fail)
        client.send(**SPEC, every=1000)
        client.get("accepted")
        assert "space" not in client.refused("internal", 1011)["detail"]
    assert "no space left on device" in caplog.text


def test_the_next_spec_may_follow_done_while_the_pictures_are_on_their_way(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it falls out: the message comes after the job is done, and before its last picture is sent."""
    began, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> bytes:
        began.set()
        assert go_on.wait(PATIENCE_S)
        return encode_result(*arguments)

    monkeypatch.setattr("tminus.service.images.encoder.encode_result", slow)
    with connect(site) as client:
        client.send(**SPEC, every=1000, keep_open=True)
        client.get("accepted")
        assert began.wait(PATIENCE_S)
        client.send(**SPEC, every=1000)
        go_on.set()
        for _ in range(2):
            client.get("done")
            client.picture()
            if _ == 0:
                client.get("accepted")
        assert client.closed()[0] == 1000


# --- what is refused ---


def test_what_is_wrong_is_one_error_with_all_that_is_and_a_close(site: Site) -> None:
    refusals: tuple[tuple[str | bytes, str, int], ...] = (
        (json.dumps(SPEC | {"steps": 0, "every": 0, "eta": 2}), "invalid_field", 1008),
        (json.dumps(EDIT | {"image": "%", "strength": 0.5}), "invalid_image", 1008),
        (json.dumps(EDIT | {"sampler": "x" * 5000}), "body_too_large", 1009),
        *(
            (text, "malformed_message", 1008)
            for text in ("", "{", "3", '{"n": 1, "n": 2}', "{" * 4000, b'{"steps": 2}')
        ),
    )
    for message, code, close in refusals:
        with connect(site) as client:
            client.ws.send_text(message) if isinstance(message, str) else client.ws.send_bytes(message)
            error = client.refused(code, close)
            assert code != "invalid_field" or [each["field"] for each in error["errors"]] == ["eta", "every", "steps"]
    assert site.metrics()['tminus_rejected_total{"reason": "invalid_field"}'] == 1


def test_a_job_deleted_by_somebody_else_is_cancelled(make_site: MakeSite) -> None:
    site = held(make_site)
    with connect(site) as client:
        client.send(**SPEC, every=1000)
        accepted = client.get("accepted")
        assert site.client.delete(f"/jobs/{accepted['id']}").status_code == 204
        site.engine.gate.open()
        client.get("cancelled")
        assert client.closed()[0] == 1000


def test_another_spec_while_a_job_runs_is_refused_and_the_job_given_up(make_site: MakeSite) -> None:
    site = held(make_site)
    with connect(site) as client:
        client.send(**SPEC, every=1000)
        client.get("accepted")
        client.send(**SPEC)
        client.refused("malformed_message", 1008)
        site.engine.gate.open()
        wait_until(lambda: not site.engine.jobs)


def test_silence_is_not_waited_for_and_between_two_jobs_not_for_ever(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routes_stream, "NEXT_MESSAGE_S", 0.05)
    with connect(site) as client:
        client.run(**SPEC, every=1000, keep_open=True)
        client.refused("silence", 1008)
    monkeypatch.setattr(routes_stream, "FIRST_MESSAGE_S", 0.05)
    with connect(site) as client:
        client.refused("silence", 1008)


def test_parameters_in_the_address_are_refused(site: Site) -> None:
    """They belong in the first message, and would be without effect."""
    with pytest.raises(WebSocketDenialResponse) as caught, connect(site, "/sample/stream?bogus=1"):
        pass
    assert (caught.value.status_code, caught.value.json()["field"]) == (422, "bogus")


def test_pages_of_other_origins_are_refused(site: Site) -> None:
    with connect(site, origin="https://TESTSERVER") as client:
        client.send()
        client.get("accepted")
    for origin in ("http://testserver:8000", "null", "http://" + "x" * 300):
        with pytest.raises(WebSocketDenialResponse) as caught, connect(site, origin=origin):
            pass
        problem = caught.value.json()
        assert (caught.value.status_code, problem["code"], problem["field"]) == (403, "foreign_origin", "Origin")
        assert len(problem["detail"]) < 300


def test_the_streams_of_one_address_are_bounded(make_site: MakeSite) -> None:
    site = make_site(max_streams_per_address=2)
    with connect(site), connect(site):
        with pytest.raises(WebSocketDenialResponse) as caught, connect(site):
            pass
        assert caught.value.status_code == 429
        assert caught.value.headers["retry-after"]
        assert caught.value.json()["code"] == "too_many_streams"
    with connect(site) as client:  # those that ended are not counted
        client.run(**SPEC)
    assert site.metrics()['tminus_rejected_total{"reason": "too_many_streams"}'] == 1


# --- edits ---


def test_a_stream_shows_the_steps_that_are_left(site: Site) -> None:
    with connect(site) as client:
        client.send(**EDIT, strength=0.6, image=b64(CAT, "image/png"), mask=b64(MASK), every=1)
        assert client.get("accepted")["seed"] == 1
        steps = []
        while (message := client.ws.receive_json())["type"] == "frame":
            steps.append((message["step"], message["steps"], message["t"]))
            client.picture()
        assert message["type"] == "done"
        assert client.picture() == site.post(
            json=EDIT | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
        ).content  # fmt: skip
    assert {entry[1] for entry in steps} == {3}
    assert set(steps) <= {(1, 3, 200), (2, 3, 0)}
    assert same(got(site), PICTURE, MASK_PIXELS)


def test_a_stream_is_counted_among_the_requests_when_it_ends(make_site: MakeSite) -> None:
    site = make_site()
    site.engine.gate.shut()
    with connect(site) as client:
        client.send(**SPEC)
        client.get("accepted")
        assert site.metrics()["tminus_streams_open"] == 1
        site.engine.gate.open()
    wait_until(lambda: site.metrics()["tminus_streams_open"] == 0)
    count = 'tminus_request_duration_seconds_count{"route": "/sample/stream", "status": "101"}'
    wait_until(lambda: site.metrics().get(count) == 1)
