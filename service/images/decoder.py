"""Decodes uploaded images to pixels of the model's size. All limits are checked before decoding."""

import asyncio
import io
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from tminus.model.pixels import fit_picture, may_be_transparent, upright
from tminus.service.byte_budget import ByteBudget
from tminus.service.errors import InvalidImage, TooManyImages
from tminus.service.model_info import ModelInfo
from tminus.service.spec import Images, Inputs
from tminus.service.threads import Pulse, started_pool
from tminus.service.tracing import traced
from tminus.service.turns import CallerTurns

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Limits that no encoder reaches. For every chunk or segment, however small, Pillow spends microseconds in Python. For
# every scan, which may be only ten bytes long, Pillow processes the whole image.
MAX_PIECES = 10_000
MAX_SCANS = 100
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15, except DHT, JPG and DAC
JPEG_SCAN = 0xDA
SCAN = bytes((0xFF, JPEG_SCAN))


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What an image's header says. `format` is Pillow's name for the format."""

    format: str
    width_px: int
    height_px: int
    scans: int = 1  # number of passes over all pixels while decoding

    @property
    def pixels(self) -> int:
        return self.width_px * self.height_px

    @property
    def work(self) -> int:
        """The cost of decoding: pixels times scans."""
        return self.pixels * self.scans


def read_header(data: bytes) -> ImageHeader | None:
    """Parse the header of a PNG, JPEG or WebP. Return None for other formats. Raises ValueError for a broken header."""
    if data.startswith(PNG_SIGNATURE):
        name, size, scans = "PNG", _png_size(data), 1
    elif data.startswith(b"\xff\xd8\xff"):
        name, size, scans = "JPEG", *_jpeg_size_and_scans(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        name, size, scans = "WEBP", _webp_size(data), 1
    else:
        return None
    if min(size) < 1:
        raise ValueError(f"its header says {size[0]}x{size[1]} pixels")
    return ImageHeader(name, *size, scans)


def _png_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) from IHDR, the first chunk (W3C PNG, section 11.2.1)."""
    if data[8:16] != b"\x00\x00\x00\rIHDR" or len(data) < 33:
        raise ValueError("its first chunk is no IHDR")
    at = len(PNG_SIGNATURE)
    for _ in range(MAX_PIECES):
        at += 12 + int.from_bytes(data[at : at + 4])
        if at >= len(data):
            return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    raise ValueError(f"it is in more than {MAX_PIECES} chunks")


def _jpeg_size_and_scans(data: bytes) -> tuple[tuple[int, int], int]:
    """Return (width, height) from the frame header (ITU-T T.81, section B.2), and the number of scans."""
    size = None
    for marker, at in _jpeg_segments(data):
        if marker in JPEG_FRAMES:
            if size is not None:
                raise ValueError("it has two frame headers")
            size = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 3 : at + 5])
        if marker == JPEG_SCAN:
            break
    if size is None:
        raise ValueError("it has no frame header")
    # In a scan's data, each 0xFF is followed by 0 or a restart marker, so this counts scans, even a thumbnail's.
    if (scans := data.count(SCAN)) > MAX_SCANS:
        raise ValueError(f"it is in more than {MAX_SCANS} scans")
    return size, max(1, scans)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield each marker of the image, and the offset of the segment length that follows it."""
    at = 2
    for _ in range(MAX_PIECES):
        lead, marker = data[at : at + 1], data[at + 1 : at + 2]
        if lead != b"\xff" or not marker:
            raise ValueError("its header breaks off")
        if marker == b"\xff":  # any number of fill bytes may precede a marker
            at += 1
            continue
        yield marker[0], at + 2
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    raise ValueError(f"it is in more than {MAX_PIECES} segments")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) of an extended file's canvas, or of a simple file's only frame (RFC 9649)."""
    kind = data[12:16]
    if len(data) < 30:
        raise ValueError("its header breaks off")
    if kind == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    raise ValueError("its first chunk is no image")


MAX_PIXELS = 4096 * 4096
MAX_SIDE_PX = 4 * 4096  # 16 million one-pixel rows take up to five times as long as a square with as many pixels
MAX_WORK = 16 * MAX_PIXELS  # pixels times scans; images from cameras and the web have at most a dozen scans
MAX_WAIT_S = 10.0  # an image is refused if it would have to wait longer for earlier images
FIRST_RATE = 20e6  # pixels per second; a guess until images have been measured
LEARNING_RATE = 0.2
Result = TypeVar("Result")
WANTED = "a PNG, JPEG or WebP image"
# For error messages: what a picture must be if its transparent pixels mark the region to regenerate.
TRANSPARENT = {
    "mask": "transparent where the image is to be made new",
    "image": "transparent where it is to be made new, or come with a mask or with strength",
}
WHITE = 128  # pixels of a mask with at least this grey value are regenerated


