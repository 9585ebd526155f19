"""The commands of README.md and of pages of docs/, as printed, against servers that mostly serve the bundled model."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import BUNDLED, ROOT, RunningServer, stop_server
from tests.service.keys import key_line
from tests.test_docs import shell_commands
from tests.tools import needs

HOME = "~/.local/state/tminus"
RUN = {"python": sys.executable, "tminus": f"{sys.executable} -m tminus"}


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
        printed.append(shell(command.replace("steps=1000", "steps=10"), folder, server.url))
    assert printed
    return printed


def shell(command: str, folder: Path, url: str = "") -> str:
    """Run a command, or a block of them, against the server at this URL; what it printed."""
    command = re.sub(r"(http://)?localhost:8000", url, command)
    command = re.sub(r"(?<!/)\.venv/bin/(python|tminus)", lambda found: RUN[found[1]], command)
    command = re.sub(r"^curl ", "curl -sS --fail-with-body ", command, flags=re.MULTILINE)
    for said, package in (("curl ", "curl"), ("--data fashion-mnist", "dataset-fashion-mnist")):
        if said in command:
            needs(package)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=folder, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def blocks(page: str) -> list[str]:
    """The shell blocks of a page."""
    return re.findall(r"^```sh\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)


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


@pytest.mark.long
def test_the_commands_of_the_command_line_page_do_what_it_says(
    own_server: Callable[..., RunningServer], small: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMINUS_KEYS", key_line("ops", "tm_of_the_page", "admin"))
    monkeypatch.setenv("TMINUS_OPEN", "yes")
    monkeypatch.setenv("TMINUS_KEY", "tm_of_the_page")
    server = own_server("--checkpoint", f"colour={small}", checkpoint=BUNDLED)
    page = shell_commands(ROOT / "docs" / "command-line.md")
    sample, *samples = (command for command in page if command.startswith(".venv/bin/tminus sample"))
    shell(sample, folder)
    server.slow_down(0.03)  # or few frames are seen
    for command in samples:
        # One has loaded the bundled model, which takes longer.
        shell(command if "--url" in command else f"{command} --checkpoint {small}", folder, server.url)
    server.speed_up()
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


def kill(server: RunningServer) -> None:
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(30)


def wait_for_job(server: RunningServer, job_id: str) -> bytes:
    """The images of a durable job, when it is done."""
    with server.client() as client:
        server.wait_until(lambda: client.get(f"/jobs/{job_id}").json()["state"] == "done")
        return client.get(f"/jobs/{job_id}/image").content


@pytest.mark.long
def test_the_tutorial_goes_through_in_order(
    own_server: Callable[..., RunningServer], folder: Path, tmp_path: Path
) -> None:
    _, train, serve, sample, watch, again, job, fetch = blocks("docs/tutorial.md")
    train = re.sub(r"--(steps|save-every|sheet-every) \d+", r"--\1 2", train)
    small = train.replace("--widths 16,32,64", "--widths 8,16,32 --batch-size 8 --precision fp32")
    assert small != train
    shell(small, folder)
    assert size(folder / "runs" / "tutorial" / "sheets" / "0000002.png") == (160, 128), "twenty images"
    checkpoint = folder / serve.split()[-1]
    env = {"TMINUS_STATE_DIR": str(tmp_path), "TMINUS_EXECUTOR": "eager"}  # or each is tried for the new network
    first = own_server(checkpoint=checkpoint, **env)
    shell(sample, folder, first.url)
    assert size(folder / "sneakers.png") == (64, 64), "four images"
    shell(watch.replace("--steps 100", "--steps 20"), folder, first.url)
    assert "same" in shell(again, folder, first.url)
    first.slow_down()
    shell(job.replace('"steps": 1000', '"steps": 200'), folder, first.url)
    assert stop_server(first) == 0
    second = own_server(checkpoint=checkpoint, **env)
    second.wait_until(lambda: "goes on from step" in second.log)
    wait_for_job(second, json.loads((folder / "job.json").read_text())["id"])
    shell(fetch, folder, second.url)
    assert size(folder / "eight.png") == (128, 64), "eight images"


def test_a_backup_of_a_running_server_is_restored_and_its_job_ends_in_the_same_bytes(
    own_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    section = page.partition("\n## Back up\n")[2].partition("\n## ")[0]
    copy, restore = re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    state = tmp_path / "state"
    server = own_server(TMINUS_STATE_DIR=str(state))
    spec = {"n": 6, "steps": 1000, "seed": 7}
    server.slow_down()
    with server.client() as client:
        job_id = client.post("/jobs", json=spec).json()["id"]
        server.wait_until(lambda: server.metric("tminus_snapshots_total") > 0)
        (file,) = state.glob("*.sqlite3")
        backup = [needs("sqlite3"), file, ".backup copy"]
        refused = subprocess.run(backup, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert "database is locked" in refused.stderr
        shell(copy.replace("$(pgrep -f 'tminus serve')", str(server.process.pid)).replace(HOME, str(state)), tmp_path)
        assert client.get(f"/jobs/{job_id}").json()["state"] == "running", "it goes on"
    server.speed_up()
    expected = wait_for_job(server, job_id)
    kill(server)
    shell(restore.replace(HOME, str(state)), tmp_path)
    restored = own_server(TMINUS_STATE_DIR=str(state))
    restored.wait_until(lambda: f"job {job_id} goes on from step" in restored.log)
    assert wait_for_job(restored, job_id) == expected
