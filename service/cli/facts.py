"""The flags of `tminus convert` and `tminus inspect` for what a file does not say."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from tminus.model.formats.flags import FACTS, flag

if TYPE_CHECKING:
    from tminus.model.formats.conversion import Given


def fact_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags to a command."""
    for name, fact in reversed(list(FACTS.items())):
        command = click.option(flag(name), type=fact.type, help=fact.text)(command)
    return command


def given_facts(options: dict[str, Any]) -> "Given":
    """What was given. Raises FactsError for a value out of bounds."""
    from tminus.model.formats.conversion import Given

    return Given(**{name: options.pop(name) for name in FACTS})
