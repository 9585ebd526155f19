"""The page's menu of models in a real browser, against a real server of two models."""

import io
import re
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import expect

from tests.e2e.browser import DONE, LONG, POSTED, QUICK, OpenPage, Page, job_ids
from tests.e2e.conftest import ADMIN, RunningServer, SlowDown


@pytest.fixture
def server(two: RunningServer) -> RunningServer:
    """A server of two models, whose page is opened."""
    return two


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
    expect(menu(page).locator("option")).to_have_text(["small", "colour"])
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


def test_a_model_keeps_its_results_and_its_job_to_itself(
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page()
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
    page.has(1, "#gallery img")
    page.cancel()


def test_what_was_asked_of_one_model_is_not_asked_of_another(open_page: OpenPage, server: RunningServer) -> None:
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


def test_a_job_of_another_model_is_shown_on_its_page_unless_that_is_unloaded(
    open_page: OpenPage, server: RunningServer
) -> None:
    said = "The model colour is not loaded. The menu at the top lists the loaded models."
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
        expect(menu(page).locator("option")).to_have_text(["colour (not loaded)", "small"])
        page.tab.reload()
        expect(page.at("#error")).to_have_text(said)
        expect(page.at("#model")).to_have_text("colour: not loaded")
        expect(menu(page)).to_have_value("colour")
        menu(page).select_option("small")
        page.says("#model", "small: ")
        expect(page.at("#models-field")).to_be_hidden()
        page.tab.goto(f"{server.url}/#job={job}")
        page.says("#error", "names a job of the model colour, which is not loaded.")
        page.make(**QUICK)
        page.tab.goto(f"{server.url}/models/colour/")
        expect(menu(page).locator("option")).to_have_text(["colour (not loaded)", "small"])
    finally:
        change(server, "load")
    menu(page).focus()
    expect(menu(page).locator("option")).to_have_text(["small", "colour"])
    expect(menu(page)).to_have_value("colour")


def test_a_list_that_cannot_be_had_disturbs_nothing(open_page: OpenPage) -> None:
    page = open_page()
    page.refuse(r"/models$", 503)
    menu(page).focus()
    expect(menu(page).locator("option")).to_have_text(["small", "colour"])
    page.tab.reload()
    page.make(**QUICK)
    expect(page.at("#error")).to_be_empty()
    expect(page.at("#models-field")).to_be_hidden()


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
    page.tab.keyboard.press("ArrowDown")
    is_of(page, "colour")
