"""Images by events, through the app on a fake engine."""

import asyncio
import base64
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.service.api.asgi import call, scope_of
from tests.service.api.openai.asking import CAT, SAME, SIZE, edit, error_of, generate
from tests.service.api.pictures import PICTURE, encode, noise
from tests.service.conftest import MakeSite, Site, pixels
from tests.service.durable import events
from tests.service.fakes import INFO, PATIENCE_S, fake_pixels, make_spec, wait_until
from tminus.service.api.answers import progress
from tminus.service.api.openai.images import steps_shown
from tminus.service.images.encoder import Encoder, encode_lossy

STREAM: dict[str, Any] = CAT | {"stream": True}


@pytest.mark.parametrize(
    ("passes", "count", "at"),
    [
        (20, 0, ()), (20, 1, (10,)), (20, 2, (7, 13)), (20, 3, (5, 10, 15)), (4, 3, (1, 2, 3)), (3, 3, (1, 2)),
        (2, 3, (1,)), (1, 3, ()), (1000, 3, (250, 500, 750)),
    ],
)  # fmt: skip
def test_what_is_shown_is_spread_evenly(passes: int, count: int, at: tuple[int, ...]) -> None:
    assert steps_shown(passes, count) == at


def test_a_stream_shows_the_estimate_of_x_0_and_then_the_image(site: Site) -> None:
    answer = generate(site, **STREAM | {"steps": 8}, partial_images=3)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    found = [(name, data) for name, data, _ in events(answer.text)]
    assert [name for name, _ in found] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert all(name == data["type"] for name, data in found)
    spec = make_spec(seed=5, steps=8)
    for number, (_, data) in enumerate(found[:3]):
        assert data.keys() == {
            *("type", "b64_json", "partial_image_index", "created_at", "size", "quality", "background"),
            *("output_format", "image_index"),
        }
        assert (data["partial_image_index"], data["size"], data["background"]) == (number, SIZE, "opaque")
        shown = pixels(base64.b64decode(data["b64_json"]))
        np.testing.assert_array_equal(shown, 255 - fake_pixels(spec, 2 * number + 2)[0, :, :, 0])
    done = found[-1][1]
    assert base64.b64decode(done["b64_json"]) == site.post(json=SAME | {"steps": 8}).content
    assert done["usage"]["total_tokens"] == 0
    assert (done["image_index"], done["seed"], done["steps"], done["revised_prompt"]) == (0, 5, 8, "cat")
    assert done["job_id"] == answer.headers["x-job-id"]
    assert site.metrics()["tminus_frames_sent_total"] == 3


def test_each_of_several_images_has_events_of_its_own(site: Site) -> None:
    found = events(generate(site, **STREAM, n=3, partial_images=1, output_format="webp").text)
    names = [(name.rpartition(".")[2], data["image_index"]) for name, data, _ in found]
    assert names == [(name, k) for name in ("partial_image", "completed") for k in range(3)]
    assert [data["index"] for name, data, _ in found if name.endswith("completed")] == [0, 1, 2]
    assert {base64.b64decode(data["b64_json"])[8:12] for _, data, _ in found} == {b"WEBP"}


@pytest.mark.parametrize("kind", ["webp", "jpeg"])
def test_what_is_shown_on_the_way_has_the_compression_that_is_asked_for(make_site: MakeSite, kind: str) -> None:
    site = make_site(info=replace(INFO, channels=3, width_px=64, height_px=64))
    noisy = noise(1, 64, 64, 3)
    site.engine.preview = lambda rows, show: lambda: {"x_0": noisy}  # type: ignore[method-assign,assignment]
    for quality in (100, 30, None):
        asked = STREAM | {"partial_images": 1, "output_format": kind, "output_compression": quality}
        (_, partial, _), _ = events(generate(site, **asked).text)
        expected = encode_lossy(noisy[0], kind, 100 if quality is None else quality)
        assert base64.b64decode(partial["b64_json"]) == expected


def test_an_edit_is_streamed_under_its_own_names(site: Site) -> None:
    fields = STREAM | {"stream": "true", "partial_images": 2, "strength": 0.5, "steps": 12}
    found = events(edit(site, {"image": encode(PICTURE)}, **fields).text)
    assert [name for name, *_ in found] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]


