"""`tminus sample --url`, of servers that send something else than they were asked for."""

import io
import itertools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.service.cli import running
from tests.service.cli.running import line_of
from tests.service.client.hostile import ACCEPTED, DONE, FRAME, IMAGE_HEAD, answering, endless, streaming
from tminus.service.images.encoder import encode_png

PNG = encode_png(np.zeros((4, 6, 1), np.uint8))
ZIP_HEAD = IMAGE_HEAD.replace("image/png", "application/zip")
PROBLEM_HEAD = "Content-Type: application/problem+json\r\n"


sample = partial(running.run, "sample")


def refusal(*arguments: str | Path) -> str:
    """The one clear line that it ends in."""
    result = sample(*arguments)
    assert len(result.stderr.splitlines()) == 1
    return line_of(result)


def test_what_was_written_is_said(tmp_path: Path) -> None:
    with answering(IMAGE_HEAD, lambda: [PNG]) as server:
        one = sample("--url", server.url, "--out", tmp_path / "a.png")
        sheet = sample("--url", server.url, "-n", "4", "--out", tmp_path / "a.png")
    assert one.stdout == f"{tmp_path / 'a.png'}: a PNG, seed 1\n"
    assert sheet.stdout == f"{tmp_path / 'a.png'}: a PNG, a sheet of 4 images, seed 1\n"
    with answering(ZIP_HEAD, lambda: [archive(2)]) as server:
        files = sample("--url", server.url, "-n", "2", "--out", tmp_path / "v1.5")
    assert files.stdout == f"{tmp_path / 'v1.5'}: 2 PNG files, seed 1\n"
    assert sorted(file.name for file in (tmp_path / "v1.5").iterdir()) == ["00000.png", "00001.png"]


def test_what_a_server_sent_is_kept_where_it_may_not_be_enlarged(tmp_path: Path) -> None:
    large, out = encode_png(np.zeros((256, 256, 3), np.uint8)), tmp_path / "a.png"
    with answering(IMAGE_HEAD, lambda: [large]) as server:
        line = line_of(sample("--url", server.url, "--scale", "64", "--out", out))
    assert line.endswith(
        f"--scale 64: the PNG would have 268435456 pixels, and may have 67108864; {out} is not enlarged"
    )
    assert out.read_bytes() == large


# --- hostile servers ---


def archive(n: int, **options: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **options) as opened:
        for k in range(n):
            opened.writestr(f"{k:05d}.png", PNG)
    return out.getvalue()


def problem(detail: str) -> list[bytes]:
    return [b'{"status": 429, "code": "overloaded", "detail": "' + detail.encode() + b'"}']


@pytest.mark.parametrize(
    ("status", "head", "pieces", "says"),
    [
        ("429 No", PROBLEM_HEAD, lambda: problem(r"no\u001b[2J\nroot# "), r"no\x1b[2J\nroot#"),
        ("200 OK", ZIP_HEAD, lambda: endless(b"PK\x03\x04"), "longer than"),
        ("200 OK", ZIP_HEAD, lambda: [archive(2, compression=zipfile.ZIP_DEFLATED)], "encrypted or compressed"),
        ("200 OK", ZIP_HEAD, lambda: [archive(3)], "3 images came, where 2 were asked for"),
        ("200 OK", IMAGE_HEAD, lambda: [PNG], "'image/png', where application/zip was asked for"),
    ],
)
def test_an_answer_that_no_tminus_server_gives_is_one_clear_line(
    status: str, head: str, pieces: Callable[[], Any], says: str, tmp_path: Path
) -> None:
    with answering(head, pieces, status) as server:
        assert says in refusal("--url", server.url, "-n", "2", "--out", tmp_path / "folder")
    assert not (tmp_path / "folder").exists() or not list((tmp_path / "folder").iterdir())


def bomb(width_px: int, height_px: int) -> bytes:
    """A PNG of black pixels, small as a file."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width_px, height_px, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes((1 + (width_px + 7) // 8) * height_px), 9)),
        (b"IEND", b""),
    ]
    body = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize(
    ("sheet", "says"),
    [
        (PNG[:40], "not a PNG that can be read"),
        (encode_png(np.zeros((4, 6, 1), np.uint8), [1]), "no object: [1]"),  # type: ignore[arg-type]
        (encode_png(np.zeros((4, 6, 1), np.uint8), {"a": [[]] * 2**20}), "JSON of more than 1048576 values"),
    ],
)
def test_a_sheet_that_no_tminus_server_sends_is_one_clear_line(sheet: bytes, says: str, tmp_path: Path) -> None:
    with answering(IMAGE_HEAD, lambda: [sheet]) as server:
        assert says in refusal("--url", server.url, "-n", "2", "--out", tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


def test_a_sheet_that_is_larger_than_people_see_is_written_and_not_decoded(tmp_path: Path) -> None:
    sheet = bomb(17_000, 17_000)
    with answering(IMAGE_HEAD, lambda: [sheet]) as server:
        assert sample("--url", server.url, "-n", "2", "--out", tmp_path / "out.png").exit_code == 0
    assert (tmp_path / "out.png").read_bytes() == sheet


def frames(each: bytes, steps: int) -> Iterator[str | bytes | dict[str, Any]]:
    yield ACCEPTED
    for step in range(1, steps + 1):
        yield FRAME | {"step": step, "steps": steps}
        yield each
    yield DONE
    yield PNG


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (lambda: frames(b"no image", 3), "no image/png"),
        (lambda: frames(PNG[:40], 3), "a frame is not a PNG"),
        (lambda: frames(bomb(9000, 9000), 3), "frames of several sizes came"),
        (lambda: [ACCEPTED, DONE, bomb(17_000, 17_000)], "more than 67108864 pixels"),
        (lambda: itertools.chain([ACCEPTED], itertools.repeat(FRAME)), "101"),
        (lambda: [ACCEPTED, {"type": "cancelled", "id": "x"}], "the job was cancelled"),
        (lambda: [{"type": "error", "status": 422, "detail": "no\x1b]0;title\x07"}], r"422 no\x1b]0;title\x07"),
        (lambda: [], "closed before the job was done"),
    ],
)
def test_frames_that_no_tminus_server_sends_are_one_clear_line(
    messages: Callable[[], Any], says: str, tmp_path: Path
) -> None:
    keep = ("--watch", tmp_path / "way.webp", "--every", "1", "--out", tmp_path / "out.png")
    with streaming(messages) as server:
        assert says in refusal("--url", server.url, "--steps", "50", *keep)
    assert list(tmp_path.iterdir()) == []


def test_more_bytes_of_frames_than_a_command_keeps_are_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tminus.service.cli.sample.MAX_FRAME_BYTES", 10 * len(PNG))
    keep = ("--watch", tmp_path / "way.webp", "--every", "1", "--out", tmp_path / "out.png")
    with streaming(lambda: frames(PNG, 50)) as server:
        assert "give a larger --every" in refusal("--url", server.url, "--steps", "50", *keep)
    with streaming(lambda: frames(PNG, 10)) as server:
        assert sample("--url", server.url, "--steps", "50", *keep).exit_code == 0
    with Image.open(tmp_path / "way.webp") as way:
        assert way.n_frames > 0  # type: ignore[attr-defined]
    assert (tmp_path / "out.png").read_bytes() == PNG
