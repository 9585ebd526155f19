"""The page in a real browser, against the real server."""

import base64
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from tests.e2e.conftest import BUNDLED, RunningServer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"]
DONE = re.compile(r"^Done in ")
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium, and none is installed")
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS + sandbox)
        yield browser
        browser.close()


class Page:
    """A tab with the page in it; what it complains about on the console is kept."""

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, **context)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(PATIENCE_MS)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab.on("console", self._hear)
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.on("websocket", lambda socket: self.requests.append(socket.url))
        self.tab.goto(url)
        expect(self.tab.locator("#model")).to_contain_text("fashion-mnist-32", timeout=PATIENCE_MS)

    def _hear(self, message: Any) -> None:
        """A refusal that the page shows to its user is an error to the browser, and to nobody else."""
        if message.type == "error" and not re.search(r"responded with a status of (404|422)", message.text):
            self.complaints.append(message.text)

    def fill(self, **fields: object) -> None:
        for name, value in fields.items():
            field = self.tab.locator(f"[name={name}]")
            if name in ("sampler", "class_label"):
                field.select_option(label=str(value))
            else:
                field.fill(str(value))

    def sample(self, **fields: object) -> None:
        self.fill(**fields)
        self.tab.get_by_role("button", name="Sample").click()

    def status(self) -> Any:
        return self.tab.locator("#status")

    def wait_until(self, text: re.Pattern[str] | str) -> None:
        expect(self.status()).to_have_text(text, timeout=PATIENCE_MS)

    def wait_for_step(self) -> None:
        expect(self.tab.locator("#progress-text")).to_have_text(re.compile(r"^Step \d+ of \d+, t = \d+, "))

    def picture(self, selector: str) -> bytes:
        """The bytes of an image that the page shows."""
        source = self.tab.locator(selector).first.get_attribute("src")
        if source.startswith("data:"):
            return base64.b64decode(source.partition(",")[2])
        numbers = self.tab.evaluate(
            "async (s) => [...new Uint8Array(await (await fetch(document.querySelector(s).src)).arrayBuffer())]",
            selector,
        )
        return bytes(numbers)


@pytest.fixture
def open_page(browser: Any, server: RunningServer) -> Iterator[Callable[..., Page]]:
    """Opens the page; at the end no tab may have complained, nor asked anybody but the server."""
    pages: list[Page] = []

    def make(url: str = server.url, **context: Any) -> Page:
        pages.append(Page(browser, url, **context))
        return pages[-1]

    yield make
    for page in pages:
        page.context.close()
        assert page.complaints == []
        assert [url for url in page.requests if not re.match(r"(blob:)?(http|ws)://127\.0\.0\.1:|data:", url)] == []


def gray(picture: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(picture)) as image:
        return np.asarray(image.convert("L")).astype(float)


