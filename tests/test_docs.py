"""README.md and docs/, held against the code: links, commands, calls, parameters, media types and headers."""

import base64
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from starlette.routing import BaseRoute, Route, WebSocketRoute

from docs.site import reference
from tests import tools
from tests.documents import ROOT, code_blocks, shell_commands
from tests.service.conftest import TABLES_OF_50, MakeSite, Site, make_site, problem  # noqa: F401
from tests.service.fakes import INFO
from tminus.model.catalogue import SAMPLER_FACTS, SAMPLERS, TABLE_SAMPLERS, Recommended
from tminus.model.timesteps import SPACINGS
from tminus.service.api.request.defaults import SETTINGS
from tminus.service.api.request.schemas import (
    AnimationRequest,
    FloatsRequest,
    SampleRequest,
    TrajectoryRequest,
    WebhookRequest,
)
from tminus.service.api.sample import WITHOUT_EVERY
from tminus.service.images.encoder import NPY, WEBP
from tminus.service.jobs.webhooks.webhook import EVENTS
from tminus.service.startup.serve import first_request
from tminus.service.startup.settings import Settings

README = ROOT / "README.md"
INDEX = ROOT / "docs" / "README.md"
PAGES = [
    README, ROOT / "ARCHITECTURE.md", ROOT / "CHANGELOG.md",
    ROOT / "docker" / "README.md", ROOT / "client" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "checkpoints").glob("*/README.md")),
]  # fmt: skip
API = (ROOT / "docs" / "api.md").read_text("utf-8")
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
OUTSIDE = {"tminus.json", "scheduler_config.json", "model_index.json", "model/", "service/", "tests/"}
OF_DOCKER = {"--stop-timeout", "--init", "--cpus", "--scale", "--target"}  # its own options
FILES_OF_PAGES = {"GET /page/{name}", "GET /docs/{name}"}

# Spans by name, and what they say, where that is written down.
SPANS = (re.compile(r"""(?:traced|start_span|begin_part)\("([a-z ]+)\""""), re.compile(r"\"(tminus\.[a-z_.]+)\""))

# What a parameter must come with to be accepted.
COMPANIONS: dict[str, dict[str, Any]] = {
    "to_seed": {"mix": 0.5},
    "mix": {"to_seed": 7},
    "eta": {"sampler": "ddim"},
    "guidance": {"class_label": "cat"},
    "guidance_interval": {"class_label": "cat", "guidance": 2},
    "guidance_rescale": {"class_label": "cat", "guidance": 2},
}


