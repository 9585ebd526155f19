"""`tminus config`: the settings in force, and where each comes from; as TOML, so that it can be a file of settings."""

import json
from pathlib import Path
from typing import Any

import click
from pydantic import SecretStr

from tminus.service.cli.configuration import settings_options, variable, with_sources
from tminus.service.cli.output import say


@click.command()
@settings_options
@click.option("--changed", is_flag=True, help="only those that are not the default")
def config(config: Path | None, changed: bool, **flags: Any) -> None:
    """Print the settings that `tminus serve` would have, given the same flags, variables and file.

    What is printed can be read again by --config. A setting that is left to the machine, and what is secret, are
    comments.
    """
    settings, sources = with_sources(config, flags)
    for name, source in sources.items():
        if source.kind == "default" and changed:
            continue
        value = getattr(settings, name)
        where = source.kind if source.kind == "default" else f"{source.kind} {source.name}"
        say(f"{line(name, value)}  # {where}")


def line(name: str, value: Any) -> str:
    """One setting as a line of TOML; a comment, where there is no value or it is secret."""
    if value is None:
        return f"# {name} is not set"
    if isinstance(value, SecretStr):
        return f"# {name} is secret: give it by {variable(name)}"
    if isinstance(value, tuple):
        value = list(map(str, value))
    return f"{name} = {json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)}"
