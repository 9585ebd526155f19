"""GET /docs and /openapi.json; that the page shows the operations is tested in tests/e2e/test_page.py."""

import re

import pytest

from tests.service.conftest import Site, problem


def test_all_that_docs_loads_is_served_from_here(site: Site) -> None:
    page = site.client.get("/docs")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    loaded = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert {"docs/swagger-ui.css", "docs/swagger-ui-bundle.js", "page/docs.js"} <= {*loaded}
    for name in loaded:
        file = site.client.get(f"/{name}")
        assert (file.status_code, len(file.content) > 0) == (200, True), name
        assert "default-src 'none'" in file.headers["content-security-policy"]
        assert site.client.get(f"/{name}", headers={"If-None-Match": file.headers["etag"]}).status_code == 304
    assert "openapi.json" in site.client.get("/page/docs.js").text


def test_scripts_of_docs_come_from_this_server_only(site: Site) -> None:
    policy = site.client.get("/docs").headers["content-security-policy"]
    directives = dict(directive.split(" ", 1) for directive in policy.split("; "))
    assert (directives["default-src"], directives["script-src"], directives["connect-src"]) == (
        "'none'", "'self'", "'self'",
    )  # fmt: skip
    assert "http" not in policy


@pytest.mark.parametrize("name", ["nothing.js", "..%2fcore.py", "%2e%2e%2fcore.py"])
def test_nothing_else_of_the_package_is_served(site: Site, name: str) -> None:
    problem(site.client.get(f"/docs/{name}"), 404, "not_found")


def test_docs_are_routes_of_their_own_in_the_metrics(site: Site) -> None:
    for path in ("/docs", "/docs/swagger-ui.css", "/openapi.json"):
        assert site.client.get(path).status_code == 200
    requests = "tminus_request_duration_seconds_count"
    for route in ("/docs", "/docs/{name}", "/openapi.json"):
        assert site.metrics()[f'{requests}{{"route": "{route}", "status": "200"}}'] == 1
    assert not [name for name in site.metrics() if "unmatched" in name]


def test_head_of_them_is_get_without_a_body(site: Site) -> None:
    for path in ("/docs", "/openapi.json"):
        got, head = site.client.get(path), site.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(got.content))
