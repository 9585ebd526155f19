"""What the page explains by: the first sample, film, plot, links, lanes, edits, grid and batch, in a real browser."""

import base64
import contextlib
import io
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect

from tests.e2e.browser import DONE, LONG, POSTED, OpenPage, Page, job_ids
from tests.e2e.conftest import RunningServer, SlowDown, pixels, png_of

OPENING = {"n": 1, "steps": 20, "sampler": "dpmpp_2m", "seed": 7, "class_label": 0, "guidance": 1.5}
WHOLE_KB = 150


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


# --- the first sample, and its way from noise ---


def test_a_visitor_moves_through_the_time_of_the_first_sample(open_page: OpenPage, server: RunningServer) -> None:
    before = job_ids(server)
    page = open_page()
    expect(page.at("body")).to_have_attribute("data-opening", "shown")
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

    for width, height in ((390, 844), (360, 740), (1280, 800)):
        page.tab.set_viewport_size({"width": width, "height": height})
        expect(page.at("#x_t")).to_be_in_viewport(ratio=1)
        expect(page.at("#go")).to_be_in_viewport(ratio=1)
        expect(page.at("[name=steps]")).to_be_hidden()

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


def nearest(frames: list[dict[str, Any]], t: float) -> int:
    return min(range(len(frames)), key=lambda k: abs(frames[k]["t"] - t))


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


# --- what was made ---


def test_a_user_samples_and_goes_on_from_what_was_made(open_page: OpenPage, server: RunningServer) -> None:
    page, held = open_page(), []
    page.tab.route(re.compile(r"/sample\?"), lambda route: held.append(route))
    page.tab.reload()
    page.go_on_until(lambda: bool(held))
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


# --- presets, links and recipes ---


def test_presets_and_tables_fill_in_the_form(open_page: OpenPage, bundled_server: RunningServer) -> None:
    page = open_page(bundled_server.url)
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
    job = httpx.get(f"{bundled_server.url}/jobs/{page.job_id}").json()
    assert job["parameters"]["steps"] == 8
    assert page.picture("#gallery img") == bundled_server.post(json=job["parameters"]).content
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


def copied_by(page: Page, button: Any) -> str:
    """What a button puts on the clipboard."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    button.click()
    expect(page.tab.get_by_role("button", name="Copied").first).to_be_visible()
    return page.tab.evaluate("() => navigator.clipboard.readText()")


def lanes_of(page: Page) -> list[tuple[str, ...]]:
    return [
        tuple(lane.locator(f".{name}").input_value() for name in ("sampler", "steps", "guidance"))
        for lane in page.at(".lane:visible").all()
    ]


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


def noised(server: RunningServer, picture: bytes, page: Page) -> bytes:
    """The picture at the timestep that the page shows."""
    query = {"t": page.at("#noise-t").input_value(), "seed": 0}
    return httpx.post(f"{server.url}/noise", params=query, files={"image": picture}).content


# --- one's own picture ---


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


def test_all_of_the_page_is_small(open_page: OpenPage) -> None:
    page = open_page()
    expect(page.at("#load")).to_have_attribute("aria-disabled", "false")
    sizes = page.tab.evaluate(
        """() => Object.fromEntries(['navigation', 'resource'].flatMap((kind) => performance.getEntriesByType(kind))
        .map(({name, transferSize}) => [name, transferSize]))"""
    )
    files = {name: size for name, size in sizes.items() if not re.search(r"/(sample|noise)\?", name)}
    assert len(files) > 15
    assert min(size for name, size in files.items() if not name.startswith("blob:")) > 0
    assert sum(files.values()) < WHOLE_KB * 1000, files
