"""The documentation site, built and read in a real browser without a network."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from docs.site import __main__ as site


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first page of the site, whose links and anchors have been checked."""
    folder = tmp_path_factory.mktemp("docs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site, "BUILD", folder / "build")
        patch.setattr(site, "SITE", folder / "site")
        assert site.build() == 0
    return folder / "site" / "index.html"


@pytest.fixture
def tab(browser: Any, home: Path) -> Iterator[Any]:
    """The first page, on a phone that has no network; nothing may be asked of other hosts, and no error be told."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True, color_scheme="light")
    page = context.new_page()
    trouble: list[str] = []
    page.on("request", lambda request: request.url.startswith("http") and trouble.append(request.url))
    page.on("requestfailed", lambda request: trouble.append(request.url))
    page.on("console", lambda message: message.type == "error" and trouble.append(message.text))
    page.goto(home.as_uri())
    yield page
    assert trouble == []
    context.close()


@pytest.mark.long
def test_the_site_is_searched_without_a_network(tab: Any) -> None:
    tab.locator("[for=__search]:visible, .md-search__button:visible").first.click()
    tab.keyboard.type("guidance")
    tab.get_by_role("link", name="Guidance").first.click()
    tab.wait_for_url("**/*.html**")
    assert "guidance" in tab.locator("article").inner_text().lower()


@pytest.mark.long
def test_the_site_turns_dark(tab: Any) -> None:
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.locator("label[title*=dark]:visible").click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != light


@pytest.mark.long
def test_no_page_is_wider_than_a_phone(tab: Any, home: Path) -> None:
    for page in sorted(home.parent.glob("**/*.html")):
        if page.name not in ("404.html", "openapi.html"):
            tab.goto(page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390, page


@pytest.mark.long
def test_swagger_ui_shows_the_calls_without_a_network(tab: Any, home: Path) -> None:
    tab.goto((home.parent / "docs" / "reference" / "openapi.html").as_uri())
    tab.locator("#operations-tag-jobs").wait_for()
