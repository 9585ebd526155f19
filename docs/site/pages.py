"""The pages of the site: which there are, where their links lead, and how they are grouped.

The site has the layout of the repository, so that a link from page to page is right in both. A link to a file that is
not a page leads to the project's repository. Pictures are copied.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

PATTERNS = (
    "README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "client/README.md",
    "docker/README.md",
    "docs/*.md", "docs/reference/*.md", "docs/examples/*.ipynb", "checkpoints/*/README.md",
)  # fmt: skip
INDEX = Path("docs/README.md")
UNGROUPED = (Path("README.md"), INDEX)  # which stand before the groups
PICTURES = {".png", ".svg", ".jpg", ".jpeg", ".webp", ".gif"}

# Matches code, where nothing is a link, and the targets of links: in Markdown, in its definitions, and in HTML.
TARGETS = re.compile(
    r"^ *(```+|~~~+).*?^ *\1 *$"
    r"|(?P<ticks>`+).+?(?P=ticks)"
    r'|\]\((?P<inline>[^)\s]+)(?=\)| ")'
    r"|^\[[^\]]+\]: +(?P<defined>\S+)"
    r'|<(?:a|img|source)\b[^>]*? (?:href|src|srcset)="(?P<html>[^"]+)"',
    re.DOTALL | re.MULTILINE,
)


def find_pages(root: Path) -> list[Path]:
    """Return the files that become pages, relative to the root of the repository."""
    return sorted({file.relative_to(root) for pattern in PATTERNS for file in root.glob(pattern)})


def page_of(file: Path) -> Path:
    """Return the Markdown file of a page: a notebook's is made of it."""
    return file.with_suffix(".md") if file.suffix == ".ipynb" else file


def title_of(text: str) -> str:
    """Return the heading of a page, as plain text."""
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1].replace("`", "") if found else ""


def targets(text: str) -> Iterator[str]:
    """Yield where the links and pictures of a page lead."""
    for found in TARGETS.finditer(text):
        target = found["inline"] or found["defined"] or found["html"]
        if target:
            yield target


def is_external(target: str) -> bool:
    """Tell whether a link leads to another host, or to a program such as mail."""
    return re.match(r"[a-z][a-z0-9+.-]*:|//", target) is not None


def rewrite(text: str, change: Callable[[str], str]) -> str:
    """Return a page with each link and picture led to where `change` says."""

    def changed(found: re.Match[str]) -> str:
        for name in ("inline", "defined", "html"):
            if found[name]:
                start, end = found.start(name) - found.start(), found.end(name) - found.start()
                return found[0][:start] + change(found[name]) + found[0][end:]
        return found[0]

    return TARGETS.sub(changed, text)


class Links:
    """Where the links of pages lead on the site. Owns what it finds: files to copy, and links to nothing."""

    def __init__(self, root: Path, pages: list[Path], source_url: str) -> None:
        """source_url: where the files of the repository are shown."""
        self._root, self._pages, self._source_url = root, set(pages), source_url
        self.copied: set[Path] = set()
        self.broken: list[str] = []

    def of(self, page: Path, text: str) -> str:
        """Return the text of a page with its links as the site has them."""
        return rewrite(text, lambda target: self._on_site(page, target))

    def _on_site(self, page: Path, target: str) -> str:
        name, hash_mark, anchor = target.partition("#")
        if is_external(target) or not name:
            return target
        file = Path(os.path.normpath(page.parent / name))
        if not (self._root / file).exists() or file.is_relative_to(".."):
            self.broken.append(f"{page}: {target}")
            return target
        if file / "README.md" in self._pages:
            file /= "README.md"
        if file in self._pages:
            return Path(os.path.relpath(page_of(file), page.parent)).as_posix() + hash_mark + anchor
        if file.suffix in PICTURES:
            self.copied.add(file)
            return target
        kind = "tree" if (self._root / file).is_dir() else "blob"
        return f"{self._source_url}/{kind}/main/{file.as_posix()}{hash_mark}{anchor}"


def navigation(root: Path, pages: list[Path]) -> dict[str, list[Path]]:
    """Return the pages by group: the groups of the index, by its headings, then those that it does not name.

    Each page stands once: under the first heading that links to all of it, or else that links to a part of it.
    """
    _, *parts = re.split(r"^## (.+)$", (root / INDEX).read_text("utf-8"), flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    placed: dict[Path, str] = {}
    for whole in (True, False):
        for heading, section in sections.items():
            for target in targets(section):
                name, _, anchor = target.partition("#")
                file = Path(os.path.normpath(INDEX.parent / name))
                if file in pages and not (whole and anchor) and file not in UNGROUPED:
                    placed.setdefault(file, heading)
    for file in pages:
        if file not in UNGROUPED:
            placed.setdefault(file, "Checkpoints" if file.parts[0] == "checkpoints" else "Project")
    groups: dict[str, list[Path]] = {heading: [] for heading in (*sections, "Checkpoints", "Project")}
    for file, heading in placed.items():
        groups[heading].append(file)
    return {heading: files for heading, files in groups.items() if files}
