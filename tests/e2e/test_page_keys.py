"""The page of a server that asks for a key, in a real browser."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.e2e.conftest import RunningServer, SlowDown, start_server, stop_server
from tests.e2e.test_page import DONE, LONG, OpenPage, Page
from tests.service.keys import bearer, key_line
from tests.tools import needs

ANN, BEN, CAT = "tm_ann", "tm_ben", "tm_cat"


@pytest.fixture(scope="module")
def keyed(small: Path) -> Iterator[RunningServer]:
    lines = (
        key_line("ann", ANN, row_steps_per_minute=10**6),
        key_line("ben", BEN),
        key_line("cat", CAT, row_steps_per_minute=60),
    )
    # What is remembered costs no key anything.
    running = start_server(small, "--result-cache-mb", "0", TMINUS_KEYS="\n".join(lines))
    yield running
    assert stop_server(running) == 0, running.log
    assert "Traceback" not in running.log, running.log
    assert "tm_" not in running.log, "a secret"


@pytest.fixture
def open_page(browser: Any, keyed: RunningServer) -> Iterator[OpenPage]:
    pages: list[Page] = []

    def make(key: str = ANN) -> Page:
        pages.append(Page(browser, keyed.url, key=key))
        return pages[-1]

    yield make
    for page in pages:
        page.context.close()
        assert page.complaints == []


def test_the_page_asks_for_a_key_and_then_works_as_any(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page()
    expect(page.tab.locator("#who")).to_contain_text("Signed in as ann")
    page.sample(steps=4, n=2, seed=7, guidance=1)
    page.wait_until(DONE)
    final = page.picture("#gallery img")
    (cookie,) = page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    assert page.tab.evaluate("document.cookie") == "", "no script can read it"
    environment = os.environ | {"TMINUS_KEY": ANN}
    needs("curl")
    for command in (
        ["bash", "-c", page.tab.locator("#gallery .curl").text_content()],
        [sys.executable, "-c", page.tab.locator("#gallery .python").text_content()],
    ):
        subprocess.run(command, cwd=tmp_path, check=True, timeout=60, env=environment)
        assert (tmp_path / "out.png").read_bytes() == final, shlex.join(command)
        (tmp_path / "out.png").unlink()
    page.tab.reload()
    expect(page.tab.locator("#gallery li")).to_have_count(1)
    expect(page.tab.locator("#key-dialog")).to_be_hidden()


def test_a_key_that_has_used_its_quota_is_told_why_there_is_no_first_sample(
    open_page: OpenPage, keyed: RunningServer
) -> None:
    # More than a minute's: what is over is owed, for some minutes.
    assert keyed.post(json={"steps": 300}, headers=bearer(CAT)).status_code == 200
    page = open_page(CAT)
    expect(page.tab.locator("body")).to_have_attribute("data-opening", "absent")
    expect(page.tab.locator("#caption")).to_contain_text("This key has nothing left for a first sample: ")
    page.sample(steps=4, n=1, guidance=1)
    expect(page.tab.locator("#error")).to_contain_text("row-steps")


def test_nothing_is_sampled_before_the_key_and_a_wrong_one_is_asked_for_again(
    browser: Any, keyed: RunningServer
) -> None:
    tab, asked = browser.new_context().new_page(), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(keyed.url)
    dialog = tab.get_by_role("dialog", name="This server asks for a key")
    expect(dialog).to_be_visible()
    expect(tab.get_by_label("Key", exact=True)).to_be_focused()
    tab.keyboard.type("tm_wrong")
    tab.keyboard.press("Enter")
    expect(tab.get_by_role("alert").filter(has_text="This key is not known here.")).to_be_visible()
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
    page = open_page()
    slow_down(keyed)
    page.sample(**LONG | {"n": 4})
    page.wait_for_step()
    page.tab.locator("#batch").scroll_into_view_if_needed()
    expect(page.tab.locator("#jobs .whose")).to_have_text(re.compile(r"^job \d+$"))
    other = open_page(BEN)
    other.tab.locator("#batch").scroll_into_view_if_needed()
    expect(other.tab.locator("#jobs .whose")).to_have_text(re.compile(r"^somebody's job \d+$"))
    expect(other.tab.locator("#jobs .where")).to_have_text(re.compile(r"^4 rows, step \d+ of 1000, t = \d+$"))
    page.press("Cancel")
    page.wait_until("Cancelled.")


def test_who_signs_out_leaves_nothing_for_the_next(open_page: OpenPage) -> None:
    page = open_page()
    page.sample(steps=4)
    page.wait_until(DONE)
    page.tab.get_by_role("button", name="Sign out").click()
    expect(page.tab.get_by_role("dialog")).to_be_visible()
    assert page.context.cookies() == []
    expect(page.tab.locator("#gallery li")).to_have_count(0)
    page.sign_in(BEN)
    expect(page.tab.locator("#who")).to_contain_text("Signed in as ben")
    expect(page.tab.locator("#gallery li")).to_have_count(0)
