import asyncio
import base64
import io
import json
import math
import re
import threading
import weakref
import zipfile
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.service.fakes import INFO, make_spec
from tminus.model.timesteps import SPACINGS
from tminus.service.images.encoder import (
    JSON,
    MEDIA_TYPES,
    PNG,
    PNG_TEXT_KEY,
    ZIP,
    Encoder,
    contact_sheet,
    encode_frame,
    encode_png,
    encode_result,
    enlarge,
    etag,
    metric_label,
    one_image,
    recipe,
    sheet_columns,
    viewing_scale,
)
from tminus.service.preview import Frame, Show
from tminus.service.spec import Images, SampleSpec
from tminus.service.work import JobResult

UNCONDITIONAL = replace(INFO, conditional=False, class_names=(), null_class=None)


def noise(n: int, height: int = 4, width: int = 6, channels: int = 1, seed: int = 0) -> Images:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def read(png: bytes) -> Images:
    """Pixels of a PNG as [H, W, C]."""
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        image.load()
        pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def text_of(png: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        found: dict[str, Any] = json.loads(image.text[PNG_TEXT_KEY])  # type: ignore[attr-defined]
    return found


# --- PNG ---


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize("size", [(1, 1), (4, 6), (32, 32), (7, 3)])
def test_a_png_has_the_pixels_and_text_in_any_language(channels: int, mode: str, size: tuple[int, int]) -> None:
    pixels = noise(1, *size, channels)[0]
    png = encode_png(pixels, {"name": "Käse 猫"})
    assert text_of(png) == {"name": "Käse 猫"}
    np.testing.assert_array_equal(read(png), pixels)
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == mode
        assert image.size == size[::-1]


# --- the sheet ---


@pytest.mark.parametrize(("kind", "pillows"), [("jpeg", "JPEG"), ("webp", "WEBP")])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_lossy_picture_is_near_the_pixels_and_smaller_where_its_quality_is_less(
    kind: str, pillows: str, channels: int
) -> None:
    ramp = np.linspace(0, 255, 64 * 48).reshape(48, 64, 1).repeat(channels, axis=2).astype(np.uint8)
    sizes = [len(encode_frame(ramp, kind, quality)) for quality in (100, 50, 0)]
    assert sizes == sorted(sizes, reverse=True)
    with Image.open(io.BytesIO(encode_frame(ramp, kind, 100))) as image:
        assert (image.format, image.size) == (pillows, (64, 48))
        shown = np.asarray(image.convert("L"), np.int16)
    assert np.abs(shown - ramp[:, :, 0]).max() <= 4


def test_a_sheet_has_image_k_in_reading_order_and_is_as_square_as_it_can_be_without_spare_cells() -> None:
    assert [sheet_columns(n) for n in (1, 2, 3, 4, 5, 6, 7, 64)] == [1, 2, 3, 2, 5, 3, 3, 8]
    for n in range(1, 65):
        images = noise(n, 3, 5, 3)
        sheet, columns, square = contact_sheet(images), sheet_columns(n), math.ceil(math.sqrt(n))
        exact = [c for c in range(1, n + 1) if n % c == 0 and c >= n // c]
        assert columns == (min(exact) if min(exact) <= 2 * square else square)
        rows = math.ceil(n / columns)
        assert (sheet.shape, sheet.dtype) == ((rows * 3, columns * 5, 3), np.uint8)
        for k in range(rows * columns):
            top, left = 3 * (k // columns), 5 * (k % columns)
            cell = sheet[top : top + 3, left : left + 5]
            np.testing.assert_array_equal(cell, images[k] if k < n else np.zeros_like(cell))


# --- a response ---


@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 300))
def test_a_sheet_for_people_is_as_large_as_its_bounds_allow(n: int, height: int, width: int) -> None:
    columns = sheet_columns(n)
    sheet = (-(-n // columns) * height, columns * width)
    scale = viewing_scale(n, *sheet)

    def fits(scale: int) -> bool:
        return scale * max(height, width) <= 256 and scale * max(sheet) <= 1024

    assert scale == 1 or fits(scale)
    assert not fits(scale + 1)


def test_each_pixel_is_enlarged_to_a_square() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    np.testing.assert_array_equal(enlarge(pixels, 3), np.kron(pixels, np.ones((3, 3, 1), np.uint8)))


def test_a_png_response_is_the_sheet_with_the_whole_recipe() -> None:
    spec, images = make_spec(n=5, class_labels=(0, 1, None, 2, 0)), noise(5)
    png = encode_result(PNG, spec, images, INFO)
    np.testing.assert_array_equal(read(png), contact_sheet(images))
    text = text_of(png)
    assert SampleSpec.from_json(text["spec"]) == spec
    assert text["weights"] == INFO.weights_hash
    assert text["fingerprint"] == INFO.fingerprint


def test_a_zip_holds_each_image_under_its_index_with_its_own_recipe() -> None:
    spec, images = make_spec(n=3, index=41, class_labels=(0, None, 2), guidance=1.0), noise(3)
    with zipfile.ZipFile(io.BytesIO(encode_result(ZIP, spec, images, INFO))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["00041.png", "00042.png", "00043.png"]
        for k, name in enumerate(archive.namelist()):
            png = archive.read(name)
            np.testing.assert_array_equal(read(png), images[k])
            assert SampleSpec.from_json(text_of(png)["spec"]) == one_image(spec, k)


def test_json_holds_each_image_and_the_whole_recipe() -> None:
    spec, images = make_spec(n=3, index=7, class_labels=(2, None, 0), seed=2**64 - 1), noise(3, channels=3)
    document = json.loads(encode_result(JSON, spec, images, replace(INFO, channels=3)))
    assert document.keys() == {"spec", "weights", "fingerprint", "images"}, "nothing that differs from run to run"
    assert SampleSpec.from_json(document["spec"]) == spec
    assert document["weights"] == INFO.weights_hash
    assert document["fingerprint"] == INFO.fingerprint
    assert [(i["index"], i["class_label"], i["class_name"]) for i in document["images"]] == [
        (7, 2, "3d-print"),
        (8, None, None),
        (9, 0, "cat"),
    ]
    for k, image in enumerate(document["images"]):
        png = base64.b64decode(image["png"], validate=True)
        np.testing.assert_array_equal(read(png), images[k])
        assert SampleSpec.from_json(text_of(png)["spec"]) == one_image(spec, k)


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
def test_the_same_images_are_the_same_bytes(media_type: str) -> None:
    spec, images = make_spec(n=4), noise(4)
    made = encode_result(media_type, spec, images, INFO)
    assert made == encode_result(media_type, spec, images.copy(), INFO)
    assert made != encode_result(media_type, spec, noise(4, seed=1), INFO)


@pytest.mark.parametrize("media_type", MEDIA_TYPES)
def test_a_model_without_classes_encodes_too(media_type: str) -> None:
    spec = make_spec(n=2, class_labels=None)
    body = encode_result(media_type, spec, noise(2), UNCONDITIONAL)
    if media_type == JSON:
        images = json.loads(body)["images"]
        assert [(image["class_label"], image["class_name"]) for image in images] == [(None, None)] * 2


# --- recipes ---


@given(
    st.builds(
        make_spec,
        n=st.just(3),
        steps=st.integers(1, 1000),
        sampler=st.sampled_from(["ddpm", "ddim", "dpmpp_2m"]),
        guidance_interval=st.none() | st.tuples(st.integers(0, 999), st.integers(0, 999)),
        guidance_rescale=st.none() | st.floats(0, 1),
        timestep_spacing=st.sampled_from(SPACINGS),
        eta=st.floats(0, 1),
        seed=st.integers(0, 2**64 - 1),
        index=st.integers(0, 2**32 - 3),
        to_seed=st.none() | st.integers(0, 2**64 - 1),
        mix=st.none() | st.floats(0, 1),
        guidance=st.floats(0, 50),
        clip=st.booleans(),
        class_labels=st.none() | st.tuples(*[st.none() | st.integers(0, 2)] * 3),
    )
)
def test_a_recipe_through_json_is_exact_to_the_bit(spec: SampleSpec) -> None:
    assert SampleSpec.from_json(json.loads(json.dumps(recipe(spec, INFO)))["spec"]) == spec


# --- the threads ---


def test_encoding_runs_off_the_event_loop_and_is_observed_by_kind() -> None:
    seen: list[tuple[str, float, str]] = []
    readers: set[str] = set()

    def read() -> Images:  # waits for a GPU, so it may not run in the event loop's thread
        readers.add(threading.current_thread().name.rpartition("_")[0])
        return images

    def observe(kind: str, seconds: float) -> None:
        seen.append((kind, seconds, threading.current_thread().name))

    async def encode_all() -> list[bytes]:
        encoder = Encoder(observe)
        result = JobResult(read, 0.0, 0.0, 0.0)
        try:
            return [
                await encoder.make(
                    result.read, partial(encode_result, kind, spec, model=INFO), metric_label(kind), kind
                )
                for kind in MEDIA_TYPES
            ]
        finally:
            encoder.close()

    spec, images = make_spec(n=2), noise(2)
    assert asyncio.run(encode_all()) == [encode_result(media_type, spec, images, INFO) for media_type in MEDIA_TYPES]
    assert [kind for kind, _, _ in seen] == [metric_label(media_type) for media_type in MEDIA_TYPES]
    assert all(seconds > 0 for _, seconds, _ in seen)
    assert all(name.startswith("tminus-encode") for _, _, name in seen)
    assert readers == {"tminus-encode"}


# --- ETags ---


def test_an_etag_is_a_strong_validator_of_the_recipe_and_the_media_type() -> None:
    spec = make_spec(n=2)
    tags = {etag(media_type, spec, INFO) for media_type in MEDIA_TYPES}
    assert len(tags) == len(MEDIA_TYPES)
    assert all(re.fullmatch(r'"[0-9a-f]{32}"', tag) for tag in tags)
    assert etag(PNG, spec, INFO) == etag(PNG, replace(spec), replace(INFO))


def other(value: object) -> object:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, tuple):
        return value[::-1]
    return "another" if isinstance(value, str) else (3, 4)


def test_every_field_of_a_spec_and_all_of_a_model_that_is_in_the_bytes_is_in_the_etag() -> None:
    spec = make_spec(n=2, class_labels=(0, 1), guidance_interval=(1, 2))
    specs = [replace(spec, **{each.name: other(getattr(spec, each.name))}) for each in fields(SampleSpec)]
    renamed = replace(INFO, class_names=("cat", "dog", "2d-print"))
    models = [replace(INFO, weights_hash="another"), replace(INFO, fingerprint="another"), renamed]
    tags = [etag(JSON, each, INFO) for each in (spec, *specs)] + [etag(JSON, spec, each) for each in models]
    assert len(set(tags)) == len(tags)
    assert etag(PNG, spec, INFO) != etag(PNG, specs[0], INFO)
    of_a_renamed_class = make_spec(class_labels=(2,))
    assert len({encode_result(JSON, of_a_renamed_class, noise(1), model) for model in (INFO, renamed)}) == 2


def test_the_etag_and_recipe_of_a_plain_spec_have_not_changed() -> None:
    """An upgrade must not change the bytes of an image, nor the ETag that clients know it by."""
    spec = make_spec(n=2, guidance=2.0, seed=7)
    assert etag(PNG, spec, INFO) == '"75685beeb28dae895beb799a030e48e1"'
    fields = (
        '"n": 1, "steps": 3, "sampler": "ddpm", "eta": 0.0, "seed": 7, "index": 1, "class_labels": [0], '
        '"guidance": 2.0, "guidance_interval": null, "timestep_spacing": "leading", "clip": true'
    )
    weights = f'"weights": "{"ab" * 32}", "fingerprint": "0123456789abcdef"'
    assert json.dumps(recipe(one_image(spec, 1), INFO)) == f'{{"spec": {{{fields}}}, {weights}}}'


def test_an_encoded_frame_is_kept_for_other_viewers_for_a_moment_and_then_let_go(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[int] = []

    class Read:
        def __call__(self) -> Mapping[Show, Images]:
            reads.append(1)
            return {"x_t": noise(1)}

    def make() -> tuple[Encoder, Frame, "weakref.ref[Read]"]:
        read = Read()
        return Encoder(lambda *_: None), Frame(1, read), weakref.ref(read)

    async def twice(encoder: Encoder, frame: Frame) -> bool:
        return await encoder.encode_frame(frame, "png", "sheet") == await encoder.encode_frame(frame, "png", "sheet")

    encoder, frame, _ = make()
    assert asyncio.run(twice(encoder, frame))
    encoder.close()
    assert len(reads) == 1
    monkeypatch.setattr("tminus.service.images.encoder.RECENT_S", 0.0)
    encoder, frame, old = make()
    asyncio.run(twice(encoder, frame))
    del frame
    asyncio.run(twice(encoder, Frame(2, Read())))
    encoder.close()
    assert old() is None
