"""docs/clients.md, word for word: the same six tasks by bash, by two Pythons, and in a real browser."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import ROOT, RunningServer, SlowDown, start_server, stop_server
from tests.tiny import randomize
from tests.tools import needs
from tminus.model.checkpoint import load_checkpoint, save_checkpoint
from tminus.model.unet import UNet2D

SAMPLE, WATCH, JOB, NOISE, REFUSAL, MODELS = range(6)
CURL, CLIENT, HTTPX, BROWSER = range(4)
SNEAKERS = {"n": 4, "steps": 20, "sampler": "dpmpp_2m", "class_label": "sneaker", "guidance": 1.5, "seed": 7}
BAG = {"steps": 200, "class_label": "bag", "guidance": 1.5, "seed": 7}
PICTURE = "document.querySelector('body > img')"  # what an example has put on the page
STEPS = [40, 80, 120, 160]


def examples() -> list[list[tuple[str, str]]]:
    """The blocks of each task, each with its language."""
    text = (ROOT / "docs" / "clients.md").read_text("utf-8")
    sections = text.split("\n## ")[1:]
    return [re.findall(r"^```(\w+)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE) for section in sections]


EXAMPLES = examples()


@pytest.fixture(scope="module")
def colour(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint like the small one, in colour."""
    like, folder = load_checkpoint(small), tmp_path_factory.mktemp("made") / "colour"
    net = UNet2D(replace(like.net.config, in_channels=3, out_channels=3))
    randomize(net)
    save_checkpoint(folder, net.state_dict(), net.config, like.noise, like.labels, {}, like.recommended)
    return folder


@pytest.fixture(scope="module")
def server(small: Path, colour: Path) -> Iterator[RunningServer]:
    """A server of two models that soon has too much to do, and keeps nothing that it made."""
    more = ("--checkpoint", f"colour={colour}")
    running = start_server(small, *more, "--max-backlog-s", "0.5", "--result-cache-mb", "0")
    yield running
    assert stop_server(running) == 0, running.log
    assert "Traceback" not in running.log, running.log


