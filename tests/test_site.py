"""The builder of the documentation site: links and navigation. The whole site is in e2e/."""

from pathlib import Path

import pytest

from docs.site import pages

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
def test_a_link_leads_to_a_page_a_copied_picture_or_the_repository(root: Path, target: str, becomes: str) -> None:
    links = pages.Links(root, pages.find_pages(root), SOURCE)
    for form in ("[x]({})", "![x]({})", '[x]({} "title")', '<img alt="x" src="{}">', "[x]: {}"):
        assert links.of(Path("docs/a.md"), form.format(target)) == form.format(becomes)
    assert links.copied == ({Path("docs/images/p.png")} if target.endswith(".png") else set())
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
