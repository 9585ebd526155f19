"""Encodes images as PNGs, contact sheets, zip, JSON and previews. `Encoder` does this in its own threads."""

import base64
import hashlib
import io
import json
import math
import time
import zipfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any, TypeVar

import numpy as np
from cachetools import TTLCache, cachedmethod
from PIL import Image, PngImagePlugin, features

from tminus.model.pixels import RGBA, VALUE_RANGE, as_uint8
from tminus.model.trajectory import Trajectory
from tminus.service.images.trajectory import pack_trajectory
from tminus.service.model_info import ModelInfo
from tminus.service.preview import Frame, Show
from tminus.service.spec import Images, Pixels, SampleSpec
from tminus.service.threads import Pulse, started_pool
from tminus.service.tracing import traced
from tminus.service.work import JobResult

PNG, ZIP, JSON, WEBP, NPY = "image/png", "application/zip", "application/json", "image/webp", "application/x-npy"
MEDIA_TYPES = (PNG, ZIP, JSON)  # the first is the default
PNG_TEXT_KEY = "tminus"
BACKGROUND = "background"  # key in a recipe: the colour laid behind an image with alpha
RESULT_THREADS = 2
ANIMATION_S = 21.0  # time allowed for the largest animation: 16 MiB of grey pixels take 17 s on a busy core
RECENT_BYTES, RECENT_S = 32 * 2**20, 5.0
FRAME_OPTIONS: dict[str, dict[str, Any]] = {
    "png": {"compress_level": 1},
    "webp": {"lossless": True, "quality": 0, "method": 0, "exact": True},  # exact: keep colours of transparent pixels
    "jpeg": {"quality": 90, "subsampling": 0},
}
Read = TypeVar("Read")
Made = TypeVar("Made")
WEBP_VERSION = f"libwebp {features.version('webp')}"  # another version may write different bytes
FRAME_MS, LAST_MS = 40, 1500
TILE_PX, SHEET_PX = 256, 1024  # maximum side of an image and of a whole sheet, after enlarging
Picture = tuple[Show, int | None, bytes]  # (x_t or x_0, image index or None for a sheet of all images, encoded bytes)


class Encoder:
    """Owns the encoding threads. Its coroutines wait for a thread, and raise Stalled if the thread hangs."""

    def __init__(self, observe: Callable[[str, float], None]) -> None:
        self._observe = observe
        self._pool = started_pool(RESULT_THREADS, "tminus-encode")
        self._animations = started_pool(1, "tminus-animate")  # separate, because an animation may take seconds
        self._frames = started_pool(1, "tminus-frames")  # separate, so results never wait for previews
        self._pulse = Pulse("the encoder")
        self._pulse_of_animations = Pulse("the encoder of animations", lambda: ANIMATION_S)
        self.pulses = (self._pulse, self._pulse_of_animations)
        # Recently encoded frames, because many viewers may watch one job. Used only in the frames' thread.
        self._recent: TTLCache[Hashable, list[Picture]] = TTLCache(RECENT_BYTES, RECENT_S, getsizeof=_cached_bytes)

    async def encode_frame(
        self, frame: Frame, frame_format: str, layout: str, quality: int | None = None, *, opaque: bool = False
    ) -> list[Picture]:
        """Encode the pictures of a preview. quality, opaque: see the function `encode_frame`."""
        return await self._pulse.run(
            self._frames, lambda: self._make_pictures(frame, frame_format, layout, quality, opaque)
        )

    async def encode_pictures(
        self, layout: str, spec: SampleSpec, result: JobResult, made_by: ModelInfo
    ) -> list[bytes]:
        """Encode a finished job as PNGs: one sheet of all images, or one PNG for each image."""

        def make(images: Pixels) -> list[bytes]:
            if layout == "sheet":
                return [encode_result(PNG, spec, images, made_by)]
            return encode_each(spec, images, made_by)

        return await self.make(result.read, make, "png", PNG, spec.n)

    async def make(
        self,
        read: Callable[[], Read],
        make: Callable[[Read], Made],
        kind: str | None,
        media_type: str,
        n: int | None = None,
        *,
        slow: bool = False,
    ) -> Made:
        """Call `make` with the result of `read` in an encoding thread. `read` may wait for a GPU. Raises NotFinite.

        kind: label in the metric of encoding times; None records no time. slow: use the thread for work that may take
        several seconds.
        """

        def encode() -> Made:
            given = read()
            started = time.perf_counter()
            made = make(given)
            if kind is not None:
                self._observe(kind, time.perf_counter() - started)
            return made

        attributes: dict[str, str | int] = {"tminus.media_type": media_type}
        with traced("encode", attributes if n is None else attributes | {"tminus.images": n}):
            if slow:
                return await self._pulse_of_animations.run(self._animations, encode)
            return await self._pulse.run(self._pool, encode)

    def close(self) -> None:
        """Stop the threads when their current work is done."""
        for pool in (self._frames, self._animations, self._pool):
            pool.shutdown(wait=False, cancel_futures=True)

    # --- in the frames' thread ---

    @cachedmethod(attrgetter("_recent"))
    def _make_pictures(
        self, frame: Frame, frame_format: str, layout: str, quality: int | None, opaque: bool
    ) -> list[Picture]:
        shown = frame.read()
        started = time.perf_counter()
        pictures: list[Picture] = []
        for show, images in shown.items():
            if layout == "sheet":
                pictures.append((show, None, encode_frame(contact_sheet(images), frame_format, quality, opaque=opaque)))
            else:
                each = (encode_frame(image, frame_format, quality, opaque=opaque) for image in images)
                pictures += [(show, k, picture) for k, picture in enumerate(each)]
        self._observe("frame", time.perf_counter() - started)
        return pictures


