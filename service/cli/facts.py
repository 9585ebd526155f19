"""The flags of `tminus convert` and `tminus inspect` for what a file does not say."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from tminus.model.formats.given import Given

HELP = (
    ("--image-size", int, "the side of the images in pixels"),
    ("--timesteps", int, "T of the training"),
    ("--beta-schedule", str, "linear, scaled_linear, squaredcos_cap_v2 (OpenAI's cosine) or sigmoid"),
    ("--variance", str, "of ancestral sampling: fixed_small or fixed_large"),
    ("--prediction", str, "epsilon, sample (x_0), v_prediction, or consistency for OpenAI's consistency_models"),
    ("--heads", int, "attention heads of each layer"),
    ("--head-width", int, "channels of an attention head, in place of --heads"),
    ("--attention-order", str, "legacy (heads before q, k, v) or new"),
    ("--rescale-timesteps", str, "yes or no: whether the network was given t * 1000 / T"),
)


def fact_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags to a command."""
    for name, kind, text in reversed(HELP):
        command = click.option(name, type=kind, help=text)(command)
    return command


def given_facts(options: dict[str, Any]) -> "Given":
    """What was given. Raises ValueError for a value out of bounds."""
    from tminus.model.formats.given import Given

    return Given(**{name: options.pop(name) for name in Given.__dataclass_fields__})
