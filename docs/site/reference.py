"""The reference in docs/reference/: what is written by hand, and between two marks what is made from the code.

Links in the texts of the code are relative to docs/; here they become relative to docs/reference/.
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from docs.site import api
from tminus.service import errors as errors_of_the_service
from tminus.service.cli.configuration import default_of
from tminus.service.cli.main import EXIT_CODES, SECTIONS, main
from tminus.service.engine.protocol import BUNDLED
from tminus.service.errors import ServiceError
from tminus.service.metrics import GROUPS as METRIC_GROUPS
from tminus.service.metrics import METRICS
from tminus.service.ray_serve.settings import RaySettings
from tminus.service.startup.settings import GROUPS, NO_FLAG, flag_of, variable_of

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

FOLDER = Path(__file__).parents[1] / "reference"
MADE = re.compile(r"(?<=<!-- Made from the code by `make docs` -->\n).*(?=<!-- End of what is made -->\n)", re.DOTALL)
CODE = re.compile(
    r"`[^`]*`|(?<![\w-])(?:--[a-z][a-z-]*[a-z]|-n)\b|\b(?:TMINUS|XDG|RAY)_[A-Z_]+\b|\b(?:GET|POST) /[\w/]+"
)
WIDTH = 100  # of usage lines, whatever the terminal has


def pages() -> dict[Path, str]:
    """Return each page as it should be, by its file."""
    made = {
        "settings": settings(),
        "command-line": command_line(),
        "errors": errors(),
        "metrics": metrics(),
        "api": api.body(),
    }
    return {file: _page(file, "".join(parts)) for name, parts in made.items() for file in [FOLDER / f"{name}.md"]}


def write() -> None:
    """Renew the pages."""
    for file, text in pages().items():
        file.write_text(text, "utf-8")


def _page(file: Path, made: str) -> str:
    made = re.sub(r"\n{3,}", "\n\n", f"\n{moved(made).strip()}\n\n")
    text, count = MADE.subn(lambda _: made, file.read_text("utf-8"))
    assert count == 1, f"{file} has no place for what is made from the code"
    return text


def moved(text: str) -> str:
    """Make the links of a text that are relative to docs/ relative to docs/reference/."""
    return re.sub(r"\]\(reference/", "](", re.sub(r"\]\((?!reference/|https?:|#)", "](../", text))


# --- settings ---


def settings() -> Iterator[str]:
    """Yield the settings of `tminus serve` and `tminus ray serve`, each below its key in a file of settings."""
    schemas = RaySettings.model_json_schema()["properties"]
    for name, field in RaySettings.model_fields.items():
        if name in GROUPS:
            yield f"## {GROUPS[name]}\n\n"
        yield setting(name, field, api.Writer({}).values(schemas[name]).removesuffix(" or null"))


def setting(name: str, field: "FieldInfo", values: str) -> str:
    """Return a setting: its names, values and default in a line, and its description."""
    flag = flag_of(name)
    if field.annotation in (bool, bool | None):
        names, values = f"`{flag}` or `--no-{flag[2:]}`", "yes or no"
    else:
        names = "no flag" if name in NO_FLAG else f"`{flag}`"
    if name == "checkpoint":
        values = "`[NAME=]PATH`"
    assert field.description, name
    text, _, _ = field.description.partition(" Default: ")
    facts = (names, f"`{variable_of(name)}`", values, f"default: {default_in_words(name, field)}")
    return f"### `{name if name in NO_FLAG else flag[2:]}`\n\n{' · '.join(facts)}\n\n{text}\n\n"


def default_in_words(name: str, field: "FieldInfo") -> str:
    """Return the default, as the description has it in words or as a value."""
    default = default_of(field)
    if name == "checkpoint":
        return f"the bundled `{BUNDLED.name}`"
    if field.default in (None, ()) or field.default == "":
        return default or "none"
    return f"`{default}`{in_other_units(name, field.default)}"


def in_other_units(name: str, value: object) -> str:
    """Return a default in units that people read: 1 MiB for 1048576 bytes. Empty where there are none."""
    for suffix, divisor, unit in (("_bytes", 2**20, "MiB"), ("_s", 3600, "h")):
        if name.endswith(suffix) and isinstance(value, int | float) and value >= divisor:
            return f" ({value / divisor:g} {unit})"
    return ""


# --- the command line ---


def commands(group: click.Group = main, prefix: str = "tminus") -> Iterator[tuple[str, click.Command]]:
    """Yield every command with its whole name: a group is no command, but those in it are."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def command_line() -> Iterator[str]:
    """Yield the commands of `tminus`, with the options of each."""
    every = dict(commands())
    yield "| command | what it does |\n|---|---|\n"
    sections = [each.name for group in SECTIONS.values() for each in group]
    assert {name.split()[1] for name in every} == set(sections)
    for name, command in every.items():
        yield f"| [`{name}`](#{name.replace(' ', '-')}) | {command.get_short_help_str(300)} |\n"
    yield "\n"
    for name, command in every.items():
        yield "".join(_command(name, command))


def _command(name: str, command: click.Command) -> Iterator[str]:
    """Yield a command: usage, help, and its options as a table."""
    context = click.Context(command, info_name=name, show_default=True, terminal_width=WIDTH)
    yield f"## {name}\n\n    {command.get_usage(context).removeprefix('Usage: ')}\n\n"
    yield from (f"{block_of_help(block)}\n\n" for text in _texts(command) for block in blocks(text))
    own = [option for option in command.params if isinstance(option, click.Option)]
    if any(option.name == "config" for option in own):
        own = [option for option in own if option.name not in {*RaySettings.model_fields, "config"}]
        yield "Its options are the [settings](reference/settings.md) and `--config FILE`"
        yield (", and:" if own else ".") + "\n\n"
    if own:
        yield "| option | values | default | meaning |\n|---|---|---|---|\n"
        yield "".join(row(each, context) for each in own) + "\n"


