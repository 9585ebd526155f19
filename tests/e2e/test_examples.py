"""docs/clients.md, word for word: the same five tasks by bash, by the Python client, and in a real browser."""

import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.documents import ROOT, code_blocks, run_python, run_shell
from tests.e2e.conftest import RunningServer, SlowDown, serving
from tests.tiny import randomize
from tminus.model.checkpoint import load_checkpoint, save_checkpoint
from tminus.model.unet import UNet2D

SAMPLE, WATCH, JOB, REFUSAL, MODELS = range(5)
CURL, CLIENT, BROWSER = range(3)
SNEAKERS = {"n": 4, "steps": 20, "sampler": "dpmpp_2m", "class_label": "sneaker", "guidance": 1.5, "seed": 7}
BAG = {"steps": 200, "class_label": "bag", "seed": 7}
BAGS = {"n": 8, "class_label": "bag", "seed": 7}
PICTURE = "document.querySelector('body > img')"  # what an example has put on the page
STEPS = [40, 80, 120, 160]


HEADINGS = re.findall("^## (.+)$", (ROOT / "docs" / "clients.md").read_text("utf-8"), re.MULTILINE)
EXAMPLES = [code_blocks("docs/clients.md", section=heading) for heading in HEADINGS]
START = EXAMPLES[MODELS].pop(0)  # the server that the other examples of this task ask


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
    more = ("--checkpoint", f"colour={colour}", "--executor", "eager")
    with serving(small, *more, "--max-backlog-s", "0.5", "--result-cache-mb", "0") as running:
        yield running


def run(server: RunningServer, folder: Path, task: int, language: int) -> str:
    """Run an example in a folder, on our server; what it printed."""
    return (run_shell if language == CURL else run_python)(EXAMPLES[task][language], folder, server.url)


@pytest.fixture(autouse=True)
def idle(server: RunningServer) -> None:
    """Nothing is left to do: this server refuses much."""
    server.wait_until(lambda: server.metric("tminus_backlog_seconds") == 0)


@pytest.fixture
def tab(server: RunningServer, browser: Any) -> Iterator[Any]:
    """The server's own page, whose Content-Security-Policy holds for the examples too; it has had its first sample."""
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(server.url)
    opened = "document.body.dataset.opening"
    page.wait_for_function(f"() => {opened} === 'shown' || {opened} === 'absent'")
    server.wait_until(lambda: server.metric("tminus_backlog_seconds") == 0)
    yield page
    page.close()


def in_browser(tab: Any, task: int) -> list[str]:
    """Run an example as a module would be; the list to which its console is written."""
    said: list[str] = []
    tab.on("console", lambda message: message.type == "log" and said.append(message.text))
    tab.evaluate(f"async () => {{ {EXAMPLES[task][BROWSER]} }}")
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
    server.fill(**BAGS)  # as the example asks
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


def in_files(server: RunningServer, folder: Path, task: int, name: str) -> Iterator[tuple[int, str, bytes]]:
    """Run an example by bash and by the Python client: the language, what it printed, and what is in its file."""
    for language in (CURL, CLIENT):
        (folder / name).unlink(missing_ok=True)
        said = run(server, folder, task, language)
        yield language, said, (folder / name).read_bytes()


def test_a_sample_becomes_a_file(server: RunningServer, tmp_path: Path, tab: Any) -> None:
    expected = server.post(json=SNEAKERS).content
    assert {made for _, _, made in in_files(server, tmp_path, SAMPLE, "sneakers.png")} == {expected}
    with tab.expect_download() as download:
        in_browser(tab, SAMPLE)
    assert download.value.suggested_filename == "sneakers.png"
    assert download.value.path().read_bytes() == expected


def test_frames_become_files(server: RunningServer, tmp_path: Path, slow_down: SlowDown) -> None:
    slow_down(server, between_ticks_s=0.03)  # or frames are dropped
    said = run(server, tmp_path, WATCH, CLIENT)
    server.speed_up()
    assert [int(step) for step in re.findall(r"^step (\d+)", said, re.MULTILINE)] == STEPS
    assert {file.name for file in tmp_path.glob("x_0-*.png")} == {f"x_0-{step}.png" for step in STEPS}
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.glob("x_0-*.png"))
    assert (tmp_path / "bag.png").read_bytes() == server.post(json=BAG).content


def test_frames_become_an_animation(server: RunningServer, tmp_path: Path) -> None:
    run(server, tmp_path, WATCH, CURL)
    with Image.open(tmp_path / "bag.webp") as image:
        assert image.n_frames == 200 // 40  # type: ignore[attr-defined]


def test_frames_are_shown(server: RunningServer, tab: Any, slow_down: SlowDown) -> None:
    final = server.post(json=BAG).content
    slow_down(server, between_ticks_s=0.03)  # or frames are dropped
    said = in_browser(tab, WATCH)
    until(tab, lambda: said == [f"step {step}" for step in STEPS])
    until(tab, lambda: picture(tab) == final)
    until(tab, lambda: tab.evaluate(f"() => {PICTURE}.naturalWidth") == 32)  # it is drawn, not only there


def test_one_key_is_one_job_in_every_language(server: RunningServer, tmp_path: Path, tab: Any) -> None:
    found = [*in_files(server, tmp_path, JOB, "coats.png")]
    assert found[1][1].startswith("done ")
    assert in_browser(tab, JOB)[0].startswith("done ")
    until(tab, lambda: tab.evaluate(f"() => {PICTURE}.naturalWidth") == 64)
    assert {made for _, _, made in found} == {picture(tab)}


@pytest.mark.long
def test_a_refusal_is_waited_for_in_every_language(server: RunningServer, tmp_path: Path, tab: Any) -> None:
    for language in (CURL, CLIENT):
        with much_to_do(server):
            assert run(server, tmp_path, REFUSAL, language) == ""
        server.wait_until(lambda: server.metric("tminus_backlog_seconds") == 0)
        expected = server.post(json=BAGS).content
        assert (tmp_path / "bags.png").read_bytes() == expected
        (tmp_path / "bags.png").unlink()
    with much_to_do(server):
        in_browser(tab, REFUSAL)
    assert picture(tab) == expected


def test_one_of_several_models_is_asked_in_every_language(server: RunningServer, tmp_path: Path, tab: Any) -> None:
    (_, first), (name, second) = re.findall(r"--checkpoint (?:(\w+)=)?(\S+)", START)
    assert (name, (ROOT / first).is_dir(), (ROOT / second).is_dir()) == ("colour", True, True)
    expected = httpx.post(f"{server.url}/models/colour/sample", json={"n": 4, "seed": 7}, timeout=60)
    for language, said, made in in_files(server, tmp_path, MODELS, "colour.png"):
        assert made == expected.content
        assert language == CURL or said.splitlines() == ["small loaded", "colour loaded"]
    assert json.loads((tmp_path / "models.json").read_text())["models"][1]["name"] == "colour"
    assert in_browser(tab, MODELS) == ["small loaded", "colour loaded"]
    until(tab, lambda: tab.evaluate(f"() => {PICTURE}.naturalWidth") == 64)
    assert picture(tab) == expected.content
