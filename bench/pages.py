"""Put the figures of bench/results/*.json into the pages, and draw the pictures: `make figures`.

    python -m bench.pages            rewrite the pages, and say which files are older than the code that they speak of
    python -m bench.pages --check    rewrite nothing; exit code 1 where a page would change or a file is too old

A number in a page is followed by its mark, `4.9<!-- figure serving:idle.tminus_over_lock .2g -->`: the file, the path
in it, and how Python formats it. A bound gets its `>` or `<`. `<!-- table NAME -->` … `<!-- end -->` is a block that is
made as a whole. A file of a quick run, or of a busy machine, counts as not there: then a number is n/a.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.image_tables import NOT_MEASURED
from bench.result_file import RESULTS, ROOT, changed
from bench.tables import TABLES, sign_of

PAGES = ("README.md", "ARCHITECTURE.md", "SECURITY.md", "docs/*.md", "docs/reference/*.md", "checkpoints/*/README.md",
         "docker/README.md")  # fmt: skip
MARK = re.compile(
    r"(?P<number>(?:(?<!-)[<>] )?(?:[-+]?\d[\d.,]*\d|\d|n/a))(?P<mark><!-- figure (?P<key>\S+) (?P<format>\S+) -->)"
)
BLOCK = re.compile(r"<!-- table (?P<name>\S+) -->\n.*?<!-- end -->", re.DOTALL)

Results = Mapping[str, Mapping[str, Any]]  # by the file's name


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.pages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="rewrite nothing; exit code 1 for what is not up to date")
    args = parser.parse_args()
    files = read(RESULTS)
    results, problems = usable(files), list(faults(files, pages()))
    for page in pages():
        text = page.read_text("utf-8")
        if (new := rewritten(text, results)) != text:
            if args.check:
                problems.append(f"{page.relative_to(ROOT)} differs from the results: run make figures")
            else:
                page.write_text(new, "utf-8")
                print(f"{page.relative_to(ROOT)}: rewritten")
    if not args.check:
        draw(results)
    for problem in problems:
        print(problem)
    sys.exit(1 if args.check and problems else 0)


def pages(root: Path = ROOT) -> list[Path]:
    """List the pages that may have figures."""
    return [page for pattern in PAGES for page in sorted(root.glob(pattern))]


def read(folder: Path) -> Results:
    """Read all files of results."""
    return {file.stem: json.loads(file.read_bytes()) for file in sorted(folder.glob("*.json"))}


def usable(files: Results) -> Results:
    """Leave out the files of quick runs, and those of timed runs on a busy machine."""
    return {name: each for name, each in files.items() if not untrusted(each)}


def untrusted(result: Mapping[str, Any]) -> str | None:
    """Why the figures of a file are in no page; None where they may be."""
    made = result.get("made", {})
    if made.get("quick"):
        return "it is of a quick run"
    if made.get("timed", True) and not made.get("idle", False):
        return "the machine was not idle"
    return None


def faults(files: Results, quoting: Sequence[Path]) -> Iterator[str]:
    """Say what is wrong with the files that pages quote: one that is missing, not to be trusted, or too old."""
    for name in sorted(quoted(quoting, files)):
        if name not in files:
            yield f"{name}.json: there is no such file"
            continue
        if (why := untrusted(files[name])) is not None:
            yield f"{name}.json: {why}"
        made = files[name].get("made", {})
        if newer := changed(made):
            yield f"{name}.json: older than {', '.join(newer)} (by {made.get('command', 'an unknown command')})"
        if not made.get("clean", False):
            yield f"{name}.json: files differed from commit {made.get('commit', 'unknown')}"


def quoted(quoting: Sequence[Path], files: Results) -> set[str]:
    """Name the files that pages have figures of. A block that is made of all files has those of GPUs."""
    found = set[str]()
    for page in quoting:
        text = page.read_text("utf-8")
        found |= {mark["key"].partition(":")[0] for mark in MARK.finditer(text)}
        for block in BLOCK.finditer(text):
            file, _ = TABLES[block["name"]]
            found |= {file} if file else {name for name in files if name.startswith("gpu-")}
    return found


def rewritten(text: str, results: Results) -> str:
    """Put the figures into a page. Raises KeyError for a table that nobody makes."""

    def block(found: re.Match[str]) -> str:
        file, make = TABLES[found["name"]]
        body = make(results[file] if file else results).strip() if not file or file in results else ""
        return f"<!-- table {found['name']} -->\n\n{body or '*Not measured yet.*'}\n\n<!-- end -->"

    return MARK.sub(
        lambda found: number(found["key"], found["format"], results) + found["mark"], BLOCK.sub(block, text)
    )


def number(key: str, form: str, results: Results) -> str:
    """Format the figure of a key, `FILE:PATH`. Raises KeyError where a file that counts has no such figure."""
    name, _, path = key.partition(":")
    if name not in results:
        return NOT_MEASURED
    found: Any = results[name]
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise KeyError(f"{name}.json has no {path}")
        found = found[part]
    value = found["value"] if isinstance(found, Mapping) else found
    text = format(value, form) if not isinstance(value, str) else value
    # 2.3e+02 is 230 in a page.
    return sign_of(found) + (f"{float(text):.0f}" if re.fullmatch(r"-?[\d.]+e\+\d+", text) else text)


def draw(results: Results) -> None:
    """Draw the pictures of the pages, where matplotlib is installed."""
    try:
        from bench import plot
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return
    for name, drawn, file in (
        ("serving", plot.contenders, "bench.svg"),
        ("quality", plot.samplers, "samplers.svg"),
        ("adaptive", plot.adaptive, "adaptive.svg"),
    ):
        if name in results:
            drawn(results[name], ROOT / "docs" / "images" / file)


if __name__ == "__main__":
    main()
