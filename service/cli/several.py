"""Options that take several values, separated by commas; and the command line that gives a command again."""

import shlex
from collections.abc import Callable
from typing import Any

import click
from click.core import ParameterSource

Callback = Callable[[click.Context, click.Parameter, str], tuple[Any, ...]]


def several(read: Callable[[str], Any], bound: str, allows: Callable[[Any], bool]) -> Callback:
    """Make a callback that reads a list, each value once. `bound` says what each must be, `allows` whether it is."""

    def convert(_context: click.Context, _option: click.Parameter, text: str) -> tuple[Any, ...]:
        found: dict[Any, None] = {}
        for part in map(str.strip, text.split(",")):
            try:
                one = read(part)
            except ValueError:
                one = None
            if one is None or not allows(one):
                raise click.BadParameter(f"each must be {bound}, got {part!r:.100}")
            found[one] = None
        return tuple(found)

    return convert


def command_line(context: click.Context) -> str:
    """The command with the options that were given, as a shell reads it."""
    words = ["tminus", context.info_name or ""]
    for option in context.command.params:
        if context.get_parameter_source(option.name or "") is not ParameterSource.COMMANDLINE:
            continue
        value = context.params[option.name or ""]
        words.append(max(option.opts, key=len))
        if option.nargs > 1:
            words += map(str, value)
        elif isinstance(value, tuple):
            words.append(",".join(map(str, value)))
        elif value is not True:
            words.append(str(value))
    return shlex.join(words)
