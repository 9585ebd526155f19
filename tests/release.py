"""Make the files of a release: both wheels, and an archive of each checkpoint that `tminus pull` fetches.

    python -m tests.release                    write them into dist/, and the archives' digests into archives.json
    python -m tests.release --version 1.1.0    name another version wherever the version stands
    python -m tests.release --check            say what keeps this commit from being released

`make release` is the whole checklist, .ci/release. The wheel knows the archives by checkpoints/archives.json;
tests/test_release.py fails where that file or a version does not agree with the rest.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
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

# Where the version stands, beside checkpoints/archives.json, which is made anew.
PLACES = (
    "pyproject.toml",
    "client/pyproject.toml",
    "service/startup/app.py",
    "CITATION.cff",
    "docker/README.md",
    "docker/kubernetes/base/deployment.yaml",
    "docker/kubernetes/components/gpu/kustomization.yaml",
)


def version() -> str:
    """Return the version of pyproject.toml."""
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"])


def named(text: str) -> re.Pattern[str]:
    """Return the pattern of a version as a whole: 1.0.0 is not in 10.1.0.0/16."""
    return re.compile(rf"(?<![\d.]){re.escape(text)}(?!\.?\d)")


def rename(new: str) -> None:
    """Name another version in every place."""
    if re.fullmatch(r"\d+\.\d+\.\d+", new) is None:
        raise SystemExit(f"--version must be three numbers, such as 1.1.0, got {new}")
    old = named(version())
    for place in PLACES:
        text = (ROOT / place).read_text("utf-8")
        (ROOT / place).write_text(old.sub(new, text), "utf-8")


def obstacles() -> list[str]:
    """Say what keeps this commit from being released; nothing if it can be."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    found, tag = [], f"v{version()}"
    if changed := git("status", "--porcelain"):
        found.append(f"the working tree has changes:\n{changed}")
    if git("tag", "--list", tag):
        found.append(f"the tag {tag} exists: name the next version with `python -m tests.release --version`")
    heading = rf"^## {re.escape(version())} - \d{{4}}-\d\d-\d\d$"
    if re.search(heading, (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE) is None:
        found.append(f"CHANGELOG.md has no heading `## {version()} - YYYY-MM-DD`")
    return found


def packed() -> dict[str, bytes]:
    """Pack each checkpoint."""
    return {name: pack(ROOT / "checkpoints" / name) for name in ABOUT}


def pins(archives: dict[str, bytes]) -> dict[str, Any]:
    """Say what archives.json has of these archives, and where the release of this version has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {
        "address": f"{project['urls']['Source']}/releases/download/v{version()}",
        "archives": {
            name: {"about": ABOUT[name], "size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in archives.items()
        },
    }


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m tests.release", description=__doc__)
    parser.add_argument("--version", help="name this version wherever the version stands")
    parser.add_argument("--check", action="store_true", help="say what keeps this commit from being released")
    args = parser.parse_args()
    if args.version:
        rename(args.version)
    elif args.check:
        if found := obstacles():
            raise SystemExit("\n".join(found))
    else:
        make()


def make() -> None:
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
