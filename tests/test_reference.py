"""docs/reference/: each setting, command, error and metric has a place there, and its texts are whole."""

import re

import click
import pytest

from docs.site import reference
from tminus.service.cli.configuration import default_of, summary_of
from tminus.service.metrics import GROUPS as METRIC_GROUPS
from tminus.service.metrics import METRICS, Metrics
from tminus.service.ray_serve.settings import RaySettings
from tminus.service.startup.settings import GROUPS, NO_FLAG, Settings

PAGES = {file.name: file.read_text("utf-8") for file in reference.FOLDER.glob("*.md")}
COMMANDS = dict(reference.commands())


def section(page: str, title: str) -> str:
    """What a page has between this heading and the next one."""
    (found,) = re.findall(rf"^##+ {re.escape(title)}\n(.*?)(?=^(?:#|<!--)|\Z)", PAGES[page], re.MULTILINE | re.DOTALL)
    return str(found).strip()


def test_the_reference_is_that_of_the_code() -> None:
    stale = [file.name for file, text in reference.pages().items() if file.read_text("utf-8") != text]
    assert stale == [], "run `make docs`, and commit docs/reference/"


def key_of(setting: str) -> str:
    """Its name in a file of settings."""
    return setting if setting in NO_FLAG else setting.replace("_", "-")


@pytest.mark.parametrize("name", RaySettings.model_fields)
def test_each_setting_is_described_with_its_variable_values_and_default(name: str) -> None:
    field, text = RaySettings.model_fields[name], section("settings.md", f"`{key_of(name)}`")
    facts, _, told = text.partition("\n\n")
    assert facts.startswith(f"{'no flag' if name in NO_FLAG else f'`--{key_of(name)}`'} ")
    assert f"`TMINUS_{name.upper()}`" in facts
    assert "default: " in facts
    assert told.endswith(".")
    assert " Default: " not in told
    assert summary_of(field)
    assert not re.search(r"`|\]\(", summary_of(field)), "what --help prints is no Markdown"
    if field.default not in (None, (), ""):
        assert str(default_of(field)) in facts


def test_the_bounds_of_a_setting_are_in_words() -> None:
    assert "integer from 4 to 4,096" in section("settings.md", "`max-batch`")


def test_groups_begin_with_what_there_is() -> None:
    assert GROUPS.keys() <= RaySettings.model_fields.keys()
    assert METRIC_GROUPS.keys() <= METRICS.keys()
    assert next(iter(GROUPS)) == next(iter(Settings.model_fields))
    assert next(iter(METRIC_GROUPS)) == next(iter(METRICS))


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_says_what_it_does_with_an_example_its_exit_codes_and_its_options(name: str) -> None:
    command, text = COMMANDS[name], section("command-line.md", name)
    assert command.help
    assert f"\n{name}" in "".join(re.findall(r"^```sh(\n.*?)^```$", text, re.DOTALL | re.MULTILINE))
    assert command.epilog is not None
    assert command.epilog.startswith("Exit codes: 0 ")
    for option in command.params:
        if isinstance(option, click.Option) and option.name not in {*RaySettings.model_fields, "config"}:
            (row,) = re.findall(rf"^\| [^|]*`{re.escape(option.opts[0])}`[^|]*\|.*\|$", text, re.MULTILINE)
            meaning = row.split(" | ")[3].removesuffix(" |")
            assert meaning.endswith("."), row
            assert meaning[0].isupper() or meaning[0] == "`", row


@pytest.mark.parametrize("error", reference.every_error())
def test_each_error_says_when_it_happens_and_what_to_do(error: type[reference.ServiceError]) -> None:
    text = section("errors.md", f"`{error.code}`")
    when, _, remedy = text.partition("\n\n**What to do:** ")
    assert re.fullmatch(rf"Status {error.status}\. \S.*\.", when), when
    assert remedy.endswith("."), remedy
    assert error.remedy is not reference.ServiceError.remedy or error.code in ("internal", "engine_failed")


@pytest.mark.parametrize("name", METRICS)
def test_each_metric_says_what_it_counts_and_what_its_labels_are(name: str) -> None:
    told, text = METRICS[name], section("metrics.md", f"`{name}`")
    assert text.startswith(f"{told.kind.capitalize()}. ")
    assert told.text.endswith("."), "it is a sentence"
    assert re.findall(r"^- `(\w+)`: \S", text, re.MULTILINE) == [*told.labels]


def test_queries_of_the_page_name_series_and_labels_that_exist() -> None:
    suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
    series = {f"{name}{suffix}": told for name, told in METRICS.items() for suffix in suffixes[told.kind]}
    named = {*re.findall(r"\btminus_\w*[a-z]\b", PAGES["metrics.md"])}
    assert named <= series.keys() | METRICS.keys()
    for name, label in re.findall(r"(tminus_\w+)\{(\w+)=", PAGES["metrics.md"]):
        assert label in {"le", *series[name].labels}


def test_help_texts_of_metrics_have_no_links() -> None:
    helps = [line for line in Metrics().render()[0].decode().splitlines() if line.startswith("# HELP tminus_")]
    assert helps
    assert not any("](" in line for line in helps)
