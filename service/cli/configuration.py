"""The settings of the server from four places, of which the first wins: a flag, its variable, a file, the default."""

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic import SecretStr, ValidationError

from tminus.service.cli.output import fail
from tminus.service.startup.settings import NO_FLAG, Settings, asked_by

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

TYPES = {int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT", SecretStr: "TEXT"}
FILE = "TMINUS_CONFIG"  # the variable that names the file
MOST_BYTES = 2**20  # of a file
SECRET = ("keys", "job_store", "webhook_secret")
Command = Callable[..., None]
Kind = TypeVar("Kind", bound=Settings)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a setting in force comes from."""

    kind: Literal["flag", "variable", "file", "default"]
    name: str  # the flag, the variable, the file's path; empty for a default


def settings_options(command: Command) -> Command:
    """Give a command one option for each field of Settings that has a flag, and one for a file of them."""
    return options_of(Settings)(command)


def options_of(kind: type[Settings]) -> Callable[[Command], Command]:
    """Give a command one option for each setting of a kind, and one for a file of them."""

    def decorate(command: Command) -> Command:
        for name, field in reversed(kind.model_fields.items()):
            if name in NO_FLAG:
                continue
            flag = f"--{name.replace('_', '-')}"
            if field.annotation in (bool, bool | None):
                flag += f"/--no-{name.replace('_', '-')}"
            default = f"[default: {shown(field.default)}]" if field.default not in (None, ()) else ""
            text = f"{field.description} {default} [env: TMINUS_{name.upper()}]"
            several = field.default == ()
            option = click.option(
                flag, name, default=None, help=text, show_default=False, metavar=values_of(field), multiple=several
            )
            command = option(command)
        text = "file of settings, in TOML; a flag or a variable wins over what it says"
        config = click.option("--config", type=click.Path(path_type=Path), envvar=FILE, help=f"{text} [env: {FILE}]")
        return config(command)

    return decorate


def shown(default: object) -> object:
    """How help and docs write a default."""
    return {True: "yes", False: "no"}[default] if isinstance(default, bool) else default


def values_of(field: "FieldInfo") -> str | None:
    """What a flag takes, as --help shows it: the choices, or the type and its bounds. Settings checks the value."""
    if get_origin(field.annotation) is tuple:
        return "[NAME=]PATH"
    bound = {name: value for each in field.metadata for name in ("ge", "gt", "le", "pattern")
             if (value := getattr(each, name, None)) is not None}  # fmt: skip
    if get_origin(field.annotation) is Literal:
        return "|".join(get_args(field.annotation))
    if "pattern" in bound:
        return str(bound["pattern"].strip("^()$"))
    (kind,) = {*(get_args(field.annotation) or (field.annotation,))} - {NoneType}
    if kind is bool:
        return None
    if "gt" in bound:
        return f"{TYPES[kind]} above {bound['gt']}"
    if "ge" in bound:
        return f"{TYPES[kind]} {bound['ge']}..{bound.get('le', '')}"
    return TYPES[kind]


def read_settings(config: Path | None, flags: Mapping[str, Any]) -> Settings:
    """Build the settings; for a bad value one line that names its flag, its variable and the value."""
    return with_sources(config, flags)[0]


def with_sources(config: Path | None, flags: Mapping[str, Any]) -> tuple[Settings, dict[str, Source]]:
    """Build the settings, and say where each comes from. What is wrong ends in one line."""
    return settings_of(Settings, config, flags)


def settings_of(kind: type[Kind], config: Path | None, flags: Mapping[str, Any]) -> tuple[Kind, dict[str, Source]]:
    """As `with_sources`, for settings of a kind."""
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
        fail(f"{asked_by(name)}{where}: {first['msg']}{got}")


def _source(name: str, given: Mapping[str, Any], in_file: Mapping[str, Any], config: Path | None) -> Source:
    if name in given:
        return Source("flag", f"--{name.replace('_', '-')}")
    if variable(name) in os.environ:
        return Source("variable", variable(name))
    return Source("file", str(config)) if name in in_file else Source("default", "")


def variable(name: str) -> str:
    """The variable of a setting."""
    return f"TMINUS_{name.upper()}"


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
