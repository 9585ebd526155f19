"""Each figure in the pages is that of its file of results, and no measured number stands there without one."""

import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from bench import pages, result_file
from bench.pages import BLOCK, MARK, rewritten
from bench.result_file import RESULTS, ROOT
from bench.training import RECIPE
from tests.documents import shell_commands

# Units that only measurements have. A number before one of them has a mark.
UNITS = (
    r"row-steps/s|row-steps (?:per|a) second|passes/s|images/s|frames/s|GFLOP/s|TFLOP/s|ms a row|% of (?:the )?peak"
    r"|times as (?:fast|slow|long)|times (?:faster|slower|longer)"
)
MEASURED = re.compile(rf"(?<![\w.,])\d[\d.,]*(?:\*\*)? ?(?:{UNITS})")
CODE = re.compile(r"^(```|~~~).*?^\1|``.+?``|`[^`\n]+`", re.MULTILINE | re.DOTALL)
PAGES = pages.pages()
WITH_FIGURES = [page for page in PAGES if "<!-- figure" in page.read_text("utf-8")]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture(scope="module")
def results() -> pages.Results:
    return pages.usable(pages.read(RESULTS))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_has_the_figures_of_its_files(page: Path, results: pages.Results) -> None:
    text = page.read_text("utf-8")
    assert rewritten(text, results) == text, "run make figures"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_mark_names_a_figure(page: Path) -> None:
    text = page.read_text("utf-8")
    assert text.count("<!-- figure") == len(MARK.findall(text)), "a mark is not well formed, or stands after no number"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_measured_number_stands_without_a_mark(page: Path) -> None:
    text = CODE.sub("", BLOCK.sub("", page.read_text("utf-8")))
    assert MEASURED.findall(text) == []


@pytest.mark.parametrize("page", WITH_FIGURES, ids=name_of)
def test_no_reader_sees_a_mark(page: Path) -> None:
    """Neither on GitHub (CommonMark with tables) nor on the site (Python-Markdown)."""
    markdown, it = pytest.importorskip("markdown"), pytest.importorskip("markdown_it")
    text = page.read_text("utf-8")
    for html in (
        markdown.markdown(text, extensions=["tables", "fenced_code"]),
        it.MarkdownIt("commonmark").enable("table").render(text),
    ):
        seen = re.sub(r"<!--.*?-->", "", html, flags=re.DOTALL)
        assert "!-- figure" not in seen
        assert "!-- table" not in seen


def test_the_picture_of_contenders_has_the_figures_of_its_file(results: pages.Results) -> None:
    plot, serving = pytest.importorskip("bench.plot"), results["serving"]
    shown = re.findall(r">([^<>]+)</text>", (ROOT / "docs" / "images" / "bench.svg").read_text("utf-8"))
    shown = list(map(unescape, shown))
    for row, *_ in plot.PANELS:
        for key in plot.COLOURS.keys() & serving.get(row, {}).keys():
            assert plot.label(serving[row][key]) in shown, f"{row}, {key}: run make figures"


def test_files_of_results_say_how_they_were_made() -> None:
    for name, each in pages.read(RESULTS).items():
        made = each["made"]
        assert made["command"].startswith("python -m "), name
        assert {"date", "commit", "clean", "seconds", "load_average", "machine", "code"} <= made.keys(), name


def test_the_losses_of_the_recipe_are_those_of_the_command_that_the_page_prints() -> None:
    recipe = next(each for each in shell_commands("docs/training.md") if each.startswith(".venv/bin/tminus train"))
    assert recipe == f".venv/bin/tminus train --data fashion-mnist --out runs/fashion {' '.join(RECIPE)}"


# --- the rewriting itself ---


def made(**changes: Any) -> dict[str, Any]:
    return {"quick": False, "timed": True, "idle": True, "clean": True, "code": code_now()} | changes


def code_now() -> dict[str, str]:
    return {path: result_file.digest(ROOT / path) for path in result_file.CODE}


