"""The checkpoint archives of a release: names, packing and unpacking. This module downloads nothing.

checkpoints/archives.json lists sizes and hashes of the archives; `python -m tests.release` writes that file.
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
    """An archive that this version knows by hash."""

    about: str  # one line for users who choose a checkpoint
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Release:
    """The release of this version."""

    address: str  # base URL of the release's files
    archives: dict[str, Archive]  # keyed by checkpoint name


def release() -> Release:
    """Read checkpoints/archives.json."""
    pins = json.loads(PINS.read_text("utf-8"))
    return Release(pins["address"], {name: Archive(**pinned) for name, pinned in pins["archives"].items()})


def file_name(checkpoint: str) -> str:
    """Return the name of a checkpoint's archive."""
    return f"{checkpoint}.tar"


def pack(folder: Path) -> bytes:
    """Pack a checkpoint folder as a tar archive. The same files always give the same bytes.

    The archive is not compressed: weights hardly shrink, and compressors produce different bytes.
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
    """Extract an archive into a folder. Modes, owners and times in the archive are ignored.

    Raises ValueError if the file is not a tar archive, or if a member is not a plain file or points outside the folder.
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
