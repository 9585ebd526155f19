"""The settings of the server from four places, of which the first wins: a flag, its variable, a file, the default.

And `tminus config`, which prints them with the place of each.
"""

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import SecretStr, ValidationError

from tminus.service.cli.options import JSON, Complete, completing
from tminus.service.cli.output import fail, say, say_json
from tminus.service.ray_serve.settings import RaySettings
from tminus.service.startup.settings import GROUPS, NO_FLAG, Settings, asked_by

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

TYPES = {int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT", SecretStr: "TEXT"}
FILE = "TMINUS_CONFIG"  # the variable that names the file
MOST_BYTES = 2**20  # of a file
SECRET = ("keys", "job_store", "webhook_secret")
LINK = re.compile(r"\[([^\]]+)\]\([^)\s]+\)")  # of Markdown
Command = Callable[..., None]
Kind = TypeVar("Kind", bound=Settings)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a setting in force comes from."""

    kind: Literal["flag", "variable", "file", "default"]
    name: str  # the flag, the variable, the file's path; empty for a default


class OfSettings(click.Command):
    """A command whose help lists the settings by their groups, after its other options."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options."""
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


def settings_options(kind: type[Settings]) -> Callable[[Command], Command]:
    """Give a command one option for each field of the settings that has a flag, and one for a file of them."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(kind.model_fields.items()):
            if name in NO_FLAG:
                continue
            flag = flag_of(name)
            if field.annotation in (bool, bool | None):
                flag += f"/--no-{name.replace('_', '-')}"
            default = f" [default: {told}]" if (told := default_of(field).replace("`", "")) else ""
            text = f"{summary_of(field)} {default} [env: {variable(name)}]"
            several = field.default == ()
            option = click.option(
                flag,
                name,
                default=None,
                help=text,
                show_default=False,
                metavar=values_of(field),
                multiple=several,
                shell_complete=completion_of(field),
            )
            command = option(command)
        text = "File of settings in TOML; flags and variables win over it "
        file = click.option("--config", type=click.Path(path_type=Path), envvar=FILE, help=f"{text} [env: {FILE}]")
        return file(command)

    return decorate


def flag_of(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"


def variable(name: str) -> str:
    """The variable of a setting."""
    return f"TMINUS_{name.upper()}"


def summary_of(field: "FieldInfo") -> str:
    """What --help says of a setting: the first sentence of its description, without links and code marks."""
    text = (field.description or "").partition(" Default: ")[0]
    first = re.split(r"(?<=\.)\s", LINK.sub(r"\1", text), maxsplit=1)[0]
    return first.replace("`", "").removesuffix(".")


def default_of(field: "FieldInfo") -> str:
    """The default of a setting: its value, or in words what its description says; empty where there is none."""
    if field.default not in (None, (), ""):
        return str(shown(field.default))
    return (field.description or "").partition(" Default: ")[2].removesuffix(".")


def shown(default: object) -> object:
    """How help and docs write a default."""
    return {True: "yes", False: "no"}[default] if isinstance(default, bool) else default


def values_of(field: "FieldInfo") -> str | None:
    """What a flag takes, as --help shows it: the choices, or the type and its bounds. Settings checks the value."""
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
    """Say how a shell completes a flag's value: by its choices, or by files and folders."""
    if get_origin(field.annotation) is Literal:
        return completing(*map(str, get_args(field.annotation)))
    if get_origin(field.annotation) is tuple:  # checkpoints
        return completing(files="dir")
    return completing(files="file") if Path in (field.annotation, *get_args(field.annotation)) else None


def read_settings(kind: type[Kind], config: Path | None, flags: Mapping[str, Any]) -> tuple[Kind, dict[str, Source]]:
    """Build the settings, and say where each comes from; a bad value ends in a line with its flag, variable and value.

    config: the file of settings. flags: the options that the command was given, None or () for each that it was not.
    """
    given = {name: value for name, value in flags.items() if value not in (None, ())}
    in_file = read_file(config, kind) if config is not None else {}
    sources = {name: _source(name, given, in_file, config) for name in kind.model_fields}
    from_file = {name: value for name, value in in_file.items() if sources[name].kind == "file"}
    try:
        return kind(**given, **from_file), sources
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        got = "" if name in SECRET else f", got {first['input']!r}"
        where = f" in {config}" if sources[name].kind == "file" else ""
        what = first["msg"].removeprefix("Value error, ").replace("Input should", "must")  # pydantic's words
        fail(f"{asked_by(name)}{where}: {what}{got}")


def _source(name: str, given: Mapping[str, Any], in_file: Mapping[str, Any], config: Path | None) -> Source:
    if name in given:
        return Source("flag", flag_of(name))
    if variable(name) in os.environ:
        return Source("variable", variable(name))
    return Source("file", str(config)) if name in in_file else Source("default", "")


def read_file(file: Path, kind: type[Settings] = Settings) -> dict[str, Any]:
    """Read settings from a TOML file, named as flags are, with - or _. What is wrong ends in one line."""
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            fail(f"--config ({FILE}): {file} has more than {MOST_BYTES} bytes")
        document = tomllib.loads(data.decode())
    except OSError as error:
        fail(f"--config ({FILE}): {file}: {error.strerror}")
    except ValueError as error:  # no UTF-8, or no TOML
        fail(f"--config ({FILE}): {file} is not TOML: {error}")
    values: dict[str, Any] = {}
    for given, value in document.items():
        name = given.replace("-", "_")
        if name not in kind.model_fields:
            fail(f"--config ({FILE}): {file} has {given!r}, and there is no such setting")
        if name in values:
            fail(f"--config ({FILE}): {file} has {given!r} twice")
        values[name] = ",".join(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value
    return values


@click.command(cls=OfSettings, short_help="Print the settings that a server would have, and where they come from.")
@settings_options(Settings)
@click.option("--changed", is_flag=True, help="Print only the settings that are not the default")
@JSON
def config(config: Path | None, changed: bool, as_json: bool, **flags: Any) -> None:
    """Print the settings that `tminus serve` would have with the same flags, variables and file, and their sources.

    \b
      tminus config --changed
      tminus config --max-batch 32 > settings.toml

    The output is TOML that --config can read. Settings without a value and secret settings are comments.

    --json prints an object `settings`. It has an object for each setting: value (null if there is none, or if it is
    secret), secret, source (flag, variable, file or default) and given_by (the name of the flag, variable or file).
    """
    settings, sources = read_settings(Settings, config, flags)
    told = {name: source for name, source in sources.items() if not (source.kind == "default" and changed)}
    if as_json:
        say_json(
            {"settings": {name: setting_document(getattr(settings, name), source) for name, source in told.items()}}
        )
        return
    for name, source in told.items():
        say(f"{toml_line(name, getattr(settings, name))}  # {f'{source.kind} {source.name}'.strip()}")


def setting_document(value: Any, source: Source) -> dict[str, Any]:
    """Describe one setting as --json has it: its value, None where not set or secret, and where it comes from."""
    secret = isinstance(value, SecretStr)
    if isinstance(value, tuple):
        value = list(map(str, value))
    value = None if secret else str(value) if isinstance(value, Path) else value
    return {"value": value, "secret": secret, "source": source.kind, "given_by": source.name or None}


def toml_line(name: str, value: Any) -> str:
    """One setting as a line of TOML; a comment, where there is no value or it is secret."""
    if value is None:
        return f"# {name} is not set"
    if isinstance(value, SecretStr):
        return f"# {name} is secret: give it by {variable(name)}"
    if isinstance(value, tuple):
        value = list(map(str, value))
    return f"{name} = {json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)}"
