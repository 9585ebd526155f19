"""What is installed from the wheels: each one name, what it needs and nothing else; and what an index shows of it."""

import importlib.metadata
import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from PIL import Image

from tests.wheel import ROOT, built, copied, unpacked
from tminus.model.archives import release

BOTH = """
import tminus.service.client, tminus_client
print(tminus_client.Client.__module__, tminus.service.client.Client.__module__)
"""


WHEELS = {"tminus": ".", "tminus_client": "client"}


class Installed(NamedTuple):
    """Both wheels in one folder, and the files of each."""

    site: Path
    files: dict[str, list[str]]
    wheels: dict[str, Path]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheels")
    source, site = copied(folder / "source"), folder / "site"
    wheels = {name: built(source / part, folder / name) for name, part in WHEELS.items()}
    return Installed(site, {name: unpacked(wheel, site) for name, wheel in wheels.items()}, wheels)


@pytest.mark.parametrize("name", WHEELS)
def test_each_takes_one_name(installed: Installed, name: str) -> None:
    names = {file.partition("/")[0] for file in installed.files[name]}
    assert {each for each in names if not each.endswith(".dist-info")} == {name}
    assert f"{name}/py.typed" in installed.files[name]


# What each is made of, from the root of the repository; tminus/ and client/ have links.
NEEDED = {
    "tminus": (
        *("tminus/*.py", "tminus/py.typed", "tminus/model/**/*.py", "tminus/service/**/*.py"),
        *("tminus/service/client/py.typed", "tminus/service/page/*"),
        *("tminus/checkpoints/archives.json", "tminus/checkpoints/fashion-mnist-32/**/*"),
    ),
    "tminus_client": ("client/tminus_client/**/*.py", "client/tminus_client/py.typed"),
}


@pytest.mark.parametrize("name", WHEELS)
def test_each_has_the_files_that_it_needs_and_no_others(installed: Installed, name: str) -> None:
    ours = {file for pattern in NEEDED[name] for file in ROOT.glob(pattern) if file.is_file()}
    theirs = {file for file in installed.files[name] if ".dist-info/" not in file}
    assert theirs == {file.relative_to(ROOT / WHEELS[name]).as_posix() for file in ours}


# --- what an index shows ---


def project(name: str) -> dict[str, Any]:
    """What pyproject.toml says of a distribution."""
    found: dict[str, Any] = tomllib.loads((ROOT / WHEELS[name] / "pyproject.toml").read_text("utf-8"))["project"]
    return found


def description(installed: Installed, name: str) -> str:
    """The text that an index shows of a distribution."""
    (found,) = importlib.metadata.distributions(name=name, path=[str(installed.site)])
    assert found.metadata["Description-Content-Type"] == "text/markdown"
    return str(found.metadata.json["description"])


@pytest.mark.parametrize("name", WHEELS)
def test_an_index_shows_the_readme_with_links_and_pictures_that_hold_anywhere(installed: Installed, name: str) -> None:
    """Where the README has relative links, they are to the tag of this version."""
    text, source = description(installed, name), project("tminus")["urls"]["Source"]
    for picture, link in re.findall(r"(!\[[^\]]*)?\]\(([^)\s]+)\)", text):
        assert link.startswith("https://")
        if link.startswith(f"{source}/"):
            kind, _, file = link.removeprefix(f"{source}/").split("/", 2)
            assert kind == ("raw" if picture else "blob")
            assert (ROOT / file.partition("#")[0]).is_file(), link
    relative = re.sub(rf"\({source}/(raw|blob)/v{project(name)['version']}/", "(", text)
    assert relative.strip() == (ROOT / WHEELS[name] / "README.md").read_text("utf-8").strip()


def test_the_project_has_one_address() -> None:
    urls = project("tminus")["urls"]
    assert {*urls} == {"Homepage", "Documentation", "Source", "Changelog", "Issues"}
    shared = ("Homepage", "Source", "Changelog", "Issues")
    assert {name: project("tminus_client")["urls"][name] for name in shared} == {name: urls[name] for name in shared}
    for name in ("pyproject.toml", "client/pyproject.toml", "client/README.md", "SECURITY.md", "Dockerfile"):
        named = re.findall(r"https://[\w.]+/tminus/[\w-]+", (ROOT / name).read_text("utf-8"))
        assert {*named} == {urls["Source"]}, name


def test_a_copy_of_the_client_alone_is_not_built_empty(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "client", tmp_path / "client", symlinks=True)
    with pytest.raises(AssertionError, match="package directory 'tminus_client' does not exist"):
        built(tmp_path / "client", tmp_path)


# --- as a newcomer has it ---


@pytest.mark.long
def test_what_pip_installs_serves_from_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    """What tminus needs is taken from where the tests run, so that nothing is fetched."""
    venv, here = tmp_path / "venv", tmp_path / "here"
    here.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True, timeout=60)
    (site,), python = venv.glob("lib/python*/site-packages"), venv / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", python, "install", "--no-deps", "--no-index"]
    subprocess.run([*pip, installed.wheels["tminus"]], check=True, timeout=60)
    (site / "needed.pth").write_text(sysconfig.get_path("purelib"))  # whose own .pth files are not read

    env = {"HOME": str(tmp_path / "home"), "PATH": os.defpath}
    run = partial(subprocess.run, cwd=here, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert run([python, "-c", "import tminus; print(tminus.__file__)"]).stdout == f"{site}/tminus/__init__.py\n"
    listed = run([venv / "bin" / "tminus", "pull"]).stdout
    assert all(name in listed for name in release().archives)

    serve = [venv / "bin" / "tminus", "serve", "--port", "0"]
    with subprocess.Popen(serve, cwd=here, env=env, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            while not (ready := re.search(r" ready: open (\S+) in a browser", line := process.stderr.readline())):
                assert line, "it has ended"
            with httpx.Client(base_url=ready[1], timeout=120) as client:
                page = client.get("/")
                assert "<title>tminus" in page.text
                for file in re.findall(r' (?:src|href)="([^"#:]+)"', page.text):
                    assert client.get(file).status_code == 200, file
                image = client.get("/sample?n=1")
                assert image.headers["content-type"] == "image/png", image.text
                with Image.open(io.BytesIO(image.content)) as picture:
                    assert picture.size == (32, 32)
            process.terminate()
            assert process.wait(60) == 0
        finally:
            process.kill()


def test_both_can_be_installed_together(installed: Installed) -> None:
    assert not {*installed.files["tminus"]} & {*installed.files["tminus_client"]}
    done = subprocess.run(
        [sys.executable, "-c", BOTH], cwd=installed.site, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "tminus_client._sync tminus.service.client._sync\n", done.stderr


def test_both_are_of_one_version_and_need_the_same_of_what_both_need() -> None:
    server, client = map(project, WHEELS)
    assert client["version"] == server["version"]
    assert client["requires-python"] == server["requires-python"]
    assert {*client["dependencies"], *client["optional-dependencies"]["watch"]} <= {*server["dependencies"]}
