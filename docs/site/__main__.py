"""Build the documentation site, or look whether the links to other hosts still lead somewhere.

    python -m docs.site
    python -m docs.site --external

The site is in site/. The pages as Zensical reads them are in build/docs/pages/, and the reference in docs/reference/.
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
ABORTED = "--strict"  # how Zensical ends where it has warned
# Addresses of examples, and of servers that run where the reader is.
NOWHERE = ("http://localhost", "http://127.", "https://example.", "http://example.", "mailto:")


def main() -> int:
    """Run the command; the exit status is 1 if a link leads nowhere."""
    parser = argparse.ArgumentParser(prog="python -m docs.site", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--external", action="store_true", help="ask the other hosts that pages link to; build nothing")
    return external() if parser.parse_args().external else build()


def build() -> int:
    """Write the reference, assemble the pages, and have Zensical make the site of them."""
    write_reference()
    for folder in (BUILD, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    files = pages.find_pages(ROOT)
    links = pages.Links(ROOT, files, PROJECT["urls"]["Source"])
    titles: dict[Path, str] = {}
    for file in files:
        text = (ROOT / file).read_text("utf-8")
        page = BUILD / "pages" / pages.page_of(file)
        page.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".ipynb":
            text = notebook.as_page(file.name, text, f"{links.source_url}/blob/main/{file.as_posix()}")
        titles[file] = pages.title_of(text)
        page.write_text(links.of(file, text), "utf-8")
    assets = (ROOT / "service" / "page" / "icon.svg", *(HERE / "assets").iterdir())
    copies = {Path("assets", each.name): each for each in assets}
    copies |= {each: ROOT / each for each in (*links.copied, *(pages.REFERENCE / name for name in api.files()))}
    for place, source in copies.items():
        target = BUILD / "pages" / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    (BUILD / "zensical.toml").write_text(configuration(files, titles), "utf-8")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(BUILD / "zensical.toml")]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if ABORTED not in done.stderr:  # which a traceback goes before
        sys.stderr.write(done.stderr)
    if links.broken:
        print("Links to files that are not there:", *sorted(links.broken), sep="\n", file=sys.stderr)
    shutil.move(BUILD / "site", SITE)
    print(f"open {SITE / 'index.html'}")
    return done.returncode or int(bool(links.broken))


def write_reference() -> None:
    """Write the pages that are made of the code, and what lies beside them."""
    folder = ROOT / pages.REFERENCE
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in (reference.pages() | {"api.md": api.page()}).items():
        (folder / name).write_text(text, "utf-8")
    for name, content in api.files().items():
        (folder / name).write_bytes(content)


def configuration(files: list[Path], titles: dict[Path, str]) -> str:
    """Return Zensical's settings, with the pages in their groups."""

    def entry(file: Path, title: str = "") -> str:
        # A string of JSON is one of TOML.
        return f"{{ {json.dumps(title or titles[file])} = {json.dumps(pages.page_of(file).as_posix())} }}"

    nav = [entry(Path("README.md"), "tminus"), entry(pages.INDEX)]
    for title, files_of_group in pages.navigation(ROOT, files).items():
        nav += [f"{{ {json.dumps(title)} = [{', '.join(map(entry, files_of_group))}] }}"]
    text = (HERE / "zensical.toml").read_text("utf-8")
    filled = {"nav": ",\n".join(nav), "description": PROJECT["description"], "source": PROJECT["urls"]["Source"]}
    for name, value in filled.items():
        text = text.replace(f"<{name}>", value)
    return text


def external() -> int:
    """Ask for each address that a page links to; print those that do not answer, with the pages."""
    found: dict[str, list[str]] = {}
    for file in pages.find_pages(ROOT):
        for target in pages.targets((ROOT / file).read_text("utf-8")):
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
