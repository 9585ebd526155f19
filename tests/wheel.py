"""Wheels of this repository, for tests: tminus, and its client by itself."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PARTS = ("tminus", "service", "model", "checkpoints", "client", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def copied(folder: Path) -> Path:
    """A copy of what wheels are built from, as building leaves files where it works."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            unwanted = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
            shutil.copytree(source, folder / part, symlinks=True, ignore=unwanted)
        else:
            shutil.copy(source, folder / part)
    return folder


def built(source: Path, into: Path) -> Path:
    """The wheel of a folder with a pyproject.toml."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(into)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    (wheel,) = into.glob("*.whl")
    return wheel


def unpacked(wheel: Path, site: Path) -> list[str]:
    """Unpack a wheel as pip would; the names of its files."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        return archive.namelist()


def with_requirements(site: Path, names: list[str], extra: str = "") -> set[str]:
    """Copy what distributions need into a folder, from where the tests run; all that is there then.

    As pip would, but without asking an index. extra: of the distributions that are named.
    """
    there = {
        each.metadata["Name"].lower().replace("_", "-") for each in importlib.metadata.distributions(path=[str(site)])
    }
    for name in names:
        (distribution,) = importlib.metadata.distributions(name=name, path=[str(site)])
        wanted = [Requirement(line) for line in distribution.requires or []]
        needed = [each.name.lower() for each in wanted if each.marker is None or each.marker.evaluate({"extra": extra})]
        new = [each for each in needed if each not in there]
        for each in new:
            for file in importlib.metadata.files(each) or []:
                target = site / file
                if ".." not in file.parts and "__pycache__" not in file.parts:  # no scripts
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file.locate(), target)
        there |= {*needed} | with_requirements(site, new)
    return there