COMMANDS = {name.removeprefix("tminus "): command for name, command in reference.commands()}


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The fragment of each heading, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tables(text: str, *columns: str) -> Iterator[list[str]]:
    """The rows of every table with these columns."""
    head = re.escape(f"| {' | '.join(columns)} |\n")
    for table in re.findall(rf"^{head}\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE):
        for line in table.splitlines():
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


def named(cell: str) -> list[str]:
    """What a cell has in code."""
    return re.findall(r"`([^`]+)`", cell)


def number(text: str) -> int:
    """A bound as the docs write it: 64, T-1, 2^32-1."""
    base, _, less = text.replace("T", str(INFO.num_timesteps)).partition("-")
    power, _, exponent = base.partition("^")
    return int(power) ** int(exponent or 1) - int(less or 0)


# --- links and commands ---


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_link_make_verb_command_and_option_of_a_page_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target

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
        known = {flag for name in COMMANDS for flag in flags_of(name)} | {"--help"}
        assert used <= known | (OF_DOCKER if page.parent.name == "docker" else set())


def flags_of(command: str) -> set[str]:
    """The options of a command of tminus."""
    return {flag for each in COMMANDS[command].params for flag in (*each.opts, *each.secondary_opts)}


def test_every_page_of_docs_is_in_its_index_to_which_the_readme_leads() -> None:
    linked = set(re.findall(r"\]\((\w[\w-]*\.md)[)#]", INDEX.read_text("utf-8")))
    assert linked == {page.name for page in INDEX.parent.glob("*.md")} - {INDEX.name}
    assert f"]({page_name(INDEX)}#" in README.read_text("utf-8")


def test_the_readme_begins_with_the_request_that_a_server_prints_when_it_is_ready() -> None:
    url = f"localhost:{Settings.model_fields['port'].default}"
    curls = [command for command in shell_commands(README) if command.startswith("curl ")]
    assert f"Try: {curls[0]}" == first_request(url, INFO)


def test_every_file_that_architecture_names_exists() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    names = {code for code in named(text) if re.fullmatch(r"[\w/]+\.(py|js|json)|\w+/", code)} - OUTSIDE
    for name in names:
        assert any(ROOT.glob(f"{part}/**/{name}") for part in ("service", "model", "tests")), name


# --- docs/api.md ---

CALLS = [named(call)[0] for call, _ in tables(API, "call", "what it does")]
PARAMETERS = {named(row[0])[0]: row[1:] for row in tables(API, "parameter", "values", "default", "meaning")}
OF_ANIMATIONS, OF_FLOATS, OF_TRAJECTORIES, OF_WEBHOOKS = (
    each.model_fields.keys() for each in (AnimationRequest, FloatsRequest, TrajectoryRequest, WebhookRequest)
)


@pytest.fixture
def site(make_site: MakeSite) -> Site:  # noqa: F811
    return make_site(max_n=Settings.model_fields["max_n"].default)


def routes_of(routes: Iterable[BaseRoute], prefix: str = "") -> Iterator[str]:
    """The calls that an app's table of routes answers, as docs/api.md writes them."""
    for route in routes:
        if isinstance(route, WebSocketRoute):
            yield f"WS {prefix}{route.path}"
        elif isinstance(route, Route):
            yield from (f"{method} {prefix}{route.path}" for method in (route.methods or set()) - {"HEAD"})
        else:  # a router that FastAPI has included
            included: Any = route
            yield from routes_of(included.original_router.routes, prefix + included.include_context.prefix)


def test_every_route_of_the_app_is_documented(site: Site) -> None:
    calls = [call.replace("{id}", "{job_id}") for call in CALLS]
    # "Below /models/NAME each has all of the calls above", and a page of this API.
    of_a_model = [*calls[: calls.index("GET /models")], "GET /docs", "GET /openapi.json", *FILES_OF_PAGES]
    below = {call.replace(" ", " /models/{model}", 1) for call in of_a_model}
    assert set(routes_of(site.app.routes)) == {*calls, *FILES_OF_PAGES} | below


def test_every_parameter_is_documented() -> None:
    of_answers = OF_ANIMATIONS | OF_FLOATS | OF_TRAJECTORIES
    assert PARAMETERS.keys() == SampleRequest.model_fields.keys() | of_answers | OF_WEBHOOKS


def accepted(site: Site, **parameters: Any) -> dict[str, Any]:
    """What a durable job says that it was asked for; it is given up at once."""
    answer = site.client.post("/jobs", json=parameters)
    assert answer.status_code == 202, answer.text
    site.client.post(f"{answer.headers['location']}/cancel")
    document: dict[str, Any] = answer.json()["parameters"]
    return document


def refused(site: Site, name: str, value: object, **companions: Any) -> None:
    answer = site.client.post("/jobs", json={**companions, name: value})
    assert problem(answer, 422, "invalid_field")["field"] == name


RANGES = {
    name: (number(found[1]), number(found[2]))
    for name, (values, *_) in PARAMETERS.items()
    if (found := re.search(r"(\S+)\.\.(\S+)$", values))
}


def test_the_bounds_of_a_parameter_are_those_of_the_docs(site: Site) -> None:
    for name, (low, high) in RANGES.items():
        companions = COMPANIONS.get(name, {})
        if name == "guidance_interval":
            assert accepted(site, **companions, guidance_interval=[low, high])[name] == [low, high]
            refused(site, name, [low - 1, high], **companions)
            refused(site, name, [low, high + 1], **companions)
            continue
        for bound, beyond in ((low, low - 1), (high, high + 1)):
            assert accepted(site, **companions, **{name: bound})[name] == bound
            refused(site, name, beyond, **companions)


def test_numbers_with_an_open_bound_are_those_of_the_docs(site: Site) -> None:
    found = {name: re.search(r"^above (\d+), at most (\d+)$", values) for name, (values, *_) in PARAMETERS.items()}
    bounds = {name: (int(match[1]), int(match[2])) for name, match in found.items() if match}
    assert bounds.keys() == {"deadline_s", "strength"}
    picture = io.BytesIO()
    Image.new("L", (INFO.width_px, INFO.height_px)).save(picture, "PNG")
    image = {"image": base64.b64encode(picture.getvalue()).decode()}
    for name, (low, high) in bounds.items():
        companions = image if name == "strength" else {}
        accepted(site, **companions, **{name: high})
        refused(site, name, low, **companions)
        refused(site, name, high + 1, **companions)


def test_the_choices_of_a_parameter_are_those_of_the_docs(site: Site) -> None:
    assert named(PARAMETERS["sampler"][0]) == list(SAMPLER_FACTS)
    assert named(PARAMETERS["timestep_spacing"][0]) == list(SPACINGS)
    for name in ("sampler", "timestep_spacing"):
        for choice in named(PARAMETERS[name][0]):
            if choice not in TABLE_SAMPLERS:  # which this checkpoint has not
                assert accepted(site, **{name: choice})[name] == choice
        refused(site, name, "another")
    for choice in (True, False):
        assert accepted(site, clip=choice)["clip"] == choice
    assert named(PARAMETERS["clip"][0]) == ["true", "false"]


def test_what_is_taken_where_settings_are_left_out_is_that_of_the_docs(make_site: MakeSite) -> None:  # noqa: F811
    table = replace(TABLES_OF_50[0], steps=5, guidance=2.0)
    own = Recommended("ddim", 30, 1.5)
    samplers = (*INFO.samplers, table.sampler)
    site = make_site(info=replace(INFO, recommended=own, samplers=samplers, tables=(table,)))
    requests: dict[str, dict[str, Any]] = {
        "none of these": {},
        "`sampler`, the recommended one": {"sampler": "ddim"},
        "`sampler`, another": {"sampler": "heun"},
        "`steps`": {"steps": 7},
        "`sampler` and `steps`": {"sampler": "ddim", "steps": 7},
        "`table`": {"table": table.hash},
    }
    rows = {row[0]: row[1:] for row in tables(API, "named", "sampler", "steps", "guidance")}
    assert rows.keys() == requests.keys()
    for named_by_it, asked in requests.items():
        spec = accepted(site, class_label=0, **asked)
        for name, cell in zip(SETTINGS, rows[named_by_it], strict=True):
            meanings = {
                "as recommended": getattr(own, name),
                "(that|those) of the table": getattr(table, name),
                "`default_sampler` in .*": INFO.default_sampler,
                "its `good_steps` in .*": SAMPLER_FACTS["heun"].good_steps,
                "that one|those": asked.get(name),
                "1": 1,
            }
            (meant,) = [value for words, value in meanings.items() if re.fullmatch(words, cell)]
            assert spec[name] == meant, (named_by_it, name)


def test_the_default_of_a_parameter_is_that_of_the_docs(site: Site) -> None:
    given = accepted(site) | {"eta": accepted(site, sampler="ddim")["eta"]}
    of_checkpoint = {"clip": INFO.clip, "timestep_spacing": INFO.timestep_spacings[INFO.recommended.sampler]}
    for name in SampleRequest.model_fields:
        match PARAMETERS[name][1]:
            case "the checkpoint's":
                assert given[name] == of_checkpoint[name]
            case "none" | "all" | "any":
                assert given.get(name) in (None, [None])
            case "drawn":
                assert given[name] != accepted(site)[name]
            case "`false`" | "`8`":  # left out of what is kept
                assert given.get(name) is None
            case "[below](#what-a-request-gets-that-leaves-settings-out)":
                assert name in SETTINGS
            case default:
                assert given[name] == number(default)
    for name in SAMPLERS:
        assert INFO.timestep_spacings[name] == ("leading" if name in ("ddpm", "ddim", "plms", "pndm") else "karras")


def test_the_parameters_of_an_animation_are_those_of_the_docs(site: Site) -> None:
    assert PARAMETERS["every"][:2] == ["at least 1", "none; `image/webp` needs it"]
    assert AnimationRequest.model_fields["every"].is_required()
    assert named(PARAMETERS["show"][1]) == [AnimationRequest.model_fields["show"].default]
    as_webp = {"Accept": WEBP}
    for show in named(PARAMETERS["show"][0]):
        answer = site.post(json={"steps": 2, "every": 1, "show": show}, headers=as_webp)
        assert answer.status_code == 200
        assert answer.headers["content-type"] == WEBP
    problem(site.post(json={"steps": 2, "every": 0}, headers=as_webp), 422, "invalid_field")


def test_the_events_of_a_webhook_are_those_of_the_docs() -> None:
    assert named(PARAMETERS["webhook_events_filter"][0]) == list(EVENTS)
    page = (ROOT / "docs" / "webhooks.md").read_text("utf-8")
    assert [named(row[0])[0] for row in tables(page, "event", "when")] == list(EVENTS)


def test_the_media_types_are_those_of_the_docs(site: Site) -> None:
    documented = [named(media_type)[0] for media_type, _ in tables(API, "media type", "answer")]
    assert documented == [*WITHOUT_EVERY, WEBP]
    for media_type in WITHOUT_EVERY:
        answer = site.post(json={"steps": 2}, headers={"Accept": media_type})
        assert answer.headers["content-type"] == media_type


def test_the_headers_are_those_of_the_docs(make_site: MakeSite) -> None:  # noqa: F811
    site = make_site(result_cache_bytes=2**20)
    asked = {"steps": 1, "seed": 5}
    floats = site.post(json=asked, headers={"Accept": NPY})
    shown = make_site(info=replace(INFO, channels=5)).post(json=asked)
    answers = (site.post(json=asked), site.post(json=asked), floats, shown)
    seen = {name.lower() for answer in answers for name in answer.headers}
    rows = tables(API, "response header", "meaning")
    documented = {name.lower() for header, _ in rows for name in named(header)}
    assert documented <= seen
    assert {name for name in seen if name.startswith("x-")} <= documented


def test_every_sampler_is_in_its_table_of_the_docs_with_the_words_of_the_catalogue() -> None:
    page = (ROOT / "docs" / "samplers.md").read_text("utf-8")
    rows = list(tables(page, "sampler", "when to take it", "source"))
    assert rows == [[f"`{name}`", facts.when, facts.source] for name, facts in SAMPLER_FACTS.items()]


# --- traces ---


def test_the_table_of_spans_has_every_span_and_what_each_may_say_and_nothing_else() -> None:
    code = "".join(file.read_text("utf-8") for file in (ROOT / "service").glob("**/*.py"))
    names, attributes = ({*each.findall(code)} for each in SPANS)
    assert {"job", "queue", "denoise", "decode", "encode", "store add"} <= names
    text = (ROOT / "docs" / "operations.md").read_text("utf-8").partition("## Traces")[2]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    requests = {"POST /sample", "GET /model"}
    assert {name for row in rows for name in re.findall(r"`([^`]+)`", row[1])} - requests == names
    assert {name for row in rows for name in re.findall(r"`(tminus\.[a-z_.]+)`", row[4])} == attributes


def test_the_readme_names_the_packages_that_the_tests_need() -> None:
    section = README.read_text("utf-8").partition("\nThe tests need Debian's packages ")[2].partition("\n\n")[0]
    assert {*re.findall(r"`([^`]+)`", section)} == tools.PLACES.keys()