def test_noise_becomes_images_before_ones_eyes(open_page: Callable[..., Page], server: RunningServer) -> None:
    page = open_page()
    page.tab.evaluate(
        """() => { window.shown = {};
        for (const id of ['x_t', 'x_0']) new MutationObserver(() => (window.shown[id] ??= new Set()).add(
            document.getElementById(id).src)).observe(document.getElementById(id), {attributes: true}); }"""
    )
    page.sample(class_label="sneaker", sampler="ddim", steps=60, n=4, seed=5, guidance=2)
    page.wait_until(DONE)
    shown = page.tab.evaluate("() => Object.fromEntries(Object.entries(window.shown).map(([k, v]) => [k, v.size]))")
    assert min(shown["x_t"], shown["x_0"]) > 10, "it really moved"
    spec = {"class_label": 7, "sampler": "ddim", "steps": 60, "n": 4, "seed": 5, "guidance": 2}
    final = page.picture("#x_t")
    assert final == page.picture("#gallery img") == server.post(json=spec).content

    # Back through the frames: noise at the start, and x_0 is ahead of x_t half way.
    scrub = page.tab.locator("#scrub")
    scrub.fill("0")
    expect(page.tab.locator("#frame-text")).to_contain_text("Frame 1 of")
    assert np.abs(gray(page.picture("#x_t")) - gray(final)).mean() > 40
    scrub.fill(str(int(scrub.get_attribute("max")) // 2))
    x_t, x_0 = (np.abs(gray(page.picture(name)) - gray(final)).mean() for name in ("#x_t", "#x_0"))
    assert x_0 < x_t
    assert page.tab.locator("#now").get_attribute("visibility") == "visible"
    scrub.focus()
    page.tab.keyboard.press("End")
    assert page.picture("#x_t") == final, "with the keyboard alone"


def test_the_calls_of_a_result_make_it_again(open_page: Callable[..., Page], tmp_path: Path) -> None:
    page = open_page()
    page.sample(class_label="bag", sampler="dpmpp_2m", steps=10, n=2, seed=2**64 - 1, guidance=1)
    page.wait_until(DONE)
    final = page.picture("#gallery img")
    assert len(final) > 1000
    curl = shlex.split(page.tab.locator("#gallery .curl").text_content())
    subprocess.run(curl, cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "out.png").read_bytes() == final
    (tmp_path / "out.png").unlink()
    python = page.tab.locator("#gallery .python").text_content()
    subprocess.run([sys.executable, "-c", python], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "out.png").read_bytes() == final
    with page.tab.expect_download() as download:
        page.tab.get_by_role("button", name="Zip").click()
    assert download.value.suggested_filename == f"tminus-{2**64 - 1}.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        images = [gray(archive.read(name)) for name in archive.namelist()]
    np.testing.assert_array_equal(np.concatenate(images, axis=1), gray(final))
    with page.tab.expect_download() as download:
        page.tab.get_by_role("link", name="PNG").click()
    assert download.value.path().read_bytes() == final


def test_a_job_is_cancelled_and_another_begun(open_page: Callable[..., Page], server: RunningServer) -> None:
    page = open_page()
    page.sample(steps=1000, n=8, sampler="ddpm", seed=1)
    page.wait_for_step()
    page.tab.get_by_role("button", name="Cancel").click()
    page.wait_until("Cancelled.")
    server.wait_until(lambda: server.metric("tminus_rows_active") == 0)
    page.sample(steps=5, n=1, sampler="ddim")
    page.wait_until(DONE)
    expect(page.tab.locator("#gallery li")).to_have_count(1)


def test_a_job_that_waits_says_how_many_are_ahead(open_page: Callable[..., Page], server: RunningServer) -> None:
    page = open_page()
    with ThreadPoolExecutor(10) as pool:
        short = [pool.submit(server.post, json={"n": 8, "steps": 120, "seed": k}) for k in range(6)]
        server.wait_until(lambda: server.metric("tminus_rows_waiting") > 20)
        page.sample(steps=1000, n=8, sampler="ddpm", seed=1)
        page.wait_until(re.compile(r"^Waiting: \d jobs? ahead, done in about "))
        page.tab.get_by_role("button", name="Cancel").click()
        page.wait_until("Cancelled.")
        assert {each.result().status_code for each in short} == {200}


def test_a_seed_that_was_not_given_is_told_and_makes_the_same_again(open_page: Callable[..., Page]) -> None:
    page = open_page()
    pictures = []
    page.sample(steps=1, n=1, class_label="no class", sampler="ddim")
    page.wait_until(DONE)
    pictures.append(page.picture("#gallery li:first-child img"))
    seed = re.search(r"seed (\d+)$", page.tab.locator("#gallery .what").text_content())
    assert seed is not None
    page.sample(seed="00" + seed[1])
    expect(page.tab.locator("#gallery li")).to_have_count(2)
    pictures.append(page.picture("#gallery li:first-child img"))
    assert pictures[0] == pictures[1]


def test_the_schedule_is_drawn_and_the_step_is_marked_in_it(
    open_page: Callable[..., Page], server: RunningServer
) -> None:
    page = open_page()
    alpha_bar = httpx.get(f"{server.url}/model/schedule").json()["alpha_bar"]
    for name in ("alpha_bar", "beta", "snr"):
        points = re.findall(r"[ML](\S+) (\S+?)(?=[ML]|$)", page.tab.locator(f"#chart .{name}").get_attribute("d"))
        assert len(points) == 1000
    page.sample(steps=50, n=1, sampler="ddim", seed=1)
    page.wait_until(DONE)
    page.tab.locator("#scrub").fill("10")
    told = re.search(r"after (\d+) steps, t = (\d+)$", page.tab.locator("#frame-text").text_content())
    step, t = int(told[1]), int(told[2])
    assert t == 980 - 20 * step, "leading spacing: where the next step starts"
    expect(page.tab.locator("#chart-text")).to_contain_text(f"At t = {t}: alpha_bar {alpha_bar[t]:#.3g}")
    assert float(page.tab.locator("#now").get_attribute("x1")) == pytest.approx(600 * t / 999, abs=0.1)


def test_an_error_is_shown_where_it_arose(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.tab.evaluate("() => document.getElementById('form').noValidate = true")  # or the browser would say it first
    page.sample(steps=5, n=65)
    expect(page.tab.locator("#error")).to_contain_text("n must be an integer in 1..64, got 65")
    expect(page.tab.locator("[name=n]")).to_have_attribute("aria-invalid", "true")
    expect(page.tab.locator("[name=n]")).to_be_focused()
    page.sample(steps=5, n=1)
    page.wait_until(DONE)
    expect(page.tab.locator("#error")).to_be_empty()


def test_a_reload_in_mid_job_finds_it_again_and_keeps_the_results(
    open_page: Callable[..., Page], server: RunningServer
) -> None:
    page = open_page()
    page.sample(class_label="bag", steps=5, n=1, sampler="ddim", seed=3, guidance=1)
    page.wait_until(DONE)
    page.sample(class_label="sneaker", steps=400, n=4, sampler="ddpm", seed=2**63 + 1, guidance=2)
    page.wait_for_step()
    before = int(re.search(r"Step (\d+)", page.tab.locator("#progress-text").text_content())[1])
    page.tab.reload()
    page.wait_for_step()
    assert int(re.search(r"Step (\d+)", page.tab.locator("#progress-text").text_content())[1]) > before
    page.wait_until(DONE)
    expect(page.tab.locator("#gallery li")).to_have_count(2)
    spec = {"class_label": 7, "sampler": "ddpm", "steps": 400, "n": 4, "seed": 2**63 + 1, "guidance": 2}
    assert page.picture("#gallery li:first-child img") == server.post(json=spec).content
    page.tab.reload()
    page.wait_until(DONE)
    expect(page.tab.locator("#gallery li")).to_have_count(2)
    page.tab.goto(f"{server.url}/#job={'0' * 32}")
    expect(page.tab.locator("#error")).to_contain_text("cannot be shown: no job")


def test_a_server_that_was_killed_in_mid_job_is_found_again_with_the_job(
    browser: Any, own_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = own_server("--checkpoint", str(BUNDLED), TMINUS_STATE_DIR=str(tmp_path))
    port = server.url.rpartition(":")[2]
    page = Page(browser, server.url)
    page.sample(steps=300, n=4, sampler="ddpm", class_label="bag", seed=6, guidance=1)
    page.wait_for_step()
    server.process.kill()
    page.wait_until(re.compile("The connection broke. The job goes on"))
    page.tab.evaluate(
        "() => { window.unloaded = false; addEventListener('beforeunload', () => window.unloaded = true) }"
    )
    server = own_server("--checkpoint", str(BUNDLED), "--port", port, TMINUS_STATE_DIR=str(tmp_path))
    page.wait_until(DONE)
    assert not page.tab.evaluate("() => window.unloaded"), "the same page all the time"
    spec = {"steps": 300, "n": 4, "sampler": "ddpm", "class_label": "bag", "seed": 6}
    assert page.picture("#gallery img") == server.post(json=spec).content
    server.process.kill()
    server.process.wait()
    page.sample()
    expect(page.tab.locator("#error")).to_contain_text("There is no connection")
    expect(page.tab.get_by_role("button", name="Sample")).to_have_attribute("aria-disabled", "false")
    page.context.close()


def test_an_image_is_shown_through_the_forward_process_at_any_t(
    open_page: Callable[..., Page], server: RunningServer, tmp_path: Path
) -> None:
    page, file = open_page(), tmp_path / "bag.png"
    file.write_bytes(server.post(params={"steps": 20, "sampler": "ddim", "class_label": "bag", "seed": 1}).content)
    page.tab.locator("#noise-file").set_input_files(file)

    def noised(t: int, seed: int) -> bytes:
        return httpx.post(
            f"{server.url}/noise", params={"t": t, "seed": seed}, files={"image": file.read_bytes()}
        ).content

    for t in (0, 500, 999):
        page.tab.locator("#noise-t").fill(str(t))
        expect(page.tab.locator("#noise-image")).to_have_attribute("alt", f"The image at t = {t}")
        assert page.picture("#noise-image") == noised(t, 0)
        expect(page.tab.locator("#chart-text")).to_contain_text(f"At t = {t}:")
    page.tab.locator("#noise-seed").fill("8")
    page.tab.keyboard.press("Tab")
    page.tab.locator("#noise-t").fill("100")
    expect(page.tab.locator("#noise-image")).to_have_attribute("alt", "The image at t = 100")
    wait_for_picture(page, "#noise-image", noised(100, 8))
    # Dropped on the page, and not an image at all.
    page.tab.evaluate(
        """() => { const given = new DataTransfer();
        given.items.add(new File(['<svg xmlns="http://www.w3.org/2000/svg"/>'], 'cat.png', {type: 'image/png'}));
        document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: given, bubbles: true, cancelable: true})); }"""
    )
    expect(page.tab.locator("#noise-error")).to_contain_text("image must be a PNG, JPEG or WebP image")
    expect(page.tab.locator("#noise-name")).to_have_text("cat.png")


def wait_for_picture(page: Page, selector: str, wanted: bytes) -> None:
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while page.picture(selector) != wanted:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_the_server_has_forgotten_is_said_where_it_is_asked_for(
    open_page: Callable[..., Page], server: RunningServer
) -> None:
    page = open_page()
    page.sample(steps=5, n=2, sampler="ddim")
    page.wait_until(DONE)
    httpx.delete(f"{server.url}/jobs/{page.tab.url.rpartition('=')[2]}")
    page.tab.get_by_role("button", name="Zip").click()
    expect(page.tab.locator("#gallery .complaint")).to_contain_text("The zip could not be had: no job")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_can_be_read_and_used_by_all(open_page: Callable[..., Page], scheme: str, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    for _ in range(2):  # as it opens, and with a result and an error
        found = Axe().run(page.tab).response["violations"]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
        assert page.tab.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth"), (
            "nothing sticks out"
        )
        page.sample(steps=5, n=2, sampler="ddim")
        page.wait_until(DONE)
        page.tab.locator("summary").first.click()
        page.tab.evaluate("() => document.getElementById('form').noValidate = true")
        page.sample(n=65)
        expect(page.tab.locator("#error")).not_to_be_empty()


def test_the_page_lets_nothing_in_from_elsewhere(server: RunningServer) -> None:
    response = httpx.get(server.url)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
        "connect-src 'self' blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )
    script = httpx.get(f"{server.url}/page/page.js")
    assert "javascript" in script.headers["content-type"]
    again = httpx.get(f"{server.url}/page/page.js", headers={"If-None-Match": script.headers["etag"]})
    assert again.status_code == 304
    for name in ("..%2fapp.py", "%2e%2e%2fapp.py", "nothing.js"):
        missing = httpx.get(f"{server.url}/page/{name}")
        assert (missing.status_code, missing.headers["content-type"]) == (404, "application/problem+json")
