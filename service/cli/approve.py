"""`tminus approve`: compares images to approve or refuse bfloat16 for a checkpoint."""

import sys
from dataclasses import replace
from pathlib import Path

import click

from tminus.service.cli.options import CHECKPOINT_TYPE, DEVICE, EXECUTOR, FOLDER_TYPE
from tminus.service.cli.output import failing_in_one_line
from tminus.service.engine.protocol import LoadOptions
from tminus.service.startup.logs import set_up_log


@click.command(
    short_help="Let a server run a checkpoint in bfloat16.",
    epilog="Exit codes: 0 bfloat16 is approved; 1 it is not, or the command failed; 2 wrong command line; 130 stopped "
    "by Ctrl-C.",
)
@click.argument("checkpoint", type=CHECKPOINT_TYPE)
@click.option(
    "--images",
    type=click.IntRange(4, 1000),
    help="Images to make with each sampler  [default: as many as ten minutes allow, 4 to 16]",
)
@EXECUTOR
@click.option("--cache-dir", type=FOLDER_TYPE, help="Folder where measurements are kept  [default: ~/.cache/tminus]")
@DEVICE
def approve(checkpoint: Path, images: int | None, executor: str, cache_dir: Path | None, device: str) -> None:
    """Allow `tminus serve` to run CHECKPOINT in bfloat16, if bfloat16 does not harm the images.

    \b
      tminus approve runs/digits

    The command makes the same images in float32 and in bfloat16, and compares them. The difference may be at most half
    of the sampler's own error, which comes from its small number of steps. The command saves the approval in the
    checkpoint, or in the cache folder if the checkpoint is read-only. The page on checkpoints describes the criterion.
    """
    set_up_log("INFO", "%(message)s")
    from tminus.model.evaluation.precision import check_comparable
    from tminus.service.engine.approval import approve_portions, check_able
    from tminus.service.engine.autotune import choose_executor
    from tminus.service.engine.choice_cache import default_cache
    from tminus.service.engine.devices import choose_device
    from tminus.service.engine.loading import read_checkpoint, wish_of

    with failing_in_one_line():
        options = LoadOptions(checkpoint, device, executor)
        torch_device, cache = choose_device(device), cache_dir or default_cache()
        loaded = replace(read_checkpoint(options), approved={})  # forget earlier approvals, so float32 is used
        check_comparable(loaded)
        wish = wish_of(options, torch_device)
        if executor != "auto":
            check_able(loaded, torch_device, executor)
        exact = choose_executor(loaded, torch_device, wish, cache)
        check_able(loaded, torch_device, exact.name)
        portions = approve_portions(checkpoint, exact, torch_device, wish.threads, cache, num_images=images)
        try:
            while True:
                next(portions)
        except StopIteration as end:
            sys.exit(0 if end.value else 1)
