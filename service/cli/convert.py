"""`tminus convert` and `tminus inspect`: checkpoints of other projects, and what they lack.

The first writes a folder that tminus, and often diffusers, loads; the second says what a checkpoint is.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.model.formats.flags import FACTS, flag
from tminus.service.cli.options import FOLDER_TYPE
from tminus.service.cli.output import failing_in_one_line, say

if TYPE_CHECKING:
    from tminus.model.formats.conversion import GivenFacts
    from tminus.model.formats.describe import Description

MIB = 2**20
TIMED_PASSES = 3


def fact_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags for what a file does not say to a command."""
    for name, fact in reversed(list(FACTS.items())):
        command = click.option(flag(name), type=fact.type, help=fact.text)(command)
    return command


def given_facts(options: dict[str, Any]) -> "GivenFacts":
    """The facts that were given. Raises FactsError for a value out of bounds."""
    from tminus.model.formats.conversion import GivenFacts

    return GivenFacts(**{name: options.pop(name) for name in FACTS})


@click.command()
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=FOLDER_TYPE)
@fact_options
def convert(source: Path, folder: Path, **options: Any) -> None:
    """Write SOURCE, a checkpoint of another project or a U-Net without a scheduler, as the checkpoint FOLDER.

    docs/formats.md has the formats.
    """
    from tminus.model.formats.read import convert as run
    from tminus.model.unet import CLASS_NAME

    with failing_in_one_line():
        converted = run(source, folder, given_facts(options))
    say(f"{folder}: written from {converted.format}")
    for note in converted.notes:
        say(f"taken: {note}")
    if converted.unet.class_name != CLASS_NAME:
        say("diffusers has no such network: the folder is for tminus alone")
    say(f"Try: tminus serve --checkpoint {folder}")


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@fact_options
def inspect(path: Path, **options: Any) -> None:
    """Say what PATH is: a checkpoint folder, or a file of another project, which `tminus convert` makes a folder of."""
    from tminus.model.formats.describe import describe

    with failing_in_one_line():
        found = describe(path, given_facts(options))
        lines = [*found.lines, *_costs(found)]
    for name, text in lines:
        say(f"{name:>14}  {text}")


def _costs(found: "Description") -> list[tuple[str, str]]:
    """Memory and time of one image, by running the network as it is, on the CPU in float32; nothing without one."""
    import torch

    from tminus.model.catalogue import SAMPLER_FACTS
    from tminus.service.engine.devices import available_bytes

    net, own = found.net, found.settings
    if net is None or own is None:
        return []
    weights = sum(4 * value.numel() for value in net.parameters())
    row, free = net.config.pass_bytes(found.size), available_bytes(torch.device("cpu"))
    lines = [("memory", f"{weights / MIB:.0f} MiB of weights, about {row / MIB:.0f} MiB for a row in a forward pass")]
    if free is not None and row > free:
        return [*lines, ("time", f"not measured: {free / MIB:.0f} MiB are free")]
    x, t = torch.zeros(1, net.config.in_channels, *found.size), torch.zeros(1)
    labels = torch.zeros(1, dtype=torch.long) if net.class_embedding is not None else None
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + TIMED_PASSES):
            started = time.perf_counter()
            net(x, t, labels)
            seconds.append(time.perf_counter() - started)
    a_pass = min(seconds[1:])
    passes = SAMPLER_FACTS[own.sampler].num_passes(own.steps) * (2 if own.guidance != 1 else 1)
    an_image = f"{a_pass * passes:.2g} s an image of {own}"
    here = f"PyTorch, float32, this CPU; {passes} passes"
    return [*lines, ("time", f"{1e3 * a_pass:.3g} ms a pass of one row, {an_image} ({here})")]