def test_no_image_on_the_way_is_lost_where_the_job_is_faster_than_its_stream(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_frame = Encoder.encode_frame

    async def late(self: Encoder, *given: Any) -> Any:
        while site.engine.jobs:  # noqa: ASYNC110  it is another thread's
            await asyncio.sleep(0)
        return await encode_frame(self, *given)

    monkeypatch.setattr(Encoder, "encode_frame", late)
    assert len(events(generate(site, **STREAM | {"steps": 8}, partial_images=3).text)) == 4


def test_a_frame_that_is_lost_does_not_end_the_stream(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_frame, failures = Encoder.encode_frame, iter([True])

    async def fail_once(self: Encoder, *given: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("secret")
        return await encode_frame(self, *given)

    monkeypatch.setattr(Encoder, "encode_frame", fail_once)
    found = events(generate(site, **STREAM | {"steps": 8}, partial_images=3).text)
    assert [data.get("partial_image_index") for _, data, _ in found] == [0, 1, None]


def test_comments_keep_a_stream_alive_while_the_job_waits(held: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "QUIET_S", 0.01)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(generate, held, **STREAM)
        held.engine.next_begun()
        wait_until(lambda: held.streams.open == 1)
        with pytest.raises(TimeoutError):
            reading.result(0.1)
        held.engine.gate.open()
        text = reading.result(PATIENCE_S).text
    assert text.count(": ping") >= 2
    assert [name for name, *_ in events(text)] == ["image_generation.completed"]


def test_an_error_in_mid_stream_is_an_event(site: Site) -> None:
    def fail(_batch: object) -> None:
        if len(site.engine.batches) > 3:
            raise RuntimeError("secret")

    site.engine.on_step = fail
    text = generate(site, **STREAM | {"steps": 8}, partial_images=3).text
    site.engine.on_step = lambda batch: None
    found = events(text)
    assert found[-1][0] == "error"
    assert found[-1][1]["error"] | {"message": ""} == {
        "message": "", "type": "server_error", "param": None, "code": "engine_failed",
    }  # fmt: skip
    assert "secret" not in text
    assert [name for name, *_ in found[:-1]] == ["image_generation.partial_image"]


def test_an_unforeseen_error_in_mid_stream_is_an_event_too(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> bytes:
        raise RuntimeError("secret")

    monkeypatch.setattr("tminus.service.images.encoder.encode_each", fail)
    text = generate(site, **STREAM).text
    ((name, data, _),) = events(text)
    assert (name, data["error"]["code"]) == ("error", "internal")
    assert "secret" not in text


def test_what_is_refused_is_refused_before_the_stream_begins(make_site: MakeSite) -> None:
    site = make_site(max_streams=1)
    error_of(generate(site, **STREAM | {"n": 11}), 400, "invalid_field")
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(generate, site, **STREAM)
        site.engine.next_begun()
        refused = generate(site, **STREAM)
        assert error_of(refused, 429, "too_many_streams")["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "1"
        site.engine.gate.open()
        assert reading.result(PATIENCE_S).status_code == 200
    assert site.streams.open == 0
    assert generate(site, **STREAM).status_code == 200


def test_a_client_that_leaves_frees_its_rows_at_the_next_tick(site: Site) -> None:
    site.engine.gate.shut()
    body = json.dumps(STREAM | {"n": 4, "steps": 1000, "partial_images": 3}).encode()
    request = iter([{"type": "http.request", "body": body, "more_body": False}])
    status, _, _ = call(site.app, request, scope_of("/v1/images/generations"), before_last=site.engine.next_begun)
    assert status == 200
    site.engine.gate.let()
    wait_until(lambda: not site.engine.jobs)
    assert len(site.engine.batches) - 1 == 1
    assert site.streams.open == 0
    site.engine.gate.open()
    assert site.metrics()['tminus_cancelled_total{"reason": "client_gone"}'] == 1


def test_a_job_that_is_deleted_ends_its_stream_by_an_error(held: Site) -> None:
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(generate, held, **STREAM)
        held.engine.next_begun()
        (job,) = held.client.get("/jobs").json()["jobs"]
        assert (job["durable"], job["model"]) == (False, INFO.name)
        deleting = pool.submit(held.client.delete, f"/jobs/{job['id']}")
        assert deleting.result(PATIENCE_S).status_code == 204
        held.engine.gate.open()
        ((name, data, _),) = events(reading.result(PATIENCE_S).text)
    assert (name, data["error"]["code"]) == ("error", "cancelled")
