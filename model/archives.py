"""The checkpoint archives of a release: their names, and how to pack and unpack one.

checkpoints/archives.json lists their sizes and hashes; `python -m tests.release` writes it. This module downloads
nothing.
"""

import io
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PINS = Path(__file__).parents[1] / "checkpoints" / "archives.json"  # part of the package, installed or not


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive that this version knows by its hash."""

    about: str  # a line that helps to choose
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Release:
    """The release of this version."""

    address: str  # the base URL of its files
    archives: dict[str, Archive]  # keys are checkpoint names


def release() -> Release:
    """Read checkpoints/archives.json."""
    pins = json.loads(PINS.read_text("utf-8"))
    return Release(pins["address"], {name: Archive(**pinned) for name, pinned in pins["archives"].items()})


def file_name(checkpoint: str) -> str:
    """Return the name of a checkpoint's archive."""
    return f"{checkpoint}.tar"


def pack(folder: Path) -> bytes:
    """Pack a checkpoint under its folder's name. The same files always give the same bytes.

    The archive is not compressed: weights hardly shrink, and compressors differ in their bytes.
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as packed:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            data = file.read_bytes()
            member = tarfile.TarInfo(file.relative_to(folder.parent).as_posix())  # has no time and no owner
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
    return out.getvalue()


def unpack(file: Path, into: Path) -> None:
    """Extract an archive below a folder, without its modes, owners and times.

    Raises ValueError for a file that is no archive, and for a member that is no plain file or points outside the
    folder.
    """
    try:
        with tarfile.open(file, "r:") as packed:
            for member in packed:
                path = PurePosixPath(member.name)
                if not member.isreg() or member.issparse() or path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"{file.name}: {member.name!r} in it is no plain file below a folder of its own")
                source, target = packed.extractfile(member), into / path
                assert source is not None
                target.parent.mkdir(parents=True, exist_ok=True)
                with source, target.open("xb") as written:
                    shutil.copyfileobj(source, written)
    except tarfile.TarError as error:
        raise ValueError(f"{file.name}: not a tar archive ({error})") from None
