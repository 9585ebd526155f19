"""The commands of README.md and of three pages of docs/, as printed, against a server on the bundled checkpoint."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import BUNDLED, ROOT, RunningServer
from tests.service.keys import key_line
from tests.test_docs import shell_commands

TMINUS = f"{sys.executable} -m tminus"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run commands in, which has what they read of the repository."""
    made = tmp_path_factory.mktemp("repository")
    for name in ("docs", "checkpoints"):
        (made / name).symlink_to(ROOT / name)
    return made


def run(server: RunningServer, folder: Path, page: str, beginning: str) -> list[str]:
    """Run the commands of a page that begin so, against our server; what each printed."""
    printed = []
    for command in shell_commands(ROOT / page):
        if not command.startswith(beginning):
            continue
        # A thousand steps take too long here, and are steps like any other.
        command = command.replace("steps=1000", "steps=50").replace("http://localhost:8000", server.url)
        command = command.replace("localhost:8000", server.url).replace(".venv/bin/tminus", TMINUS)
        command = re.sub(r"^curl ", "curl -sS --fail-with-body ", command)
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            ["bash", "-c", command], cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        printed.append(done.stdout)
    assert printed
    return printed


@pytest.fixture(scope="module")
def readme_images(bundled_server: RunningServer, folder: Path) -> int:
    """How many requests of README.md were answered; their images are in the folder."""
    return len(run(bundled_server, folder, "README.md", "curl"))


def size(file: Path) -> tuple[int, int]:
    with Image.open(file) as image:
        return image.size


def test_the_requests_of_the_readme_are_answered_with_what_it_says(readme_images: int, folder: Path) -> None:
    assert readme_images == 5
    assert size(folder / "out.png") == (128, 64), "eight images"
    assert size(folder / "sneaker.png") == (32, 32)
    assert size(folder / "boots.png") == (64, 64), "four images"
    with Image.open(folder / "bags.webp") as bags:
        assert bags.size == (64, 64)
        assert bags.n_frames == 20  # type: ignore[attr-defined]


@pytest.mark.usefixtures("readme_images")
def test_an_image_of_the_readme_is_made_again_to_the_byte(bundled_server: RunningServer, folder: Path) -> None:
    here, there = run(bundled_server, folder, "docs/reproducibility.md", ".venv/bin/tminus")
    assert here
    assert there


def test_the_requests_of_the_api_page_are_answered(bundled_server: RunningServer, folder: Path) -> None:
    run(bundled_server, folder, "docs/api.md", "curl")
    assert (folder / "three.zip").read_bytes().startswith(b"PK")
    assert size(folder / "third.png") == (32, 32)


def test_the_commands_of_the_command_line_page_do_what_it_says(
    own_server: Callable[..., RunningServer], small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMINUS_KEYS", key_line("ops", "tm_of_the_page", "admin"))
    monkeypatch.setenv("TMINUS_OPEN", "yes")
    monkeypatch.setenv("TMINUS_KEY", "tm_of_the_page")
    server = own_server("--checkpoint", f"colour={small}", checkpoint=BUNDLED)
    run(server, folder, "docs/command-line.md", ".venv/bin/tminus sample")
    listed, *changed = run(server, folder, "docs/command-line.md", ".venv/bin/tminus models")
    assert [line.split()[0] for line in listed.splitlines()] == ["NAME", "fashion-mnist-32", "colour"]
    assert changed == ["colour: unloaded\n", "colour: loaded\n", "colour: reloaded\n"]
    assert size(folder / "colour.png") == (64, 64), "four images"
    assert size(folder / "bags.png") == (160, 64), "ten images"
    assert size(folder / "sneaker.png") == (32, 32)
    assert len(list((folder / "images").glob("*.png"))) == 10
    assert size(folder / "varied.png") == (32, 32)
    with Image.open(folder / "way.webp") as way:
        assert way.n_frames > 50  # type: ignore[attr-defined]
