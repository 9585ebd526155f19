import asyncio
import io
import re
import struct
import threading
import time
import zlib
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from tests.service.api.pictures import encode, noise
from tests.service.fakes import INFO
from tests.service.keys import access_of, key_line
from tminus.service.byte_budget import ByteBudget
from tminus.service.errors import InvalidImage, QuotaExceeded, TooManyBytes, TooManyImages
from tminus.service.images import decoder as decoder_module
from tminus.service.images.decoder import (
    MAX_SIDE_PX,
    Decoder,
    decode_image,
    decode_inputs,
    decode_mask,
    decode_transparent,
)
from tminus.service.spec import Images

pytestmark = pytest.mark.slow

ANN, BEN, EVE = (access_of(key_line(name, f"tm_{name}")).with_secret(f"tm_{name}") for name in ("ann", "ben", "eve"))
GREY = replace(INFO, height_px=8, width_px=12, channels=1)
COLOUR = replace(GREY, channels=3)


def refused(data: bytes) -> InvalidImage:
    with pytest.raises(InvalidImage) as caught:
        decode_image(data, COLOUR)
    error = caught.value
    assert (error.status, error.code, error.field) == (422, "invalid_image", "image")
    assert error.bound
    return error


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
        *extra,
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


# --- what is accepted ---


@given(seed=st.integers(0, 2**32), level=st.integers(0, 9), kind=st.sampled_from(["PNG", "WEBP"]))
def test_an_image_of_the_models_size_is_taken_bit_for_bit(seed: int, level: int, kind: str) -> None:
    options = {"compress_level": level} if kind == "PNG" else {"lossless": True}
    colour, grey = noise(8, 12, 3, seed=seed), noise(8, 12, seed=seed)
    np.testing.assert_array_equal(decode_image(encode(colour, kind, **options), COLOUR), colour)
    np.testing.assert_array_equal(decode_image(encode(grey, kind, **options), GREY)[:, :, 0], grey)
    np.testing.assert_array_equal(decode_image(encode(grey, kind, **options), COLOUR), np.dstack([grey] * 3))


@pytest.mark.parametrize(("rgb", "luma"), [((255, 0, 0), 76), ((0, 0, 255), 29)])
def test_a_model_of_one_channel_gets_the_luma_of_itu_r_601(rgb: tuple[int, int, int], luma: int) -> None:
    assert set(decode_image(encode(Image.new("RGB", (12, 8), rgb)), GREY).flat) == {luma}


@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    mode=st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]),
    model=st.sampled_from([GREY, COLOUR, replace(GREY, height_px=1, width_px=1)]),
)
def test_any_size_and_mode_comes_out_in_the_models_shape(width: int, height: int, mode: str, model: Any) -> None:
    image = Image.new(mode, (width, height))
    out = decode_image(encode(image), model)
    assert (out.shape, out.dtype) == ((model.height_px, model.width_px, model.channels), np.uint8)
    assert not out.any()


def test_a_larger_image_is_cropped_about_its_centre_and_resampled() -> None:
    picture = noise(400, 80, 3)  # 80 wide at 12:8 is 53 high; Lanczos looks 20 further
    out = decode_image(encode(picture), COLOUR)
    assert out.shape == (8, 12, 3)
    np.testing.assert_array_equal(
        out, np.asarray(ImageOps.fit(Image.fromarray(picture), (12, 8), Image.Resampling.LANCZOS))
    )
    blank = picture.copy()
    blank[:150], blank[250:] = 0, 0
    np.testing.assert_array_equal(out, decode_image(encode(blank), COLOUR), "the rest has no say")


# --- depths and modes ---


def test_sixteen_bit_grey_is_scaled_to_nearest_for_each_value() -> None:
    values = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    model = replace(INFO, height_px=256, width_px=256, channels=1)
    out = decode_image(encode(values), model)[:, :, 0]
    np.testing.assert_array_equal(out, np.rint(values / 257))


