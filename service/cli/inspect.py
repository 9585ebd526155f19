"""`tminus inspect`: what a checkpoint is, what it lacks, and roughly what it costs here."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.service.cli.facts import fact_options, given_facts
from tminus.service.cli.output import fail, say

if TYPE_CHECKING:
    from tminus.model.formats.describe import Description

MIB = 2**20
TIMED_PASSES = 3


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@fact_options
def inspect(path: Path, **options: Any) -> None:
    """Say what PATH is: a checkpoint folder, or a file of another project, which `tminus convert` makes a folder of."""
    from tminus.model.files import CheckpointError
    from tminus.model.formats.describe import describe

    try:
        found = describe(path, given_facts(options))
        lines = [*found.lines, *_costs(found)]
    except (CheckpointError, ValueError, OSError) as error:
        fail(str(error))
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
    an_image = f"{a_pass * passes:.2g} s an image of {own.steps} steps of {own.sampler}, guidance {own.guidance:g}"
    here = f"PyTorch, float32, this CPU; {passes} passes"
    return [*lines, ("time", f"{1e3 * a_pass:.3g} ms a pass of one row, {an_image} ({here})")]
