"""`tminus train-autoencoder`: its options, handed to model/training/autoencoder.py."""

from typing import Any

import click

from tminus.service.cli.options import BACKGROUND, DEVICE, FOLDER_TYPE, THREADS, integers
from tminus.service.cli.output import fail, say
from tminus.service.cli.training import load_training_data, reconstruction_writer
from tminus.service.startup.logs import set_up_log


@click.command(name="train-autoencoder")
@click.option("--data", required=True, help="fashion-mnist, or a folder of images")
@click.option("--data-dir", type=FOLDER_TYPE, help="where Fashion-MNIST's IDX files lie  [default: Debian's place]")
@click.option("--size", "size_px", default=64, help="side of the square images of a folder, in pixels")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", help="of the images of a folder")
@BACKGROUND
@click.option("--out", type=FOLDER_TYPE, required=True, help="folder of the run; a run that is there is resumed")
@click.option("--kind", type=click.Choice(["kl", "vq"]), default="kl", help="AutoencoderKL or VQModel")
@click.option("--latent-channels", default=4, help="of a latent")
@click.option("--widths", default="16,32,64", help="block_out_channels; each but the last halves the sides")
@click.option("--layers", default=1, help="layers per block")
@click.option("--groups", default=8, help="of the group norms")
@click.option("--codes", default=1024, help="of a VQModel's codebook")
@click.option("--kl-weight", default=1e-3, help="of the divergence from N(0, I) of an AutoencoderKL's latents")
@click.option("--steps", default=10_000, help="optimiser steps in all")
@click.option("--batch-size", default=32, help="images of an optimiser step")
@click.option("--learning-rate", default=1e-3, help="of Adam, at its highest")
@click.option("--warmup-steps", default=200, help="over which the rate rises from zero")
@click.option("--decay-fraction", default=0.5, help="last part of the run, over which the rate falls to zero")
@click.option("--ema-decay", default=0.999, help="of the average of the weights, which is what is kept")
@click.option("--grad-clip", default=1.0, help="longest gradient, as an L2 norm")
@click.option("--seed", default=0, help="of first weights, order of the images and noise")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="auto: the faster")
@click.option("--compile", is_flag=True, help="torch.compile the autoencoder")
@THREADS
@click.option("--save-every", default=500, help="steps between saves")
@click.option("--sheet-every", default=1000, help="steps between sheets of images and what is decoded of them")
@DEVICE
def train_autoencoder(**options: Any) -> None:
    """Train an autoencoder for latent diffusion, or resume. Ctrl-C saves; the same command resumes exactly."""
    set_up_log("INFO", "%(message)s")
    import torch

    from tminus.model.latent.autoencoder import DOWN_BLOCKS, KL, UP_BLOCKS, VQ, AutoencoderConfig
    from tminus.model.training.autoencoder import AutoencoderTrainConfig
    from tminus.model.training.autoencoder import train_autoencoder as run
    from tminus.model.training.data import DataError
    from tminus.model.training.run import TrainError
    from tminus.service.engine.devices import choose_device

    out = options["out"]
    try:
        device = choose_device(options["device"])
        config = AutoencoderTrainConfig(**{name: options[name] for name in AutoencoderTrainConfig.__dataclass_fields__})
        like = options["size_px"], int(options["channels"]), options["background"]
        data = load_training_data(options["data"], "train", options["data_dir"], *like)
        widths = integers("--widths", options["widths"])
        model = AutoencoderConfig(
            kind={"kl": KL, "vq": VQ}[options["kind"]],
            in_channels=data.images.shape[1],
            out_channels=data.images.shape[1],
            down_block_types=DOWN_BLOCKS[:1] * len(widths),
            up_block_types=UP_BLOCKS[:1] * len(widths),
            block_out_channels=widths,
            layers_per_block=options["layers"],
            latent_channels=options["latent_channels"],
            sample_size=data.images.shape[-1],
            norm_num_groups=options["groups"],
            scaling_factor=1.0,
            num_vq_embeddings=options["codes"],
        )
        if data.images.shape[-1] % model.factor:
            raise ValueError(f"the side of the images must divide by {model.factor}, got {data.images.shape[-1]}")
        say(f"{data.name}: {len(data)} images of {tuple(data.images.shape[1:])}")
        write = reconstruction_writer(out, data, device)
        done = run(out, data, model, config, device=device, on_sheet=write)
    except (DataError, TrainError, ValueError, OSError, torch.OutOfMemoryError) as error:
        fail(str(error))
    say(f"{out}: {'done' if done else 'interrupted and saved; the same command goes on'}")
