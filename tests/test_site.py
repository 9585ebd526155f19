"""The builder of the documentation site: links, navigation, and the page of the API. The whole site is in e2e/."""

import json
from pathlib import Path
from typing import Any

import pytest

from docs.site import api, notebook, pages
from tests.service.conftest import Site, make_site, site  # noqa: F401

SOURCE = "https://example.org/source"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of a few pages."""
    texts = {
        "README.md": "# Home",
        "docs/README.md": "# I\n\n## Do\n[part](b.md#x), [a](a.md)\n\n## Look\n[b](b.md), [c](../docker/README.md)\n",
        "docs/a.md": "# A",
        "docs/b.md": "# `B`",
        "docs/examples/n.ipynb": "{}",
        "docs/images/p.png": "",
        "docker/README.md": "# C",
        "checkpoints/m/README.md": "# M",
        "service/code.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("target", "becomes"),
    [
        ("b.md#x", "b.md#x"),
        ("../docker", "../docker/README.md"),
        ("examples/n.ipynb", "examples/n.md"),
        ("images/p.png", "images/p.png"),
        ("../service/code.py#L3", f"{SOURCE}/blob/main/service/code.py#L3"),
        ("../service/", f"{SOURCE}/tree/main/service"),
        ("#here", "#here"),
        ("https://example.org", "https://example.org"),
    ],
)
@pytest.mark.parametrize("form", ["[x]({})", "![x]({})", '[x]({} "title")', '<img alt="x" src="{}">', "[x]: {}"])
def test_a_link_leads_to_a_page_a_copied_picture_or_the_repository(
    root: Path, form: str, target: str, becomes: str
) -> None:
    links = pages.Links(root, pages.find_pages(root), SOURCE)
    assert links.of(Path("docs/a.md"), form.format(target)) == form.format(becomes)
    assert links.copied == ({Path("docs/images/p.png")} if target.endswith(".png") else set())
    assert not links.broken


def test_a_link_to_what_is_made_for_the_site_alone_stays(root: Path) -> None:
    links = pages.Links(root, pages.find_pages(root), SOURCE, [Path("docs/made.json")])
    assert links.of(Path("docs/a.md"), "[x](made.json)") == "[x](made.json)"
    assert not links.broken


@pytest.mark.parametrize("target", ["c.md", "images/q.png", "../../outside"])
def test_a_link_to_nothing_is_told_with_its_page(root: Path, target: str) -> None:
    links = pages.Links(root, pages.find_pages(root), SOURCE)
    links.of(Path("docs/a.md"), f"[x]({target})")
    assert links.broken == [f"docs/a.md: {target}"]


@pytest.mark.parametrize("code", ["`[x](c.md)`", "```md\n[x](c.md)\n```", "- text\n\n  ```\n  [x](c.md)\n  ```"])
def test_what_looks_like_a_link_in_code_is_none(root: Path, code: str) -> None:
    links = pages.Links(root, pages.find_pages(root), SOURCE)
    assert links.of(Path("docs/a.md"), f"{code}\n[y](b.md)") == f"{code}\n[y](b.md)"
    assert not links.broken


def test_a_page_stands_once_where_the_index_links_to_all_of_it(root: Path) -> None:
    assert pages.navigation(root, pages.find_pages(root)) == {
        "Do": [Path("docs/a.md")],
        "Look": [Path("docs/b.md"), Path("docker/README.md")],
        "Checkpoints": [Path("checkpoints/m/README.md")],
        "Project": [Path("docs/examples/n.ipynb")],
    }


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"anyOf": [{"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, {"type": "null"}]}, "0..2^64-1"),
        ({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": "^[0-9]+$"}]}, "integer"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "above 0, at most 0.5"),
        (
            {"anyOf": [{"enum": ["a", "b"]}, {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}]},
            "`a`, `b` or a list of at most 2 of these",
        ),
        ({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}, "a list of 2: integer"),
        ({"type": "string", "pattern": "^[0-9a-f]{16}$"}, "16 hexadecimal digits, in lower case"),
        ({"$ref": "#/components/schemas/Choice"}, "`x`, `y`"),
        ({"$ref": "#/components/schemas/Thing"}, "[Thing](#thing)"),
    ],
)  # fmt: skip
def test_a_schema_in_words(schema: dict[str, Any], words: str) -> None:
    document = {"components": {"schemas": {"Choice": {"enum": ["x", "y"]}, "Thing": {"type": "object"}}}}
    assert api.values(schema, document) == words


def test_the_page_of_the_api_has_every_call_parameter_header_and_answer(site: Site) -> None:  # noqa: F811
    document = site.client.get("/openapi.json").json()
    text = api.Page(document).text()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            section = text.partition(f"### `{method.upper()} {path}` {{ #")[2].partition("\n### ")[0]
            assert f"**{operation['summary']}.**" in section
            assert all(status in section for status in operation["responses"])
            names = {each["name"] for each in operation.get("parameters", ()) if "name" in each}
            assert all(f"`{name}`" in section or f'<a id="{name}">' in text for name in names)
    for names in (document["components"]["headers"], document["x-websockets"]["/sample/stream"]["server"]):
        assert all(f"`{name}`" in text for name in names)


def test_a_notebook_becomes_a_page_with_what_its_cells_show() -> None:
    cells = [
        {"cell_type": "markdown", "source": ["# N\n", "Text."]},
        {
            "cell_type": "code",
            "source": ["show()"],
            "outputs": [
                {"output_type": "stream", "text": ["said\n"]},
                {"data": {"image/png": "AA\nA=", "text/plain": ["x"]}, "metadata": {"image/png": {"width": 9}}},
            ],
        },
    ]
    text = notebook.as_page("n.ipynb", json.dumps({"cells": cells}), f"{SOURCE}/n.ipynb")
    assert pages.title_of(text) == "N"
    assert f"[n.ipynb]({SOURCE}/n.ipynb)" in text
    assert "```python\nshow()\n```\n\n```text\nsaid\n```" in text
    assert '<img src="data:image/png;base64,AAA=" alt="What the cell shows" width="9">' in text
