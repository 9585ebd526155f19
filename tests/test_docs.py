"""README.md and docs/, held against the code: links, commands, calls, parameters, defaults and media types.

`make docs` checks the links of the site.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

from docs.site import reference
from docs.site.pages import is_external, targets
from tests import tools
from tests.documents import ROOT, anchors, code_blocks, shell_commands
from tests.service.conftest import TABLES_OF_50, MakeSite, Site, make_site, running_sites  # noqa: F401
from tests.service.fakes import INFO
from tminus.model.catalogue import SAMPLER_FACTS, Recommended
from tminus.service.api.answers.operations import LEFT_OUT, MEDIA
from tminus.service.api.request.schemas import SETTINGS
from tminus.service.api.sample import WITHOUT_EVERY
from tminus.service.images.encoder import WEBP
from tminus.service.jobs.webhooks.webhook import EVENTS
from tminus.service.startup.serve import first_request
from tminus.service.startup.settings import Settings

README = ROOT / "README.md"
INDEX = ROOT / "docs" / "README.md"
PAGES = [
    README, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md",
    ROOT / "docker" / "README.md", ROOT / "client" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "reference").glob("*.md")),
    *sorted((ROOT / "checkpoints").glob("*/README.md")),
]  # fmt: skip
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
OUTSIDE = {"tminus.json", "scheduler_config.json", "model_index.json", "model/", "service/", "tests/"}
UNDESCRIBED = ("/docs", "/openapi.json")  # by the document
OF_DOCKER = {"--stop-timeout", "--init", "--cpus", "--scale", "--target"}  # its own options
# pip's, an example's and Prometheus'.
OF_OTHERS = {"--help", "--extra-index-url", "--plot", "--enable-feature=exemplar-storage"}

# Spans by name, and what they say, where that is written down.
SPANS = (re.compile(r"""(?:traced|start_span|begin_part)\("([a-z ]+)\""""), re.compile(r"\"(tminus\.[a-z_.]+)\""))


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def tables(text: str, *columns: str) -> Iterator[list[str]]:
    """The rows of every table with these columns."""
    head = re.escape(f"| {' | '.join(columns)} |\n")
    for table in re.findall(rf"^{head}\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        for line in table.splitlines():
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def named(cell: str) -> list[str]:
    """What a cell has in code."""
    return re.findall(r"`([^`]+)`", cell)


# --- links ---


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_of_a_page_leads_somewhere_in_the_repository(page: Path) -> None:
    for target in targets(page.read_text("utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not is_external(target):
            assert file.exists(), target
            if anchor and file.suffix == ".md":
                assert anchor in anchors(file), target


# --- commands ---


COMMANDS = {name.removeprefix("tminus "): command for name, command in reference.commands()}


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_make_verb_command_and_option_of_a_page_is_there(page: Path) -> None:
    verbs = set(re.findall(r"^\.PHONY: (.+)$", MAKEFILE, re.MULTILINE)[0].split())
    in_code = "\n".join([*code_blocks(page, "sh"), *named(prose(page))])
    assert set(re.findall(r"(?:^|or: |=\S+ )make ([a-z]+)", in_code, re.MULTILINE)) <= verbs

    for command in shell_commands(page):
        words = command.split()
        if words[0] in ("tminus", ".venv/bin/tminus"):
            name = next(known for known in (" ".join(words[1:3]), words[1]) if known in COMMANDS)
            assert {word for word in words[2:] if word.startswith("-")} <= flags_of(name), command
    if page.name != "benchmarks.md":
        used = {code.split()[0] for code in named(prose(page)) if code.startswith("--")}
        known = {flag for name in COMMANDS for flag in flags_of(name)} | OF_OTHERS
        assert used <= known | (OF_DOCKER if page.parent.name == "docker" else set())


def test_nothing_says_to_install_tminus_by_its_name() -> None:
    """No package index has a release, so pip would install what somebody else registered there."""
    ours = [file for part in ("model", "service", "docker", "docs/examples") for file in (ROOT / part).rglob("*.*")]
    for file in (*PAGES, ROOT / "Dockerfile", ROOT / "Makefile", *ours):
        if file.suffix not in (".pyc", ".png") and file.is_file():
            assert not re.search(r"pip install (-\S+ )*['\"]?tminus", file.read_text("utf-8")), file


def test_make_and_pip_install_what_the_readme_asks_of_a_server() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]

    def whole(names: str) -> set[str]:
        """Extras, and those that they are made of."""
        made_of = re.findall(r"tminus\[(.+?)\]", " ".join(line for name in names.split(",") for line in extras[name]))
        return {*names.split(",")}.union(*map(whole, made_of))

    (by_pip,) = re.findall(r"pip install '\.\[(.+)\]' && tminus serve", README.read_text("utf-8"))
    by_make = [
        re.findall(r"--editable '\.\[(.+)\]'", steps)[0]
        for rule, steps in re.findall(r"^\$\(VENV\)/(\.installed\S*):.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
        if re.search(r"@touch.*\.installed( |$)", steps.replace("$@", rule), re.MULTILINE)
    ]
    assert len(by_make) > 1
    for names in (by_pip, *by_make):
        assert whole(names) >= {"openvino", "hub"}, "a checkpoint may be named by its id on the hub"


def flags_of(command: str) -> set[str]:
    """The options of a command of tminus."""
    return {flag for each in COMMANDS[command].params for flag in (*each.opts, *each.secondary_opts)}


def test_every_page_of_docs_is_in_its_index_to_which_the_readme_leads() -> None:
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)[)#]", INDEX.read_text("utf-8")))
    assert {page.name for page in INDEX.parent.glob("*.md")} - {INDEX.name} <= linked
    assert f"]({page_name(INDEX)})" in README.read_text("utf-8")


def test_the_readme_begins_with_the_request_that_a_server_prints_when_it_is_ready() -> None:
    url = f"localhost:{Settings.model_fields['port'].default}"
    curls = [command for command in shell_commands(README) if command.startswith("curl ")]
    assert f"Try: {curls[0]}" == first_request(url, INFO)


def test_every_file_that_architecture_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    names = {code for code in named(text) if re.fullmatch(r"[\w/]+\.(py|js|json)|\w+/", code)} - OUTSIDE
    for name in names:
        assert any(ROOT.glob(f"{part}/**/{name}") for part in ("service", "model", "tests")), name


# --- calls ---


@pytest.fixture
def site(make_site: MakeSite) -> Site:  # noqa: F811
    return make_site()


def accepted(site: Site, **parameters: Any) -> dict[str, Any]:
    """What a durable job says that it was asked for; it is given up at once."""
    answer = site.client.post("/jobs", json=parameters)
    assert answer.status_code == 202, answer.text
    site.client.post(f"{answer.headers['location']}/cancel")
    document: dict[str, Any] = answer.json()["parameters"]
    return document


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    """What a server says of its calls."""
    with running_sites() as make:
        document: dict[str, Any] = make().client.get("/openapi.json").json()
    return document


def operations(openapi: dict[str, Any], path: str) -> dict[str, Any]:
    """The methods of a path, in which words in capitals or braces stand for parts."""
    path = re.sub(r"^/models/[^/]+(?=/(sample|jobs|noise|model|docs|openapi.json)\b)", "", path)
    wanted = re.sub(r"\{[^}]+\}|\b[A-Z_]+\b", "{}", path.partition("?")[0])
    found: dict[str, Any] = {}
    for known, methods in [*openapi["paths"].items(), *openapi["x-websockets"].items()]:
        pattern = re.sub(r"\\\{[^}]+\\\}", "[^/]+", re.escape(known))
        if known == path or re.fullmatch(pattern, wanted):
            found |= {"ws": methods} if known in openapi["x-websockets"] else methods
    return found


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_call_that_a_page_names_is_there_with_its_parameters(page: Path, openapi: dict[str, Any]) -> None:
    for code in named(prose(page)):
        if (call := re.match(r"(GET|HEAD|POST|PUT|DELETE|WS) (/[^\s`]*)", code)) and call[2] not in UNDESCRIBED:
            method = "get" if call[1] == "HEAD" else call[1].lower()
            assert method in operations(openapi, call[2]), code
    for url in re.findall(r"localhost:8000(/[^\s'\"`]*)", "".join(code_blocks(page))):
        path, _, query = url.partition("?")
        if path in UNDESCRIBED:
            continue
        methods = operations(openapi, path)
        assert methods or any(known.startswith(f"{path}/") for known in openapi["paths"]), url
        known = {each.get("name") for method in methods.values() for each in method.get("parameters", ())}
        assert {name for name, _ in parse_qsl(query)} <= known, url


def test_what_is_taken_where_settings_are_left_out_is_that_of_the_reference(make_site: MakeSite) -> None:  # noqa: F811
    table = replace(TABLES_OF_50[0], steps=5, guidance=2.0)
    own = Recommended("ddim", 30, 1.5)
    samplers = (*INFO.samplers, table.sampler)
    site = make_site(info=replace(INFO, recommended=own, samplers=samplers, tables=(table,)))
    requests: dict[str, dict[str, Any]] = {
        "none of these": {},
        "`sampler`, the recommended one": {"sampler": "ddim"},
        "`sampler`, another one": {"sampler": "heun"},
        "`steps`": {"steps": 7},
        "`sampler` and `steps`": {"sampler": "ddim", "steps": 7},
        "`table`": {"table": table.hash},
    }
    rows = {given: cells for given, *cells in tables(LEFT_OUT, "given", "sampler", "steps", "guidance")}
    assert rows.keys() == requests.keys()
    for named_by_it, asked in requests.items():
        spec = accepted(site, class_label=0, **asked)
        for name, cell in zip(SETTINGS, rows[named_by_it], strict=True):
            meanings = {
                "recommended": getattr(own, name),
                "(that|those) of the table": getattr(table, name),
                "`default_sampler` in .*": INFO.default_sampler,
                "its `good_steps` in .*": SAMPLER_FACTS["heun"].good_steps,
                "that one|those": asked.get(name),
                "1": 1,
            }
            (meant,) = [value for words, value in meanings.items() if re.fullmatch(words, cell)]
            assert spec[name] == meant, (named_by_it, name)


def test_the_events_of_a_webhook_are_those_of_the_docs() -> None:
    page = (ROOT / "docs" / "webhooks.md").read_text("utf-8")
    assert [named(row[0])[0] for row in tables(page, "event", "when")] == list(EVENTS)


def test_the_media_types_are_those_of_the_docs(site: Site) -> None:
    documented = [named(media_type)[0] for media_type, _ in tables(MEDIA, "media type", "answer")]
    assert documented == [*WITHOUT_EVERY, WEBP]
    for media_type in WITHOUT_EVERY:
        answer = site.post(json={"steps": 2}, headers={"Accept": media_type})
        assert answer.headers["content-type"] == media_type


# --- traces ---


def test_the_table_of_spans_has_every_span_and_what_each_may_say_and_nothing_else() -> None:
    code = "".join(file.read_text("utf-8") for file in (ROOT / "service").glob("**/*.py"))
    names, attributes = ({*each.findall(code)} for each in SPANS)
    assert {"job", "queue", "denoise", "decode", "encode", "store add"} <= names
    rows = list(tables((ROOT / "docs" / "operations.md").read_text("utf-8"), "span", "covers", "attributes"))
    assert {name for spans, *_ in rows[1:] for name in named(spans)} == names, "the first row is that of requests"
    assert {name for *_, said in rows for name in named(said)} == attributes


def test_contributors_are_told_the_packages_that_the_tests_need() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("\npackages of Debian: ")[2].partition(". A test")[0]
    assert {*named(text)} == tools.PLACES.keys()


def test_troubleshooting_has_every_code_of_the_statuses_that_refuse() -> None:
    page, listed, status = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8"), set[tuple[int, str]](), ""
    for stated, codes, _ in tables(page, "status", "code", "what to do"):
        status = stated or status
        listed |= {(int(status), code) for code in named(codes)}
    statuses = {each for each, _ in listed}
    assert statuses == {403, 413, 429, 503, 507}
    assert listed == {(each.status, each.code) for each in reference.every_error() if each.status in statuses}
