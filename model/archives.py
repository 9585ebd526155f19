"""The archives of checkpoints that a release has beside the wheel: which there are, how one is packed and unpacked.

checkpoints/archives.json names them, with the size and the hash of each; `python -m tests.release` writes it. Nothing
is fetched here.
"""

import io
import json
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

PINS = Path(__file__).parents[1] / "checkpoints" / "archives.json"  # comes with tminus, installed or not


@dataclass(frozen=True, slots=True)
class Archive:
    """An archive that this version knows; one of other bytes is another."""

    about: str  # a line for those who choose
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Release:
    """The release of this version."""

    address: str  # of its files
    archives: dict[str, Archive]  # by the checkpoint's name


def release() -> Release:
    """Read what is known of the release of this version."""
    pins = json.loads(PINS.read_text("utf-8"))
    return Release(pins["address"], {name: Archive(**pinned) for name, pinned in pins["archives"].items()})


def file_name(checkpoint: str) -> str:
    """Return the name of a checkpoint's archive."""
    return f"{checkpoint}.tar"


def pack(folder: Path) -> bytes:
    """Pack a checkpoint under its folder's name: the same bytes for the same files, whoever packs them and when.

    Not compressed: weights hardly get smaller, and compressors differ in their bytes.
    """
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as packed:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            data = file.read_bytes()
            member = tarfile.TarInfo(file.relative_to(folder.parent).as_posix())  # with no time and no owner
            member.size = len(data)
            packed.addfile(member, io.BytesIO(data))
    return out.getvalue()


def unpack(file: Path, into: Path) -> None:
    """Write the files of an archive below a folder, without its modes, owners and times.

    Raises ValueError for what is no archive, and for a member that is no plain file or would lie elsewhere.
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
