"""The page's menu of models in a real browser, against a real server of two models."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import expect

from tests.e2e.conftest import RunningServer, SlowDown, start_server, stop_server
from tests.e2e.test_page import DONE, LONG, POSTED, QUICK, OpenPage, Page, job_ids
from tests.service.keys import key_line

KEY = "a-key-for-these-tests"
KEYS = {"TMINUS_KEYS": key_line("ops", KEY, "admin"), "TMINUS_OPEN": "yes"}
ADMIN = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def two(small: Path, colour: Path) -> Iterator[RunningServer]:
    """A server of `small`, the default, and of `colour`, which has another size and other classes."""
    running = start_server(small, "--checkpoint", f"colour={colour}", **KEYS)
    yield running
    assert stop_server(running) == 0, running.log
    assert "Traceback" not in running.log, running.log


@pytest.fixture
def open_page(browser: Any, two: RunningServer) -> Iterator[OpenPage]:
    """Opens the page of the default model; at the end no tab may have complained. Leaves no job behind."""
    pages: list[Page] = []

    def make(url: str = two.url, **context: Any) -> Page:
        pages.append(Page(browser, url, **context))
        return pages[-1]

    yield make
    for page in pages:
        page.context.close()
    for job in httpx.get(f"{two.url}/jobs", params={"state": "waiting,running"}).json()["jobs"]:
        httpx.delete(f"{two.url}/jobs/{job['id']}")
    for page in pages:
        assert page.complaints == []


def menu(page: Page) -> Any:
    return page.tab.get_by_role("combobox", name="Model", exact=True)


def choose(page: Page, name: str) -> None:
    menu(page).select_option(name)
    is_of(page, name)


def is_of(page: Page, name: str) -> None:
    """The page is that of a model, and says so."""
    expect(page.tab).to_have_url(re.compile(rf"/models/{name}/"))
    expect(page.tab.locator("#model")).to_contain_text(f"{name}: ")
    expect(menu(page)).to_have_value(name)
    expect(page.tab).to_have_title(f"tminus: {name}")
    page.wait_for_the_opening()


def shows_no_job(page: Page) -> None:
    """The page is set up, and shows no job."""
    expect(page.tab.get_by_role("button", name="Sample")).to_have_attribute("aria-disabled", "false")
    page.wait_until("Press Sample to make your own.")


def change(server: RunningServer, what: str) -> None:
    """Load or unload the model colour."""
    httpx.post(f"{server.url}/models/colour/{what}", headers=ADMIN, timeout=120).raise_for_status()


def test_the_menu_goes_to_the_page_of_a_model_and_back(open_page: OpenPage, two: RunningServer) -> None:
    page = open_page()
    expect(menu(page).locator("option")).to_have_text(["small", "colour"])
    expect(menu(page)).to_have_value("small")
    classes = page.tab.locator("[name=class_label] option")
    expect(classes).to_contain_text(["t-shirt", "ankle-boot"])
    choose(page, "colour")
    expect(page.tab.locator("#model")).to_contain_text("colour: 16×16")
    expect(classes).to_have_text(["red", "green", "blue", "no class"])
    page.sample(class_label="green", guidance=1, **QUICK)
    page.wait_until(DONE)
    spec = {"class_label": 1, **QUICK}
    picture = page.picture("#gallery img")
    assert picture == httpx.post(f"{two.url}/models/colour/sample", json=spec, timeout=60).content
    with Image.open(io.BytesIO(picture)) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")
    expect(page.tab.locator("#gallery .curl")).to_contain_text(f"'{two.url}/models/colour/sample'")
    choose(page, "small")
    page.sample(class_label="bag", guidance=1, **QUICK)
    page.wait_until(DONE)
    assert page.picture("#gallery img") == two.post(json={"class_label": 8, **QUICK}).content
    page.tab.go_back()
    is_of(page, "colour")


def test_a_model_keeps_its_results_and_its_job_to_itself(
    open_page: OpenPage, two: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
    page.sample(**QUICK)
    page.wait_until(DONE)
    slow_down(two)
    page.sample(**LONG)
    page.wait_for_step()
    address = page.tab.url
    choose(page, "colour")
    shows_no_job(page)
    expect(page.tab.locator("#gallery li")).to_have_count(0)
    choose(page, "small")
    page.wait_for_step()
    assert page.tab.url.rpartition("#")[2] == address.rpartition("#")[2]
    expect(page.tab.locator("#gallery li")).to_have_count(1)
    page.press("Cancel")
    page.wait_until("Cancelled.")


def test_what_was_asked_of_one_model_is_not_asked_of_another(open_page: OpenPage, two: RunningServer) -> None:
    page, before, held = open_page(), job_ids(two), []

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
    assert {page.tab.url.rpartition("=")[2]} == job_ids(two) - before, "one job, which the page shows"


def test_a_job_of_another_model_is_shown_on_its_page(open_page: OpenPage, two: RunningServer) -> None:
    job = httpx.post(f"{two.url}/models/colour/jobs", json={"class_label": 2, **QUICK}).json()["id"]
    page = open_page()
    page.tab.goto(f"{two.url}/#job={job}")
    is_of(page, "colour")
    page.wait_until(DONE)
    assert page.tab.url == f"{two.url}/models/colour/#job={job}"
    expect(page.tab.locator("#gallery .what")).to_contain_text("blue")


def test_a_model_that_is_unloaded_is_said_to_be(open_page: OpenPage, two: RunningServer) -> None:
    said = "The model colour is not loaded. The menu at the top has those that are."
    page = open_page()
    choose(page, "colour")
    page.sample(**QUICK)
    page.wait_until(DONE)
    job = page.tab.url.rpartition("=")[2]
    change(two, "unload")
    try:
        page.press("Sample")
        expect(page.tab.locator("#error")).to_have_text(said)
        expect(menu(page).locator("option")).to_have_text(["colour (not loaded)", "small"])
        page.tab.reload()
        expect(page.tab.locator("#error")).to_have_text(said)
        expect(page.tab.locator("#model")).to_have_text("colour: not loaded")
        expect(menu(page)).to_have_value("colour")
        menu(page).select_option("small")
        expect(page.tab.locator("#model")).to_contain_text("small: ")
        expect(page.tab.locator("#models-field")).to_be_hidden()
        page.tab.goto(f"{two.url}/#job={job}")
        expect(page.tab.locator("#error")).to_contain_text("is of the model colour, which is not loaded.")
        page.sample(**QUICK)
        page.wait_until(DONE)
        page.tab.goto(f"{two.url}/models/colour/")
        expect(menu(page).locator("option")).to_have_text(["colour (not loaded)", "small"])
    finally:
        change(two, "load")
    menu(page).focus()
    expect(menu(page).locator("option")).to_have_text(["small", "colour"])
    expect(menu(page)).to_have_value("colour")


def test_a_list_that_cannot_be_had_disturbs_nothing(open_page: OpenPage) -> None:
    page = open_page()
    page.refuse(r"/models$", 503)
    menu(page).focus()
    expect(menu(page).locator("option")).to_have_text(["small", "colour"])
    page.tab.reload()
    page.sample(**QUICK)
    page.wait_until(DONE)
    expect(page.tab.locator("#error")).to_be_empty()
    expect(page.tab.locator("#models-field")).to_be_hidden()


def test_the_menu_works_below_a_path_of_a_proxy(open_page: OpenPage, browser: Any, two: RunningServer) -> None:
    def forward(route: Any) -> None:
        answer = route.fetch(url=route.request.url.replace("/studio/", "/", 1))
        route.fulfill(response=answer)

    context = browser.new_context()
    context.route(f"{two.url}/studio/**", forward)
    page = open_page(f"{two.url}/studio/", into=context)
    choose(page, "colour")
    page.sample(**QUICK)
    page.wait_until(DONE)
    metrics = page.tab.get_by_role("link", name="Metrics").get_attribute("href")
    assert metrics == f"{two.url}/studio/metrics", "of the whole server"
    choose(page, "small")
    page.tab.locator("#batch").scroll_into_view_if_needed()
    expect(page.tab.locator("#batch-text")).to_contain_text("The server is idle.")
    context.unroute_all(behavior="ignoreErrors")
    assert {url for url in page.requests if not url.startswith((f"{two.url}/studio/", "blob:"))} == set()


def test_the_menu_is_used_by_keyboard(open_page: OpenPage) -> None:
    page = open_page()
    expect(menu(page)).to_be_visible()
    page.tab.keyboard.press("Tab")
    expect(menu(page)).to_be_focused()
    page.tab.keyboard.press("ArrowDown")
    is_of(page, "colour")


@pytest.mark.parametrize(("width", "scheme"), [(360, "dark"), (1280, "light")])
def test_the_menu_can_be_read_by_all(open_page: OpenPage, two: RunningServer, scheme: str, width: int) -> None:
    page = open_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    for path in ("", "/models/colour/", "/models/none/"):
        page.tab.goto(f"{two.url}{path}")
        expect(menu(page)).to_be_visible()
        expect(page.tab.locator("#model")).not_to_have_text("…")
        found = Axe().run(page.tab).response["violations"]
        assert [(each["id"], [node["html"] for node in each["nodes"]]) for each in found] == []
        assert page.tab.evaluate("() => document.documentElement.scrollWidth <= window.innerWidth")
