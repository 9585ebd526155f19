"""The format and size of an image, read from its bytes before a decoder allocates memory for it.

Pure. Pillow tells the size too, but for a WebP only after allocating the whole canvas.
"""

from collections.abc import Iterator
from dataclasses import dataclass

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# More than any encoder writes. Pillow spends microseconds of Python on each chunk or segment, however small, and a pass
# over the whole image on each scan, which may be ten bytes long.
MAX_PIECES = 10_000
MAX_SCANS = 100
JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0..15, without DHT, JPG and DAC
JPEG_SCAN = 0xDA
SCAN = bytes((0xFF, JPEG_SCAN))


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """`format` is Pillow's name for it."""

    format: str
    width_px: int
    height_px: int
    scans: int = 1  # passes over all pixels that a decoder makes

    @property
    def pixels(self) -> int:
        """The number of pixels."""
        return self.width_px * self.height_px

    @property
    def work(self) -> int:
        """What decoding it costs, in pixels."""
        return self.pixels * self.scans


def read_header(data: bytes) -> ImageHeader | None:
    """Read the header of a PNG, JPEG or WebP; None for any other bytes. Raises ValueError if it is broken."""
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
    """W3C PNG, section 11.2.1: IHDR is the first chunk."""
    if data[8:16] != b"\x00\x00\x00\rIHDR" or len(data) < 33:
        raise ValueError("its first chunk is no IHDR")
    at = len(PNG_SIGNATURE)
    for _ in range(MAX_PIECES):
        at += 12 + int.from_bytes(data[at : at + 4])
        if at >= len(data):
            return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    raise ValueError(f"it is in more than {MAX_PIECES} chunks")


def _jpeg_size_and_scans(data: bytes) -> tuple[tuple[int, int], int]:
    """ITU-T T.81, section B.2: the size is in the frame header, a segment before the first scan."""
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
    # Within a scan 0xFF is always followed by 0 or a restart marker, so this counts scans (a thumbnail's included).
    if (scans := data.count(SCAN)) > MAX_SCANS:
        raise ValueError(f"it is in more than {MAX_SCANS} scans")
    return size, max(1, scans)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Each marker from the image's start on, with the offset of its length."""
    at = 2
    for _ in range(MAX_PIECES):
        lead, marker = data[at : at + 1], data[at + 1 : at + 2]
        if lead != b"\xff" or not marker:
            raise ValueError("its header breaks off")
        if marker == b"\xff":  # any number of fill bytes may come before a marker
            at += 1
            continue
        yield marker[0], at + 2
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    raise ValueError(f"it is in more than {MAX_PIECES} segments")


def _webp_size(data: bytes) -> tuple[int, int]:
    """RFC 9649: the canvas of an extended file, else the size of its only frame."""
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
