"""POST /sample with `every` and Accept: image/webp, through the app."""

import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.api.sample import MAX_ANIMATION_BYTES
from service.images.animation import FRAME_MS, LAST_MS
from service.images.encoder import contact_sheet
from tests.service.conftest import MakeSite, Site, problem
from tests.service.fakes import INFO, fake_pixels, make_spec

SPEC = {"n": 2, "steps": 10, "seed": 4, "class_label": "cat"}
WEBP = {"Accept": "image/webp"}


def frames_of(content: bytes) -> tuple[list[np.ndarray], list[int]]:
    """Pixels and durations of an animation."""
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "WEBP"
        frames, durations = [], []
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            frames.append(np.asarray(image.convert("L")))
            durations.append(image.info["duration"])
        return frames, durations


def expected(show: str, steps: list[int]) -> list[np.ndarray]:
    pixels = [fake_pixels(make_spec(n=2, seed=4), step) for step in steps]
    shown = [each if show == "x_t" or step == 10 else 255 - each for each, step in zip(pixels, steps, strict=True)]
    return [contact_sheet(each)[:, :, 0] for each in shown]


@pytest.mark.parametrize("show", ["x_t", "x_0"])
def test_an_animation_shows_every_so_many_steps_and_the_result(site: Site, show: str) -> None:
    response = site.post(json=SPEC | {"every": 3, "show": show}, headers=WEBP)
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/webp"
    frames, durations = frames_of(response.content)
    assert durations == [FRAME_MS] * 3 + [LAST_MS]
    for frame, wanted in zip(frames, expected(show, [3, 6, 9, 10]), strict=True):
        np.testing.assert_array_equal(frame, wanted)


def test_an_img_gets_it_by_get(site: Site) -> None:
    accept = {"Accept": "image/avif,image/webp,image/apng,image/svg+xml,image/*,*/*;q=0.8"}
    query = "n=2&steps=10&seed=4&class_label=cat"
    assert site.client.get(f"/sample?{query}", headers=accept).headers["content-type"] == "image/png"
    animated = site.client.get(f"/sample?{query}&every=5", headers=accept)
    assert animated.headers["content-type"] == "image/webp"
    assert len(frames_of(animated.content)[0]) == 2


def test_a_seeded_animation_has_an_etag_and_is_cached(make_site: MakeSite) -> None:
    site = make_site(result_cache_bytes=2**20)
    first = site.post(json=SPEC | {"every": 3}, headers=WEBP)
    again = site.post(json=SPEC | {"every": 3}, headers=WEBP)
    assert again.headers["cache-status"] == "tminus; hit"
    assert again.content == first.content
    known = site.post(json=SPEC | {"every": 3}, headers=WEBP | {"If-None-Match": first.headers["etag"]})
    assert known.status_code == 304
    others = [SPEC | {"every": 2}, SPEC | {"every": 3, "show": "x_0"}]
    tags = {site.post(json=body, headers=WEBP).headers["etag"] for body in others}
    assert len(tags | {first.headers["etag"], site.post(json=SPEC).headers["etag"]}) == 4


@pytest.mark.parametrize(
    ("given", "field"),
    [({"every": 0}, "every"), ({"every": "x"}, "every"), ({"every": True}, "every"), ({"show": "x_t"}, "show"),
     ({"every": 1, "show": "x"}, "show"), ({"every": 1, "show": ["x_t", "x_0"]}, "show")],
)  # fmt: skip
def test_parameters_that_fit_no_animation_are_refused_with_their_field(
    site: Site, given: dict[str, Any], field: str
) -> None:
    document = problem(site.post(json=SPEC | given, headers=WEBP if "every" in given else {}), 422, "invalid_field")
    assert document["field"] == field
    assert document["bound"]


def test_the_media_type_without_every_or_every_without_the_media_type_is_not_acceptable(site: Site) -> None:
    document = problem(site.post(json=SPEC, headers=WEBP), 406, "not_acceptable")
    assert "image/webp together with the parameter `every`" in document["bound"]
    problem(site.post(json=SPEC | {"every": 2}, headers={"Accept": "image/png"}), 406, "not_acceptable")


def test_a_durable_job_keeps_no_frames(site: Site) -> None:
    headers = WEBP | {"Prefer": "respond-async"}
    document = problem(site.post(json=SPEC | {"every": 2}, headers=headers), 422, "invalid_field")
    assert document["field"] == "every"


def test_a_frame_that_cannot_be_read_fails_its_own_job_only(site: Site) -> None:
    def fail(_rows: object) -> None:
        raise RuntimeError("out of memory")

    site.engine.on_preview = fail
    problem(site.post(json=SPEC | {"every": 2}, headers=WEBP), 500, "engine_failed")
    site.engine.on_preview = lambda rows: None
    assert site.post(json=SPEC | {"every": 2}, headers=WEBP).status_code == 200


def test_too_many_frames_are_refused_with_an_every_that_would_fit(make_site: MakeSite) -> None:
    site = make_site(info=replace(INFO, height_px=256, width_px=256))
    most = MAX_ANIMATION_BYTES // (4 * 256 * 256)
    document = problem(site.post(json={"n": 4, "steps": 1000, "every": 1}, headers=WEBP), 422, "invalid_field")
    assert document["bound"] == f"at least {-(-1000 // most)} for so many images and steps"
    site.engine.gate.shut()
    with ThreadPoolExecutor(32) as pool:
        body = {"n": 1, "steps": 250, "every": 1}
        asked = [pool.submit(site.post, json=body | {"seed": k}, headers=WEBP) for k in range(16)]
        site.engine.gate.open()
        assert {each.result(60).status_code for each in asked} == {200}


def test_a_client_that_goes_away_or_fails_leaves_room(site: Site) -> None:
    for _ in range(40):
        problem(site.post(json=SPEC | {"every": 1, "deadline_s": 0}, headers=WEBP), 422, "invalid_field")
    assert site.post(json=SPEC | {"every": 1}, headers=WEBP).status_code == 200
