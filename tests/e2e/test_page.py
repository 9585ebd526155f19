"""The page in a real browser, against real servers. One server has models of all kinds, one asks for a key."""

import base64
import contextlib
import io
import json
import re
import tomllib
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect
from starlette.testclient import TestClient

from tests.documents import ROOT, run_python, run_shell
from tests.e2e.browser import (
    DONE,
    ENDING,
    EVENTS,
    LONG,
    POSTED,
    QUICK,
    SELDOM_S,
    OpenPage,
    Page,
    cancel_job,
    job_ids,
    post_job,
)
from tests.e2e.conftest import ADMIN, BUNDLED, KEYS, SHARED, RunningServer, SlowDown, pixels, png_of, serving
from tests.service.keys import bearer, key_line
from tests.tiny import randomize
from tminus.model.checkpoint import load_checkpoint, save_checkpoint
from tminus.model.unet import UNet2D
from tminus.service.startup.server import Opening

OPENING = {"n": 1, "steps": 20, "sampler": "dpmpp_2m", "seed": 7, "class_label": 0, "guidance": 1.5}
MODELS = ["small", "colour", "alpha", "planes", "numbers", "fashion-mnist-32"]
ANN, BEN, CAT = "tm_ann", "tm_ben", "tm_cat"
WHOLE_KB = 150
QUICK_START = ("--executor", "eager", "--threads", "1", "--max-batch", "8")


