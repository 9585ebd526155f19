"""What the image is installed from: whole, with hashes, within pyproject.toml's ranges; and its bill of materials."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCKS = ROOT / "docker" / "locks"
NAMES = ("requirements", "torch-cpu", "torch-cuda", "sbom")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
PROJECT = PYPROJECT["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
BIN = Path(sys.executable).parent
# What runs, and what builds the code in the image.
NEEDED = [
    *PROJECT["dependencies"],
    *PROJECT["optional-dependencies"]["openvino"],
    *PROJECT["optional-dependencies"]["otel"],
    *PROJECT["optional-dependencies"]["postgres"],
    *PROJECT["optional-dependencies"]["s3"],
    *PROJECT["optional-dependencies"]["hub"],
    *PYPROJECT["build-system"]["requires"],
]


def text(name: str) -> str:
    return (LOCKS / f"{name}.txt").read_text("utf-8")


def pins(*names: str) -> dict[str, str]:
    """The version of each package."""
    found = re.findall(r"^([a-z0-9-]+)==(\S+) \\$", "".join(text(name) for name in names), re.MULTILINE)
    assert len(dict(found)) == len(found), "no package is in two locks"
    return dict(found)


def test_every_line_is_a_version_or_one_of_its_hashes() -> None:
    for name in NAMES:
        lines = [line.removesuffix(" \\") for line in text(name).splitlines() if not line.startswith("#")]
        assert lines[0][0] != " "
        for line, after in zip(lines, [*lines[1:], "end"], strict=True):
            if re.fullmatch(r"[a-z0-9-]+==[\w.+]+", line):
                assert after.startswith("    --hash="), f"{line} has a hash"
            else:
                assert re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}", line), line


def test_everything_that_the_image_needs_is_in_the_locks_within_its_range() -> None:
    for kind in ("torch-cpu", "torch-cuda"):
        pinned = pins("requirements", kind)
        for wanted in map(Requirement, NEEDED):
            assert wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]), wanted


def test_both_builds_of_torch_are_of_the_one_version() -> None:
    (wanted,) = re.findall(r"^torch==(\S+)$", (LOCKS / "torch.in").read_text("utf-8"), re.MULTILINE)
    assert pins("torch-cpu") == {"torch": f"{wanted}+cpu"}
    assert pins("torch-cuda")["torch"] == wanted


def simulate(*options: str | Path) -> "subprocess.CompletedProcess[str]":
    """What uv would install on Debian with Python 3.11, by what the index says: nothing is downloaded."""
    command = [BIN / "uv", "pip", "install", "--dry-run", "--require-hashes", "--only-binary", ":all:"]
    command += ["--python", sys.executable, "--python-version", "3.11", "--no-progress", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("names", [("requirements", "torch-cuda"), ("sbom",)], ids="-".join)
def test_the_locks_hold_all_that_their_packages_require(tmp_path: Path, names: tuple[str, ...], machine: str) -> None:
    files = [part for name in names for part in ("--requirement", LOCKS / f"{name}.txt")]
    done = simulate("--python-platform", f"{machine}-manylinux_2_36", "--target", tmp_path / "empty", *files)
    assert done.returncode == 0, done.stderr
    would = dict(re.findall(r"^ \+ ([\w.-]+)==(\S+)$", done.stderr, re.MULTILINE))
    assert would == pins(*names)


def test_the_image_is_installed_from_the_locks_alone() -> None:
    installs = re.findall(r"pip --python \S+ install (.*?)(?= && |\n\n|\nFROM|\nCOPY)", join(DOCKERFILE), re.DOTALL)
    assert len(installs) == 5
    for install in installs:
        locked = "--require-hashes --only-binary :all:" in install
        own = "--no-index --no-build-isolation --no-deps" in install
        assert locked != own, install
    copied = set(re.findall(r"^COPY docker/locks/(\S+)\.txt ", DOCKERFILE, re.MULTILINE))
    assert copied == set(NAMES)


def join(lines: str) -> str:
    """A Dockerfile whose instructions are one line each."""
    return re.sub(r" \\\n\s+", " ", lines)


def test_no_index_is_written_in() -> None:
    files = [ROOT / "Dockerfile", ROOT / "docker" / "lock", *(ROOT / "docker").glob("*.yaml"), *LOCKS.iterdir()]
    for file in files:
        text = re.sub(r'image\.source="[^"]+"', "", file.read_text("utf-8"))  # a label, of the project itself
        assert not re.search(r"https?://|pypi\.org|pytorch\.org", text), file.name


# --- the bill of materials ---


def write_bill(python: Path, file: Path) -> dict[str, Any]:
    """Write one as the image's build does; it is valid."""
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    command = [ROOT / "docker" / "sbom", python, file]
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    content = file.read_text("utf-8")
    version = SchemaVersion.from_version(json.loads(content)["specVersion"])
    assert JsonStrictValidator(version).validate_str(content) is None
    document: dict[str, Any] = json.loads(content)
    assert document["bomFormat"] == "CycloneDX"
    assert document["metadata"]["component"]["name"] == "tminus"
    assert document["metadata"]["component"]["version"] == PROJECT["version"]
    return document


@pytest.mark.long
@pytest.mark.slow
def test_the_lock_installs_by_its_hashes_and_the_bill_names_every_package(tmp_path: Path) -> None:
    """Of all but torch, whose wheels are gigabytes, as docker/smoke does with it."""
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    pip = [sys.executable, "-m", "pip", "--python", python]
    install = [*pip, "install", "--quiet", "--no-compile", "--require-hashes", "--only-binary", ":all:"]
    subprocess.run([*install, "--requirement", LOCKS / "requirements.txt"], check=True, timeout=600)
    subprocess.run([*pip, "check"], check=True)
    document = write_bill(python, tmp_path / "bill" / "tminus.cdx.json")
    bill = {canonicalize_name(each["name"]): each["version"] for each in document["components"]}
    assert bill == pins("requirements")
    for component in document["components"]:
        assert component["purl"].startswith("pkg:pypi/")
        assert component.get("licenses") or component["name"] in WITHOUT_LICENCE
    used = {each["ref"]: each.get("dependsOn", []) for each in document["dependencies"]}
    assert any(ref.startswith("fastapi==") for ref in used["root-component"])


WITHOUT_LICENCE = {"protobuf"}  # packages whose metadata do not tell
