"""The documentation site, built and read in a real browser on a phone that has no network."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from docs.site import __main__ as site


@pytest.mark.long
def test_the_site_is_built_without_a_warning_and_read_without_a_network(
    browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "BUILD", tmp_path / "build")
    monkeypatch.setattr(site, "SITE", tmp_path / "site")
    with ThreadPoolExecutor(1) as pool:  # as the browser has this thread's event loop
        assert pool.submit(site.build).result() == 0, "a link or an anchor leads nowhere"
    home = tmp_path / "site" / "index.html"
    context = browser.new_context(viewport={"width": 390, "height": 844}, offline=True, color_scheme="light")
    tab = context.new_page()
    trouble: list[str] = []
    tab.on("request", lambda request: request.url.startswith("http") and trouble.append(request.url))
    tab.on("console", lambda message: message.type == "error" and trouble.append(message.text))

    tab.goto(home.as_uri())
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    tab.locator("label[title*=dark]:visible").click()
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") != light

    tab.locator("[for=__search]:visible").click()
    tab.keyboard.type("guidance")
    tab.get_by_role("option").first.wait_for()
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/*.html?h=guidance*")
    assert "guidance" in tab.locator("article").inner_text().lower()

    for page in sorted(home.parent.glob("**/*.html")):
        if page.name != "404.html":  # which a server sends, and has its files at the root
            tab.goto(page.as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390, page
    context.close()
    assert trouble == []
