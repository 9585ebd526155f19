import io
import struct
import zipfile
from typing import Any

import httpx
import numpy as np
import pytest

from tests.service.client.conftest import job_members
from tminus.service.client import ModelState, UnexpectedAnswer
from tminus.service.client.results import JobState, Sampled

PNG = b"\x89PNG\r\n\x1a\n picture"
HEADERS = {"x-seed": "1", "x-fingerprint": "f"}


def sampled(data: bytes, media_type: str, **headers: str) -> Sampled:
    given = HEADERS | {"content-type": media_type} | headers
    return Sampled.of(httpx.Response(200, headers=given, content=data), media_type)


def zip_of(files: dict[str, bytes], **options: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def encrypted(data: bytes) -> bytes:
    """The same zip, but its entries claim to be encrypted."""
    out = bytearray(data)
    out[6] |= 1  # in the header of the first file
    out[data.index(b"PK\x01\x02") + 8] |= 1  # and in the directory
    return bytes(out)


def overlapping(data: bytes, times: int) -> bytes:
    """A zip whose directory has its only file many times."""
    at, end = data.index(b"PK\x01\x02"), data.index(b"PK\x05\x06")
    entry = data[at:end]
    entries = b"".join(entry[:46] + f"{k:05d}.png".encode() for k in range(times))
    tail = struct.pack("<4s4xHHLLH", b"PK\x05\x06", times, times, len(entries), at, 0)
    return data[:at] + entries + tail


ONE = zip_of({"00000.png": PNG})
BAD_ZIPS: dict[str, tuple[bytes, str]] = {
    "nothing but its beginning": (ONE[:4], "its end is missing"),
    "cut": (ONE[:-30], "its end is missing"),
    "text": (b"PK\x03\x04" + b"x" * 1000, "its end is missing"),
    "encrypted": (encrypted(ONE), "encrypted or compressed"),
    "a bomb": (
        zip_of({"00000.png": PNG + bytes(50_000_000)}, compression=zipfile.ZIP_DEFLATED),
        "encrypted or compressed",
    ),
    "one file in many entries": (overlapping(zip_of({"00000.png": PNG * 1000}), 4000), "larger than itself"),
    "more entries than images": (overlapping(ONE, 100_000 // 2), "more than 4096 files"),
    "a path out of the folder": (zip_of({"../../00000.png": PNG}), "no name of an image"),
    "a name with an escape": (zip_of({"\x1b[2J.png": PNG}), "no name of an image"),
    "a folder": (zip_of({"..": b""}), "no name of an image"),
    "a file that is no image": (zip_of({"00000.png": b"text"}), "no image/png"),
    "a directory elsewhere": (ONE[:-6] + b"\xff\xff\xff\x7f\x00\x00", "not a zip of images"),
    "a length of 2^32": (ONE[: ONE.index(b"PK\x01\x02") + 20] + b"\xfe" * 8 + ONE[ONE.index(b"PK\x01\x02") + 28 :],
                         "not a zip of images"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ZIPS)
def test_a_zip_that_the_server_would_not_make_is_unexpected(name: str) -> None:
    data, says = BAD_ZIPS[name]
    with pytest.raises(UnexpectedAnswer, match=says):
        _ = sampled(data, "application/zip").files


@pytest.mark.parametrize(
    "document",
    [
        "{}",
        '{"images": 5}',
        '{"images": [{"png": "?"}]}',
        '{"images": [{"png": "aGVsbG8="}]}',
        '{"a": ' * 5000 + "1" + "}" * 5000,
        '{"images": [' + "[]," * 2**20 + "[]]}",
        '{"images": ' + "9" * 5000 + "}",
    ],
    ids=lambda text: text[:40],
)
def test_a_document_without_images_is_unexpected(document: str) -> None:
    with pytest.raises(UnexpectedAnswer):
        _ = sampled(document.encode(), "application/json").pngs


@pytest.mark.parametrize(
    ("data", "headers"),
    [
        (b"hello", {}),
        (PNG, {"x-seed": "1" * 5000}),
        (PNG, {"x-fingerprint": "\x1b[31m"}),
        (PNG, {"x-job-id": ""}),
        (PNG, {"server-timing": "queue;dur=nan"}),
        (PNG, {"content-type": "text/html"}),
    ],
)
def test_an_image_with_headers_that_the_server_would_not_send_is_unexpected(
    data: bytes, headers: dict[str, str]
) -> None:
    given = HEADERS | {"content-type": "image/png", "x-alpha-bar": "0.5"} | headers
    with pytest.raises(UnexpectedAnswer):
        Sampled.of(httpx.Response(200, headers=given, content=data), "image/png")


def members(**given: Any) -> dict[str, Any]:
    return {"name": "x", "default": False, "state": "loaded", "url": "/models/x/", "model": {"channels": 1}} | given


def test_a_job_or_model_whose_members_have_other_types_is_unexpected() -> None:
    JobState.of(job_members())
    jobs: tuple[dict[str, object], ...] = (
        {"id": "\ud800"},
        {"model": "../x"},
        {"state": "asleep"},
        {"step": -1},
        {"n": True},
        {"seed": 2**64},
        {"eta_s": float("nan")},
        {"eta_s": 10**400},
        {"durable": 1},
        {"parameters": []},
    )
    for job in jobs:
        with pytest.raises(UnexpectedAnswer):
            JobState.of(job_members(**job))
    told = ModelState("x", False, "loaded", {"channels": 1}, "/models/x/")
    assert ModelState.of(members(size=5)) == told, "a newer server's too"
    for state in ("loading", "unloading", "unloaded"):
        assert ModelState.of(members(state=state, url=None, model=None)).info is None
    assert ModelState.of(members(state="unloaded")).info == {"channels": 1}, "one that is loaded on demand"
    models: tuple[dict[str, object], ...] = (
        {"url": 5},
        {"name": "../x"},
        {"name": "\x1b[2J"},
        {"state": "asleep"},
        {"state": "loaded", "model": None},
        {"model": []},
    )
    for model in models:
        with pytest.raises(UnexpectedAnswer):
            ModelState.of(members(**model))


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def test_floats_are_an_array_and_what_is_none_is_no_answer() -> None:
    array = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    good = npy(array)
    np.testing.assert_array_equal(np.asarray(sampled(good, "application/x-npy").floats), array)
    huge = good.replace(b"(1, 3, 2, 2)", b"(1, 3, 9, 9)")
    for data in (
        good[:-1],
        good[:40],
        huge,
        npy(array.astype(np.float64)),
        npy(np.asfortranarray(array)),
        npy(array[0]),
    ):
        with pytest.raises(UnexpectedAnswer, match="not an array of floats"):
            _ = sampled(data, "application/x-npy").floats
    with pytest.raises(UnexpectedAnswer):
        sampled(PNG, "application/x-npy")