def _cached_bytes(pictures: list[Picture]) -> int:
    """Estimate the memory of a cache entry.

    The entry's key holds the frame's pixels, which take a few times the memory of the encoded pictures.
    """
    return 4 * sum(len(picture) for *_, picture in pictures)


def as_pictures(images: Pixels, model: ModelInfo) -> Pixels:
    """Convert a job's images [n, H, W, C] to integer pixels. Drop channels that pictures do not show."""
    shown = images[..., : model.shown_channels]
    return as_uint8(shown.astype(np.float32)) if shown.dtype == np.float32 else shown


def encode_result(media_type: str, spec: SampleSpec, images: Pixels, model: ModelInfo, *, clip: bool = True) -> bytes:
    """Encode a finished job as one PNG (a sheet if n > 1), a zip of n PNGs, JSON with base64 PNGs, or NPY.

    NPY holds float32 [n, C, H, W]. clip: clip these values to the model's range. A float32 job's pictures have the same
    bytes as those of an 8-bit job.
    """
    if media_type == NPY:
        header = io.BytesIO()
        values = images.clip(*VALUE_RANGE) if clip else images
        values = np.ascontiguousarray(values.transpose(0, 3, 1, 2), "<f4")
        # np.save is not used, because it would pickle arrays of objects.
        np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
        return header.getvalue() + values.tobytes()
    images = as_pictures(images, model)
    if spec.depth == 32:
        spec = replace(spec, bit_depth=None)
    if media_type == PNG:
        return encode_png(contact_sheet(images), recipe(spec, model))
    if media_type == ZIP:
        return _zip({f"{spec.index + k:05d}.png": png for k, png in enumerate(encode_each(spec, images, model))})
    assert media_type == JSON
    return json.dumps(_document(spec, images, model)).encode()


def _document(spec: SampleSpec, images: Pixels, model: ModelInfo) -> dict[str, object]:
    entries = [
        {
            "index": spec.index + k,
            "class_label": label,
            "class_name": model.class_names[label] if label is not None else None,
            "png": _base64(png),
        }
        for k, (png, label) in enumerate(
            zip(encode_each(spec, images, model), spec.class_labels or (None,) * spec.n, strict=True)
        )
    ]
    return {**recipe(spec, model), "images": entries}


def encode_path(
    recorded: tuple[Mapping[int, Mapping[Show, Images]], Pixels | None],
    spec: SampleSpec,
    timesteps: Sequence[float],
    model: ModelInfo,
) -> bytes:
    """Encode recorded frames as JSON, with the finished images if given. timesteps: the timestep of each pass."""
    steps, images = recorded
    frames = [
        {"step": step, "t": round(timesteps[step], 3)}
        | {show: _base64(encode_frame(contact_sheet(each), "png")) for show, each in shown.items()}
        for step, shown in steps.items()
    ]
    document: dict[str, object] = {**recipe(spec, model), "images": [], "frames": frames}
    if images is not None:
        document |= _document(spec, images, model) | {"sheet": _base64(encode_result(PNG, spec, images, model))}
    return json.dumps(document).encode()


def encode_trajectory(recorded: tuple[Trajectory, Pixels], spec: SampleSpec, model: ModelInfo) -> bytes:
    """Encode a trajectory and its finished images as a file."""
    return pack_trajectory(*recorded, spec, model, recipe(spec, model))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def encode_each(spec: SampleSpec, images: Pixels, model: ModelInfo, *, opaque: bool = False) -> list[bytes]:
    """Encode each image of a finished job as a separate PNG. opaque: lay RGBA over white."""
    pictures = [over_white(image) if opaque else image for image in as_pictures(images, model)]
    more = {BACKGROUND: "white"} if opaque else {}
    return [encode_png(picture, recipe(one_image(spec, k), model) | more) for k, picture in enumerate(pictures)]


def recipe(spec: SampleSpec, model: ModelInfo) -> dict[str, object]:
    """Return everything that is needed to make the same pixels again."""
    made: dict[str, object] = {"spec": spec.to_json(), "weights": model.weights_hash, "fingerprint": model.fingerprint}
    return made if spec.depth == 8 else made | {"value_range": VALUE_RANGE}


