"""What is installed from the wheels: each one name, and all that it needs."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.wheel import ROOT, built, copied, unpacked

PROGRAM = """
from pathlib import Path
import tminus
from tminus.model.checkpoint import load_checkpoint
from tminus.service.api.page import FOLDER
from tminus.service.startup.settings import Settings
assert Path(tminus.__file__).parents[1] == Path.cwd(), tminus.__file__
((_, checkpoint),) = Settings().checkpoints()
assert checkpoint.is_relative_to(Path.cwd()), checkpoint
print(load_checkpoint(checkpoint).name, (FOLDER / "index.html").is_file())
"""
BOTH = """
import tminus.service.client, tminus_client
print(tminus_client.Client.__module__, tminus.service.client.Client.__module__)
"""


WHEELS = {"tminus": ".", "tminus_client": "client"}


class Installed(NamedTuple):
    """Both wheels in one folder, and the files of each."""

    site: Path
    files: dict[str, list[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheels")
    source, site = copied(folder / "source"), folder / "site"
    files = {name: unpacked(built(source / part, folder / name), site) for name, part in WHEELS.items()}
    return Installed(site, files)


@pytest.mark.parametrize("name", WHEELS)
def test_each_takes_one_name(installed: Installed, name: str) -> None:
    names = {file.partition("/")[0] for file in installed.files[name]}
    assert {each for each in names if not each.endswith(".dist-info")} == {name}
    assert f"{name}/py.typed" in installed.files[name]


@pytest.mark.parametrize(
    ("part", "there"), [("service", "tminus/service"), ("model", "tminus/model"), ("service/client", "tminus_client")]
)
def test_every_module_is_in_it(installed: Installed, part: str, there: str) -> None:
    ours, theirs = (
        {file.relative_to(folder) for file in folder.glob("**/*.py")}
        for folder in (ROOT / part, installed.site / there)
    )
    assert theirs == ours


def test_a_copy_of_the_client_alone_is_not_built_empty(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "client", tmp_path / "client", symlinks=True)
    with pytest.raises(AssertionError, match="package directory 'tminus_client' does not exist"):
        built(tmp_path / "client", tmp_path)


def test_it_has_something_to_serve(installed: Installed) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=installed.site, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "fashion-mnist-32 True\n", done.stderr


def test_both_can_be_installed_together(installed: Installed) -> None:
    assert not {*installed.files["tminus"]} & {*installed.files["tminus_client"]}
    done = subprocess.run(
        [sys.executable, "-c", BOTH], cwd=installed.site, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "tminus_client._sync.client tminus.service.client._sync.client\n", done.stderr


def test_both_are_of_one_version_and_need_the_same_of_what_both_need() -> None:
    server, client = (
        tomllib.loads((ROOT / part / "pyproject.toml").read_text("utf-8"))["project"] for part in WHEELS.values()
    )
    assert client["version"] == server["version"]
    assert client["requires-python"] == server["requires-python"]
    assert {*client["dependencies"], *client["optional-dependencies"]["watch"]} <= {*server["dependencies"]}