@pytest.fixture(scope="module")
def server(small: Path, colour: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server of `small`, its default, and of five others.

    `colour` has another size and other classes, `alpha` and `planes` have four and five channels, the classes of
    `numbers` are named by numbers, and the bundled model has tables.
    """
    like, made = load_checkpoint(small), tmp_path_factory.mktemp("models")
    numbers = replace(like.labels, class_names=tuple(map(str, range(1, 11))))  # of folders that are named 1 to 10
    for name, channels, labels in (("alpha", 4, like.labels), ("planes", 5, like.labels), ("numbers", 1, numbers)):
        config = replace(like.net.config, sample_size=16, in_channels=channels, out_channels=channels)
        net = UNet2D(config)
        randomize(net, seed=1)
        save_checkpoint(made / name, net.state_dict(), config, like.noise, labels, {}, like.recommended)
    folders = {"colour": colour, "fashion-mnist-32": BUNDLED} | {name: made / name for name in MODELS[2:5]}
    others = [flag for name in MODELS[1:] for flag in ("--checkpoint", f"{name}={folders[name]}")]
    with serving(small, *SHARED, *QUICK_START, *others, **KEYS) as running:
        yield running


def sampled(server: RunningServer, model: str, **spec: object) -> bytes:
    return httpx.post(f"{server.url}/models/{model}/sample", json=spec, timeout=60).raise_for_status().content


def way(server: RunningServer, **spec: object) -> Any:
    """The frames of a request, as the server gives them to anybody."""
    query = {"every": 1, "show": ["x_t", "x_0"]} | spec
    return httpx.get(f"{server.url}/sample", params=query, headers={"Accept": "application/json"}, timeout=60).json()


def frame_numbers(page: Page) -> tuple[int, int]:
    """Which frame is shown, of how many."""
    found = re.search(r"^Frame (\d+) of (\d+):", page.at("#frame-text").text_content())
    return int(found[1]), int(found[2])


def time_shown(page: Page) -> float:
    return float(re.search(r"t = ([\d.]+)$", page.at("#frame-text").text_content())[1])


def nearest(frames: list[dict[str, Any]], t: float) -> int:
    return min(range(len(frames)), key=lambda k: abs(frames[k]["t"] - t))


# --- the first sample, and its way from noise ---


def test_a_visitor_moves_through_the_time_of_the_first_sample(open_page: OpenPage, server: RunningServer) -> None:
    before = job_ids(server)
    page = open_page()
    expect(page.at("body")).to_have_attribute("data-opening", "shown")
    expect(page.at("#load")).to_have_attribute("aria-disabled", "false")
    sizes = page.tab.evaluate(
        """() => Object.fromEntries(['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind))
        .map(({name, transferSize}) => [name, transferSize]))"""
    )
    files = {name: size for name, size in sizes.items() if not re.search(r"/(sample|noise)\?", name)}
    assert len(files) > 15
    assert min(size for name, size in files.items() if not name.startswith("blob:")) > 0
    assert sum(files.values()) < WHOLE_KB * 1000, files
    page.says("#caption", "t-shirt, 20 steps of dpmpp_2m, guidance 1.5, seed 7")
    page.wait_for_picture("#x_t img", server.post(json=OPENING).content)
    assert frame_numbers(page) == (21, 21)
    page.has(10, "#strip button")
    assert page.form["class_label"] == "0", "the first class"
    assert job_ids(server) == before
    page.has(0, "#gallery img")
    assert page.tab.url == f"{server.url}/"
    steps = server.metric("tminus_row_steps_total")
    page.tab.reload()
    page.wait_for_the_opening()
    expect(page.at("#x_t")).to_be_visible()
    assert server.metric("tminus_row_steps_total") == steps

    frames = way(server, **OPENING)["frames"]
    page.at("#strip button").first.click()
    assert frame_numbers(page) == (1, 21)
    page.tab.keyboard.press("ArrowRight")
    assert frame_numbers(page) == (3, 21), "ten of them are on the film"
    expect(page.at("#strip button").nth(1)).to_be_focused()
    expect(page.at("#strip button").nth(1)).to_have_attribute("aria-current", "true")
    assert time_shown(page) == frames[2]["t"]
    page.tab.keyboard.press("End")
    assert frame_numbers(page) == (21, 21)

    plot = page.at("#plot")
    plot.scroll_into_view_if_needed()
    box = page.at("#chart").bounding_box()
    page.tab.mouse.move(box["x"] + box["width"] / 2, box["y"] + 30)
    t = 500
    shown = nearest(frames, t)
    assert frame_numbers(page) == (shown + 1, 21)
    page.wait_for_picture("#x_0 img", base64.b64decode(frames[shown]["x_0"]))
    expect(plot).to_have_attribute("aria-valuenow", str(999 - t))
    schedule = httpx.get(f"{server.url}/model/schedule").json()
    for name in ("alpha_bar", "beta", "snr"):
        assert len(re.findall(r"[ML](\S+) (\S+?)(?=[ML]|$)", page.at(f"#chart .{name}").get_attribute("d"))) == 1000
    marked = re.search(rf"At t = {t}: alpha_bar ([\d.e-]+), beta", page.at("#chart-text").text_content())
    assert float(marked[1]) == pytest.approx(schedule["alpha_bar"][t], rel=0.005)
    assert float(page.at("#now").get_attribute("x1")) == pytest.approx(600 * (1 - t / 999), abs=0.1), "noise is left"
    expect(page.at("#noise-t")).to_have_value(str(t))
    plot.focus()
    page.tab.keyboard.press("ArrowRight")
    expect(plot).to_have_attribute("aria-valuenow", str(999 - t + 1))
    expect(plot).to_have_attribute("aria-valuetext", re.compile(f"^t = {t - 1}, alpha_bar "))
    for key, value in (("ArrowUp", 501), ("ArrowDown", 500), ("ArrowLeft", 499), ("PageUp", 549), ("PageDown", 499)):
        page.tab.keyboard.press(key)
        expect(plot).to_have_attribute("aria-valuenow", str(value))
    page.tab.keyboard.press("Home")
    expect(plot).to_have_attribute("aria-valuenow", "0")
    expect(plot).to_have_attribute("aria-valuetext", re.compile("^t = 999, alpha_bar "))
    assert frame_numbers(page) == (1, 21)
    page.at("#noise-t").fill("0")
    assert frame_numbers(page) == (21, 21)
    expect(plot).to_have_attribute("aria-valuenow", "999")

    strip = page.at("#strip")
    strip.scroll_into_view_if_needed()
    box = strip.bounding_box()
    middle = box["y"] + box["height"] / 3
    page.tab.mouse.move(box["x"] + box["width"] - 5, middle)
    page.tab.mouse.down()
    for share, number in ((0.5, 11), (0.0, 1), (0.75, 16)):
        page.tab.mouse.move(box["x"] + 3 + share * (box["width"] - 6), middle, steps=4)
        assert abs(frame_numbers(page)[0] - number) <= 1
    page.tab.mouse.up()
    dragged = frame_numbers(page)[0]
    page.tab.mouse.move(box["x"] + 20, middle)
    assert frame_numbers(page)[0] == dragged, "it was let go"
    page.tab.mouse.move(box["x"] + 1, middle)  # and let go elsewhere before it moved
    page.tab.mouse.down()
    page.tab.mouse.move(box["x"] - 3, middle)
    page.tab.mouse.move(box["x"] - 50, middle)
    page.tab.mouse.up()
    page.tab.mouse.move(box["x"] + 300, middle)
    page.tab.mouse.move(box["x"] + 320, middle)
    dragged = frame_numbers(page)[0]
    page.tab.mouse.move(box["x"] + 100, middle)
    assert frame_numbers(page)[0] == dragged
    for turn, number in ((-80, dragged - 2), (40, dragged - 1)):
        page.tab.mouse.wheel(0, turn)
        page.says("#frame-text", f"Frame {number} of 21:")
    scrolled = page.tab.evaluate("() => scrollY")
    page.tab.mouse.wheel(0, -10_000)
    page.says("#frame-text", "Frame 1 of 21:")
    assert page.tab.evaluate("() => scrollY") == scrolled
    page.at("#scrub").press("End")
    page.says("#frame-text", "Frame 21 of 21:")
    page.tab.mouse.wheel(0, 200)
    page.tab.wait_for_function(f"() => scrollY > {scrolled}")  # at its end the page goes on
    page.says("#frame-text", "Frame 21 of 21:")
    page.at("#scrub").press("Home")
    expect(page.at("#x_0 img[src]")).to_have_count(0)  # before the first step there is no guess


def test_the_way_is_played_until_something_else_is_moved(open_page: OpenPage) -> None:
    page = open_page(reduced_motion="no-preference")
    page.context.add_init_script(KEEP_FRAMES)
    page.tab.reload()
    page.wait_for_the_opening()
    expect(page.at("#play")).to_have_attribute("aria-label", "Play")
    assert frame_numbers(page) == (21, 21)
    texts = page.tab.evaluate("() => window.frames_shown.filter((text) => text)")
    # The frames come one after the other, and the last of them stays.
    came = next(number for number, text in enumerate(texts) if text.startswith("Frame 21 of 21"))
    assert any(text.startswith("Frame 1 of 21") for text in texts[came:])
    page.tab.emulate_media(reduced_motion="reduce")
    page.tab.reload()
    page.wait_for_the_opening()

    play, lanes_play = page.at("#play"), page.at("#compare-play")
    page.press("Compare")
    expect(page.at("#compare-status")).to_have_text("Done.")
    page.tab.clock.install(time=0)
    page.tab.clock.pause_at(60_000)
    page.at("#scrub").fill("0")
    moves: list[Callable[[], None]] = [
        lambda: page.at("#scrub").fill("3"),
        lambda: page.at("#strip button").nth(2).click(),
        lambda: page.at("#plot").press("ArrowLeft"),
        lambda: page.at("#noise-t").fill("900"),
        lambda: page.at("#compare-t").fill("100"),
    ]
    for move in moves:
        play.click()
        page.tab.mouse.move(0, 0)  # or the plot may come below it
        page.tab.clock.run_for(300)
        expect(play).to_have_attribute("aria-label", "Pause")
        move()
        expect(play).to_have_attribute("aria-label", "Play")
        moved = frame_numbers(page)
        assert moved[0] < 20
        page.tab.clock.run_for(1000)
        assert frame_numbers(page) == moved
    for begun, paused in ((play, lanes_play), (lanes_play, play), (play, lanes_play)):
        begun.click()
        page.tab.clock.run_for(300)
        expect(begun).to_have_attribute("aria-label", "Pause")
        expect(paused).to_have_attribute("aria-label", "Play")
    page.at("#scrub").press("End")
    page.at("#play").click()
    page.tab.clock.run_for(2000)
    assert 8 <= frame_numbers(page)[0] <= 13, "half of it"
    page.tab.get_by_role("button", name="Pause").click()
    paused = frame_numbers(page)
    page.tab.clock.run_for(5000)
    assert frame_numbers(page) == paused
    page.at("#speed").select_option("2")
    page.at("#play").click()
    page.tab.clock.run_for(3000)
    assert frame_numbers(page) == (21, 21)
    expect(page.at("#play")).to_have_attribute("aria-label", "Play")
    page.at("#loop").check()
    page.at("#play").click()
    page.tab.clock.run_for(2600 + 1000)
    assert 8 <= frame_numbers(page)[0] <= 13, "it has begun again"


KEEP_FRAMES = """window.frames_shown = []; addEventListener('DOMContentLoaded', () => {
    const text = document.getElementById('frame-text');
    new MutationObserver(() => window.frames_shown.push(text.textContent)).observe(text, {childList: true}); });"""


def test_presets_and_tables_fill_in_the_form_and_noise_becomes_images_before_ones_eyes(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page(f"{server.url}/models/fashion-mnist-32/")
    of_table = {"sampler": "tuned", "steps": "8", "guidance": "1"}
    settings = lambda: {name: page.form[name] for name in of_table}  # noqa: E731
    page.open_more()
    assert settings() == of_table
    page.press("Guided")
    assert settings() == {"sampler": "dpmpp_2m", "steps": "20", "guidance": "5"}
    page.press("Every step")
    assert settings() == {"sampler": "ddpm", "steps": "1000", "guidance": "5"}
    page.press("Best")
    assert settings() == of_table
    page.at("#compare-count").select_option("4")
    assert lanes_of(page) == [("tuned", "5", "1"), ("tuned", "8", "1"), ("ddpm", "100", "1"), ("dpmpp_2m", "20", "5")]
    expect(page.at("[name=guidance]")).to_be_disabled()
    page.fill(sampler="ddim")
    expect(page.at("[name=guidance]")).to_be_enabled()

    page.fill(sampler="tuned", steps=7, seed=1, n=1)
    said = "No table of tuned has 7 steps: the nearest has 8 steps."
    address = copied_by(page, page.at("#link"))
    assert "steps=8" in address
    expect(page.at("#when")).to_have_text(said)
    assert "nearest" not in address
    assert page.form["steps"] == "8"
    page.make()
    expect(page.at("#when")).to_have_text(said)
    job = httpx.get(f"{server.url}/jobs/{page.job_id}").json()
    assert job["parameters"]["steps"] == 8
    assert page.picture("#gallery img") == sampled(server, "fashion-mnist-32", **job["parameters"])
    steps = page.at(".lane:visible .steps").first
    expect(page.at(".lane:visible .sampler").first).to_have_value("tuned")
    steps.fill("6")
    steps.blur()
    expect(steps).to_have_value("5")
    page.says(".lane:first-child .when", "No table of tuned has 6 steps: the nearest has 5 steps.")

    other = open_page(address.replace("steps=8", "steps=7&nearest=true"))  # as pages of earlier versions wrote it
    other.wait_for_the_opening()
    assert other.form["steps"] == "8"
    other.says("#caption", "8 steps of tuned")

    slow_down(server, between_ticks_s=0.03)
    page.tab.evaluate(
        """() => { window.shown = {};
        for (const id of ['x_t', 'x_0']) new MutationObserver(() => (window.shown[id] ??= new Set()).add(
            document.querySelector(`#${id} img`)?.src)).observe(document.getElementById(id),
            {attributes: true, attributeFilter: ['src'], subtree: true}); }"""
    )
    page.make(class_label="sneaker", sampler="ddim", steps=60, n=2, seed=5, guidance=2)
    shown = page.tab.evaluate("() => Object.fromEntries(Object.entries(window.shown).map(([k, v]) => [k, v.size]))")
    assert min(shown["x_t"], shown["x_0"]) > 10, "it really moved"
    spec = {"class_label": 7, "sampler": "ddim", "steps": 60, "n": 2, "seed": 5, "guidance": 2}
    final = page.picture("#x_t img")
    assert final == page.picture("#gallery img") == sampled(server, "fashion-mnist-32", **spec)

    def distance(selector: str) -> float:
        return np.abs(pixels(page.picture(selector)).astype(float) - pixels(final)).mean()

    # Back through the frames: noise at the start, and x_0 is ahead of x_t half way.
    scrub = page.at("#scrub")
    scrub.fill("0")
    page.says("#frame-text", "Frame 1 of")
    assert distance("#x_t img") > 40
    scrub.fill(str(int(scrub.get_attribute("max")) // 2))
    assert distance("#x_0 img") < distance("#x_t img")
    assert page.at("#now").get_attribute("visibility") == "visible"
    scrub.focus()
    page.tab.keyboard.press("End")
    assert page.picture("#x_t img") == final, "with the keyboard alone"


def lanes_of(page: Page) -> list[tuple[str, ...]]:
    return [
        tuple(lane.locator(f".{name}").input_value() for name in ("sampler", "steps", "guidance"))
        for lane in page.at(".lane:visible").all()
    ]


def copied_by(page: Page, button: Any) -> str:
    """What a button puts on the clipboard."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button.click()
    expect(page.tab.get_by_role("button", name="Copied").first).to_be_visible()
    return page.tab.evaluate("() => navigator.clipboard.readText()")


def test_the_film_of_a_job_has_every_frame_from_the_noise_on_whatever_the_page_has_heard(
    open_page: OpenPage, server: RunningServer
) -> None:
    page, steps = open_page(), 8
    asked = {"class_label": "bag", "sampler": "ddim", "steps": steps, "n": 2, "guidance": 1}
    counted, scrub = page.at("#frame-text"), page.at("#scrub")

    def check(seed: int) -> None:
        expect(counted).to_contain_text(f" of {steps + 1}: after step ")
        query = asked | {"class_label": 8, "seed": seed, "every": 1, "show": ["x_t", "x_0"]}
        answer = httpx.get(f"{server.url}/sample", params=query, headers={"Accept": "application/json"}, timeout=60)
        for number, frame in enumerate(answer.json()["frames"]):
            scrub.fill(str(number))
            expect(counted).to_contain_text(f"Frame {number + 1} of {steps + 1}: after step {number}, ")
            np.testing.assert_array_equal(pixels(page.picture("#x_t img")), pixels(base64.b64decode(frame["x_t"])))

    page.make(**asked, seed=2)  # the job may have ended before its events are asked for
    check(2)
    page.tab.reload()
    page.wait_until(DONE)
    check(2)
    page.refuse("/events", 503)  # as a proxy that lets none through
    page.make(**asked, seed=5)
    check(5)


# --- jobs ---


def test_the_calls_of_a_result_make_it_again(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page()
    page.make(class_label="bag", sampler="dpmpp_2m", steps=10, n=2, seed=2**64 - 1, guidance=1)
    final = page.picture("#gallery img")
    assert len(final) > 1000
    for run, kind in ((run_shell, "curl"), (run_python, "python")):
        run(page.at(f"#{kind}").text_content(), tmp_path)
        assert (tmp_path / "out.png").read_bytes() == final
        (tmp_path / "out.png").unlink()
    with page.tab.expect_download() as download:
        page.tab.get_by_role("button", name="All as a zip").click()
    assert download.value.suggested_filename == f"tminus-{2**64 - 1}.zip"
    with zipfile.ZipFile(download.value.path()) as archive:
        images = [pixels(archive.read(name)) for name in archive.namelist()]
    np.testing.assert_array_equal(np.concatenate(images, axis=1), pixels(final))
    with page.tab.expect_download() as download:
        page.tab.get_by_role("link", name="PNG").click()
    assert download.value.path().read_bytes() == final


def test_a_job_is_cancelled_or_goes_on_if_that_fails_and_another_begun(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    page.hear_status()
    page.refuse(r"/cancel$", 503)
    slow_down(server)
    page.sample(**LONG)
    expect(page.at("#progress-text")).to_have_text(re.compile(r" (s|min) left$"))
    page.press("Cancel")
    expect(page.at("#error")).to_have_text("It could not be cancelled: the server answered 503.")
    assert "Cancelling failed." in page.heard()
    page.wait_until("Running.")
    page.tab.unroute(re.compile(r"/cancel$"))
    page.cancel()
    expect(page.at("#progress-text")).to_have_text(re.compile(r"^Step \d+ of 1000, t = \d+$"))
    server.wait_until(lambda: server.metric("tminus_rows_active") == 0)
    page.make(steps=5, n=1, sampler="ddim", seed="")
    page.has(1, "#gallery img")
    seed = re.search(r"seed (\d+)\.$", page.at("#caption").text_content())
    made = page.picture("#gallery img")
    page.sample(seed="00" + seed[1])
    page.has(2, "#gallery img")
    assert page.picture("#gallery li:first-child img") == made, "the seed that was drawn makes it again"


def test_a_job_that_waits_says_how_many_are_ahead(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    with ThreadPoolExecutor(10) as pool:
        slow_down(server)
        short = [pool.submit(server.post, json={"n": 8, "steps": 150, "seed": k}) for k in range(5)]
        server.wait_until(lambda: server.metric("tminus_rows_waiting") > 20)
        page.sample(**LONG)
        page.wait_until(re.compile(r"^Waiting: \d jobs? ahead, done in about "))
        page.cancel()
        server.speed_up()
        assert {each.result().status_code for each in short} == {200}


def test_an_error_is_shown_where_it_arose_and_what_was_made_stays(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page()
    file = tmp_path / "grey.png"
    Image.new("L", (32, 32), 128).save(file)
    page.tab.evaluate("() => document.getElementById('form').noValidate = true")  # or the browser would say it first
    page.sample(steps=5, n=65)
    page.says("#error", "n must be an integer in 1..64, got 65")
    expect(page.at("[name=n]")).to_have_attribute("aria-invalid", "true")
    expect(page.at("[name=n]")).to_be_focused()
    page.make(steps=5, n=1)
    expect(page.at("#error")).to_be_empty()
    assert page.at("#progress").evaluate("(bar) => bar.value") == 1
    # However long the value is, it stays within the error that names it.
    page.sample(**QUICK | {"seed": "9" * 1000})
    page.give(file)
    page.at("#noise-seed").fill("9" * 1000)
    page.tab.keyboard.press("Tab")
    for name in ("error", "noise-error"):
        box = page.at(f"#{name}")
        expect(box).to_contain_text(re.compile(rf"seed must be an integer in 0..{2**64 - 1}, got '9{{69}}….$"))
        assert box.evaluate("(box) => box.scrollWidth <= box.clientWidth")
    page.wait_until("Not started.")
    assert page.picture("#x_t img") == page.picture("#gallery img")
    page.says("#frame-text", "after step 5")
    # A wrong value in the folded part of the form unfolds it.
    page.tab.evaluate("() => document.getElementById('form').noValidate = false")
    page.fill(n=999)
    page.at("#more summary").click()
    expect(page.at("[name=n]")).to_be_hidden()
    page.press("Sample")
    expect(page.at("[name=n]")).to_be_focused()


def test_a_running_job_stays_in_sight_while_others_are_looked_at_or_asked_for(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    page.make(**QUICK)
    slow_down(server, between_ticks_s=SELDOM_S)
    page.sample(**ENDING)
    page.wait_for_step()
    page.says("#caption", "2 × t-shirt, 250 steps of ddpm")
    page.press("Image 2 of 2")
    page.has(1, "#x_t .tile:visible")
    page.at("#x_t .tile:visible").press("Escape")
    page.has(2, "#x_t .tile:visible")
    page.has(2, "#gallery button")
    page.at("#gallery button").last.click()
    page.wait_until(DONE)
    page.says("#caption", "5 steps of ddim")
    page.at("#gallery button").first.click()
    page.wait_for_step()
    page.tab.go_back()
    page.wait_until(DONE)
    page.says("#caption", "5 steps of ddim")
    page.at("#gallery button").first.click()
    page.wait_for_step()
    first = page.job_id
    page.tab.evaluate("() => document.getElementById('form').noValidate = true")
    page.sample(n=65)
    page.says("#error", "n must be an integer in 1..64, got 65")
    page.wait_until("Running.")  # what is refused takes the place of nothing
    assert page.job_id == first
    page.make(**QUICK | {"seed": 2})
    page.says("#caption", "seed 2")
    expect(page.at("#error")).to_be_empty()
    page.has(3, "#gallery button")
    assert httpx.get(f"{server.url}/jobs/{first}").json()["state"] == "running"
    server.speed_up()
    page.has(3, "#gallery img")  # it has ended out of sight
    page.says("#caption", "seed 2")


def test_slider_strip_and_title_say_how_far_a_job_is_seen_or_not(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    expect(page.tab).to_have_title("tminus: small")
    slow_down(server, between_ticks_s=0.04)
    page.sample(**ENDING)
    page.has(3, "#strip button")
    place, slider = page.tab.evaluate(
        """() => { const scrub = document.getElementById("scrub");
        const cell = document.querySelector("#strip [aria-current]");
        return [Number(cell.style.getPropertyValue("--place")), scrub.value / scrub.max]; }"""
    )
    assert abs(place - slider) < 1 / 9, "of ten cells, the nearest is marked"
    page.at("#scrub").press("Home")
    page.says("#frame-text", "Frame 1 of")
    for key, number in (("ArrowRight", 2), ("ArrowUp", 3), ("ArrowDown", 2), ("ArrowLeft", 1)):
        page.at("#scrub").press(key)
        page.says("#frame-text", f"Frame {number} of")
    expect(page.tab).to_have_title(re.compile(r"^[1-9]\d? % tminus: small$"))
    page.look_elsewhere(True)
    before = page.tab.title()
    expect(page.tab).not_to_have_title(before)
    expect(page.tab).to_have_title(re.compile(r"^[1-9]\d? % tminus: small$"))
    server.speed_up()
    page.wait_until(DONE)
    expect(page.tab).to_have_title("tminus: small")
    page.look_elsewhere(False)
    page.sample(**LONG | {"seed": 2})
    expect(page.tab).to_have_title(re.compile("^[1-9]"))
    page.cancel()
    expect(page.tab).to_have_title("tminus: small")


def test_a_reload_in_mid_job_finds_it_again_and_keeps_the_results(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    page.make(class_label="bag", steps=5, n=1, sampler="ddim", seed=3, guidance=1)
    slow_down(server, between_ticks_s=SELDOM_S)
    page.sample(class_label="sneaker", steps=250, n=4, sampler="ddpm", seed=2**63 + 1, guidance=1)
    page.wait_for_step()
    form = page.form
    before = int(re.search(r"Step (\d+)", page.at("#progress-text").text_content())[1])
    page.tab.reload()
    page.wait_for_step()
    assert int(re.search(r"Step (\d+)", page.at("#progress-text").text_content())[1]) > before
    assert page.form == form
    assert form["seed"] == str(2**63 + 1)
    server.speed_up()
    page.wait_until(DONE)
    page.has(2, "#gallery img")
    spec = {"class_label": 7, "sampler": "ddpm", "steps": 250, "n": 4, "seed": 2**63 + 1}
    assert page.picture("#gallery li:first-child img") == server.post(json=spec).content
    page.tab.reload()
    page.wait_until(DONE)
    page.has(2, "#gallery img")
    page.tab.goto(f"{server.url}/#job={'0' * 32}")
    page.says("#error", "cannot be shown: no job")


def test_a_server_that_was_killed_in_mid_job_is_found_again_with_the_job(
    browser: Any, own_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    server = own_server(TMINUS_STATE_DIR=str(tmp_path))
    port = server.url.rpartition(":")[2]
    page = Page(browser, server.url)
    expect(page.at("#models-field")).to_be_hidden()  # it has one model
    expect(page.tab).to_have_title("tminus")
    for width, height in ((390, 844), (360, 740), (1280, 800)):
        page.tab.set_viewport_size({"width": width, "height": height})
        expect(page.at("#x_t")).to_be_in_viewport(ratio=1)
        expect(page.at("#go")).to_be_in_viewport(ratio=1)
        expect(page.at("[name=steps]")).to_be_hidden()
    server.slow_down(SELDOM_S)
    page.sample(steps=250, n=2, sampler="ddpm", class_label="bag", seed=6, guidance=1)
    page.wait_for_step()
    server.process.kill()
    page.wait_until("No connection. Trying again…")
    page.tab.evaluate(
        "() => { window.unloaded = false; addEventListener('beforeunload', () => window.unloaded = true) }"
    )
    server = own_server("--port", port, TMINUS_STATE_DIR=str(tmp_path))
    page.wait_until(DONE)
    assert not page.tab.evaluate("() => window.unloaded"), "the same page all the time"
    spec = {"steps": 250, "n": 2, "sampler": "ddpm", "class_label": "bag", "seed": 6}
    assert page.picture("#gallery img") == server.post(json=spec).content
    server.process.kill()
    server.process.wait(30)
    page.sample()
    page.says("#error", "The server did not answer")
    expect(page.tab.get_by_role("button", name="Sample")).to_have_attribute("aria-disabled", "false")
    page.context.close()


def test_a_job_whose_answer_is_lost_is_had_by_asking_again_and_is_one(
    open_page: OpenPage, server: RunningServer
) -> None:
    page, before = open_page(), job_ids(server)
    drawn = QUICK | {"seed": ""}
    page.hear_status()
    page.lose_answers(POSTED, count=2)
    page.make(**drawn)
    assert "No answer. Trying again…" in page.heard()
    assert len(job_ids(server) - before) == 1
    page.tab.evaluate("() => { location.hash = ''; }")
    page.lose_answers(POSTED)
    page.sample(**drawn)
    page.says("#error", "The server did not answer")
    page.tab.unroute(re.compile(POSTED))
    page.refuse(POSTED, 503)
    page.press("Sample")
    page.says("#error", "the server answered 503")
    page.tab.unroute(re.compile(POSTED))
    page.tab.reload()
    page.wait_until("Press Sample to make your own.")
    page.make(**drawn)
    expect(page.at("#error")).to_be_empty()
    assert len(job_ids(server) - before) == 2, "the one after is another"


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_reload_before_the_answer_finds_the_job(
    open_page: OpenPage, server: RunningServer, cancelled: bool, slow_down: SlowDown
) -> None:
    page, before, seen = open_page(), job_ids(server), []
    page.tab.route(re.compile(POSTED), lambda route: seen.append(route.fetch().json()["id"]))  # and no answer
    slow_down(server)
    page.sample(**LONG)
    page.go_on_until(lambda: job_ids(server) != before)
    page.wait_until("Sending…")
    if cancelled:
        page.press("Cancel")
        page.wait_until("Cancelling…")
    page.tab.unroute(re.compile(POSTED))
    page.tab.reload()
    if not cancelled:
        page.wait_for_step()
        page.press("Cancel")
    page.wait_until("Cancelled.")
    assert {page.job_id} == job_ids(server) - before == set(seen)
    assert {name: page.form[name] for name in LONG} == {name: str(value) for name, value in LONG.items()}


def test_nothing_waits_for_earlier_results_and_they_stay_until_the_server_has_forgotten_them(
    open_page: OpenPage, server: RunningServer
) -> None:
    page = open_page()
    for seed in (1, 2, 3):
        page.sample(**QUICK | {"seed": seed, "n": 2})
        page.has(seed, "#gallery img")
    held: list[Any] = []
    page.tab.route(re.compile(r"/image$"), lambda route: held.append(route), times=1)
    page.tab.evaluate(  # away from the job in the address; the page is told of that by an event
        """() => new Promise((told) => {
            addEventListener("hashchange", told, {once: true});
            location.hash = "";
        }).then(() => null)"""
    )
    page.tab.reload()
    page.go_on_until(lambda: len(held) == 1)
    page.make(**QUICK | {"seed": 4, "n": 2})
    page.has(1, "#gallery img")
    held[0].continue_()
    page.has(4, "#gallery img")

    def seeds() -> list[str]:
        titles = page.at("#gallery button").evaluate_all("(buttons) => buttons.map((button) => button.title)")
        return [re.search(r"seed (\d+)$", title)[1] for title in titles]

    assert seeds() == ["4", "3", "2", "1"]
    page.tab.reload()
    page.has(4, "#gallery img")
    assert seeds() == ["4", "3", "2", "1"]

    for pattern, which in ((r"/image$", "3 earlier results"), (r"/jobs/\w+$", "4 earlier results")):
        page.refuse(pattern, 503)
        page.tab.reload()
        page.says("#results-error", f"{which} could not be fetched: the server answered 503.")
        page.tab.unroute(re.compile(pattern))
    page.tab.reload()
    page.has(4, "#gallery img")
    expect(page.at("#results-error")).to_be_empty()
    httpx.delete(f"{server.url}/jobs/{page.job_id}")
    page.press("All as a zip")
    expect(page.at("#made-error")).to_contain_text("The zip could not be fetched: no job")
    page.tab.reload()
    page.says("#error", "cannot be shown: no job")
    page.has(3, "#gallery img")
    expect(page.at("#results-error")).to_be_empty()


def test_a_job_whose_events_are_refused_is_looked_at_until_they_are_there_again_or_it_ends(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    page.refuse(EVENTS, 429)
    page.make(**QUICK)
    slow_down(server)
    page.sample(**LONG | {"n": 6})
    seen = re.compile(r"^Step [1-9]\d* of 1000, [\d.]+ (s|min) left$")
    expect(page.at("#progress-text")).to_have_text(seen)
    page.wait_until("Running. There are no frames at the moment.")
    page.tab.unroute(re.compile(EVENTS))
    page.says("#frame-text", re.compile(r"Frame \d+ of \d+"))
    page.wait_until("Running.")
    page.cancel()


def test_a_job_that_others_end_or_forget_or_that_fails_is_told_how(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    slow_down(server)
    page.tab.goto(f"{server.url}/#job={post_job(server, **LONG)}")
    page.wait_for_step()
    cancel_job(server, page.job_id)
    page.wait_until("Cancelled.")
    page.tab.goto(f"{server.url}/#job={post_job(server, **LONG)}")
    page.wait_until("Running.")
    page.look_elsewhere(True)
    cancel_job(server, page.job_id)
    page.wait_until("Cancelled.")
    page.look_elsewhere(False)
    page.sample(**LONG)
    page.wait_for_step()
    page.look_elsewhere(True)
    httpx.delete(f"{server.url}/jobs/{page.job_id}")
    page.look_elsewhere(False)
    page.wait_until("The server no longer has this job.")
    page.says("#error", "no job")
    slow_down(server, between_ticks_s=3.0)
    slow = LONG | {"steps": 10}  # it takes 30 s, and by the ticks that were measured it seems quick
    first = httpx.post(f"{server.url}/jobs", json=slow).json()
    cancel_job(server, first["id"])
    page.tab.goto(f"{server.url}/#job={post_job(server, **slow, deadline_s=1 + first['eta_s'])}")
    page.wait_until("Not done.")
    page.says("#error", "deadline_s")
    server.speed_up()
    page.make(**QUICK)


def test_tabs_that_nobody_sees_leave_the_connections_to_others(
    open_page: OpenPage, browser: Any, server: RunningServer, slow_down: SlowDown
) -> None:
    slow_down(server)
    address = f"{server.url}/#job={post_job(server, **LONG)}"
    pages = [open_page(address)]
    for _ in range(6):  # a browser has six connections for all of them
        pages[-1].wait_for_step()
        pages[-1].look_elsewhere(True)
        pages.append(open_page(address, into=pages[0].context))
    pages[-1].wait_for_step()
    pages[-1].look_elsewhere(True)
    old = step_of(pages[0])
    pages[0].look_elsewhere(False)
    expect(pages[0].at("#progress-text")).not_to_have_text(re.compile(rf"^Step {old} "))
    shown = pages[0].at("#frame-text").text_content()
    expect(pages[0].at("#frame-text")).not_to_have_text(shown)
    assert step_of(pages[0]) > old, "it goes on from there"
    cancel_job(server, address.rpartition("=")[2])
    pages[0].wait_until("Cancelled.")
    pages[1].wait_until("Cancelled.")


def step_of(page: Page) -> int:
    return int(re.search(r"^Step (\d+) of", page.at("#progress-text").text_content())[1])


COUNT_URLS = """() => { window.urls = new Map(); const {createObjectURL, revokeObjectURL} = URL;
    URL.createObjectURL = (b) => { const u = createObjectURL.call(URL, b); window.urls.set(u, b.size); return u; };
    URL.revokeObjectURL = (u) => { window.urls.delete(u); revokeObjectURL.call(URL, u); }; }"""


def test_frames_are_let_go_with_the_next_job_and_bounded_by_what_they_take(open_page: OpenPage) -> None:
    page = open_page()
    page.tab.evaluate(COUNT_URLS)
    for results in (1, 2):
        page.sample(steps=20, n=1, sampler="ddim", seed=results)
        page.has(results, "#gallery img")
        frames = "(Number(document.querySelector('#scrub').max) + 1)"  # the last ones may still be on their way
        # Beside them and the results there may be one of the forward process, which follows the player.
        page.tab.wait_for_function(f"() => [0, 1].includes(window.urls.size - 2 * {frames} - {results})")
    for number in (1, 2):
        assert page.picture(f"#gallery li:nth-child({number}) img")
    # Also for somebody who looks back at the third of them.
    page.tab.evaluate(
        """async () => { const {addFrame, clearFrames} = await import('/page/film.js');
        const scrub = document.getElementById('scrub');
        window.most = 0;
        clearFrames();
        window.urls.clear();
        for (let step = 1; step <= 30; step++) {
          addFrame({step, steps: 30, t: 30 - step}, {x_t: new Blob([new Uint8Array(5e6)])});
          addFrame({step, steps: 30, t: 30 - step}, {x_0: new Blob([new Uint8Array(5e6)])});
          window.most = Math.max(window.most, [...window.urls.values()].reduce((a, b) => a + b));
          if (step === 6) { scrub.value = 3; scrub.dispatchEvent(new Event('input')); }
        } }"""
    )
    assert page.tab.evaluate("() => window.most") <= 100e6
    page.says("#frame-text", "after ")
    page.at("#scrub").press("End")
    page.says("#frame-text", "after step 30, t = 0")


@pytest.mark.parametrize(("width", "n"), [(360, 4), (1280, 8)])
def test_nothing_moves_when_a_job_begins_nor_while_it_runs(open_page: OpenPage, width: int, n: int) -> None:
    page = open_page(viewport={"width": width, "height": 720})
    page.fill(n=n, steps=60, sampler="ddpm", seed=1)
    page.tab.evaluate(
        """() => { scrollTo(0, 0);
        const parts = [...document.querySelectorAll(
            'main > :not(#results), .first > *, #watch > *, #schedule > *, #noise > *')];
        window.places = parts.map((part) => ({name: part.id || part.tagName, highest: Infinity, lowest: -Infinity}));
        const look = () => { parts.forEach((part, i) => { const y = part.getBoundingClientRect().top + scrollY;
            places[i].highest = Math.min(places[i].highest, y); places[i].lowest = Math.max(places[i].lowest, y); });
          requestAnimationFrame(look); }; look(); }"""
    )
    page.press("Sample")
    page.wait_until(DONE)
    if width == 360:  # it has scrolled to what can be seen of it
        expect(page.at("#status")).to_be_in_viewport()
        expect(page.at("#x_t")).to_be_in_viewport(ratio=1)
    else:
        assert page.tab.evaluate("() => scrollY") == 0
    page.tab.evaluate(
        """() => { document.getElementById('status').textContent = 'Waiting: 12 jobs ahead, done in about 1.3 min.';
        return new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))); }"""
    )
    moved = page.tab.evaluate("() => places.filter((place) => place.lowest - place.highest >= 1)")
    assert not moved  # by less than a pixel it may seem so: the page also scrolls


# --- the form, links and recipes ---


def test_the_form_begins_with_what_is_recommended_or_a_job_was_asked_for_and_suggests_steps(
    open_page: OpenPage, server: RunningServer
) -> None:
    page = open_page()
    recommended = httpx.get(f"{server.url}/model").json()["recommended"]
    assert recommended == {"sampler": "dpmpp_2m", "steps": 20, "guidance": 1.5}
    assert {name: page.form[name] for name in recommended} == {name: str(value) for name, value in recommended.items()}
    page.make()
    job = httpx.get(f"{server.url}/jobs/{page.job_id}").json()
    assert {name: job["parameters"][name] for name in recommended} == recommended
    for sampler, steps in {"ddpm": "100", "ddim": "50", "dpmpp_2m": "20"}.items():
        page.fill(sampler=sampler)
        assert page.form["steps"] == steps
    page.fill(steps=33)
    for sampler in ("ddpm", "ddim"):
        page.fill(sampler=sampler)
        assert page.form["steps"] == "33"
    for labels, value, guidance in (([1, 2], "1,2", "1"), (None, "", "1.5")):
        spec = {"n": 2, "steps": 20, "sampler": "dpmpp_2m", "seed": 4}
        job = post_job(server, **spec, **({"class_label": labels} if labels else {}))
        page.tab.goto(f"{server.url}/#job={job}")
        page.tab.reload()
        page.wait_until(DONE)
        assert page.form == {
            "class_label": value, "sampler": "dpmpp_2m", "steps": "20", "guidance": guidance, "n": "2", "seed": "4",
        }  # fmt: skip
        page.fill(sampler="ddim")
        assert page.form["steps"] == "50", "20 was what was suggested"


def test_a_job_is_as_good_as_its_seconds_allow_where_there_is_a_choice(
    open_page: OpenPage, bundled_server: RunningServer
) -> None:
    expect(open_page().at("#adaptive-field")).to_be_hidden()
    page = open_page(bundled_server.url)
    best = httpx.get(f"{bundled_server.url}/model").json()["ladder"][0]
    page.make(n=1, seed=5, sampler="ddim", steps=3, deadline_s=3600)
    job = httpx.get(f"{bundled_server.url}/jobs/{page.job_id}").json()
    assert (job["sampler"], job["parameters"]["steps"], job["seed"]) == (best["sampler"], best["steps"], 5)
    page.says("#caption", f"{best['steps']} steps of {best['sampler']}, seed 5")
    page.sample(deadline_s=0.001)
    expect(page.at("#error")).to_contain_text("deadline_s must be at least")
    page.make(deadline_s="", sampler="ddim", steps=3)
    assert httpx.get(f"{bundled_server.url}/jobs/{page.job_id}").json()["parameters"]["steps"] == 3


def test_a_user_samples_and_goes_on_from_what_was_made(open_page: OpenPage, server: RunningServer) -> None:
    page, held, models = open_page(), [], []
    page.tab.route(re.compile(r"/sample\?"), lambda route: held.append(route))
    page.tab.route(re.compile(r"/model$"), lambda route: models.append(route))
    page.tab.reload()
    page.go_on_until(lambda: bool(models))
    focus = "() => { const s = document.querySelector('[name=steps]'); s.focus(); return s.matches(':focus'); }"
    assert not page.tab.evaluate(focus), "what the model recommends would be written over a choice"
    models[0].continue_()
    page.open_more()
    page.go_on_until(lambda: bool(held) and page.tab.evaluate(focus))
    page.make(steps=5, n=1, sampler="ddim", seed=1)
    picture = page.picture("#x_t img")
    held[0].abort()
    assert page.picture("#x_t img") == picture == page.picture("#gallery img")
    page.lost = "net::ERR_FAILED"
    page.tab.unroute_all()

    page.make(n=1, steps=5, sampler="ddim", seed=2)
    page.has(2, "#gallery img")
    page.at("#gallery button").last.click()
    page.says("#caption", "seed 1.")
    page.wait_until(DONE)
    expect(page.at("#gallery button").last).to_have_attribute("aria-current", "true")
    page.has(1, "#gallery [aria-current]")
    assert page.picture("#x_t img") == page.picture("#gallery li:last-child img")
    assert page.form["seed"] == "1"

    for width in (390, 1280):
        page.tab.set_viewport_size({"width": width, "height": 800})
        for section in ("film", "batch"):
            page.at(f"#{section}").scroll_into_view_if_needed()
            results, other = (page.at(selector).bounding_box() for selector in ("#results", f"#{section}"))
            assert results["y"] + results["height"] <= other["y"]
        boxes = [page.at(selector).bounding_box() for selector in ("#form", "#beside", "#results")]
        assert len({(box["x"], box["width"]) for box in boxes}) == 1

    asked = {"n": 3, "steps": 6, "sampler": "ddim", "seed": 5, "class_label": "bag", "guidance": 1}
    page.make(**asked)
    spec = asked | {"class_label": 8}
    assert downloaded(page) == server.post(json=spec).content
    expect(page.at("#vary")).to_be_hidden()
    page.press("Image 2 of 3")
    page.has(1, "#x_t .tile:visible")
    alone = spec | {"n": 1, "index": 1}
    expect(page.at("#png")).to_have_attribute("download", "tminus-5-2.png")
    assert downloaded(page) == server.post(json=alone).content
    page.says("#caption", "bag, 6 steps of ddim, seed 5, index 1.")
    page.says("#curl", '"index":1')
    np.testing.assert_array_equal(shown_pixels(page), pixels(server.post(json=alone).content))
    link = httpx.QueryParams(copied_by(page, page.at("#share")).partition("#")[2])
    assert link == httpx.QueryParams({name: value for name, value in alone.items() if name != "guidance"})
    page.at("#scrub").fill("3")  # on its way it is large too, and there is nothing to take
    page.has(1, "#x_0 .tile:visible")
    expect(page.at("#made")).to_be_hidden()
    page.at("#scrub").press("End")
    page.press("All 3")
    page.has(3, "#x_t .tile:visible")
    assert downloaded(page) == server.post(json=spec).content

    page.make(n=2, steps=8, sampler="ddim", seed=5, class_label="bag", guidance=1)
    page.press("Another seed")
    page.has(5, "#gallery img")
    page.wait_until(DONE)
    parameters = httpx.get(f"{server.url}/jobs/{page.job_id}").json()["parameters"]
    assert (parameters["n"], parameters["steps"], parameters["class_label"]) == (2, 8, [8, 8])
    assert parameters["seed"] != 5
    page.press("Image 2 of 2")
    chosen = shown_pixels(page)
    page.press("Edit this")
    page.says("#noise-name", "The image above. Paint")
    expect(page.at("#canvas")).to_be_in_viewport()
    page.at("#noise-t").fill("0")
    page.wait_for_picture("#noise-image", noised(server, png_of(chosen), page))
    page.press("Variation")
    page.has(6, "#gallery img")
    page.wait_until(DONE)
    job = httpx.get(f"{server.url}/jobs/{page.job_id}").json()
    assert (job["parameters"]["strength"], job["parameters"]["n"], job["parameters"]["class_label"]) == (0.6, 2, [8, 8])
    page.says("#caption", "from a picture")

    page.make(steps=5, n=2, sampler="ddim", seed=3)
    page.tab.goto(f"{server.url}/#{httpx.QueryParams(OPENING | {'class_label': 8})}")
    page.wait_for_picture("#x_t img", server.post(json=OPENING | {"class_label": 8}).content)
    page.wait_until("Press Sample to make your own.")
    page.says("#caption", "bag, 20 steps of dpmpp_2m")

    held.clear()
    asked_before = len(page.requests)
    expect(page.at("#noise-image")).to_be_visible()
    page.fill(n=1, steps=5, sampler="ddim")
    page.tab.route(re.compile(POSTED), lambda route: held.append(route))
    page.tab.evaluate(  # and have a blob read after those of the edits
        """() => { ['edit', 'edit', 'go', 'go'].forEach((id) => document.getElementById(id).click());
        return new Blob(['later']).arrayBuffer().then(String); }"""
    )
    page.go_on_until(lambda: bool(held))
    held[0].continue_()
    page.wait_until(DONE)
    assert [url for url in page.requests[asked_before:] if url.endswith("/jobs")] == [f"{server.url}/jobs"]
    page.has(8, "#gallery img")


def downloaded(page: Page) -> bytes:
    """What the link beside the image gives."""
    expect(page.at("#png[href]")).to_be_visible()
    with page.tab.expect_download() as download:
        page.at("#png").click()
    return download.value.path().read_bytes()


def shown_pixels(page: Page) -> Any:
    """The image of the tile that is to be seen, by what its place in the sheet is."""
    place = page.at("#x_t .tile:visible").evaluate(
        """(tile) => { const image = tile.querySelector("img"), [box, frame] = [image, tile.querySelector(".crop")].map(
        (each) => each.getBoundingClientRect()); const scale = image.naturalWidth / box.width;
        return [(frame.left - box.left) * scale, (frame.top - box.top) * scale, frame.width * scale]; }"""
    )
    left, top, width = map(round, place)
    return pixels(page.picture("#x_t img"))[top : top + width, left : left + width]


ALL_OF_IT = {
    "n": 2, "steps": 12, "sampler": "ddim", "eta": 0.5, "seed": 2**64 - 1, "index": 3, "class_label": [1, 2],
    "to_seed": 2**64 - 2, "mix": 0.25,
    "guidance": 2.5, "guidance_interval": [100, 800], "guidance_rescale": 0.5, "timestep_spacing": "trailing",
    "clip": False,
}  # fmt: skip


def test_a_link_opens_with_what_it_says_unless_that_costs_much_or_is_nonsense(
    open_page: OpenPage, server: RunningServer
) -> None:
    query = httpx.QueryParams(ALL_OF_IT | {"clip": "false"})
    page = open_page(f"{server.url}/#{query}")
    expect(page.at("body")).to_have_attribute("data-opening", "shown")
    picture = server.post(json=ALL_OF_IT).content
    page.wait_for_picture("#x_t img", picture)
    address = copied_by(page, page.at("#link"))
    assert httpx.QueryParams(address.partition("#")[2]) == query
    page.make()
    assert page.picture("#gallery img") == picture
    other = open_page(copied_by(page, page.at("#share")))
    other.wait_for_picture("#x_t img", picture)

    steps = server.metric("tminus_row_steps_total")
    page = open_page(f"{server.url}/#n=64&steps=1000&sampler=ddpm&seed=1")
    page.says("#caption", "Press Sample to see the result.")
    assert page.form["steps"] == "1000"
    for link in ("steps=x&sampler=ddim&seed=1", "steps=5&sampler=%3Cimg%3E&seed=1"):
        page.tab.goto(f"{server.url}/?{link}#{link}")
        expect(page.at("body")).to_have_attribute("data-opening", "absent")
        page.says("#caption", "The sample of this link cannot be made: ")
    assert server.metric("tminus_row_steps_total") == steps


def test_a_png_restores_its_recipe_where_it_has_one_and_nothing_else(
    open_page: OpenPage, server: RunningServer, tmp_path: Path
) -> None:
    page, file, made = open_page(), tmp_path / "made.png", server.post(json=ALL_OF_IT).content
    file.write_bytes(made)
    page.give(file)
    page.says("#recipe-text", "It was made by this model and this build.")
    page.press("Make it again")
    expect(page.at("#recipe-answer")).to_have_text("The same, byte for byte. The build is the same.")
    page.make()
    assert page.picture("#gallery img") == made

    with Image.open(io.BytesIO(server.post(json=OPENING).content)) as image:
        image.load()
        recipe, changed = image.text["tminus"], np.asarray(image).copy()  # type: ignore[attr-defined]
    for change, said in (
        (0, "The same pixels, but the bytes of the file differ."),
        (9, "pixels differ by up to 9 of 255."),
    ):
        changed[0, 0] = changed[0, 0] + change if changed[0, 0] < 128 else changed[0, 0] - change
        file = tmp_path / f"changed-by-{change}.png"  # of another name, or the browser sees nothing new
        save_with(file, changed, recipe)
        page.give(file)
        page.press("Make it again")
        page.says("#recipe-answer", said)
    file = tmp_path / "other.png"
    save_with(file, changed, recipe.replace('"weights": "', '"weights": "0'))
    page.give(file)
    page.says("#recipe-text", "It was made by another model, or other weights")

    # A file is looked at only within bounds.
    size_and_read = """async () => { let read = false;
        const arrayBuffer = async () => { read = true; return new ArrayBuffer(0); };
        const { offer } = await import('./page/recipe.js');
        return [await offer({ size: 2 ** 26, name: 'large', arrayBuffer }, {}), read]; }"""
    assert page.tab.evaluate(size_and_read) == [False, False]
    file = tmp_path / "bomb.png"
    file.write_bytes(made[:16] + (60_000).to_bytes(4, "big") * 2 + made[24:])
    page.give(file)
    page.press("Make it again")
    page.says("#recipe-answer", "Not the same: the sizes differ.")

    file = tmp_path / "crafted.png"
    spec = {"sampler": "ddim", "n": 1, "steps": 5, "seed": 3, "eta": 0.5, "guidance": 1}
    spec |= {"class_labels": [2], "table": None}
    crafted = spec | {"image": "AAAA", "mask": "AAAA", "deadline_s": 1, "webhook": "http://127.0.0.1/", "strength": 0.5}
    save_with(file, np.zeros((8, 8), np.uint8), json.dumps({"spec": crafted}))
    page.give(file)
    with page.tab.expect_request(lambda request: request.method == "POST" and "/sample" in request.url) as asked:
        page.press("Make it again")
    assert asked.value.post_data_json == {
        "sampler": "ddim", "n": 1, "steps": 5, "seed": 3, "class_label": 2, "eta": 0.5, "guidance": 1,
    }  # fmt: skip
    page.says("#recipe-answer", "Not the same: the sizes differ.")
    other = tmp_path / "magic.png"
    save_with(other, np.zeros((8, 8), np.uint8), json.dumps({"spec": spec | {"sampler": "<b>magic</b>"}}))
    page.give(other)
    page.says("#recipe-text", "This model has no sampler <b>magic</b>.")
    expect(page.at("#again")).to_be_disabled()

    made = server.post(json=OPENING).content
    grey = np.full((32, 32), 128, np.uint8)
    page.tab.evaluate("() => document.getElementById('recipe').hidden = false")
    for number, text in enumerate(NO_RECIPES):
        file = tmp_path / f"grey-{number}.png"
        save_with(file, grey, text)
        page.give(file)
        page.wait_for_picture("#noise-image", noised(server, file.read_bytes(), page))
        expect(page.at("#recipe")).to_be_hidden()
    for number, broken in enumerate((made[:60], made[:8] + b"\xff\xff\xff\xffiTXt" + made[16:], made[:8])):
        file = tmp_path / f"broken-{number}.png"
        file.write_bytes(broken)
        page.give(file)
        expect(page.at("#noise-name")).to_have_text(file.name)
        page.says("#noise-error", "image")
        expect(page.at("#recipe")).to_be_hidden()


def save_with(file: Path, pixels: np.ndarray, text: str) -> None:
    info = PngInfo()
    info.add_itxt("tminus", text)
    Image.fromarray(pixels).save(file, pnginfo=info, compress_level=1)


NO_RECIPES = (
    "{", "[]", '{"spec": 5}', '{"noise": {}}', '{"spec": {"sampler": "ddim", "class_labels": 5}}',
    json.dumps({"spec": {"sampler": "ddim", "class_labels": [1] * 65}}),
)  # fmt: skip


def test_classes_whose_names_are_numbers_are_those_that_the_page_shows(
    open_page: OpenPage, server: RunningServer, tmp_path: Path
) -> None:
    page = open_page(f"{server.url}/models/numbers/")
    expect(page.at("#caption")).not_to_contain_text("class_label")  # that the opening is refused for
    page.make(class_label="2", sampler="ddim", steps=3, n=1, seed=5, guidance=1)
    spec = {"sampler": "ddim", "steps": 3, "n": 1, "seed": 5}
    made = {
        label: sampled(server, "numbers", **spec, class_label=label) for label in ("name:2", "number:1", "number:2")
    }
    assert page.picture("#gallery img") == made["name:2"] == made["number:1"] != made["number:2"]
    page.says("#curl", '"class_label":"number:1"')
    file = tmp_path / "again.png"
    file.write_bytes(made["name:2"])
    page.give(file)
    page.says("#recipe-text", "It was made by this model and this build.")
    assert page.form["class_label"] == "1", "the second"
    page.press("Make it again")
    page.says("#recipe-answer", "The same, byte for byte.")


# --- one's own picture ---


def noised(server: RunningServer, picture: bytes, page: Page) -> bytes:
    """The picture at the timestep that the page shows."""
    query = {"t": page.at("#noise-t").input_value(), "seed": 0}
    return httpx.post(f"{server.url}/noise", params=query, files={"image": picture}).content


def test_an_image_is_shown_through_the_forward_process_at_any_t(
    open_page: OpenPage, server: RunningServer, tmp_path: Path
) -> None:
    page, file = open_page(), tmp_path / "bag.png"
    file.write_bytes(server.post(params={"steps": 20, "sampler": "ddim", "class_label": "bag", "seed": 1}).content)
    page.give(file)

    def noised(t: int, seed: int) -> bytes:
        return httpx.post(
            f"{server.url}/noise", params={"t": t, "seed": seed}, files={"image": file.read_bytes()}
        ).content

    for t in (0, 500, 999):
        page.at("#noise-t").fill(str(t))
        expect(page.at("#noise-image")).to_have_attribute("alt", f"The image at t = {t}")
        assert page.picture("#noise-image") == noised(t, 0)
        page.says("#chart-text", f"At t = {t}:")
    page.at("#noise-seed").fill("8")
    page.tab.keyboard.press("Tab")
    page.at("#noise-t").fill("100")
    expect(page.at("#noise-image")).to_have_attribute("alt", "The image at t = 100")
    page.wait_for_picture("#noise-image", noised(100, 8))
    # Dropped on the page, and not an image at all.
    page.tab.evaluate(
        """() => { const given = new DataTransfer();
        given.items.add(new File(['<svg xmlns="http://www.w3.org/2000/svg"/>'], 'cat.png', {type: 'image/png'}));
        document.body.dispatchEvent(new DragEvent('drop', {dataTransfer: given, bubbles: true, cancelable: true})); }"""
    )
    page.says("#noise-error", "image must be a PNG, JPEG or WebP image")
    expect(page.at("#noise-name")).to_have_text("cat.png")


def picture_file(tmp_path: Path) -> tuple[Path, np.ndarray]:
    drawn, file = np.random.default_rng(5).integers(0, 256, (32, 32), dtype=np.uint8), tmp_path / "own.png"
    file.write_bytes(png_of(drawn))
    return file, drawn


def edited(server: RunningServer, picture: bytes, mask: np.ndarray, **fields: object) -> bytes:
    """What the page asks for, by POST /sample."""
    data = {"n": 1, "steps": 10, "sampler": "ddim", "seed": 4, "class_label": 8} | fields
    return server.post(
        files={"image": picture, "mask": png_of(np.where(mask, 255, 0).astype(np.uint8))}, data=data
    ).content


def test_a_picture_is_denoised_where_its_mask_is(open_page: OpenPage, server: RunningServer, tmp_path: Path) -> None:
    page = open_page()
    file, drawn = picture_file(tmp_path)
    page.fill(n=1, steps=10, sampler="ddim", seed=4, class_label="bag", guidance=1)
    page.give(file)
    expect(page.at("#noise-name")).to_have_text("own.png")
    page.at("#mask-preset").select_option("rectangle")
    for name, value in {"x": 3, "y": 5, "w": 10, "h": 20}.items():
        page.at(f"#rect-{name}").fill(str(value))
    made_new = np.zeros((32, 32), bool)
    made_new[5:25, 3:13] = True
    page.at("#strength").fill("1")
    page.press("Denoise it")
    page.wait_until(DONE)
    assert page.picture("#gallery img") == edited(server, file.read_bytes(), made_new)
    final = pixels(page.picture("#gallery img"))
    np.testing.assert_array_equal(final[~made_new], drawn[~made_new])
    assert (final[made_new] != drawn[made_new]).mean() > 0.5
    page.says("#caption", "from a picture")
    expect(page.at("#code")).to_be_hidden()
    page.tab.reload()
    page.wait_until(DONE)

    page = open_page()
    page.fill(n=1, steps=10, sampler="ddim", seed=4, class_label="bag", guidance=1)
    page.press("Clear")
    expect(page.at("#noise-image")).to_be_hidden()
    page.press("Denoise it")
    page.says("#noise-error", "There is no picture yet")
    page.at("#size").fill("4")
    page.at("#canvas").scroll_into_view_if_needed()
    box = page.at("#canvas").bounding_box()
    pixel = box["width"] / 32

    def draw(*points: tuple[float, float]) -> None:
        for number, (x, y) in enumerate(points):
            page.tab.mouse.move(box["x"] + x * pixel, box["y"] + y * pixel)
            if number == 0:
                page.tab.mouse.down()
        page.tab.mouse.up()

    draw((4, 16), (28, 16))
    expect(page.at("#noise-name")).to_have_text("Drawn here.")
    page.at("#brush").select_option("mask")
    draw((16, 4), (16, 28))
    page.at("#strength").fill("0.5")
    drawn = np.zeros((32, 32), np.uint8)
    drawn[14:18, 2:30] = 255
    made_new = np.zeros((32, 32), bool)
    made_new[2:30, 14:18] = True
    page.press("Denoise it")
    page.wait_until(DONE)
    assert page.picture("#gallery img") == edited(server, png_of(drawn), made_new, strength=0.5)
    expect(page.at("#frame-text")).to_have_text(re.compile(r"^Frame \d of 6: "))
    page.at("#scrub").fill("0")
    expect(page.at("#x_t img")).to_have_attribute("alt", "x_t after step 0 of 5")


# --- lanes, the grid and the batch ---


def test_samplers_classes_seeds_and_jobs_are_compared(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    assert not [url for url in page.requests if url.endswith("/batch")], "nobody sees it"
    page.refuse(r"/batch$", 401)
    page.at("#batch").scroll_into_view_if_needed()
    expect(page.at("#batch-text")).to_have_text("The server's work cannot be shown: it needs a key.")
    expect(page.at("#key-dialog")).to_be_hidden()
    page.tab.unroute_all()
    page.says("#batch-text", "The server is idle.")
    with ThreadPoolExecutor(1) as pool:
        slow_down(server)
        asked = pool.submit(server.post, json=LONG | {"n": 3})
        page.has(1, "#jobs li")
        expect(page.at("#jobs .whose")).to_have_text(re.compile(r"^job \d+$"))
        expect(page.at("#jobs .where")).to_have_text(
            re.compile(r"^3 rows, step \d+ of 1000, t = \d+, \S+ (s|min) left$")
        )
        page.has(3, "#jobs .dots i")
        first = page.at("#jobs .where").text_content()
        expect(page.at("#jobs .where")).not_to_have_text(first)
        (job,) = httpx.get(f"{server.url}/jobs?state=running").json()["jobs"]
        httpx.delete(f"{server.url}/jobs/{job['id']}")
        asked.result()
    page.has(0, "#jobs li")
    page.press("Send three different requests")
    expect(page.at("#jobs .own")).not_to_have_count(0)
    server.speed_up()
    expect(page.at("#load")).to_have_attribute("aria-disabled", "false")
    page.has(0, "#jobs li")

    held: list[Any] = []
    page.at("#lanes").scroll_into_view_if_needed()
    expect(page.at(".lane:nth-child(1) img.x_t")).to_be_visible()
    expect(page.at(".lane:nth-child(2) img.x_0")).to_be_visible()
    expect(page.at("#compare-t-text")).to_have_text("t = 0")
    page.refuse(r"deadline_s=3", 429)  # of what nobody asked for
    page.at("#compare-count").select_option("3")
    lanes = page.at(".lane:visible")
    expect(lanes).to_have_count(3)
    settings = [("heun", 10, 1), ("pndm", 50, 1), ("dpmpp_2m", 20, 3)]
    for lane, (sampler, steps, guidance) in zip(lanes.all(), settings, strict=True):
        lane.locator(".sampler").select_option(sampler)
        lane.locator(".steps").fill(str(steps))
        lane.locator(".guidance").fill(str(guidance))
    lanes.nth(2).locator(".from").fill("200")
    page.tab.unroute(re.compile(r"deadline_s=3"))
    page.tab.route(re.compile(r"/sample\?"), lambda route: held.append(route))
    page.press("Compare")
    page.go_on_until(lambda: len(held) == 3)
    for route in held:
        route.continue_()
    expect(page.at("#compare-status")).to_have_text("Done.")
    slider = page.at("#compare-t")
    common = {"n": 1, "seed": 7, "class_label": 0}
    more: list[dict[str, Any]] = [{}, {"every": 2}, {"guidance": 3, "guidance_interval": [200, 999]}]
    ways = [
        way(server, **common, sampler=sampler, steps=steps, **further)
        for (sampler, steps, _), further in zip(settings, more, strict=True)
    ]
    for t in (0, 400, 900):
        slider.fill(str(999 - t))
        for number, made in enumerate(ways, 1):
            for show in ("x_t", "x_0"):
                expected = base64.b64decode(made["frames"][nearest(made["frames"], t)][show] if t else made["sheet"])
                page.wait_for_picture(f".lane:nth-child({number}) img.{show}", expected)
        expect(page.at("#noise-t")).to_have_value(str(t))
    for number, passes in enumerate(("19 passes, ", "59 passes, ", "20 to 40 passes, ")):
        expect(lanes.nth(number).locator(".told")).to_contain_text(f". {passes}")
    page.tab.unroute_all()
    page.at(".lane .steps").first.fill("0")
    page.press("Compare")
    expect(page.at("#compare-status")).to_have_text("2 of 3 lanes are done.")
    expect(page.at(".lane .told").first).to_contain_text("Not done: steps must be")
    expect(page.at(".lane:nth-child(2) img.x_t")).to_be_visible()

    held.clear()
    page.at("#grid-rows").fill("1")
    page.at("#grid-columns").fill("2")
    page.at("#grid-seed").fill("007")
    page.tab.route(re.compile(r"/sample"), lambda route: held.append(route))
    page.press("Make the grid")
    page.go_on_until(lambda: bool(held))
    page.at("#grid-columns").fill("5")
    held.pop().continue_()
    page.says("#grid-status", "Done.")
    cells = page.at("#cells button")
    expect(cells).to_have_count(2)
    made = server.post(json=OPENING | {"class_label": 0}).content
    assert page.picture("#cells button img") == made
    cells.nth(0).click()
    cells.nth(1).click()
    page.go_on_until(lambda: len(held) == 2)
    for route in reversed(held):
        with contextlib.suppress(PlaywrightError):  # the page no longer waits for the first
            route.continue_()
    page.says("#caption", "index 1.")
    expect(page.at("#grid-status")).to_have_text("")
    assert page.picture("#x_t img") == server.post(json=OPENING | {"class_label": 0, "index": 1}).content
    page.tab.unroute_all()

    for field, value in {"rows": "2", "columns": "5", "seed": "7", "to": str(2**64 - 1)}.items():
        page.at(f"#grid-{field}").fill(value)
    page.press("Make the grid")
    page.says("#grid-status", "Done.")
    for row in range(2):
        begins = OPENING | {"class_label": row}
        walk = [page.picture(f"#cells tr:nth-child({row + 1}) td:nth-child({column + 2}) img") for column in range(5)]
        assert len(set(walk)) == 5
        mixes = [server.post(json=begins | {"to_seed": 2**64 - 1, "mix": k / 4}) for k in range(5)]
        assert walk == [answer.content for answer in mixes]
        ends = (pixels(server.post(json=begins | {"seed": seed}).content) for seed in (7, 2**64 - 1))
        assert [(pixels(at) == end).all() for at, end in zip((walk[0], walk[-1]), ends, strict=True)] == [True, True]
    page.at("#cells button").nth(6).click()
    page.says("#caption", f"25 % of the way to seed {2**64 - 1} from seed 7.")
    assert page.picture("#x_t img") == server.post(json=begins | {"to_seed": 2**64 - 1, "mix": 0.25}).content
    form = {name: page.at(f"[name={name}]").input_value() for name in ("seed", "to_seed", "mix")}
    assert (form["seed"], form["to_seed"], form["mix"]) == ("7", str(2**64 - 1), "0.25")
    page.make()
    assert page.picture("#x_t img") == server.post(json=begins | {"to_seed": 2**64 - 1, "mix": 0.25}).content

    page.at("#grid-class").select_option(label="sneaker")
    page.at("#grid-rows").fill("9")  # there are three from there on
    page.at("#grid-columns").fill("2")
    page.at("#grid-to").fill("")
    page.press("Make the grid")
    page.says("#grid-status", "Done.")
    expect(page.at("#cells th")).to_have_text(["sneaker", "bag", "ankle-boot"])
    for row, label in enumerate((7, 8, 9), 1):
        for column in range(2):
            alone = OPENING | {"class_label": label, "index": column}
            cell = f"#cells tr:nth-child({row}) td:nth-child({column + 2}) img"
            assert page.picture(cell) == server.post(json=alone).content
    page.at("#cells tr:nth-child(2) td:nth-child(3) button").click()
    page.says("#caption", "bag")
    assert page.picture("#x_t img") == server.post(json=OPENING | {"class_label": 8, "index": 1}).content
    assert frame_numbers(page) == (21, 21)
    assert page.form["class_label"] == "8"
    slow_down(server)
    page.sample(**LONG)
    page.wait_for_step()
    page.at("#cells button").first.click()
    page.says("#caption", "sneaker, 20 steps")  # and the job goes on
    page.at("#gallery button").first.click()
    page.wait_for_step()
    page.cancel()


# --- models ---


def menu(page: Page) -> Any:
    return page.tab.get_by_role("combobox", name="Model", exact=True)


def choose(page: Page, name: str) -> None:
    menu(page).select_option(name)
    is_of(page, name)


def is_of(page: Page, name: str) -> None:
    """The page is that of a model, and says so."""
    expect(page.tab).to_have_url(re.compile(rf"/models/{name}/"))
    page.says("#model", f"{name}: ")
    expect(menu(page)).to_have_value(name)
    expect(page.tab).to_have_title(re.compile(rf"^(\d+ % )?tminus: {name}$"))  # with how far its job is
    page.wait_for_the_opening()


def shows_no_job(page: Page) -> None:
    """The page is set up, and shows no job."""
    expect(page.tab.get_by_role("button", name="Sample")).to_have_attribute("aria-disabled", "false")
    page.wait_until("Press Sample to make your own.")


def change(server: RunningServer, what: str) -> None:
    """Load or unload the model colour."""
    httpx.post(f"{server.url}/models/colour/{what}", headers=ADMIN, timeout=120).raise_for_status()


def test_the_menu_goes_to_the_page_of_a_model_and_back(open_page: OpenPage, server: RunningServer) -> None:
    page = open_page()
    expect(menu(page).locator("option")).to_have_text(MODELS)
    expect(menu(page)).to_have_value("small")
    classes = page.at("[name=class_label] option")
    expect(classes).to_contain_text(["t-shirt", "ankle-boot"])
    choose(page, "colour")
    page.says("#model", "colour: 16×16")
    page.says("#caption", "red, 20 steps")
    expect(classes).to_have_text(["red", "green", "blue", "no class"])
    page.make(class_label="green", guidance=1, **QUICK)
    spec = {"class_label": 1, **QUICK}
    picture = page.picture("#gallery img")
    assert picture == httpx.post(f"{server.url}/models/colour/sample", json=spec, timeout=60).content
    with Image.open(io.BytesIO(picture)) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    page.says("#curl", f"'{server.url}/models/colour/sample'")
    choose(page, "small")
    page.make(class_label="bag", guidance=1, **QUICK)
    assert page.picture("#gallery img") == server.post(json={"class_label": 8, **QUICK}).content
    page.tab.go_back()
    is_of(page, "colour")


def test_a_model_keeps_its_results_its_job_and_what_was_asked_of_it_to_itself(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page, before, held = open_page(), job_ids(server), []

    def hold_the_first(route: Any) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    page.tab.route(re.compile(POSTED), hold_the_first)
    page.sample(**QUICK | {"seed": ""})
    page.go_on_until(lambda: bool(held))
    choose(page, "colour")
    shows_no_job(page)
    choose(page, "small")
    page.wait_until(DONE)
    assert {page.job_id} == job_ids(server) - before, "one job, which the page shows"
    page.tab.unroute_all()

    page.make(**QUICK)
    slow_down(server)
    page.sample(**LONG)
    page.wait_for_step()
    address = page.tab.url
    choose(page, "colour")
    shows_no_job(page)
    page.has(0, "#gallery li")
    choose(page, "small")
    page.wait_for_step()
    assert page.tab.url.rpartition("#")[2] == address.rpartition("#")[2]
    page.has(2, "#gallery img")
    page.cancel()

    server.speed_up()
    page.refuse(r"/models$", 503)
    menu(page).focus()
    expect(menu(page).locator("option")).to_have_text(MODELS)
    page.tab.reload()
    page.make(**QUICK)
    expect(page.at("#error")).to_be_empty()
    expect(page.at("#models-field")).to_be_hidden()


def test_a_job_of_another_model_is_shown_on_its_page_unless_that_is_unloaded(
    open_page: OpenPage, server: RunningServer
) -> None:
    said = "The model colour is not loaded. The menu at the top lists the loaded models."
    others = [name for name in MODELS if name != "colour"]
    without = ["colour (not loaded)", *others]
    job = httpx.post(f"{server.url}/models/colour/jobs", json={"class_label": 2, **QUICK}).json()["id"]
    page = open_page()
    page.tab.goto(f"{server.url}/#job={job}")
    is_of(page, "colour")
    page.wait_until(DONE)
    assert page.tab.url == f"{server.url}/models/colour/#job={job}"
    page.says("#caption", "blue")
    change(server, "unload")
    try:
        page.press("Sample")
        expect(page.at("#error")).to_have_text(said)
        expect(menu(page).locator("option")).to_have_text(without)
        page.tab.reload()
        expect(page.at("#error")).to_have_text(said)
        expect(page.at("#model")).to_have_text("colour: not loaded")
        expect(menu(page)).to_have_value("colour")
        menu(page).select_option("small")
        page.says("#model", "small: ")
        page.tab.goto(f"{server.url}/#job={job}")
        page.says("#error", "names a job of the model colour, which is not loaded.")
        page.make(**QUICK)
        page.tab.goto(f"{server.url}/models/colour/")
        expect(menu(page).locator("option")).to_have_text(without)
    finally:
        change(server, "load")
    menu(page).focus()
    expect(menu(page).locator("option")).to_have_text([*others, "colour"])
    expect(menu(page)).to_have_value("colour")


def test_the_menu_works_below_a_path_of_a_proxy(open_page: OpenPage, browser: Any, server: RunningServer) -> None:
    def forward(route: Any) -> None:
        answer = route.fetch(url=route.request.url.replace("/studio/", "/", 1))
        route.fulfill(response=answer)

    context = browser.new_context()
    context.route(f"{server.url}/studio/**", forward)
    page = open_page(f"{server.url}/studio/", into=context)
    choose(page, "colour")
    page.make(**QUICK)
    metrics = page.tab.get_by_role("link", name="Metrics").get_attribute("href")
    assert metrics == f"{server.url}/studio/metrics", "of the whole server"
    choose(page, "small")
    page.at("#batch").scroll_into_view_if_needed()
    page.says("#batch-text", "The server is idle.")
    context.unroute_all(behavior="ignoreErrors")
    assert {url for url in page.requests if not url.startswith((f"{server.url}/studio/", "blob:"))} == set()


def test_the_menu_can_be_read_and_used_by_all(open_page: OpenPage, server: RunningServer) -> None:
    page = open_page(viewport={"width": 360, "height": 800}, color_scheme="dark")
    for path in ("", "/models/colour/", "/models/none/"):
        page.tab.goto(f"{server.url}{path}")
        expect(menu(page)).to_be_visible()
        expect(page.at("#model")).not_to_have_text("…")
        page.check_that_all_can_use_it()
    page.tab.goto(server.url)
    expect(menu(page)).to_be_visible()
    page.tab.keyboard.press("Tab")
    expect(menu(page)).to_be_focused()
    second = menu(page).locator("option").nth(1).text_content()
    page.tab.keyboard.press("ArrowDown")
    is_of(page, second)


CHECKERED = "repeating-conic-gradient"


def behind(page: Page, selector: str) -> str:
    """What lies behind an element."""
    found: str = page.at(selector).first.evaluate("(element) => getComputedStyle(element).backgroundImage")
    return found


def colours_behind(page: Page, selector: str) -> list[tuple[int, ...]]:
    """The two colours that are seen where a picture is, if all of it is transparent."""
    page.at(selector).first.evaluate("(element) => { (element.querySelector('img') ?? element).style.opacity = 0 }")
    with Image.open(io.BytesIO(page.at(selector).first.screenshot())) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    (first, many), (second, fewer) = Counter(map(tuple, pixels.tolist())).most_common(2)
    assert many < 1.3 * fewer, "as many squares of each"
    assert many + fewer > 0.9 * len(pixels), "and nothing else, but for where they meet"
    return sorted([first, second])


def test_pictures_with_alpha_lie_on_a_checkerboard_and_an_edit_keeps_it(
    open_page: OpenPage, server: RunningServer
) -> None:
    seen = []
    for scheme in ("light", "dark"):
        page = open_page(f"{server.url}/models/alpha/", viewport={"width": 390, "height": 900}, color_scheme=scheme)
        page.make(**QUICK)
        page.press("Compare")
        page.press("Make the grid")
        expect(page.at(".lane .x_t[src]").first).to_be_attached()
        expect(page.at("#cells img[src]").first).to_be_attached()
        expect(page.at("#noise-image[src]")).to_be_attached()
        places = ("#x_t .crop", "#strip img[src]", "#gallery img", ".lane .x_t", ".lane .x_0", "#cells img", "#canvas")
        for selector in (*places, "#noise-image"):
            assert behind(page, selector).startswith(CHECKERED), selector
        page.check_that_all_can_use_it()
        with Image.open(io.BytesIO(page.picture("#gallery img"))) as image:
            assert image.mode == "RGBA"
        seen.append(colours_behind(page, "#x_t .crop"))
    assert max(seen[0][0]) > max(seen[1][1]), "light squares, and dark ones"

    spec = {"class_label": 8, **QUICK}
    made = sampled(server, "alpha", **spec)
    page.tab.set_input_files("#noise-file", {"name": "a.png", "mimeType": "image/png", "buffer": made})
    page.says("#noise-name", "a.png")
    alpha = page.at("#canvas").evaluate(
        "(canvas) => [...canvas.getContext('2d').getImageData(0, 0, 16, 16).data].filter((_, at) => at % 4 === 3)"
    )
    with Image.open(io.BytesIO(made)) as image:
        assert alpha == np.asarray(image)[..., 3].ravel().tolist()


def test_pictures_of_other_models_lie_on_nothing_of_the_kind_and_show_three_of_five_channels(
    open_page: OpenPage, server: RunningServer
) -> None:
    page = open_page()
    expect(page.at("#model")).not_to_contain_text("channels")
    page.make(**QUICK)
    assert behind(page, "#x_t .crop") == behind(page, "#gallery img") == "none"
    page = open_page(f"{server.url}/models/planes/")
    page.says("#model", "3 of 5 channels shown")
    page.make(**QUICK)
    with Image.open(io.BytesIO(page.picture("#gallery img"))) as image:
        assert image.mode == "RGB"
    for selector in ("#noise", "#edit-this"):
        expect(page.at(selector)).to_be_hidden()
    assert not [url for url in page.requests if "/noise?" in url], "nor asks what would be refused"
    floats = httpx.get(
        f"{server.url}/models/planes/sample", params=QUICK, headers={"Accept": "application/x-npy"}, timeout=60
    )
    assert np.load(io.BytesIO(floats.content)).shape == (1, 5, 16, 16)


# --- keys ---


@pytest.fixture(scope="module")
def keyed(small: Path) -> Iterator[RunningServer]:
    """A server that asks for a key."""
    lines = (
        key_line("ann", ANN, row_steps_per_minute=10**6),
        key_line("ben", BEN),
        key_line("cat", CAT, row_steps_per_minute=60),
    )
    # What is remembered costs no key anything.
    with serving(small, "--result-cache-mb", "0", TMINUS_KEYS="\n".join(lines)) as running:
        yield running
    assert "tm_" not in running.log, "a secret"


def test_the_page_of_a_key_works_as_any_and_leaves_nothing_to_the_next(
    open_page: OpenPage, keyed: RunningServer, tmp_path: Path
) -> None:
    page = open_page(keyed.url, key=ANN)
    page.says("#who", "Signed in as ann")
    page.make(steps=4, n=2, seed=7, guidance=1)
    final = page.picture("#gallery img")
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.tab.evaluate("document.cookie") == "", "no script can read it"
    for run, kind in ((run_shell, "curl"), (run_python, "python")):
        run(page.at(f"#{kind}").text_content(), tmp_path, TMINUS_KEY=ANN)
        assert (tmp_path / "out.png").read_bytes() == final
        (tmp_path / "out.png").unlink()
    page.tab.reload()
    page.has(1, "#gallery img")
    expect(page.at("#key-dialog")).to_be_hidden()

    page.tab.get_by_role("button", name="Sign out").click()
    expect(page.tab.get_by_role("dialog")).to_be_visible()
    assert page.context.cookies() == []
    page.has(0, "#gallery li")
    page.sign_in(BEN)
    page.says("#who", "Signed in as ben")
    page.has(0, "#gallery li")


def test_a_key_that_has_used_its_quota_is_told_why_there_is_no_first_sample(
    open_page: OpenPage, keyed: RunningServer
) -> None:
    # More than a minute's: what is over is owed, for some minutes.
    assert keyed.post(json={"steps": 300}, headers=bearer(CAT)).status_code == 200
    page = open_page(keyed.url, key=CAT)
    expect(page.at("body")).to_have_attribute("data-opening", "absent")
    page.says("#caption", "The quota of this key does not allow a first sample: ")
    page.sample(steps=4, n=1, guidance=1)
    page.says("#error", "row-steps")


def test_nothing_is_sampled_before_the_key_and_a_wrong_one_is_asked_for_again(
    browser: Any, keyed: RunningServer
) -> None:
    tab, asked = browser.new_context().new_page(), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(keyed.url)
    dialog = tab.get_by_role("dialog", name="This server needs a key")
    expect(dialog).to_be_visible()
    expect(tab.get_by_label("Key", exact=True)).to_be_focused()
    tab.keyboard.type("tm_wrong")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("alert").filter(has_text="The server does not know this key.")).to_be_visible()
    expect(tab.get_by_label("Key", exact=True)).to_be_focused()
    for _ in range(3):
        tab.keyboard.press("Escape")
        expect(dialog).to_be_visible()
    found = Axe().run(tab)
    assert found.violations_count == 0, found.generate_report()
    assert not [url for url in asked if "/sample" in url]
    tab.keyboard.press("Control+A")
    tab.keyboard.type(ANN)
    tab.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(tab.locator("body")).to_have_attribute("data-opening", "shown")
    expect(tab.locator("#model")).to_contain_text("small")
    assert tab.get_by_label("Key", exact=True).input_value() == ""
    tab.context.close()


def test_the_batch_does_not_name_the_jobs_of_others(
    open_page: OpenPage, keyed: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page(keyed.url, key=ANN)
    slow_down(keyed)
    page.sample(**LONG | {"n": 4})
    page.wait_for_step()
    page.at("#batch").scroll_into_view_if_needed()
    expect(page.at("#jobs .whose")).to_have_text("from this page")
    other = open_page(keyed.url, key=BEN)
    other.at("#batch").scroll_into_view_if_needed()
    expect(other.at("#jobs .whose")).to_have_text(re.compile(r"^another user's job \d+$"))
    expect(other.at("#jobs .where")).to_have_text(re.compile(r"^4 rows, step \d+ of 1000, t = \d+, \S+ (s|min) left$"))
    page.cancel()


# --- everybody, and every screen ---


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_all_parts_can_be_read_and_used_by_all(open_page: OpenPage, tmp_path: Path, width: int, scheme: str) -> None:
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.make(steps=5, n=2, sampler="ddim")
    page.at("#code summary").click()
    page.tab.evaluate("() => document.getElementById('form').noValidate = true")
    page.sample(n=65)
    expect(page.at("#error")).not_to_be_empty()
    page.give(picture_file(tmp_path)[0])
    page.at("#mask-preset").select_option("rectangle")
    page.open_more()
    page.at("#compare-count").select_option("4")
    page.press("Compare")
    expect(page.at("#compare-status")).to_have_text("Done.")
    page.at("#grid-columns").fill("12")
    page.press("Make the grid")
    page.says("#grid-status", "Done.")
    page.check_that_all_can_use_it()
    if scheme == "light":
        page.tab.emulate_media(forced_colors="active")
        page.check_that_all_can_use_it()


def test_the_page_links_to_the_guide_and_to_the_operations_of_the_server(
    open_page: OpenPage, server: RunningServer
) -> None:
    page = open_page()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    guide, api = (page.tab.get_by_role("link", name=name, exact=True) for name in ("Guide", "API"))
    for link in (guide, api):
        expect(link).to_be_in_viewport()
    assert guide.get_attribute("href") == project["urls"]["Documentation"]
    api.click()
    document = httpx.get(f"{server.url}/openapi.json").json()
    page.has(sum(map(len, [*document["paths"].values(), *document["webhooks"].values()])), ".opblock")
    page.tab.locator(".opblock", has_text="/healthz").locator(".opblock-summary-control").click()
    page.press("Try it out")
    page.press("Execute")
    page.says(".live-responses-table", "alive")


def test_the_page_of_a_server_that_starts_is_in_the_style_of_the_others_and_fits_a_phone(browser: Any) -> None:
    client = TestClient(Opening(), base_url="http://localhost")

    def answer(route: Any) -> None:
        early = client.get(route.request.url)
        route.fulfill(status=early.status_code, headers=dict(early.headers), body=early.content)

    context = browser.new_context(viewport={"width": 390, "height": 844}, is_mobile=True, color_scheme="dark")
    context.route("**/*", answer)
    tab = context.new_page()
    tab.goto("http://localhost/models/any/")
    expect(tab.get_by_role("heading", name="tminus is starting")).to_be_visible()
    assert tab.evaluate("() => innerWidth") == 390
    expect(tab.locator("body")).to_have_css("background-color", "rgb(19, 20, 23)")
    context.close()
