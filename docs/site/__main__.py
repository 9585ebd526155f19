"""Build the documentation site, or look whether the links to other hosts still lead somewhere.

    python -m docs.site
    python -m docs.site --external

The site is in site/. The pages as Zensical reads them are in build/docs/pages/.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from docs.site import api, notebook, pages, reference

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
BUILD = ROOT / "build" / "docs"
SITE = ROOT / "site"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
ABORTED = "--strict"  # Zensical's last words where it has warned
# Addresses of examples, and of servers that run where the reader is.
NOWHERE = ("http://localhost", "http://127.", "https://example.", "http://example.", "mailto:")


def main() -> int:
    """Run the command; the exit status is 1 if a link leads nowhere."""
    parser = argparse.ArgumentParser(prog="python -m docs.site", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--external", action="store_true", help="ask the other hosts that pages link to; build nothing")
    return external() if parser.parse_args().external else build()


def build() -> int:
    """Assemble the pages, and have Zensical make the site of them."""
    for folder in (BUILD, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    texts, beside = read_pages(), {pages.REFERENCE / name: content for name, content in api.files().items()}
    links = pages.Links(ROOT, [*texts], PROJECT["urls"]["Source"], beside)
    titles: dict[Path, str] = {}
    for file, text in texts.items():
        page = BUILD / "pages" / pages.page_of(file)
        page.parent.mkdir(parents=True, exist_ok=True)
        titles[file] = pages.title_of(text)
        page.write_text(links.of(file, text), "utf-8")
    assets = (ROOT / "service" / "page" / "icon.svg", *(HERE / "assets").iterdir())
    copies = {Path("assets", each.name): each for each in assets}
    copies |= {each: ROOT / each for each in links.copied}
    for place, content in (beside | {place: source.read_bytes() for place, source in copies.items()}).items():
        target = BUILD / "pages" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
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
    """Return every page as Markdown, by its file: of a notebook too, and of the reference with what the code says."""
    texts = {file: (ROOT / file).read_text("utf-8") for file in pages.find_pages(ROOT)}
    for file, text in texts.items():
        if file.suffix == ".ipynb":
            address = f"{PROJECT['urls']['Source']}/blob/main/{file.as_posix()}"
            texts[file] = notebook.as_page(file.name, text, address)
    made = reference.pages() | {"api.md": api.page()}
    return texts | {pages.REFERENCE / name: text for name, text in made.items()}


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


def external() -> int:
    """Ask for each address that a page links to; print those that do not answer, with the pages."""
    found: dict[str, list[str]] = {}
    for file, text in read_pages().items():
        for target in pages.targets(text):
            if pages.is_external(target) and not target.startswith(NOWHERE):
                found.setdefault(target.partition("#")[0], []).append(file.as_posix())
    with ThreadPoolExecutor(8) as pool:
        problems = dict(zip(found, pool.map(ask, found), strict=True))
    for address, problem in sorted(problems.items()):
        if problem:
            print(f"{address}: {problem}, in {', '.join(sorted(set(found[address])))}")
    failed = sum(map(bool, problems.values()))
    print(f"{len(problems)} addresses, {failed} that do not answer")
    return int(failed > 0)


def ask(address: str) -> str:
    """Return what is wrong with an address; nothing if it answers."""
    try:
        with httpx.stream("GET", address, follow_redirects=True, timeout=20) as answer:
            # 403 and 429 are for programs: a browser is let in.
            return "" if answer.status_code < 400 or answer.status_code in (403, 429) else str(answer.status_code)
    except httpx.HTTPError as error:
        return type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
