"""Which pixels one can get: RGBA, models of other channels, floats and 16 bits; through the app on a fake engine."""

import base64
import io
import json
import zipfile
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.service.api.pictures import CAT, encode, noise
from tests.service.api.test_stream import connect
from tests.service.conftest import MakeSite, Restarts, Site, problem
from tests.service.durable import wait_for
from tests.service.fakes import INFO, fake_pixels, make_spec
from tminus.service.api.sample import WITHOUT_EVERY
from tminus.service.images.encoder import MEDIA_TYPES

RGBA = replace(INFO, channels=4, alpha=True)
NPY = {"Accept": "application/x-npy"}
SPEC: dict[str, Any] = {"n": 3, "steps": 3, "sampler": "ddpm", "seed": 7, "class_label": "cat"}


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def floats_of(site: Site, spec: dict[str, Any] = SPEC) -> np.ndarray:
    """What FakeEngine gives as floats, [n, C, H, W]."""
    pixels = fake_pixels(make_spec(**{k: spec[k] for k in ("n", "steps", "seed")}), spec["steps"], site.engine.info)
    return (pixels / 100 - 1).astype(np.float32).transpose(0, 3, 1, 2)


def text_of(png: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(opened(png).info["tminus"])
    return found


# --- RGBA ---


def test_every_answer_of_an_rgba_model_has_alpha(make_site: MakeSite) -> None:
    site = make_site(info=RGBA)
    site.engine.images = lambda *_: lambda: noisy  # type: ignore[method-assign,assignment]
    noisy = noise(3, 4, 6, 4)
    sheet = site.post(json=SPEC | {"n": 3})
    assert (opened(sheet.content).mode, opened(sheet.content).size) == ("RGBA", (18, 4))
    np.testing.assert_array_equal(np.asarray(opened(sheet.content)), np.concatenate(list(noisy), axis=1))
    archive = zipfile.ZipFile(io.BytesIO(site.post(json=SPEC, headers={"Accept": "application/zip"}).content))
    pngs = [archive.read(name) for name in archive.namelist()]
    document = site.post(json=SPEC, headers={"Accept": "application/json"}).json()
    assert pngs == [base64.b64decode(each["png"]) for each in document["images"]]
    for png, pixels in zip(pngs, noisy, strict=True):
        np.testing.assert_array_equal(np.asarray(opened(png)), pixels)
    film = opened(site.post(json=SPEC | {"every": 1}, headers={"Accept": "image/webp"}).content)
    film.seek(film.n_frames - 1)  # type: ignore[attr-defined]
    last, wanted = np.asarray(film), np.asarray(opened(sheet.content))
    np.testing.assert_array_equal(last[..., 3], wanted[..., 3])
    np.testing.assert_array_equal(last[wanted[..., 3] > 0], wanted[wanted[..., 3] > 0])


def test_what_a_sheet_of_rgba_leaves_is_transparent(make_site: MakeSite) -> None:
    sheet = np.asarray(opened(make_site(info=RGBA).post(json=SPEC | {"n": 7}).content))
    rows, columns = sheet.shape[0] // 4, sheet.shape[1] // 6
    assert rows * columns > 7
    assert (sheet[-4:, -6:] == 0).all()
    assert sheet[:4, :6, 3].all()


@pytest.mark.parametrize("kind", ["png", "webp", "jpeg"])
def test_previews_have_alpha_but_for_jpegs_which_show_it_over_white(make_site: MakeSite, kind: str) -> None:
    site = make_site(info=RGBA)
    with connect(site) as client:
        client.send(**SPEC | {"n": 1, "steps": 2, "every": 1, "frame_format": kind})
        client.get("accepted")
        client.get("frame")
        picture = client.picture()
    frame = np.asarray(opened(picture))
    value = int(fake_pixels(make_spec(n=1, seed=7), 1, RGBA)[0, 0, 0, 0])
    over_white = value * value / 255 + 255 - value
    wanted = {"jpeg": [over_white] * 3}.get(kind, [value] * 4)
    assert frame.shape == (4, 6, len(wanted))
    np.testing.assert_allclose(frame, np.broadcast_to(wanted, frame.shape), atol=2 if kind == "jpeg" else 0)


def test_an_upload_keeps_its_alpha_and_is_opaque_without(make_site: MakeSite) -> None:
    site, picture = make_site(info=RGBA), noise(4, 6, 4)
    seen = []
    add = site.engine.add
    site.engine.add = lambda *given: seen.append(given[-1]) or add(*given)  # type: ignore[method-assign,func-returns-value]
    for upload in (picture, picture[..., :3]):
        answer = site.client.post("/sample", data=SPEC | {"strength": 0.5}, files={"image": encode(upload)})
        assert answer.status_code == 200, answer.text
    np.testing.assert_array_equal(seen[0].image, picture)
    np.testing.assert_array_equal(seen[1].image, np.dstack([picture[..., :3], np.full((4, 6), 255, np.uint8)]))
    noisy = site.client.post("/noise", params={"t": 3, "seed": 0}, files={"image": encode(picture)})
    np.testing.assert_array_equal(np.asarray(opened(noisy.content)), picture + np.uint8(3))


def test_a_mask_of_openais_kind_is_refused_and_one_that_is_white_is_not(make_site: MakeSite) -> None:
    clear = np.dstack([np.zeros((4, 6, 3), np.uint8), np.where(np.arange(6) < 3, 0, 255)[None].repeat(4, 0)])
    white = clear.copy()
    white[:, :3] = 255  # also opaque: what is transparent is black
    for info in (replace(INFO, channels=3), RGBA):
        site = make_site(info=info)
        form = {"image": encode(noise(4, 6, 3)), "mask": encode(clear.astype(np.uint8))}
        refused = problem(site.client.post("/sample", data=SPEC, files=form), 422, "invalid_image")
        assert refused["field"] == "mask"
        assert "white where the image is to be made new" in refused["detail"]
        form["mask"] = encode(white.astype(np.uint8))
        assert site.client.post("/sample", data=SPEC, files=form).status_code == 200


# --- other numbers of channels ---


@pytest.mark.parametrize(("channels", "shown", "mode"), [(2, 1, "L"), (4, 3, "RGB"), (5, 3, "RGB"), (64, 3, "RGB")])
def test_pictures_show_the_first_channels_and_say_so(make_site: MakeSite, channels: int, shown: int, mode: str) -> None:
    site = make_site(info=replace(INFO, channels=channels))
    site.engine.images = lambda *_: lambda: noisy  # type: ignore[method-assign,assignment]
    noisy = noise(1, 4, 6, channels)
    answer = site.post(json=SPEC | {"n": 1})
    assert answer.headers["x-shown-channels"] == f"{shown} of {channels}"
    picture = opened(answer.content)
    assert picture.mode == mode
    np.testing.assert_array_equal(np.asarray(picture).reshape(4, 6, shown), noisy[0, ..., :shown])
    document = site.client.get("/model").json()
    assert (document["channels"], document["shown_channels"], document["alpha"]) == (channels, shown, False)
    film = site.post(json=SPEC | {"n": 1, "every": 1}, headers={"Accept": "image/webp"})
    assert film.status_code == 200
    for call in ("/sample?strength=0.5", "/noise?t=3"):
        refused = problem(site.client.post(call, files={"image": CAT}), 422, "invalid_field")
        assert refused["field"] == "image"
        assert f"{channels} channels" in refused["bound"]


def test_an_answer_that_shows_all_channels_says_nothing_of_it(site: Site) -> None:
    assert "x-shown-channels" not in site.post(json=SPEC).headers


# --- floats ---


@pytest.mark.parametrize("channels", [1, 4, 5])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_floats_are_all_channels_in_the_models_range(make_site: MakeSite, channels: int, method: str) -> None:
    site = make_site(info=replace(INFO, channels=channels, alpha=channels == 4))
    answer = site.client.request(method, "/sample", params=SPEC, headers=NPY)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-npy"), answer.text
    assert (answer.headers["x-value-range"], answer.headers["x-clipped"]) == ("-1, 1", "true")
    found = np.load(io.BytesIO(answer.content), allow_pickle=False)
    assert (found.dtype, found.shape) == (np.float32, (3, channels, 4, 6))
    np.testing.assert_array_equal(found, floats_of(site).clip(-1, 1))
    assert site.client.get("/model").json()["value_range"] == [-1, 1]


def test_floats_are_not_clipped_where_that_is_asked_for(site: Site) -> None:
    spec = SPEC | {"seed": 120}  # FakeEngine's values are then above 1
    answer = site.post(json=spec | {"clip_output": False}, headers=NPY)
    assert answer.headers["x-clipped"] == "false"
    found = np.load(io.BytesIO(answer.content))
    assert found.max() > 1
    np.testing.assert_array_equal(found, floats_of(site, spec))


def test_a_durable_job_that_was_asked_for_floats_has_them_after_a_restart(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    job = site.client.post("/jobs", json=SPEC | {"bit_depth": 32}).json()
    plain = site.client.post("/jobs", json=SPEC).json()
    assert job["parameters"]["bit_depth"] == 32
    restarts.stop()
    site = restarts.start()
    for each in (job, plain):
        wait_for(site, each["id"])
    path = f"/jobs/{job['id']}/image"
    found = np.load(io.BytesIO(site.client.get(path, headers=NPY).content))
    np.testing.assert_array_equal(found, floats_of(site).clip(-1, 1))
    one = site.client.get(path, params={"index": 1, "clip_output": "false"}, headers=NPY)
    assert one.headers["x-clipped"] == "false"
    np.testing.assert_array_equal(np.load(io.BytesIO(one.content)), floats_of(site)[1:2])
    direct = site.post(json=SPEC, headers=NPY)
    assert direct.content == site.client.get(path, headers=NPY).content
    picture = opened(site.client.get(path).content)  # of the floats, in 8 bits
    assert (picture.mode, "bit_depth" in text_of(site.client.get(path).content)["spec"]) == ("L", False)
    again = site.client.get(path, headers=NPY | {"If-None-Match": site.client.get(path, headers=NPY).headers["etag"]})
    assert again.status_code == 304
    refused = problem(site.client.get(f"/jobs/{plain['id']}/image", headers=NPY), 406, "not_acceptable")
    assert "bit_depth=32" in refused["detail"]
    fallback = {"Accept": "application/x-npy, image/png;q=0.5"}
    assert site.client.get(f"/jobs/{plain['id']}/image", headers=fallback).headers["content-type"] == "image/png"


# --- 16 bits ---


@pytest.mark.parametrize("accept", ["image/png", "application/zip", "application/json"])
def test_sixteen_bits_are_the_floats_rounded_and_say_their_range(site: Site, accept: str) -> None:
    content = site.post(json=SPEC | {"n": 1, "bit_depth": 16}, headers={"Accept": accept}).content
    png = content
    if accept == "application/zip":
        with zipfile.ZipFile(io.BytesIO(content)) as files:
            png = files.read("00000.png")
    elif accept == "application/json":
        document = json.loads(content)
        assert document["value_range"] == [-1, 1]
        png = base64.b64decode(document["images"][0]["png"])
    assert png[24] == 16, "bits, as IHDR has them"
    x = floats_of(site, SPEC | {"n": 1})[0, 0].astype(np.float64).clip(-1, 1)
    np.testing.assert_array_equal(np.asarray(opened(png)), np.rint((x + 1) / 2 * 65535))
    assert text_of(png)["value_range"] == [-1, 1]
    assert text_of(png)["spec"]["bit_depth"] == 16


# --- what is refused ---


def test_sixteen_bits_are_of_one_channel(make_site: MakeSite) -> None:
    for channels in (2, 3, 4):
        site = make_site(info=replace(INFO, channels=channels, alpha=channels == 4))
        found = problem(site.post(json=SPEC | {"bit_depth": 16}), 422, "invalid_field")
        assert found["bound"] == f"8 or 32 for {channels} channels; 16 is for one"
        found = problem(site.post(json=SPEC | {"bit_depth": 32}), 422, "invalid_field")
        assert found["bound"].startswith("8 with Accept: image/png")


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_each_type_has_each_depth_or_refuses_it(make_site: MakeSite, channels: int) -> None:
    site = make_site(info=replace(INFO, channels=channels, alpha=channels == 4))
    for accept, bits in product(WITHOUT_EVERY, (8, 16, 32)):
        answer = site.post(json=SPEC | {"bit_depth": bits}, headers={"Accept": accept})
        if answer.status_code != 200:
            assert problem(answer, 422, "invalid_field")["field"] == "bit_depth", (accept, bits)
    for bits in (8, 16, 32):
        if (job := site.client.post("/jobs", json=SPEC | {"bit_depth": bits})).status_code != 202:
            assert problem(job, 422, "invalid_field")["field"] == "bit_depth", bits
            continue
        wait_for(site, job.json()["id"])
        for accept in (*MEDIA_TYPES, *NPY.values()):
            image = site.client.get(f"/jobs/{job.json()['id']}/image", headers={"Accept": accept})
            assert image.status_code in (200, 406), (accept, bits)