class Payer(Protocol):
    """The caller who is charged for decoding an upload, see access/."""

    @property
    def name(self) -> str:
        """The caller's name. Callers take turns in decoding."""

    def pay_for_decoding(self, pixels: int) -> None:
        """Charge for decoding. pixels: the image's pixels times its scans. Raises QuotaExceeded."""


class Decoder:
    """Owns the decoding thread. There is only one, so at most one full-size decoded image is in memory."""

    def __init__(self) -> None:
        # Counts the bytes that wait for the thread. Once a WebSocket message has been received, nothing else counts it.
        self._budget = ByteBudget()
        self._pool = started_pool(1, "tminus-decode")
        self._turns = CallerTurns()
        self.pulse = Pulse("the decoder of uploads")
        self._rate = FIRST_RATE

    async def decode(self, data: bytes, model: ModelInfo, caller: Payer, field: str = "image") -> Images:
        """Run `decode_image` off the event loop. Raises InvalidImage, TooManyBytes, TooManyImages, QuotaExceeded."""
        return await self._run(caller, [(field, data)], lambda: decode_image(data, model, field))

    async def inputs(
        self, image: bytes, mask: bytes | None, model: ModelInfo, caller: Payer, *, transparent: bool = False
    ) -> Inputs:
        """Run `decode_inputs` off the event loop. Raises the same errors as `decode`."""
        given = [("image", image)] + ([("mask", mask)] if mask is not None else [])
        return await self._run(caller, given, lambda: decode_inputs(image, mask, model, transparent=transparent))

    async def _run(self, caller: Payer, given: Sequence[tuple[str, bytes]], decode: Callable[[], Result]) -> Result:
        """Decode in the caller's turn. A request that is cancelled before its turn takes no time in the thread."""
        size_bytes = sum(len(data) for _, data in given)
        with self._budget.hold(owner=caller.name) as held:
            held.add(size_bytes)
            work = sum(check_header(data, field).work for field, data in given)
            if (wait_s := self._turns.wait_s(caller.name)) > MAX_WAIT_S:
                raise TooManyImages(wait_s, MAX_WAIT_S)
            caller.pay_for_decoding(work)
            with traced("read upload", {"tminus.bytes": size_bytes}):
                async with self._turns.taken(caller.name, work / self._rate):
                    decoding = asyncio.ensure_future(self.pulse.run(self._pool, lambda: _timed(decode)))
                    try:
                        result, seconds = await asyncio.shield(decoding)
                    finally:
                        await asyncio.wait([decoding])  # the thread continues even if this task is cancelled
        if work >= MAX_PIXELS // 100:  # smaller images say too little about the rate
            self._rate += LEARNING_RATE * (work / max(seconds, 1e-6) - self._rate)
        return result

    def close(self) -> None:
        """Stop the thread when it has decoded its current image."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def decode_image(data: bytes, model: ModelInfo, field: str = "image", *, crop: bool = True) -> Images:
    """Decode a PNG, JPEG or WebP into uint8 [H, W, C] of the model's size. Raises InvalidImage that names the field.

    The image is prepared by `fit_picture`, as training pictures are. So x_0 looks like the training data. For an RGBA
    model, the image keeps its alpha, or is opaque if it has none. For other models, transparent pixels are laid over
    black. An image of the model's size is not resampled. crop: if False, an image of another size is refused.
    """
    with _loaded(data, field) as image:
        if not crop:
            _check_size(upright(image), model, field)
        return fit_picture(image, (model.width_px, model.height_px), model.channels)


def decode_mask(data: bytes, model: ModelInfo, field: str = "mask") -> npt.NDArray[np.bool_]:
    """Decode a mask into bool [H, W] of the model's size: True where the mask is white. Raises InvalidImage.

    The mask is cropped like an image. A pixel of the result is True if the mean of the mask's pixels that it covers is
    at least WHITE. Transparent pixels count as black. A mask that has alpha but no white pixel is refused: it probably
    follows OpenAI's convention, where transparent pixels are regenerated.
    """
    with _loaded(data, field) as mask:
        new, has_alpha = _mask(mask, model), may_be_transparent(mask)
    if has_alpha and not new.any():
        bound = "white where the image is to be made new, whatever its alpha"
        raise InvalidImage.of(field, bound, "one with alpha and without a white pixel")
    return new


def decode_transparent(
    data: bytes, model: ModelInfo, field: Literal["mask", "image"] = "mask", *, crop: bool = True
) -> npt.NDArray[np.bool_]:
    """Decode a mask in OpenAI's convention: like `decode_mask`, but True where the mask is transparent.

    Colours are ignored. A mask without transparent pixels would regenerate nothing, so it raises InvalidImage too.
    crop: see `decode_image`.
    """
    with _loaded(data, field) as loaded:
        mask = upright(loaded)
        if not crop:
            _check_size(mask, model, field)
        has_alpha = may_be_transparent(mask) and not mask.mode.startswith("I")  # Pillow has no 16-bit RGBA
        alpha = np.asarray(mask.convert("RGBA").getchannel("A")) if has_alpha else None
    if alpha is None or alpha.all():
        raise InvalidImage.of(field, TRANSPARENT[field], "one without a transparent pixel")
    return _mask(Image.fromarray(np.where(alpha == 0, 255, 0).astype(np.uint8)), model)


def _mask(image: Image.Image, model: ModelInfo) -> npt.NDArray[np.bool_]:
    size = model.width_px, model.height_px
    return fit_picture(image, size, 1, resampling=Image.Resampling.BOX)[:, :, 0] >= WHITE


def decode_inputs(image: bytes, mask: bytes | None, model: ModelInfo, *, transparent: bool = False) -> Inputs:
    """Decode the image to edit, and its mask if there is one. Raises InvalidImage.

    transparent: use OpenAI's convention, in which the mask's transparent pixels are regenerated, not its white ones.
    The mask may then be the image itself. After EXIF rotation, both must have the model's size, because OpenAI's
    clients do not say how to crop.
    """
    pixels = decode_image(image, model, crop=not transparent)
    if mask is None:
        return Inputs(pixels, None)
    if not transparent:
        return Inputs(pixels, decode_mask(mask, model))
    return Inputs(pixels, decode_transparent(mask, model, "image" if mask == image else "mask", crop=False))


def _check_size(image: Image.Image, model: ModelInfo, field: str) -> None:
    if image.size != (model.width_px, model.height_px):
        bound = f"of {model.width_px}x{model.height_px} pixels, as the model's images are"
        raise InvalidImage.of(field, bound, f"one of {image.width}x{image.height}")


def _timed(decode: Callable[[], Result]) -> tuple[Result, float]:
    began_s = time.perf_counter()
    return decode(), time.perf_counter() - began_s


def check_header(data: bytes, field: str) -> ImageHeader:
    """Parse an image's header. Raises InvalidImage if the image must not be decoded."""
    try:
        header = read_header(data)
    except ValueError as error:
        raise InvalidImage.of(field, WANTED, f"one that is broken: {error}") from None
    if header is None:
        got = f"{len(data)} bytes that begin with {data[:16]!r}" if data else "nothing"
        raise InvalidImage.of(field, WANTED, got)
    size = f"{header.width_px}x{header.height_px}"
    for extent, side_px in (("wide", header.width_px), ("high", header.height_px)):
        if side_px > MAX_SIDE_PX:
            raise InvalidImage.of(field, f"at most {MAX_SIDE_PX} pixels {extent}", str(side_px))
    if header.pixels > MAX_PIXELS:
        raise InvalidImage.of(field, f"of at most {MAX_PIXELS} pixels", f"{size} = {header.pixels}")
    if header.work > MAX_WORK:
        got = f"{size} in {header.scans} scans"
        raise InvalidImage.of(field, f"of at most {MAX_WORK} pixels times scans", got)
    return header


@contextmanager
def _loaded(data: bytes, field: str) -> Iterator[Image.Image]:
    """Decode an image of at most MAX_PIXELS for use in the `with` block. Raises InvalidImage.

    Convert the image's pixels inside the block, because errors there become InvalidImage too. Pillow finds some faults,
    such as a missing palette, only when it converts an image.
    """
    header = check_header(data, field)
    try:
        image = Image.open(io.BytesIO(data), formats=[header.format])
        if image.size != (header.width_px, header.height_px):
            raise ValueError("its header contradicts itself")
        # A phone's JPEG file may hold further images (MPO), such as a thumbnail or a gain map. Only the first counts.
        frames = 1 if header.format == "JPEG" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise InvalidImage.of(field, "a still image", f"a {header.format} of {frames} frames")
        image.load()
        yield image
    except (InvalidImage, MemoryError):
        raise
    except Exception as error:  # for broken data, Pillow raises OSError, SyntaxError, struct.error and others
        size = f"{header.width_px}x{header.height_px}"
        got = f"a {header.format} of {size} that is broken: {str(error) or type(error).__name__}"
        raise InvalidImage.of(field, WANTED, got) from None