def test_transparent_pixels_of_sixteen_bits_become_black() -> None:
    rows = b"".join(b"\0" + np.full(12, 1000 * row, ">u2").tobytes() for row in range(8))
    out = decode_image(png(12, 8, 16, 0, rows, (b"tRNS", struct.pack(">H", 5000))), GREY)
    assert [row.tolist() for row in np.unique(out[:, :, 0], axis=1)[:, 0:1]] == [
        [0 if row == 5 else round(1000 * row / 257)] for row in range(8)
    ]


@given(seed=st.integers(0, 2**32))
def test_transparent_pixels_are_laid_over_black(seed: int) -> None:
    rgba = noise(8, 12, 4, seed=seed)
    out = decode_image(encode(rgba), COLOUR)
    exact = rgba[:, :, :3].astype(float) * rgba[:, :, 3:] / 255
    assert np.abs(out - exact).max() <= 0.51
    la = decode_image(encode(Image.fromarray(rgba[:, :, 2:], "LA")), GREY)[:, :, 0]
    assert np.abs(la - exact[:, :, 2]).max() <= 0.51


def test_the_transparent_colour_of_a_palette_or_an_rgb_png_is_black() -> None:
    palette, colours = Image.new("P", (12, 8), 1), Image.new("RGB", (12, 8), (10, 20, 30))
    palette.putpalette([255, 0, 0, 10, 20, 30])
    palette.paste(0, (0, 0, 6, 8))
    colours.paste((255, 0, 0), (0, 0, 6, 8))
    for image, transparency in ((palette, 0), (colours, (255, 0, 0))):
        assert decode_image(encode(image), COLOUR)[0, [0, -1]].tolist() == [[255, 0, 0], [10, 20, 30]]
        clear = encode(image, transparency=transparency)
        assert decode_image(clear, COLOUR)[0, [0, -1]].tolist() == [[0, 0, 0], [10, 20, 30]]


@pytest.mark.parametrize(
    ("ink", "rgb"), [((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 100), 155)]
)
def test_cmyk_becomes_rgb_by_the_complement(ink: tuple[int, ...], rgb: Any) -> None:
    data = encode(Image.new("CMYK", (12, 8), ink), "JPEG", quality=100)
    out = decode_image(data, COLOUR).astype(int)
    assert np.abs(out - np.array(rgb)).max() <= 3
    luma = decode_image(data, GREY).astype(int)
    assert np.abs(luma - np.dot(np.broadcast_to(rgb, 3), (0.299, 0.587, 0.114))).max() <= 3


@pytest.mark.parametrize(("orientation", "kind"), [(k, ("JPEG", "PNG", "WEBP")[k % 3]) for k in range(1, 9)])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    image = Image.fromarray(noise(8, 12, 3)).resize((120, 80))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(image, kind, exif=exif)
    with Image.open(io.BytesIO(data)) as opened:
        upright = ImageOps.exif_transpose(opened)
        expected = np.asarray(ImageOps.fit(upright, (12, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(decode_image(data, COLOUR), expected)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about them too
@pytest.mark.parametrize("exif", [b"Exif\0\0" + bytes(30), b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*"])
def test_broken_exif_data_do_no_harm(exif: bytes) -> None:
    image = Image.fromarray(noise(8, 12, 3))
    for kind in ("PNG", "JPEG"):
        np.testing.assert_array_equal(
            decode_image(encode(image, kind, exif=exif), COLOUR), decode_image(encode(image, kind), COLOUR)
        )


def test_the_first_image_of_a_phones_jpeg_with_several_is_used() -> None:
    one, two = (Image.fromarray(noise(8, 12, 3, seed=seed)) for seed in (1, 2))
    data = encode(one, "MPO", save_all=True, append_images=[two], quality=95)
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.n_frames == 2  # type: ignore[attr-defined]
    np.testing.assert_array_equal(decode_image(data, COLOUR), decode_image(encode(one, "JPEG", quality=95), COLOUR))


# --- what is refused ---


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "got nothing"),
        (b"a text, not an image", "20 bytes that begin with b'a text"),
        (encode(Image.new("RGB", (5, 5)), "GIF"), "GIF"),
        (encode(Image.new("RGB", (5, 5)), "TIFF"), "II*"),
    ],
)
def test_other_formats_are_recognised_by_their_content_and_refused(data: bytes, says: str) -> None:
    error = refused(data)
    assert says in error.detail
    assert error.bound == "a PNG, JPEG or WebP image"


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.02, 0.6])
def test_a_truncated_image_is_refused(kind: str, share: float) -> None:
    data = encode(noise(64, 64, 3), kind)
    assert "image must be a PNG, JPEG or WebP image, got" in refused(data[: int(share * len(data))]).detail