def run(server: RunningServer, folder: Path, task: int, language: int) -> str:
    """Run an example in a folder, on our server; what it printed."""
    kind, code = EXAMPLES[task][language]
    for scheme in ("http", "ws"):
        code = code.replace(f"{scheme}://localhost:8000", server.url.replace("http", scheme))
    code = code.replace("localhost:8000", server.url)
    if kind == "sh":
        needs("curl")
    command = ["bash", "-euo", "pipefail", "-c"] if kind == "sh" else [sys.executable, "-c"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "client")))}
    done = subprocess.run([*command, code], cwd=folder, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def idle(server: RunningServer) -> None:
    """Wait until nothing is left to do: this server refuses much."""
    server.wait_until(lambda: server.metric("tminus_backlog_seconds") == 0)


@pytest.fixture(autouse=True)
def nothing_to_do(server: RunningServer) -> None:
    idle(server)


@pytest.fixture
def tab(server: RunningServer, browser: Any) -> Iterator[Any]:
    """The server's own page, whose Content-Security-Policy holds for the examples too."""
    page = browser.new_page()
    page.set_default_timeout(60_000)
    open_page(server, page)
    yield page
    page.close()


def open_page(server: RunningServer, tab: Any) -> None:
    """Open it anew, and let it have its own first sample."""
    tab.goto(server.url)
    opened = "document.body.dataset.opening"
    tab.wait_for_function(f"() => {opened} === 'shown' || {opened} === 'absent'")
    idle(server)


def in_browser(tab: Any, task: int, block: int = BROWSER) -> list[str]:
    """Run an example as a module would be; the list to which its console is written."""
    kind, code = EXAMPLES[task][block]
    assert kind == "js"
    said: list[str] = []
    tab.on("console", lambda message: message.type == "log" and said.append(message.text))
    tab.evaluate(f"async () => {{ {code} }}")
    return said


def picture(tab: Any) -> bytes:
    """The bytes of the picture that the example put on the page."""
    return bytes(tab.evaluate(f"async () => [...new Uint8Array(await (await fetch({PICTURE}.src)).arrayBuffer())]"))


def until(tab: Any, holds: Callable[[], bool]) -> None:
    """Let the page go on until something holds."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        tab.wait_for_timeout(20)


@contextmanager
def much_to_do(server: RunningServer) -> Iterator[None]:
    """Work for more than the server takes; what is asked inside was refused at first."""
    server.fill(n=8, steps=30)  # as the example asks
    refused = server.metric("tminus_rejected_total")

    def let_it_end() -> None:
        try:
            server.wait_until(lambda: server.metric("tminus_rejected_total") > refused)
        finally:
            server.speed_up()

    with ThreadPoolExecutor(1) as pool:
        refusal = pool.submit(let_it_end)
        yield
        refusal.result()


@pytest.mark.parametrize("language", [CURL, CLIENT, HTTPX])
def test_a_sample_becomes_a_file(server: RunningServer, tmp_path: Path, language: int) -> None:
    run(server, tmp_path, SAMPLE, language)
    assert (tmp_path / "sneakers.png").read_bytes() == server.post(json=SNEAKERS).content


def test_a_sample_is_downloaded(server: RunningServer, tab: Any) -> None:
    with tab.expect_download() as download:
        in_browser(tab, SAMPLE)
    assert download.value.suggested_filename == "sneakers.png"
    assert download.value.path().read_bytes() == server.post(json=SNEAKERS).content


@pytest.mark.parametrize("language", [CURL, CLIENT, HTTPX])
def test_frames_become_files(server: RunningServer, tmp_path: Path, language: int, slow_down: SlowDown) -> None:
    slow_down(server, between_ticks_s=0.03)  # or the job goes on before its events are asked for
    said = run(server, tmp_path, WATCH, language)
    server.speed_up()
    assert [int(step) for step in re.findall(r"^step (\d+)", said, re.MULTILINE)] == STEPS
    assert {file.name for file in tmp_path.glob("x_0-*.png")} == {f"x_0-{step}.png" for step in STEPS}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.glob("x_0-*.png"))
    if language == CLIENT:
        assert (tmp_path / "bag.png").read_bytes() == server.post(json=BAG).content


@pytest.mark.parametrize("block", [BROWSER, BROWSER + 1], ids=["WebSocket", "EventSource"])
def test_frames_are_shown(server: RunningServer, tab: Any, block: int, slow_down: SlowDown) -> None:
    final = server.post(json=BAG).content
    frames = [f"step {step}" for step in STEPS]
    slow_down(server, between_ticks_s=0.03)  # or the job goes on before its events are asked for
    said = in_browser(tab, WATCH, block)
    until(tab, lambda: said == frames)
    if block == BROWSER:
        until(tab, lambda: picture(tab) == final)
    else:
        assert picture(tab).startswith(b"\x89PNG")
    until(tab, lambda: tab.evaluate(f"() => {PICTURE}.naturalWidth") == 32)  # it is drawn, not only there


def test_one_key_is_one_job_in_every_language(server: RunningServer, tmp_path: Path, tab: Any) -> None:
    made = set()
    for language in (CURL, CLIENT, HTTPX):
        said = run(server, tmp_path, JOB, language)
        made.add((tmp_path / "coats.png").read_bytes())
        (tmp_path / "coats.png").unlink()
        assert language != CLIENT or said.startswith("done ")
    assert in_browser(tab, JOB)[0].startswith("done ")
    until(tab, lambda: tab.evaluate(f"() => {PICTURE}.naturalWidth") == 64)
    made.add(picture(tab))
    assert len(made) == 1
    assert made.pop().startswith(b"\x89PNG")


def test_an_image_goes_forward_in_every_language(server: RunningServer, tmp_path: Path, tab: Any) -> None:
    (tmp_path / "sneakers.png").write_bytes(server.post(json=SNEAKERS).content)
    made = set()
    alpha_bars = []
    for language in (CURL, CLIENT, HTTPX):
        alpha_bars += run(server, tmp_path, NOISE, language).split()
        made.add((tmp_path / "x_500.png").read_bytes())
        (tmp_path / "x_500.png").unlink()
    alpha_bars += in_browser(tab, NOISE)
    made.add(picture(tab))
    assert len(made) == 1
    assert len(alpha_bars) == 3
    assert len(set(alpha_bars)) == 1


@pytest.mark.parametrize("language", [CURL, CLIENT, HTTPX])
def test_a_refusal_is_waited_for(server: RunningServer, tmp_path: Path, language: int) -> None:
    with much_to_do(server):
        assert run(server, tmp_path, REFUSAL, language) == ""
    expected = server.post(json={"n": 8, "steps": 30, "seed": 7}).content
    assert (tmp_path / "bags.png").read_bytes() == expected


def test_a_refusal_is_waited_for_in_the_browser(server: RunningServer, tab: Any) -> None:
    with much_to_do(server):
        in_browser(tab, REFUSAL)
    assert picture(tab) == server.post(json={"n": 8, "steps": 30, "seed": 7}).content


def test_one_of_several_models_is_asked_in_every_language(server: RunningServer, tmp_path: Path, tab: Any) -> None:
    expected = httpx.post(f"{server.url}/models/colour/sample", json={"n": 4, "steps": 20, "seed": 7}, timeout=60)
    for language in (CURL, CLIENT, HTTPX):
        said = run(server, tmp_path, MODELS, language)
        assert (tmp_path / "colour.png").read_bytes() == expected.content
        (tmp_path / "colour.png").unlink()
        assert language == CURL or said.splitlines() == ["small loaded", "colour loaded"]
    assert json.loads((tmp_path / "models.json").read_text())["models"][1]["name"] == "colour"
    assert in_browser(tab, MODELS) == ["small loaded", "colour loaded"]
    until(tab, lambda: tab.evaluate(f"() => {PICTURE}.naturalWidth") == 64)
    assert picture(tab) == expected.content
