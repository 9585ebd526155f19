"""Pack and unpack the checkpoint archives of a release.

checkpoints/archives.json lists the sizes and hashes of the archives. `python -m tests.release` writes that file. This
module downloads nothing.
"""

import io
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PINS = Path(__file__).parents[1] / "checkpoints" / "archives.json"


@dataclass(frozen=True, slots=True)
class Archive:
    """A checkpoint archive of a release."""

    about: str  # one-line description for users
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Release:
    """The release that matches this version of the code."""

    address: str  # base URL of the archives
    archives: dict[str, Archive]  # keyed by checkpoint name


def release() -> Release:
    """Read checkpoints/archives.json."""
    pins = json.loads(PINS.read_text("utf-8"))
    return Release(pins["address"], {name: Archive(**pinned) for name, pinned in pins["archives"].items()})


def file_name(checkpoint: str) -> str:
    """Return the file name of a checkpoint's archive."""
    return f"{checkpoint}.tar"


def pack(folder: Path) -> bytes:
    """Pack a checkpoint folder as a tar archive. Equal folders give identical archives.

    The archive is not compressed: weights hardly shrink, and the output would depend on the compressor's version.
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as packed:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            data = file.read_bytes()
            member = tarfile.TarInfo(file.relative_to(folder.parent).as_posix())  # omits modification time and owner
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
    return out.getvalue()


def unpack(file: Path, into: Path) -> None:
    """Extract an archive into a folder. File modes, owners and times are ignored.

    Raises ValueError if the file is not a tar archive, or if it contains anything but regular files inside the folder.
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
