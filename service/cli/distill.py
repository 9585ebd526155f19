"""`tminus distill`: its options, handed to model/training/distill.py."""

from typing import Any

import click

from tminus.service.cli.options import BACKGROUND, DEVICE, FOLDER_TYPE, THREADS, integers
from tminus.service.cli.output import fail, say
from tminus.service.cli.training import load_training_data, sheet_writer
from tminus.service.startup.logs import set_up_log


@click.command()
@click.option("--checkpoint", type=FOLDER_TYPE, required=True, help="the teacher")
@click.option("--out", type=FOLDER_TYPE, required=True, help="folder of the run; a run that is there is resumed")
@click.option("--data", help="fashion-mnist, or a folder of images as the teacher was trained on  [default: none]")
@click.option("--data-dir", type=FOLDER_TYPE, help="where Fashion-MNIST's IDX files lie  [default: Debian's place]")
@BACKGROUND
@click.option("--guidance", default=1.0, help="of the teacher, folded into the student; 1 is off")
@click.option("--student-steps", default="1,2,3,4", help="numbers of sampling steps that the student is made for")
@click.option("--teacher-sampler", default="dpmpp_2m", help="ddim, dpmpp_2m, dpmpp_3m, unipc, deis or euler")
@click.option("--teacher-steps", default=20, help="of its sampler")
@click.option("--trajectories", default=512, help="that the teacher solves at a time")
@click.option("--uses", default=16, help="of the noise of each trajectory, at the mean")
@click.option("--first-share", default=0.6, help="of a batch at pure noise, from which all images begin")
@click.option("--frechet-weight", default=3.0, help="of the distance between the distributions of images; 0 is off")
@click.option("--steps", default=10_000, help="optimiser steps in all")
@click.option("--batch-size", default=64, help="images of an optimiser step")
@click.option("--learning-rate", default=3e-4, help="of Adam, at its highest")
@click.option("--warmup-steps", default=100, help="over which the rate rises from zero")
@click.option("--decay-fraction", default=0.5, help="last part of the run, over which the rate falls to zero")
@click.option("--ema-decay", default=0.999, help="of the average of the weights, which is what is kept")
@click.option("--class-dropout", default=0.1, help="how often a label becomes the null class, which is not guided")
@click.option("--grad-clip", default=1.0, help="longest gradient, as an L2 norm")
@click.option("--seed", default=0, help="of the order of the images, and of noise")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="auto: the faster")
@click.option("--compile", is_flag=True, help="torch.compile the networks")
@THREADS
@click.option("--save-every", default=500, help="steps between saves")
@click.option("--sheet-every", default=1000, help="steps between sample sheets")
@DEVICE
def distill(**options: Any) -> None:
    """Train a student of 1 to 4 steps from a checkpoint, or resume. Ctrl-C saves; the same command resumes exactly."""
    set_up_log("INFO", "%(message)s")
    import torch

    from tminus.model.checkpoint import load_checkpoint
    from tminus.model.files import CheckpointError
    from tminus.model.training.data import DataError
    from tminus.model.training.distill import DistillConfig
    from tminus.model.training.distill import distill as run
    from tminus.model.training.run import TrainError
    from tminus.service.engine.devices import choose_device

    out, teacher = options["out"], options["checkpoint"]
    try:
        device = choose_device(options["device"])
        options["student_steps"] = integers("--student-steps", options["student_steps"])
        config = DistillConfig(**{name: options[name] for name in DistillConfig.__dataclass_fields__})
        loaded = load_checkpoint(teacher)
        data = None
        if options["data"] is not None:
            (height, width), channels = loaded.size_px, loaded.image_shape[0]
            like = max(height, width), channels, options["background"]
            data = load_training_data(options["data"], "train", options["data_dir"], *like)
        write = sheet_writer(out, loaded.net.config, device, loaded.autoencoder)
        done = run(out, teacher, config, device=device, data=data, on_sheet=write)
    except (DataError, TrainError, CheckpointError, ValueError, OSError, torch.OutOfMemoryError) as error:
        fail(str(error))
    say(f"{out}: {'done' if done else 'interrupted and saved; the same command goes on'}")