def etag(media_type: str, spec: SampleSpec, model: ModelInfo) -> str:
    """Return the ETag of a response. It is known before the response is encoded."""
    parts = json.dumps([media_type, recipe(spec, model), model.class_names], sort_keys=True)
    return f'"{hashlib.sha256(parts.encode()).hexdigest()[:32]}"'


def etag_form(media_type: str, *, clip: bool) -> str:
    """Return the media type to hash in an ETag. Unclipped floats get a suffix, because clipping changes the bytes."""
    return media_type if clip else f"{media_type}; unclipped"


def metric_label(media_type: str) -> str:
    """Return a media type's label for the metric of encoding times: png, zip, json or npy."""
    return media_type.rpartition("/")[2].removeprefix("x-")


def one_image(spec: SampleSpec, k: int) -> SampleSpec:
    """Return the spec that makes only image k of a request."""
    labels = spec.class_labels[k : k + 1] if spec.class_labels is not None else None
    return replace(spec, n=1, index=spec.index + k, class_labels=labels)


def encode_png(pixels: Pixels, text: dict[str, object] | None = None) -> bytes:
    """Encode [H, W, C] as PNG, with `text` as JSON in a text chunk. C is 1, 3 or 4; only 1 for 16 bits."""
    info = PngImagePlugin.PngInfo()
    if text is not None:
        info.add_itxt(PNG_TEXT_KEY, json.dumps(text))
    out = io.BytesIO()
    _to_pillow(pixels).save(out, "PNG", pnginfo=info)
    return out.getvalue()


def encode_frame(pixels: Pixels, frame_format: str, quality: int | None = None, *, opaque: bool = False) -> bytes:
    """Encode [H, W, C] as png, webp or jpeg.

    quality: 0 to 100; None prefers speed to size, with png and webp lossless. opaque: lay RGBA over white. A jpeg is
    always opaque, because it has no alpha.
    """
    out = io.BytesIO()
    options = FRAME_OPTIONS[frame_format] if quality is None else {"quality": quality}
    _to_pillow(over_white(pixels) if opaque or frame_format == "jpeg" else pixels).save(out, frame_format, **options)
    return out.getvalue()


def encode_sheets(frames: Sequence[Pixels]) -> bytes:
    """Encode frames [n, H, W, C] as an animated WebP. If n > 1, each frame is a contact sheet."""
    return encode_animation([_to_pillow(contact_sheet(images)) for images in frames])


def encode_animation(frames: Sequence[Image.Image], kind: str = "webp") -> bytes:
    """Encode pictures of one size and mode as an animation that repeats forever. The last picture is shown longer."""
    out = io.BytesIO()
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    options: dict[str, Any] = {"lossless": True} if kind == "webp" else {}
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)
    return out.getvalue()


def over_white(pixels: Pixels) -> Pixels:
    """Lay RGBA [H, W, 4] over white. Pictures without alpha are returned unchanged."""
    if pixels.shape[2] != RGBA:
        return pixels
    image = _to_pillow(pixels)
    return np.asarray(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB"))


def _to_pillow(pixels: Pixels) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def contact_sheet(images: Pixels) -> Pixels:
    """Arrange images [n, H, W, C] in a grid without gaps, left to right and top to bottom: [rows H, columns W, C].

    Empty cells are black, or transparent for RGBA.
    """
    n, height, width, channels = images.shape
    rows, columns = sheet_grid(n)
    cells = np.zeros((rows * columns, height, width, channels), images.dtype)
    cells[:n] = images
    grid = cells.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    return grid.reshape(rows * height, columns * width, channels)


def sheet_grid(n: int) -> tuple[int, int]:
    """Return (rows, columns) of a contact sheet of n images."""
    columns = sheet_columns(n)
    return math.ceil(n / columns), columns


def sheet_columns(n: int) -> int:
    """Return the smallest number of columns, at least sqrt(n), that leaves no empty cells.

    If that would make the sheet too wide, return ceil(sqrt(n)).
    """
    square = math.isqrt(n - 1) + 1
    exact = next(columns for columns in range(square, n + 1) if n % columns == 0)
    return exact if exact <= 2 * square else square


def viewing_scale(n: int, height: int, width: int, most_px: int = SHEET_PX) -> int:
    """Return the factor by which to enlarge a sheet of n images for viewing.

    Images are enlarged up to TILE_PX a side, and the sheet up to most_px a side.
    """
    rows, columns = sheet_grid(n)
    tile = max(height // rows, width // columns)
    return max(1, min(TILE_PX // tile, most_px // max(height, width)))


def enlarge(pixels: Pixels, scale: int) -> Pixels:
    """Enlarge [H, W, C] without interpolation: each pixel becomes a square of scale x scale pixels."""
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def _zip(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:  # stored, because PNGs are already compressed
        for name, data in files.items():
            archive.writestr(zipfile.ZipInfo(name), data)  # ZipInfo has a fixed date, so equal images give equal zips
    return out.getvalue()