def test_a_number_is_rewritten_from_its_file_and_its_mark_stays() -> None:
    results = {"serving": {"idle": {"ratio": {"value": 4.934, "rounds": [4.9, 5.0]}}, "rate": 668.7, "share": 0.271}}
    results["serving"]["wait"] = {"value": 121.2, "at_least": True}
    for before, after in (
        (
            "**3**<!-- no --> 3<!-- figure serving:idle.ratio .2g --> x",
            "**3**<!-- no --> 4.9<!-- figure serving:idle.ratio .2g --> x",
        ),
        ("| n/a<!-- figure serving:rate .2g --> |", "| 670<!-- figure serving:rate .2g --> |"),
        ("1,000<!-- figure serving:rate ,.1f -->", "668.7<!-- figure serving:rate ,.1f -->"),
        ("0.5<!-- figure serving:share .2f -->", "0.27<!-- figure serving:share .2f -->"),
        ("120<!-- figure serving:wait .2g -->", "> 120<!-- figure serving:wait .2g -->"),
        ("> 5<!-- figure serving:rate .2g -->", "670<!-- figure serving:rate .2g -->"),
        ("5<!-- figure networks:cifar .2f -->", "n/a<!-- figure networks:cifar .2f -->"),
    ):
        assert rewritten(before, results) == after
        assert rewritten(after, results) == after
    with pytest.raises(KeyError, match=r"serving\.json has no idle\.nothing"):
        rewritten("1<!-- figure serving:idle.nothing .2f -->", results)


def test_a_block_without_figures_says_that_they_are_not_measured() -> None:
    before = "<!-- table headline -->\n\n| old |\n\n<!-- end -->"
    assert rewritten(before, {}) == "<!-- table headline -->\n\n*Not measured yet.*\n\n<!-- end -->"
    with pytest.raises(KeyError, match="nobody-makes-it"):
        rewritten(before.replace("headline", "nobody-makes-it"), {})


def test_a_quick_run_and_a_busy_machine_are_in_no_page() -> None:
    files = {
        "good": {"made": made()},
        "untimed": {"made": made(timed=False, idle=False)},
        "quick": {"made": made(quick=True)},
        "busy": {"made": made(idle=False)},
    }
    assert pages.usable(files).keys() == {"good", "untimed"}


def test_a_file_that_is_older_than_the_code_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = "1<!-- figure a:x d --> 2<!-- figure b:x d --> 3<!-- figure c:x d --> 4<!-- figure d:x d -->"
    page.write_text(f"{marks}\n<!-- table gpu -->\n\n<!-- end -->\n")
    old = made(code=code_now() | {"service/engine": "another", "bench/loads.py": "another"}, command="python -m bench")
    dirty, unknown = made(clean=False, commit="abc"), made(code={}, command="make gpu")
    files = {name: {"made": of} for name, of in {"a": made(), "b": old, "d": dirty, "gpu-card": unknown}.items()}
    assert list(pages.faults(files, [page])) == [
        "b.json: older than service/engine, bench/loads.py (by python -m bench)",
        "c.json: there is no such file",
        "d.json: files differed from commit abc",
        "gpu-card.json: older than bench (by make gpu)",
    ]


def test_a_run_names_its_own_modules_and_its_peers_but_not_what_makes_the_pages() -> None:
    names = "import json, bench.__main__; print(json.dumps(bench.__main__.result_file.begin(wait=False).code))"
    code = json.loads(subprocess.check_output([sys.executable, "-c", names], cwd=ROOT))
    assert {"model", "bench/__main__.py", "bench/loads.py", "bench/figures.py", "bench/peers"} <= code.keys()
    assert not {"bench/pages.py", "bench/tables.py"} & code.keys()


def test_only_what_runs_decides_whether_code_is_newer(tmp_path: Path) -> None:
    file = tmp_path / "model" / "a.py"
    file.parent.mkdir()

    def digest(text: str) -> str:
        file.write_text(text)
        return result_file.digest.__wrapped__(file.parent)

    first = digest('"""A module."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    assert digest("# reworded\ndef f(x):\n    'Other words.'\n    return (x + 1)  # why\n") == first
    assert digest("def f(x):\n    return x + 2\n") != first
    assert digest("def f(x):\n    return x + 1.0\n") != first


def test_a_file_keeps_four_digits_and_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    begun = result_file.Begun(busy_share=0.01)
    figures = {"a": {"b": 1.23456789, "c": None}, "n": 12345, "rounds": result_file.rounds([2.0, None, 4.0])}
    result_file.write("some", begun.made({"cpu": "x"}), figures, tmp_path)
    found = json.loads((tmp_path / "some.json").read_bytes())
    assert found["a"] == {"b": 1.235}
    assert found["n"] == 12345
    assert found["rounds"] == {"value": 3.0, "rounds": [2.0, 4.0]}
    assert found["made"]["idle"] is True


def test_a_quick_run_replaces_no_file_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_file, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(result_file, "TRIALS", tmp_path / "trials")
    assert result_file.write("some", made(), {}) == tmp_path / "results" / "some.json"
    assert result_file.write("some", made(quick=True), {}) == tmp_path / "trials" / "some.json"