def _texts(command: click.Command) -> Iterator[str | None]:
    yield command.help
    if command.epilog != EXIT_CODES:  # which the introduction of the page says of all
        yield command.epilog


def blocks(text: str | None) -> list[str]:
    """Return the paragraphs of a command's help."""
    return [block for block in re.split(r"\n[ ]*\n", inspect.cleandoc(text or "")) if block.strip()]


def block_of_help(block: str) -> str:
    """Return a paragraph of help as Markdown: one that click does not wrap is code."""
    if not block.startswith("\b"):
        return coded(" ".join(block.split()))
    lines = block.removeprefix("\b").strip("\n").split("\n")
    indent = min(len(line) - len(line.lstrip()) for line in lines)
    code = "\n".join(line[indent:] for line in lines)
    return f"```{'sh' if code.startswith('tminus ') else 'text'}\n{code}\n```"


def row(option: click.Option, context: click.Context) -> str:
    """Return an option as a line of the table."""
    record = option.get_help_record(context)
    assert record is not None, f"{option.name} is hidden"
    assert option.help, f"{context.info_name} {option.opts[0]} has no help"
    said = " ".join(record[1].replace(str(BUNDLED), f"the bundled {BUNDLED.name}").split())
    variable = re.search(r" \[env: (\w+)\]$", said)
    said = said[: variable.start()] if variable else said
    bounds = r"\[(required|\d\S*<=x\S*|x>=\S+)\]|; (\d\S*<=x\S*|x>=\S+)(?=\])"
    text, _, default = re.sub(bounds, "", said).partition("[default: ")
    default = "required" if option.required else default.strip("()] ")
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    values = "" if option.is_flag else values_of_option(option)
    meaning = sentence(text.strip()) + (f" Variable: `{variable[1]}`." if variable else "")
    cells = (names, values, coded(default), meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def sentence(text: str) -> str:
    """Return a help text as a sentence of a page."""
    return coded(text if not text or text.endswith(".") else f"{text}.")


def coded(text: str) -> str:
    """Put the options, variables and calls in a help text into code marks, where they have none."""
    return CODE.sub(_in_code, text)


def _in_code(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith("`") else f"`{found[0]}`"


def values_of_option(option: click.Option) -> str:
    """Say in words what an option takes."""
    match option.type:
        case click.Choice(choices=choices):
            return ", ".join(f"`{choice}`" for choice in choices)
        case click.IntRange(min=low, max=high) | click.FloatRange(min=low, max=high):
            return f"{low}..{high}" if high is not None else f"{low} or more"
        case click.Path():
            return {"directory": "folder"}.get(option.type.name, option.type.name)
    word = re.sub("^(INTEGER|FLOAT) ", "", option.metavar or option.type.name)
    if word[0].isdigit() or word.startswith("above "):
        return word.replace("..", " or more") if word.endswith("..") else word
    word = {"integer": "integer", "float": "number", "text": "text", "list": "list"}.get(word.lower(), f"`{word}`")
    return word if option.nargs == 1 else f"{option.nargs} {word}s"


# --- errors ---


def every_error() -> list[type[ServiceError]]:
    """Return the classes of errors in the order of their file; the base class, for unexpected errors, comes last."""
    found = [
        each
        for each in vars(errors_of_the_service).values()
        if isinstance(each, type) and issubclass(each, ServiceError) and each.__module__ == ServiceError.__module__
    ]
    return sorted(found, key=lambda each: each is ServiceError)


def errors() -> Iterator[str]:
    """Yield the errors, each with its status, when it happens and what to do."""
    yield "| code | status | title |\n|---|---|---|\n"
    for each in every_error():
        yield f"| [`{each.code}`](#{each.code}) | {each.status} | {each.title} |\n"
    yield "\n"
    for each in every_error():
        assert each.__doc__, each
        yield f"### `{each.code}`\n\nStatus {each.status}. {' '.join(each.__doc__.split())}\n\n"
        yield f"**What to do:** {each.remedy}\n\n"


# --- metrics ---


def metrics() -> Iterator[str]:
    """Yield the metrics, each with its type, what it counts, and its labels."""
    for name, told in METRICS.items():
        if name in METRIC_GROUPS:
            yield f"## {METRIC_GROUPS[name]}\n\n"
        yield f"### `{name}`\n\n{told.kind.capitalize()}. {linked(told.text, name)}"
        yield f" See [{title_of(told.more)}]({told.more}).\n\n" if told.more else "\n\n"
        yield from (f"- `{label}`: {meaning}\n" for label, meaning in told.labels.items())
        yield "\n"


def title_of(link: str) -> str:
    """Return the text of a link to a page, or to a part of it."""
    page, _, part = link.removeprefix("reference/").partition("#")
    return (part or page.removesuffix(".md")).replace("-", " ").replace("api", "API")


def linked(text: str, own: str) -> str:
    """Return a text with the names of other metrics and of flags as links."""
    text = re.sub(
        r"\btminus_\w+", lambda found: f"[`{found[0]}`](#{found[0]})" if found[0] != own else f"`{own}`", text
    )
    return re.sub(r"(?<!\S)--([a-z-]+[a-z])", r"[`--\1`](reference/settings.md#\1)", text)
