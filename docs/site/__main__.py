"""Renew docs/reference/, and build the documentation site: `python -m docs.site`.

The exit status is 1 if a link leads nowhere. The site is in site/, and the pages as Zensical reads them are in
build/docs/pages/.
"""

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from nbconvert import MarkdownExporter

from docs.site import pages, reference

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "docs"
SITE = ROOT / "site"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ABORTED = "--strict"  # Zensical's last words where it has warned
# Pictures stand in the page, of the size that the notebook gives them.
NOTEBOOK = """\
{% extends 'markdown/index.md.j2' %}
{% block data_priority scoped %}
{% for kind in output.data if kind.startswith('image/') %}
<img src="data:{{ kind }};base64,{{ output.data[kind] | replace('\n', '') }}" alt="What the cell shows"
     width="{{ output.metadata[kind].width }}">
{% else %}{{ super() }}{% endfor %}
{% endblock %}
"""


def build() -> int:
    """Assemble the pages, and have Zensical make the site of them."""
    for folder in (BUILD, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    texts = read_pages()
    links = pages.Links(ROOT, [*texts], PROJECT["urls"]["Source"])
    titles: dict[Path, str] = {}
    for file, text in texts.items():
        page = BUILD / "pages" / pages.page_of(file)
        page.parent.mkdir(parents=True, exist_ok=True)
        titles[file] = pages.title_of(text)
        page.write_text(links.of(file, text), "utf-8")
    assets = (ROOT / "service" / "page" / "icon.svg", *(HERE / "assets").iterdir())
    copies = {Path("assets", each.name): each for each in assets}
    copies |= {each: ROOT / each for each in links.copied}
    for place, source in copies.items():
        target = BUILD / "pages" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (BUILD / "zensical.toml").write_text(configuration(titles), "utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(BUILD / "zensical.toml")]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if ABORTED not in done.stderr:  # otherwise it is a traceback, and the warnings are printed above
        sys.stderr.write(done.stderr)
    if links.broken:
        print("Links to files that are not there:", *sorted(links.broken), sep="\n", file=sys.stderr)
    if (BUILD / "site").is_dir():  # Zensical may have failed before it wrote any
        shutil.move(BUILD / "site", SITE)
        print(f"open {SITE / 'index.html'}")
    return done.returncode or int(bool(links.broken))


def read_pages() -> dict[Path, str]:
    """Return every page as Markdown, by its file: of a notebook too."""
    texts: dict[Path, str] = {}
    exporter = MarkdownExporter(raw_template=NOTEBOOK)  # type: ignore[no-untyped-call]
    for file in pages.find_pages(ROOT):
        if file.suffix == ".ipynb":
            text, _ = exporter.from_filename(str(ROOT / file))
            address = f"{PROJECT['urls']['Source']}/blob/main/{file.as_posix()}"
            text += f"\n*This page shows the notebook [{file.name}]({address}).*\n"
        else:
            text = (ROOT / file).read_text("utf-8")
        texts[file] = text
    return texts


def configuration(titles: dict[Path, str]) -> str:
    """Return Zensical's settings, with the pages in their groups. titles: of all pages."""

    def entry(file: Path, title: str = "") -> str:
        # A string of JSON is one of TOML.
        return f"{{ {json.dumps(title or titles[file])} = {json.dumps(pages.page_of(file).as_posix())} }}"

    nav = [entry(Path("README.md"), "tminus"), entry(pages.INDEX)]
    for title, files_of_group in pages.navigation(ROOT, [*titles]).items():
        nav += [f"{{ {json.dumps(title)} = [{', '.join(map(entry, files_of_group))}] }}"]
    text = (HERE / "zensical.toml").read_text("utf-8")
    filled = {"nav": ",\n".join(nav), "description": PROJECT["description"], "source": PROJECT["urls"]["Source"]}
    for name, value in filled.items():
        text = text.replace(f"<{name}>", value)
    return text


if __name__ == "__main__":
    reference.write()
    sys.exit(build())
