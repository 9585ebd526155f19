"""Reads settings from flags, TMINUS_ variables, a file and defaults. Also contains `tminus config`.

A flag has priority over a variable, a variable over the file, and the file over the default.
"""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import SecretStr, ValidationError

from tminus.service.cli.options import JSON, Complete, Option, completing, options
from tminus.service.cli.output import fail, say, say_json
from tminus.service.ray_serve.settings import RaySettings
from tminus.service.startup.settings import GROUPS, NO_FLAG, Settings, flag_of, named, variable_of

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

TYPES = {int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT", SecretStr: "TEXT"}
FILE = "TMINUS_CONFIG"  # environment variable that holds the path of the file
MAX_FILE_BYTES = 2**20
LINK = re.compile(r"\[([^\]]+)\]\([^)\s]+\)")  # Markdown link
Kind = TypeVar("Kind", bound=Settings)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the value of a setting comes from."""

    kind: Literal["flag", "variable", "file", "default"]
    name: str  # the flag, the variable, or the path of the file; empty for a default


class SettingsCommand(click.Command):
    """A command whose help lists the other options first, and then the settings by group."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"Options": []}
        of_setting, heading = dict[str, str](), ""
        for name in RaySettings.model_fields:
            heading = GROUPS.get(name, heading)
            of_setting[name] = heading
        for option in self.get_params(ctx):
            if (record := option.get_help_record(ctx)) is not None:
                groups.setdefault(of_setting.get(str(option.name), "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


def settings_options(kind: type[Settings]) -> Option:
    """Return the options for a class of settings: --config, and one option for each setting with a flag."""
    text = f"File of settings in TOML; flags and variables win over it  [env: {FILE}]"
    file = click.option("--config", type=click.Path(path_type=Path), envvar=FILE, help=text)
    return options(
        file, *(setting_option(name, field) for name, field in kind.model_fields.items() if name not in NO_FLAG)
    )


def setting_option(name: str, field: "FieldInfo") -> Option:
    """Return the option for a setting. The option accepts any text, because Settings checks the value."""
    is_switch = field.annotation in (bool, bool | None)
    default = f" [default: {text}]" if (text := default_of(field).replace("`", "")) else ""
    return click.option(
        f"{flag_of(name)}/{flag_of(f'no_{name}')}" if is_switch else flag_of(name),
        name,
        default=None,
        help=f"{summary_of(field)} {default} [env: {variable_of(name)}]",
        show_default=False,
        metavar=values_of(field),
        multiple=field.default == (),
        shell_complete=completion_of(field),
    )


def summary_of(field: "FieldInfo") -> str:
    """Return the first sentence of a setting's description, without links and backticks."""
    text = (field.description or "").partition(" Default: ")[0]
    first = re.split(r"(?<=\.)\s", LINK.sub(r"\1", text), maxsplit=1)[0]
    return first.replace("`", "").removesuffix(".")


def default_of(field: "FieldInfo") -> str:
    """Return a setting's default as text: the value, or the words after "Default:" in the description."""
    if field.default not in (None, (), ""):
        return {True: "yes", False: "no"}[field.default] if isinstance(field.default, bool) else str(field.default)
    return (field.description or "").partition(" Default: ")[2].removesuffix(".")


def values_of(field: "FieldInfo") -> str | None:
    """Return how --help describes a flag's value: by its choices, or its type and bounds. None: a switch."""
    if get_origin(field.annotation) is tuple:
        return "[NAME=]PATH"
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    bound = {name: value for each in field.metadata for name in ("ge", "gt", "le")
             if (value := getattr(each, name, None)) is not None}  # fmt: skip
    (kind,) = {*(get_args(field.annotation) or (field.annotation,))} - {NoneType}
    if kind is bool:
        return None
    if "gt" in bound:
        return f"{TYPES[kind]} above {bound['gt']}"
    if "ge" in bound:
        return f"{TYPES[kind]} {bound['ge']}..{bound.get('le', '')}"
    return TYPES[kind]


def completion_of(field: "FieldInfo") -> Complete | None:
    """Return the shell completion for a flag's value: choices, files or folders. None: no completion."""
    if get_origin(field.annotation) is Literal:
        return completing(*map(str, get_args(field.annotation)))
    if get_origin(field.annotation) is tuple:  # the setting `checkpoint`
        return completing(files="dir")
    return completing(files="file") if Path in (field.annotation, *get_args(field.annotation)) else None


def read_settings(kind: type[Kind], config: Path | None, flags: Mapping[str, Any]) -> tuple[Kind, dict[str, Source]]:
    """Build the settings, and say where each value comes from. Exits with 1 if a value is invalid.

    config: the settings file. flags: the values of all flags; None or () if a flag is absent.
    """
    in_file = read_file(config, kind) if config is not None else {}
    values: dict[str, Any] = {}
    sources: dict[str, Source] = {}
    for name in kind.model_fields:
        if flags.get(name) not in (None, ()):
            values[name], sources[name] = flags[name], Source("flag", flag_of(name))
        elif variable_of(name) in os.environ:  # pydantic-settings itself reads the variable
            sources[name] = Source("variable", variable_of(name))
        elif name in in_file:
            values[name], sources[name] = in_file[name], Source("file", str(config))
        else:
            sources[name] = Source("default", "")
    try:
        return kind(**values), sources
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        is_secret = SecretStr in get_args(kind.model_fields[name].annotation)
        got = "" if is_secret else f", got {first['input']!r}"
        where = f" in {config}" if sources[name].kind == "file" else ""
        what = first["msg"].removeprefix("Value error, ").replace("Input should", "must")  # pydantic's words
        fail(f"{named(name)}{where}: {what}{got}")


def read_file(file: Path, kind: type[Settings] = Settings) -> dict[str, Any]:
    """Read settings from a TOML file. Keys may use - or _. Exits with 1 if the file is invalid."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            fail(f"--config ({FILE}): {file} has more than {MAX_FILE_BYTES} bytes")
        document = tomllib.loads(data.decode())
    except OSError as error:
        fail(f"--config ({FILE}): {file}: {error.strerror}")
    except ValueError as error:  # invalid UTF-8 or TOML
        fail(f"--config ({FILE}): {file} is not TOML: {error}")
    values: dict[str, Any] = {}
    for key, value in document.items():
        name = key.replace("-", "_")
        if name not in kind.model_fields:
            fail(f"--config ({FILE}): {file} has {key!r}, and there is no such setting")
        if name in values:
            fail(f"--config ({FILE}): {file} has {key!r} twice")
        values[name] = ",".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
    return values


@click.command(cls=SettingsCommand, short_help="Print the settings that a server would have, and where they come from.")
@settings_options(Settings)
@click.option("--changed", is_flag=True, help="Print only the settings that are not the default")
@JSON
def config(config: Path | None, changed: bool, as_json: bool, **flags: Any) -> None:
    """Print the settings that `tminus serve` would use with these flags, variables and file, and where they come from.

    \b
      tminus config --changed
      tminus config --max-batch 32 > settings.toml

    The output is TOML that --config can read. Settings without a value and secret settings are comments.

    --json prints an object `settings`, with an object for each setting: value (null if the setting is secret or has
    no value), secret, source (flag, variable, file or default) and given_by (the name of the flag, variable or file).
    """
    settings, sources = read_settings(Settings, config, flags)
    values = settings.model_dump(mode="json")
    printed = {name: source for name, source in sources.items() if not (source.kind == "default" and changed)}
    if as_json:
        documents = {}
        for name, source in printed.items():
            secret = isinstance(getattr(settings, name), SecretStr)
            given_by = {"source": source.kind, "given_by": source.name or None}
            documents[name] = {"value": None if secret else values[name], "secret": secret, **given_by}
        say_json({"settings": documents})
        return
    for name, source in printed.items():
        if values[name] is None:
            line = f"# {name} is not set"
        elif isinstance(getattr(settings, name), SecretStr):
            line = f"# {name} is secret: give it by {variable_of(name)}"
        else:
            line = f"{name} = {json.dumps(values[name], ensure_ascii=False)}"
        say(f"{line}  # {f'{source.kind} {source.name}'.strip()}")
