"""`tminus tune`: the command line of model/tuning/."""

import math
from pathlib import Path
from typing import Any

import click

from tminus.service.cli.options import CHECKPOINT_TYPE, DEVICE, EXECUTOR, PRECISION, comma_separated
from tminus.service.cli.output import failing_in_one_line, say
from tminus.service.engine.protocol import BUNDLED
from tminus.service.startup.logs import set_up_log

WHOLE = comma_separated(int, "an integer", lambda _: True)  # model/tuning/ checks whether the numbers are in bounds
NUMBERS = comma_separated(float, "a number", math.isfinite)


@click.command(short_help="Fit samplers with few steps to a checkpoint, and recommend one.")
@click.option(
    "--checkpoint",
    type=CHECKPOINT_TYPE,
    default=BUNDLED,
    help="Checkpoint; the tables are written to samplers/ in its folder",
)
@click.option(
    "--steps",
    default="4,5,6,8,10,12,16",
    callback=WHOLE,
    help="Numbers of steps, separated by commas; each gets a table",
)
@click.option(
    "--guidance",
    callback=NUMBERS,
    help="Scales of guidance, separated by commas; 1 is off  [default: the recommended one, or 1]",
)
@click.option("--rows", default=192, help="Images that the tables are fitted to")
@click.option("--held-out", default=64, help="Further images, which only judge")
@click.option(
    "--teacher",
    help="SAMPLER:STEPS that makes the images to fit to  [default: the recommended sampler, or dpmpp_2m, in 50 "
    "steps or more]",
)
@click.option("--seed", default=1_000_000, help="Seed of the images' noise")
@click.option("--iterations", default=200, help="Most iterations of refining the coefficients by gradients")
@click.option("--batch-size", default=64, help="Images in one forward pass")
@EXECUTOR
@PRECISION
@DEVICE
def tune(checkpoint: Path, steps: tuple[int, ...], guidance: tuple[float, ...] | None, **options: Any) -> None:
    """Fit samplers with few steps to a checkpoint, and recommend one of them.

    \b
      tminus tune --checkpoint runs/digits --steps 4,8

    A server that starts afterwards offers the tables as the sampler `tuned`. After Ctrl-C, the same command goes on.
    """
    set_up_log("INFO", "%(message)s")
    import torch

    from tminus.model.checkpoint import load_checkpoint
    from tminus.model.tuning.tune import TuneConfig, check, default_teacher
    from tminus.model.tuning.tune import tune as run
    from tminus.service.engine.autotune import Wish, choose_executor
    from tminus.service.engine.choice_cache import default_cache
    from tminus.service.engine.devices import choose_device

    try:
        with failing_in_one_line():
            device, loaded = choose_device(options["device"]), load_checkpoint(checkpoint)
            options["teacher"] = options["teacher"] or default_teacher(loaded)
            guidance = guidance or (loaded.settings.guidance,)
            config = TuneConfig(**{name: options[name] for name in TuneConfig.__dataclass_fields__})
            check(loaded, steps, guidance, config)
            threads = torch.get_num_threads()
            wish = Wish(options["executor"], options["precision"], device.type == "cpu", config.batch_size, threads)
            loaded.net.to(device)
            # Load the checkpoint a second time, because an executor may keep the network for itself.
            executor = choose_executor(load_checkpoint(checkpoint), device, wish, default_cache())
            files = run(checkpoint, loaded, executor, steps, guidance, config, device=device, say=say, threads=threads)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on after the last table") from None
    served = ". A server that is started now has them: sampler=tuned" if files else ""
    say(f"{checkpoint}: {len(files)} tables written{served}")
