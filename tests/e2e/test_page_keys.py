"""The page of a server that asks for a key, in a real browser."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect

from tests.documents import run_python, run_shell
from tests.e2e.browser import LONG, OpenPage
from tests.e2e.conftest import RunningServer, SlowDown, serving
from tests.service.keys import bearer, key_line

ANN, BEN, CAT = "tm_ann", "tm_ben", "tm_cat"


@pytest.fixture(scope="module")
def server(small: Path) -> Iterator[RunningServer]:
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


def test_the_page_asks_for_a_key_and_then_works_as_any(open_page: OpenPage, tmp_path: Path) -> None:
    page = open_page(key=ANN)
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


def test_a_key_that_has_used_its_quota_is_told_why_there_is_no_first_sample(
    open_page: OpenPage, server: RunningServer
) -> None:
    # More than a minute's: what is over is owed, for some minutes.
    assert server.post(json={"steps": 300}, headers=bearer(CAT)).status_code == 200
    page = open_page(key=CAT)
    expect(page.at("body")).to_have_attribute("data-opening", "absent")
    page.says("#caption", "The quota of this key does not allow a first sample: ")
    page.sample(steps=4, n=1, guidance=1)
    page.says("#error", "row-steps")


def test_nothing_is_sampled_before_the_key_and_a_wrong_one_is_asked_for_again(
    browser: Any, server: RunningServer
) -> None:
    tab, asked = browser.new_context().new_page(), []
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(server.url)
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
    open_page: OpenPage, server: RunningServer, slow_down: SlowDown
) -> None:
    page = open_page(key=ANN)
    slow_down(server)
    page.sample(**LONG | {"n": 4})
    page.wait_for_step()
    page.at("#batch").scroll_into_view_if_needed()
    expect(page.at("#jobs .whose")).to_have_text("from this page")
    other = open_page(key=BEN)
    other.at("#batch").scroll_into_view_if_needed()
    expect(other.at("#jobs .whose")).to_have_text(re.compile(r"^another user's job \d+$"))
    expect(other.at("#jobs .where")).to_have_text(re.compile(r"^4 rows, step \d+ of 1000, t = \d+, \S+ (s|min) left$"))
    page.cancel()


def test_who_signs_out_leaves_nothing_for_the_next(open_page: OpenPage) -> None:
    page = open_page(key=ANN)
    page.make(steps=4)
    page.tab.get_by_role("button", name="Sign out").click()
    expect(page.tab.get_by_role("dialog")).to_be_visible()
    assert page.context.cookies() == []
    page.has(0, "#gallery li")
    page.sign_in(BEN)
    page.says("#who", "Signed in as ben")
    page.has(0, "#gallery li")
