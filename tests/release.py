"""What a release has: both wheels, and an archive of each checkpoint that `tminus pull` fetches.

    python -m tests.release

writes them into dist/, and checkpoints/archives.json, by which the wheel knows the archives; tests/test_release.py
fails where that is not what the folders are.
"""

import hashlib
import json
import shutil
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from tests.wheel import ROOT, built, copied
from tminus.model.archives import PINS, file_name, pack

# The checkpoints that do not come with the wheel, and what `tminus pull` says of each.
ABOUT = {
    "avatars-64": "avatars in four drawn styles, 64x64, colour: a latent model",
    "fashion-mnist-32-student": "garments in one or two passes, 32x32, grey: a student of fashion-mnist-32",
    "pixel-art-32": "avatars of pixels, 32x32, colour",
}


def packed() -> dict[str, bytes]:
    """Pack each checkpoint."""
    return {name: pack(ROOT / "checkpoints" / name) for name in ABOUT}


def pins(archives: dict[str, bytes]) -> dict[str, Any]:
    """Say what archives.json has of these archives, and where the release of this version has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {
        "address": f"{project['urls']['Source']}/releases/download/v{project['version']}",
        "archives": {
            name: {"about": ABOUT[name], "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in archives.items()
        },
    }


def main() -> None:
    """Write the files of a release."""
    archives, dist = packed(), ROOT / "dist"
    PINS.write_text(json.dumps(pins(archives), indent=2) + "\n", "utf-8")
    shutil.rmtree(dist, ignore_errors=True)
    dist.mkdir()
    for name, data in archives.items():
        (dist / file_name(name)).write_bytes(data)
    with tempfile.TemporaryDirectory() as folder:
        source = copied(Path(folder) / "source")
        for part in (".", "client"):
            shutil.copy(built(source / part, Path(folder) / part / "wheels"), dist)
    for file in sorted(dist.iterdir()):
        print(hashlib.sha256(file.read_bytes()).hexdigest(), f"dist/{file.name}", sep="  ")


if __name__ == "__main__":
    main()
