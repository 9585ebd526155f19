"""Archives of checkpoints: the same files give the same bytes, and no archive writes but below its own folder."""

import io
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tminus.model.archives import pack, unpack
from tminus.model.checkpoint import CheckpointError, load_checkpoint

FILES = {"model_index.json": b"{}", "unet/config.json": b"[1]", "unet/weights": bytes(range(256)) * 100, "empty": b""}


def written(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def found(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_same_files_are_the_same_bytes_whoever_packs_them_and_when(tmp_path: Path) -> None:
    first = pack(written(tmp_path / "a" / "checkpoint", FILES))
    again = written(tmp_path / "b" / "checkpoint", dict(reversed(FILES.items())))
    for file in again.rglob("*"):
        file.chmod(0o700)
        os.utime(file, (1, 1))
    (again / "a folder without files").mkdir()
    assert pack(again) == first
    assert pack(written(again, {"one-more": b""})) != first


def test_tar_itself_reads_what_is_packed(tmp_path: Path) -> None:
    data = pack(written(tmp_path / "checkpoint", FILES))
    (tmp_path / "there").mkdir()
    subprocess.run(["tar", "-x", "-C", tmp_path / "there"], input=data, check=True)
    assert found(tmp_path / "there" / "checkpoint") == FILES


PARTS = st.lists(st.text("abc", min_size=1, max_size=3), min_size=1, max_size=4)
NAMES = PARTS.map(lambda parts: "/".join(parts) + ".x")  # no file has the name of a folder


@settings(max_examples=30)
@given(st.dictionaries(NAMES, st.binary()))
def test_what_is_packed_is_unpacked(files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "archive.tar").write_bytes(pack(written(folder / "checkpoint", files)))
        unpack(folder / "archive.tar", folder / "there")
        assert found(folder / "there" / "checkpoint") == files


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.mark.parametrize(
    "bad",
    [
        [member("../outside")],
        [member("checkpoint/../../outside")],
        [member("/outside")],
        [member("checkpoint/link", tarfile.SYMTYPE, ".."), member("checkpoint/link/outside")],
        [member("checkpoint/link", tarfile.SYMTYPE, "/etc/passwd")],
        [member("checkpoint/link", tarfile.LNKTYPE, "/etc/passwd")],
        [member("checkpoint/pipe", tarfile.FIFOTYPE)],
        [member("checkpoint/device", tarfile.CHRTYPE)],
        [member("checkpoint/folder", tarfile.DIRTYPE)],
    ],
    ids=lambda bad: f"{bad[0].name} {bad[0].type!r}",
)
def test_a_member_that_is_no_plain_file_below_its_folder_is_refused(tmp_path: Path, bad: list[tarfile.TarInfo]) -> None:
    archive, into = tmp_path / "archive.tar", tmp_path / "into"
    into.mkdir()
    with tarfile.open(archive, "w") as packed:
        for each in (member("checkpoint/first"), *bad):
            packed.addfile(each, io.BytesIO())
    with pytest.raises(ValueError, match="no plain file below a folder of its own"):
        unpack(archive, into)
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == {
        *("archive.tar", "into", "into/checkpoint", "into/checkpoint/first")
    }


def test_a_file_that_is_there_twice_is_not_written_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "archive.tar", "w") as packed:
        for _ in range(2):
            packed.addfile(member("checkpoint/file"), io.BytesIO())
    with pytest.raises(FileExistsError):
        unpack(tmp_path / "archive.tar", tmp_path)


@pytest.mark.parametrize("kind", ["empty", "text", "cut"])
def test_what_is_no_archive_is_refused(tmp_path: Path, kind: str) -> None:
    data = {"empty": b"", "text": b"no archive" * 1000, "cut": pack(written(tmp_path / "checkpoint", FILES))[:20_000]}
    (tmp_path / "archive.tar").write_bytes(data[kind])
    with pytest.raises(ValueError, match="not a tar archive"):
        unpack(tmp_path / "archive.tar", tmp_path / "into")


def test_a_checkpoint_that_is_not_there_and_can_be_fetched_says_how(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such folder; tminus pull pixel-art-32 fetches one of that name$"):
        load_checkpoint(tmp_path / "pixel-art-32")
    with pytest.raises(CheckpointError, match=r"no such folder$"):
        load_checkpoint(tmp_path / "another")
