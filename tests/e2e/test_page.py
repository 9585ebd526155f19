"""The page in a real browser, against the real server."""

import base64
import json
import re
import shutil
import tomllib
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
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
from tests.e2e.conftest import RunningServer, SlowDown, pixels
from tminus.service.startup.server import Opening


def test_noise_becomes_images_before_ones_eyes(
    open_page: OpenPage, bundled_server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page(bundled_server.url)
    slow_down(bundled_server, between_ticks_s=0.03)
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
    assert final == page.picture("#gallery img") == bundled_server.post(json=spec).content

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


def test_a_running_job_stays_in_sight_and_the_one_before_is_a_step_back(
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
    page.at("#gallery button").last.click()
    page.wait_until(DONE)
    server.speed_up()
    page.has(2, "#gallery img")  # it has ended out of sight
    page.says("#caption", "5 steps of ddim")


def test_a_job_that_is_asked_for_while_another_runs_is_queued_and_both_join_the_results(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    slow_down(server, between_ticks_s=SELDOM_S)
    page.sample(**ENDING)
    page.wait_for_step()
    first = page.job_id
    page.tab.evaluate("() => document.getElementById('form').noValidate = true")
    page.sample(n=65)
    page.says("#error", "n must be an integer in 1..64, got 65")
    page.wait_until("Running.")  # what is refused takes the place of nothing
    assert page.job_id == first
    page.make(**QUICK)
    page.says("#caption", "5 steps of ddim")
    expect(page.at("#error")).to_be_empty()
    page.has(2, "#gallery button")
    assert httpx.get(f"{server.url}/jobs/{first}").json()["state"] == "running"
    page.at("#gallery button").last.click()
    page.wait_for_step()
    server.speed_up()
    page.wait_until(DONE)
    page.has(2, "#gallery img")


def test_slider_and_strip_stand_at_the_same_place_while_a_job_runs(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    slow_down(server, between_ticks_s=0.02)
    page.sample(**LONG)
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
    page.cancel()


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


def test_nothing_can_be_chosen_before_the_model_is_known(open_page: OpenPage) -> None:
    """What the model recommends would be written over it."""
    page, held = open_page(), []
    page.tab.route(re.compile(r"/model$"), lambda route: held.append(route))
    page.tab.reload()
    page.go_on_until(lambda: bool(held))
    focus = "() => { const s = document.querySelector('[name=steps]'); s.focus(); return s.matches(':focus'); }"
    assert not page.tab.evaluate(focus)
    held[0].continue_()
    page.fill(steps=5)
    assert page.tab.evaluate(focus)


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


def test_a_result_is_forgotten_only_when_the_server_has_forgotten_it(
    open_page: OpenPage, server: RunningServer
) -> None:
    page = open_page()
    for seed in (1, 2):
        page.sample(**QUICK | {"seed": seed, "n": 2})
        page.has(seed, "#gallery img")
    # The job in the address says itself what became of it, once it is known.
    for pattern, which in ((r"/image$", "One earlier result"), (r"/jobs/\w+$", "2 earlier results")):
        page.refuse(pattern, 503)
        page.tab.reload()
        page.says("#results-error", f"{which} could not be fetched: the server answered 503.")
        page.tab.unroute(re.compile(pattern))
    page.tab.reload()
    page.has(2, "#gallery img")
    expect(page.at("#results-error")).to_be_empty()
    httpx.delete(f"{server.url}/jobs/{page.job_id}")
    page.press("All as a zip")
    expect(page.at("#made-error")).to_contain_text("The zip could not be fetched: no job")
    page.tab.reload()
    page.says("#error", "cannot be shown: no job")
    page.has(1, "#gallery img")
    expect(page.at("#results-error")).to_be_empty()


def test_after_a_reload_nothing_waits_for_the_earlier_results_and_the_newest_comes_first(
    open_page: OpenPage,
) -> None:
    page = open_page()
    for seed in (1, 2, 3):
        page.sample(**QUICK | {"seed": seed})
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
    page.make(**QUICK | {"seed": 4})
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


def test_the_title_of_a_tab_says_how_far_its_job_is_seen_or_not(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    expect(page.tab).to_have_title("tminus")
    slow_down(server, between_ticks_s=0.04)
    page.sample(**ENDING)
    expect(page.tab).to_have_title(re.compile(r"^[1-9]\d? % tminus$"))
    page.look_elsewhere(True)
    before = page.tab.title()
    expect(page.tab).not_to_have_title(before)
    expect(page.tab).to_have_title(re.compile(r"^[1-9]\d? % tminus$"))
    server.speed_up()
    page.wait_until(DONE)
    expect(page.tab).to_have_title("tminus")
    page.look_elsewhere(False)
    page.sample(**LONG | {"seed": 2})
    expect(page.tab).to_have_title(re.compile("^[1-9]"))
    page.cancel()
    expect(page.tab).to_have_title("tminus")


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


def test_the_form_begins_with_what_is_recommended_and_suggests_steps_until_they_are_changed(
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


def test_the_link_of_a_job_fills_the_form_with_what_it_was_asked_for(
    open_page: OpenPage, server: RunningServer
) -> None:
    # A job of several classes, which is one more option, and one without any.
    for labels, value, guidance in (([1, 2], "1,2", "1"), (None, "", "1.5")):
        spec = {"n": 2, "steps": 20, "sampler": "dpmpp_2m", "seed": 4}
        job = post_job(server, **spec, **({"class_label": labels} if labels else {}))
        page = open_page(f"{server.url}/#job={job}")
        page.wait_until(DONE)
        assert page.form == {
            "class_label": value, "sampler": "dpmpp_2m", "steps": "20", "guidance": guidance, "n": "2", "seed": "4",
        }  # fmt: skip
        page.fill(sampler="ddim")
        assert page.form["steps"] == "50", "20 was what was suggested"


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


def test_the_page_lets_nothing_in_from_elsewhere(server: RunningServer) -> None:
    response = httpx.head(server.url)
    assert (response.status_code, response.content) == (200, b"")
    assert response.headers["content-security-policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self' blob:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    )


def test_classes_whose_names_are_numbers_are_those_that_the_page_shows(
    open_page: OpenPage, own_server: Callable[..., RunningServer], small: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    meta = json.loads((folder / "tminus.json").read_text())
    names = [str(number) for number in range(1, 11)]  # of folders that are named 1 to 10
    (folder / "tminus.json").write_text(json.dumps(meta | {"class_names": names}))
    server = own_server("--executor", "eager", checkpoint=folder)
    page = open_page(server.url)
    expect(page.at("#caption")).not_to_contain_text("class_label")  # that the opening is refused for
    page.make(class_label="2", sampler="ddim", steps=3, n=1, seed=5, guidance=1)
    spec = {"sampler": "ddim", "steps": 3, "n": 1, "seed": 5}
    made = {
        label: server.post(json=spec | {"class_label": label}).content for label in ("name:2", "number:1", "number:2")
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