@settings(max_examples=100)
@given(data=st.data(), kind=st.sampled_from(["PNG", "JPEG", "WEBP"]))
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_is_decoded_or_refused_and_nothing_else(data: st.DataObject, kind: str) -> None:
    whole = bytearray(encode(noise(16, 16, 3), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        out = decode_image(bytes(whole), COLOUR)
    except InvalidImage:
        return
    assert out.shape == (8, 12, 3)


# Pillow opens and decodes both, and finds the fault as it converts the pixels.
NO_PALETTE = png(12, 8, 8, 3, (b"\0" + bytes(12)) * 8)
LONG_TRANSPARENCY = png(12, 8, 8, 3, (b"\0" + bytes(12)) * 8, (b"PLTE", bytes(768)), (b"tRNS", bytes(257)))


@pytest.mark.parametrize(
    ("data", "says"), [(NO_PALETTE, "it has no palette"), (LONG_TRANSPARENCY, "palette index out of range")]
)
@pytest.mark.parametrize("decode", [decode_image, decode_mask, decode_transparent])
def test_a_palette_that_is_missing_or_contradicted_is_refused(data: bytes, says: str, decode: Any) -> None:
    with pytest.raises(InvalidImage, match=f"a PNG of 12x8 that is broken: {says}"):
        decode(data, COLOUR)


def test_a_png_that_only_claims_to_be_large_is_refused_by_its_header() -> None:
    error = refused(png(4096, 4097, 8, 2, b"\0"))
    assert error.bound == "of at most 16777216 pixels"
    assert "4096x4097" in error.detail


@pytest.mark.parametrize(
    ("size", "extent"), [((1, 2**24), "high"), ((1, MAX_SIDE_PX + 1), "high"), ((MAX_SIDE_PX + 1, 1), "wide")]
)
def test_a_side_that_is_too_long_is_refused_by_the_header(
    size: tuple[int, int], extent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "open", lambda *_args, **_more: pytest.fail("Pillow sees it"))
    error = refused(png(*size, 8, 0, b"\0"))
    assert error.detail == f"image must be at most 16384 pixels {extent}, got {max(size)}"


def test_sides_at_the_bound_are_taken() -> None:
    for size in ((1, MAX_SIDE_PX), (MAX_SIDE_PX, 1)):
        assert decode_image(encode(Image.new("1", size, 1)), GREY).min() == 255


def test_a_real_bomb_of_each_format_is_refused_before_it_is_decoded() -> None:
    """Pillow allocates a WebP's canvas when it opens the file, so it must not get that far."""
    bombs = [
        encode(Image.new("1", (12_000, 12_000)), "PNG"),
        encode(Image.new("L", (5000, 5000)), "JPEG"),
        encode(Image.new("RGB", (5000, 5000)), "WEBP", lossless=True, method=0, quality=0),
        b"RIFF" + struct.pack("<I", 40) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + b"\xfe\x3f\0\xfe\x3f\0" * 2,
        encode(Image.new("RGB", (8, 8)), "JPEG").replace(b"\0\x11\x08\0\x08\0\x08", b"\0\x11\x08\xff\xff\xff\xff"),
    ]
    for bomb in bombs:
        assert len(bomb) < 300_000
        started = time.perf_counter()
        assert re.search("at most (16777216 pixels|16384 pixels high|16384 pixels wide),", refused(bomb).detail)
        assert time.perf_counter() - started < 0.05, "nothing was decoded"


def test_an_image_at_the_bound_is_taken() -> None:
    assert decode_image(encode(Image.new("1", (4096, 4096), 1)), GREY).min() == 255


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_an_animation_is_refused(kind: str) -> None:
    frames = [Image.fromarray(noise(8, 12, 3, seed=seed)) for seed in range(3)]
    error = refused(encode(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert error.bound == "a still image"
    assert "3 frames" in error.detail


def test_texts_that_unpack_to_gigabytes_are_refused() -> None:
    text = b"key\0\0" + zlib.compress(bytes(2**20 - 10), 9)
    assert len(text) < 1100
    rows = b"\0" + bytes(3)
    assert "broken" in refused(png(1, 1, 8, 2, rows, *[(b"zTXt", text)] * 80)).detail
    large = b"key\0\0" + zlib.compress(bytes(2**24), 9)
    for kind in (b"zTXt", b"iCCP"):
        assert "broken" in refused(png(1, 1, 8, 2, rows, (kind, large))).detail


def test_a_long_text_and_a_large_profile_are_ignored() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 500_000, zip=True)
    picture = noise(8, 12, 3)
    data = encode(picture, pnginfo=info, icc_profile=bytes(200_000))
    np.testing.assert_array_equal(decode_image(data, COLOUR), picture)


# --- the thread ---


def test_one_image_is_decoded_at_a_time_and_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    running = most = 0
    threads: set[str] = set()

    def slow(data: bytes, model: Any, field: str) -> Images:
        nonlocal running, most
        running += 1
        most = max(most, running)
        threads.add(threading.current_thread().name)
        time.sleep(0.002)
        running -= 1
        return decode_image(data, model, field)

    monkeypatch.setattr(decoder_module, "decode_image", slow)
    decoder, picture = Decoder(), noise(8, 12, 3)

    async def all_at_once() -> list[Images]:
        return await asyncio.gather(*[decoder.decode(encode(picture), COLOUR, ANN) for _ in range(20)])

    for out in asyncio.run(all_at_once()):
        np.testing.assert_array_equal(out, picture)
    decoder.close()
    assert most == 1
    assert threads == {"tminus-decode_0"}


def jpeg_of_scans(scans: int, size_px: int = 64) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode(noise(size_px, size_px, 3), "JPEG", progressive=True)
    last, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:last] + data[last:end] * (scans - data.count(b"\xff\xda") + 1) + data[end:]


def test_the_scans_of_a_jpeg_and_their_pixels_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "scans" in refused(jpeg_of_scans(210)).detail
    monkeypatch.setattr(decoder_module, "MAX_WORK", 16 * 64 * 64)
    assert decode_image(jpeg_of_scans(16), COLOUR).shape == (8, 12, 3)
    with pytest.raises(InvalidImage, match="64x64 in 90 scans"):
        decode_image(jpeg_of_scans(90), COLOUR)


class Blocked:
    """A decoder whose thread is busy until `go`; what it decoded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go, self.decoded = threading.Event(), list[bytes]()
        self.decoder = Decoder()
        self.png_bytes = encode(noise(8, 12, 3))

        def slow(data: bytes, model: Any, field: str) -> Images:
            self.go.wait(10)
            self.decoded.append(data)
            return decode_image(data, model, field)

        monkeypatch.setattr(decoder_module, "decode_image", slow)


def test_images_whose_clients_have_gone_take_no_time_of_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = Blocked(monkeypatch)

    async def leave() -> None:
        first = asyncio.ensure_future(blocked.decoder.decode(blocked.png_bytes, COLOUR, ANN))
        await asyncio.sleep(0.05)  # until it is being decoded
        others = [asyncio.ensure_future(blocked.decoder.decode(blocked.png_bytes, COLOUR, ANN)) for _ in range(60)]
        await asyncio.sleep(0)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        last = asyncio.ensure_future(blocked.decoder.decode(blocked.png_bytes, COLOUR, ANN))
        await asyncio.sleep(0)
        blocked.go.set()
        await asyncio.gather(first, last)

    asyncio.run(leave())
    blocked.decoder.close()
    assert len(blocked.decoded) == 2


def test_an_image_that_would_wait_too_long_is_refused_with_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "FIRST_RATE", 8 * 12 * 2.0)  # two of these images a second
    blocked = Blocked(monkeypatch)

    async def crowd() -> None:
        waiting = [asyncio.ensure_future(blocked.decoder.decode(blocked.png_bytes, COLOUR, ANN)) for _ in range(21)]
        await asyncio.sleep(0)
        with pytest.raises(TooManyImages) as caught:
            await blocked.decoder.decode(blocked.png_bytes, COLOUR, ANN)
        assert int(caught.value.headers["Retry-After"]) == 11
        blocked.go.set()
        await asyncio.gather(*waiting)
        await blocked.decoder.decode(blocked.png_bytes, COLOUR, ANN)

    asyncio.run(crowd())
    blocked.decoder.close()


def test_one_callers_images_fill_its_own_share_of_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "FIRST_RATE", 8 * 12 * 2.0)  # two of these images a second
    blocked = Blocked(monkeypatch)
    of_ann, of_ben = (encode(noise(8, 12, 3, seed=seed)) for seed in (1, 2))

    async def crowd() -> None:
        decode = blocked.decoder.decode
        waiting = [asyncio.ensure_future(decode(of_ann, COLOUR, ANN)) for _ in range(21)]
        await asyncio.sleep(0)
        with pytest.raises(TooManyImages):
            await decode(of_ann, COLOUR, ANN)
        waiting += [asyncio.ensure_future(decode(of_ben, COLOUR, BEN)) for _ in range(2)]
        await asyncio.sleep(0)
        blocked.go.set()
        await asyncio.gather(*waiting)

    asyncio.run(crowd())
    blocked.decoder.close()
    assert of_ben in blocked.decoded[:3]
    assert len(blocked.decoded) == 23


def test_decoding_is_charged_before_it_begins_unless_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    access = access_of(key_line("ann", "tm_ann", row_steps_per_minute=4))
    ann, large = access.with_secret("tm_ann"), encode(Image.new("1", (2**13, 2**9)))  # 4 times 2^20 pixels
    decoder = Decoder()

    async def left_after(data: bytes) -> int:
        with suppress(InvalidImage):
            await decoder.decode(data, GREY, ann)
        assert ann.allowance is not None
        return ann.allowance.left

    async def spend() -> None:
        assert await left_after(b"no image") == 4
        assert await left_after(encode(noise(8, 12))) == 3
        assert await left_after(encode(noise(8, 12))[:-20]) == 2, "one that is broken takes the time too"
        monkeypatch.setattr(decoder_module, "decode_image", lambda *_: pytest.fail("it is decoded"))
        with pytest.raises(QuotaExceeded) as caught:
            await decoder.decode(large, GREY, ann)
        assert (caught.value.field, caught.value.value) == ("row_steps", 4)

    asyncio.run(spend())
    decoder.close()


def test_the_next_image_waits_for_one_whose_client_has_gone_while_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else its time would count for nobody."""
    blocked = Blocked(monkeypatch)

    async def leave() -> None:
        gone = asyncio.ensure_future(blocked.decoder.decode(blocked.png_bytes, COLOUR, ANN))
        await asyncio.sleep(0.05)  # until it is being decoded
        gone.cancel()
        await asyncio.sleep(0)
        following = asyncio.ensure_future(blocked.decoder.decode(blocked.png_bytes, COLOUR, BEN))
        await asyncio.sleep(0)
        assert blocked.decoder._pool._work_queue.empty()
        blocked.go.set()
        await following

    asyncio.run(leave())
    blocked.decoder.close()


def test_the_bytes_that_wait_for_the_thread_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = Blocked(monkeypatch)
    decoder, png_bytes = blocked.decoder, blocked.png_bytes
    monkeypatch.setattr(decoder, "_budget", ByteBudget(2 * len(png_bytes)))

    async def one_too_many() -> None:
        waiting = asyncio.ensure_future(decoder.decode(png_bytes, COLOUR, ANN))
        await asyncio.sleep(0)
        with pytest.raises(TooManyBytes, match="one caller's bodies"):
            await decoder.decode(png_bytes, COLOUR, ANN)
        of_ben = asyncio.ensure_future(decoder.decode(encode(Image.new("L", (1, 1))), COLOUR, BEN))
        await asyncio.sleep(0)
        for more in (
            decoder.decode(png_bytes, COLOUR, EVE),
            decoder.inputs(png_bytes, None, COLOUR, EVE),
            decoder.inputs(b"", png_bytes, COLOUR, EVE),
        ):
            with pytest.raises(TooManyBytes):
                await more
        blocked.go.set()
        await asyncio.gather(waiting, of_ben)
        await decoder.decode(png_bytes, COLOUR, ANN)

    asyncio.run(one_too_many())
    decoder.close()


# --- masks that are transparent where the image is made new ---

LEFT = np.arange(12)[None].repeat(8, axis=0) < 5


def with_alpha(alpha: np.ndarray, mode: str = "RGBA") -> Image.Image:
    image = Image.fromarray(noise(8, 12, 3)).convert(mode)
    image.putalpha(Image.fromarray(alpha.astype(np.uint8)))
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_what_is_wholly_transparent_is_made_new_whatever_its_colour(mode: str, kind: str) -> None:
    data = encode(with_alpha(np.where(LEFT, 0, 255), mode), kind, **({"lossless": True} if kind == "WEBP" else {}))
    np.testing.assert_array_equal(decode_transparent(data, COLOUR), LEFT)
    inputs = decode_inputs(encode(noise(8, 12, 3)), data, COLOUR, transparent=True)
    assert inputs.mask is not None
    np.testing.assert_array_equal(inputs.mask, LEFT)


@pytest.mark.parametrize(("orientation", "kind"), [(k, ("PNG", "WEBP")[k % 2]) for k in (1, 3, 6, 8)])
def test_a_transparent_mask_is_turned_upright_as_a_white_one_is(orientation: int, kind: str) -> None:
    new = noise(8, 12) > 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"exif": exif} | ({"lossless": True} if kind == "WEBP" else {})
    white = encode(np.where(new, 255, 0).astype(np.uint8), kind, **options)
    clear = encode(with_alpha(np.where(new, 0, 255)), kind, **options)
    np.testing.assert_array_equal(decode_transparent(clear, COLOUR), decode_mask(white, COLOUR))
    palette = Image.fromarray(np.where(new, 3, 7).astype(np.uint8)).convert("P")
    if kind == "PNG":
        clear = encode(palette, transparency=3, exif=exif)
        np.testing.assert_array_equal(decode_transparent(clear, COLOUR), decode_mask(white, COLOUR))


def test_an_image_may_be_its_own_mask() -> None:
    data = encode(with_alpha(np.where(LEFT, 0, 255)))
    inputs = decode_inputs(data, data, COLOUR, transparent=True)
    assert inputs.mask is not None
    np.testing.assert_array_equal(inputs.mask, LEFT)
    opaque = encode(with_alpha(np.full((8, 12), 255)))
    with pytest.raises(InvalidImage, match="image must be transparent where it is to be made new") as caught:
        decode_inputs(opaque, opaque, COLOUR, transparent=True)
    assert caught.value.field == "image"


@pytest.mark.parametrize(
    "mask",
    [
        with_alpha(np.full((8, 12), 255)),
        with_alpha(np.full((8, 12), 1)),
        Image.fromarray(noise(8, 12)),
        Image.fromarray(noise(8, 12, 3)),
        Image.fromarray(noise(8, 12).astype(np.uint16) * 257),
    ],
    ids=["opaque", "nearly transparent", "grey", "colours", "16 bits"],
)
def test_a_mask_without_a_transparent_pixel_is_refused(mask: Image.Image) -> None:
    with pytest.raises(InvalidImage, match="mask must be transparent where the image is to be made new") as caught:
        decode_transparent(encode(mask), COLOUR)
    assert caught.value.field == "mask"


def test_16_bits_with_a_transparent_grey_are_refused_and_no_error_of_ours() -> None:
    rows = b"".join(b"\0" + b"\x12\x34" * 12 for _ in range(8))
    with pytest.raises(InvalidImage):
        decode_transparent(png(12, 8, 16, 0, rows, (b"tRNS", b"\x12\x34")), COLOUR)
