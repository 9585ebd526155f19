from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from tests.service.api.pictures import encode
from tminus.service.images.decoder import MAX_PIECES, MAX_SCANS, PNG_SIGNATURE, ImageHeader, read_header

KINDS: list[tuple[str, str, dict[str, Any]]] = [
    ("PNG", "RGB", {}),
    ("PNG", "1", {}),
    ("PNG", "I;16", {}),
    ("JPEG", "L", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "CMYK", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {}),  # the extended format
]


SAMPLES = [encode(Image.new(mode, (5, 3)), kind, **options) for kind, mode, options in KINDS]


@given(kind=st.sampled_from(KINDS), width=st.integers(1, 300), height=st.integers(1, 300))
def test_the_header_agrees_with_the_image_that_pillow_wrote(
    kind: tuple[str, str, dict[str, Any]], width: int, height: int
) -> None:
    name, mode, options = kind
    data = encode(Image.new(mode, (width, height)), name, **options)
    header = read_header(data)
    assert header is not None
    assert (header.format, header.width_px, header.height_px) == (name, width, height)
    progressive = options.get("progressive", False)
    assert header.scans > 1 if progressive else header.scans == 1
    assert header.work == header.scans * width * height


@given(data=st.sampled_from(SAMPLES), cut=st.integers(0, 2000), at=st.integers(0, 200), byte=st.integers(0, 255))
def test_an_image_that_is_cut_off_or_damaged_raises_nothing_but_value_error(
    data: bytes, cut: int, at: int, byte: int
) -> None:
    damaged = bytearray(data)
    damaged[at % len(data)] = byte
    for broken in (data[:cut], bytes(damaged)):
        try:
            read_header(broken)
        except ValueError:
            pass


@given(st.binary(max_size=200))
def test_other_bytes_are_none(data: bytes) -> None:
    assume(not data.startswith((b"\xff\xd8\xff", PNG_SIGNATURE)) and data[8:12] != b"WEBP")
    assert read_header(data) is None


FRAME = SAMPLES[3].index(b"\xff\xc0")


def test_fill_bytes_may_stand_before_a_marker() -> None:
    assert read_header(SAMPLES[3][:FRAME] + b"\xff" * 9 + SAMPLES[3][FRAME:]) == ImageHeader("JPEG", 5, 3)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (SAMPLES[0][:16] + bytes(4) + SAMPLES[0][20:], "0x3"),
        (SAMPLES[3][:FRAME] + SAMPLES[3][FRAME : FRAME + 13] + SAMPLES[3][FRAME:], "two frame headers"),
        (SAMPLES[0][:33] + (bytes(4) + b"tEXt" + bytes(4)) * MAX_PIECES, "chunks"),
        (SAMPLES[3][:2] + b"\xff\xe9\0\2" * MAX_PIECES + SAMPLES[3][2:], "segments"),
        (SAMPLES[3][:2] + b"\xff" * MAX_PIECES + SAMPLES[3][2:], "segments"),
        (SAMPLES[4] + b"\xff\xda" * MAX_SCANS, "scans"),
    ],
)
def test_a_size_of_zero_two_frames_and_more_pieces_than_any_encoder_writes_are_refused(data: bytes, says: str) -> None:
    """Each piece costs Pillow far more time than its few bytes suggest."""
    with pytest.raises(ValueError, match=says):
        read_header(data)
