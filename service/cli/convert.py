"""`tminus convert` and `tminus inspect`: convert files of other projects, and describe checkpoints."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.model.formats.flags import FACTS, flag
from tminus.service.cli.options import FOLDER_TYPE, JSON, CheckpointType, options
from tminus.service.cli.output import failing_in_one_line, say, say_json
from tminus.service.model_info import Limits

if TYPE_CHECKING:
    from tminus.model.formats.conversion import GivenFacts
    from tminus.model.formats.describe import Description

MIB = 2**20
TIMED_PASSES = 3
NO_LIMITS = Limits(max_n=1, max_batch=1, max_rows=1, max_jobs=1, max_backlog_s=0, max_body_bytes=0)
# Members of GET /model that depend on the server, not on the model.
SERVER_FACTS = {"limits", "device", "executor", "precision", "executor_details", "exact", "fingerprint"}


fact_options = options(*(click.option(flag(name), type=fact.type, help=fact.text) for name, fact in FACTS.items()))


def given_facts(flags: dict[str, Any]) -> "GivenFacts":
    """Remove the facts from a command's flags, and return them. Raises FactsError for an invalid value."""
    from tminus.model.formats.conversion import GivenFacts

    return GivenFacts(**{name: flags.pop(name) for name in FACTS})


@click.command(short_help="Write a file of another project as a checkpoint.")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("folder", type=FOLDER_TYPE)
@fact_options
def convert(source: Path, folder: Path, **facts: Any) -> None:
    """Convert SOURCE, a file of another project or a U-Net without a scheduler, to the checkpoint FOLDER.

    \b
      tminus inspect ema_0.9999_500000.pt
      tminus convert ema_0.9999_500000.pt cifar10/ --image-size 32 \\
          --timesteps 4000 --beta-schedule squaredcos_cap_v2 \\
          --prediction epsilon --heads 4 --attention-order legacy \\
          --rescale-timesteps yes
      tminus serve --checkpoint cifar10/

    Use options for facts that are not in the file; `tminus inspect` lists the missing options. The page on formats
    lists the projects whose files can be converted.
    """
    from tminus.model.formats.read import convert as run
    from tminus.model.unet_config import CLASS_NAME

    with failing_in_one_line():
        converted = run(source, folder, given_facts(facts))
    say(f"{folder}: written from {converted.format}")
    for note in converted.notes:
        say(f"taken: {note}")
    if converted.unet.class_name != CLASS_NAME:
        say("diffusers has no such network: the folder is for tminus alone")
    say(f"Try: tminus serve --checkpoint {folder}")


@click.command(short_help="Say what a checkpoint is, or a file of another project.")
@click.argument("path", type=CheckpointType(exists=True, path_type=Path))
@fact_options
@JSON
def inspect(path: Path, as_json: bool, **facts: Any) -> None:
    """Describe PATH: a checkpoint (a folder or a hub id), or a file of another project for `tminus convert`.

    \b
      tminus inspect runs/digits
      tminus inspect ema_0.9999_500000.pt --json

    The command also shows the memory and time that an image needs on this CPU.

    --json prints an object with these members: format; model, as in GET /model but without the members that depend on
    the server (null if facts are missing); missing, the options that `tminus convert` needs; taken, the facts that the
    format implies; and costs: weights_bytes, row_bytes (of one row in a forward pass), free_bytes, passes (of an image
    with the recommended settings) and pass_s (null if the memory is too small).
    """
    from tminus.model.formats.describe import describe

    with failing_in_one_line():
        found = describe(path, given_facts(facts))
        costs = _costs(found)
        if as_json:
            say_json(_document(found, costs))
            return
        lines = [*found.lines, *_lines(found, costs)]
    for name, text in lines:
        say(f"{name:>14}  {text}")


def _document(found: "Description", costs: dict[str, Any]) -> dict[str, Any]:
    """Return the description for --json. Its `model` is like GET /model, but without SERVER_FACTS."""
    import torch

    from tminus.service.api.answers.documents import ModelAnswer
    from tminus.service.engine.executors import EagerExecutor
    from tminus.service.engine.fingerprint import make_model_info

    model = None
    if (checkpoint := found.checkpoint) is not None:
        cpu = torch.device("cpu")
        info = make_model_info(checkpoint, cpu, EagerExecutor(checkpoint.net, cpu), exact=False)
        model = ModelAnswer.of(info, NO_LIMITS).model_dump(exclude=SERVER_FACTS)
    described = {"format": found.format, "missing": found.missing, "taken": found.notes, "model": model}
    return described | {"costs": costs or None}


def _costs(found: "Description") -> dict[str, Any]:
    """Measure the memory and time of one image on the CPU in float32. Empty if the network is unknown."""
    import torch

    from tminus.model.catalogue import SAMPLER_FACTS
    from tminus.service.engine.devices import available_bytes

    if found.checkpoint is None or (own := found.settings) is None:
        return {}
    net, size = found.checkpoint.net, found.checkpoint.row_shape[1:]
    weights = sum(4 * value.numel() for value in net.parameters())
    passes = SAMPLER_FACTS[own.sampler].num_passes(own.steps) * (2 if own.guidance != 1 else 1)
    row, free = net.config.pass_bytes(size), available_bytes(torch.device("cpu"))
    costs = {"weights_bytes": weights, "row_bytes": row, "free_bytes": free, "passes": passes, "pass_s": None}
    if free is not None and row > free:
        return costs
    x, t = torch.zeros(1, net.config.in_channels, *size), torch.zeros(1)
    labels = torch.zeros(1, dtype=torch.long) if net.class_embedding is not None else None
    seconds = []
    with torch.inference_mode():
        for _ in range(1 + TIMED_PASSES):
            started = time.perf_counter()
            net(x, t, labels)
            seconds.append(time.perf_counter() - started)
    return costs | {"pass_s": min(seconds[1:])}


def _lines(found: "Description", costs: dict[str, Any]) -> list[tuple[str, str]]:
    if not costs or (own := found.settings) is None:
        return []
    weights, row = costs["weights_bytes"] / MIB, costs["row_bytes"] / MIB
    lines = [("memory", f"{weights:.0f} MiB of weights, about {row:.0f} MiB for a row in a forward pass")]
    if (a_pass := costs["pass_s"]) is None:
        return [*lines, ("time", f"not measured: {costs['free_bytes'] / MIB:.0f} MiB are free")]
    image_s = a_pass * costs["passes"]
    an_image = f"{image_s:.2g} s an image of {own}"
    here = f"PyTorch, float32, this CPU; {costs['passes']} passes"
    return [*lines, ("time", f"{1e3 * a_pass:.3g} ms a pass of one row, {an_image} ({here})")]
