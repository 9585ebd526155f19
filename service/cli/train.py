"""`tminus train`: its options, handed to model/training/train.py."""

from typing import TYPE_CHECKING, Any

import click

from tminus.service.cli.options import BACKGROUND, DEVICE, FOLDER_TYPE, THREADS, integers
from tminus.service.cli.output import fail, say
from tminus.service.cli.training import load_training_data, sheet_writer
from tminus.service.startup.logs import set_up_log

if TYPE_CHECKING:
    from tminus.model.latent.autoencoder import AutoencoderConfig
    from tminus.model.training.data import ImageSet
    from tminus.model.unet import UNetConfig

SHEET_STEPS = 50


@click.command()
@click.option("--data", default="fashion-mnist", help="fashion-mnist, or a folder of images (a subfolder a class)")
@click.option("--data-dir", type=FOLDER_TYPE, help="where Fashion-MNIST's IDX files lie  [default: Debian's place]")
@click.option(
    "--test-data",
    type=FOLDER_TYPE,
    help="folder of held-out images, of which losses.csv then tells; fashion-mnist has its own",
)
@click.option("--size", "size_px", default=32, help="side of the square images of a folder, in pixels")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", help="of the images of a folder")
@BACKGROUND
@click.option("--out", type=FOLDER_TYPE, required=True, help="folder of the run; a run that is there is resumed")
@click.option("--latent", type=FOLDER_TYPE, help="train on the latents of this autoencoder, see train-autoencoder")
@click.option("--init-from", type=FOLDER_TYPE, help="begin from the weights of this checkpoint")
@click.option("--steps", default=15_000, help="optimiser steps in all")
@click.option("--batch-size", default=64, help="images of an optimiser step")
@click.option("--optimizer", default="adam", help="adam, or muon, which learns more in a step")
@click.option("--learning-rate", default=1e-3, help="of the optimiser, at its highest")
@click.option("--warmup-steps", default=500, help="over which the rate rises from zero")
@click.option("--decay-fraction", default=0.2, help="last part of the run, over which the rate falls to zero")
@click.option("--ema-decay", default=0.999, help="of the average of the weights, which is what is kept")
@click.option("--class-dropout", default=0.1, help="how often a label becomes the null class, for guidance")
@click.option(
    "--weighting",
    default="simple",
    help="of the loss over t: simple, or velocity, where errors near t = T count more (for a network of eps)",
)
@click.option(
    "--stable-target",
    is_flag=True,
    help="learn the mean of x_0 over the training images that x_t may come from, which varies less",
)
@click.option(
    "--timestep-sampling",
    default="uniform",
    help="how t is drawn: uniform, or lognormal, more often where there is little noise",
)
@click.option("--guidance", default=1.0, help="to fold into the weights of --init-from; 1 is none")
@click.option("--flip", is_flag=True, help="mirror half of the images")
@click.option("--grad-clip", default=1.0, help="longest gradient, as an L2 norm")
@click.option("--seed", default=0, help="of first weights, order of the images and noise")
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="auto: the faster")
@click.option("--compile", is_flag=True, help="torch.compile the network")
@THREADS
@click.option("--save-every", default=500, help="steps between saves")
@click.option(
    "--sheet-every", default=1000, help="steps between sample sheets, and between measurements of held-out images"
)
@click.option("--widths", default="32,64,128", help="block_out_channels, one per resolution")
@click.option("--layers", default=1, help="layers per block")
@click.option("--attention-at", default="16", help="resolutions that attend, in pixels, e.g. 16,8; the mid block does")
@click.option("--head-dim", default=32, help="width of an attention head")
@click.option("--groups", default=8, help="of the group norms")
@click.option("--dropout", default=0.0, help="probability, inside the residual blocks")
@click.option("--beta-schedule", default="linear", help="linear, scaled_linear, squaredcos_cap_v2 or sigmoid")
@click.option("--timesteps", default=1000, help="T")
@click.option("--prediction", default="epsilon", help="epsilon, sample or v_prediction")
@DEVICE
def train(**options: Any) -> None:
    """Train a U-Net, or resume a run. Ctrl-C saves; the same command resumes exactly."""
    set_up_log("INFO", "%(message)s")
    import torch

    from tminus.model.files import CheckpointError
    from tminus.model.latent.folder import load_autoencoder
    from tminus.model.noise import NoiseConfig
    from tminus.model.samplers import compile_plan
    from tminus.model.training.data import DataError, listed
    from tminus.model.training.run import TrainError
    from tminus.model.training.train import TrainConfig
    from tminus.model.training.train import train as run
    from tminus.service.engine.devices import choose_device

    fields = {name: options[name] for name in TrainConfig.__dataclass_fields__}
    try:
        device = choose_device(options["device"])
        like = options["size_px"], int(options["channels"]), options["background"]
        data = load_training_data(options["data"], "train", options["data_dir"], *like)
        held_out = None
        if options["test_data"] is not None or options["data"] == "fashion-mnist":
            held_out = load_training_data(
                str(options["test_data"] or options["data"]), "test", options["data_dir"], *like
            )
        autoencoder = load_autoencoder(options["latent"]) if options["latent"] is not None else None
        unet = _architecture(options, data, autoencoder.config if autoencoder is not None else None)
        noise = NoiseConfig(
            num_train_timesteps=options["timesteps"],
            beta_schedule=options["beta_schedule"],
            prediction_type=options["prediction"],
            clip_sample=autoencoder is None,  # latents have no bounds
        )
        classes = f"{len(data.class_names)} classes: {listed(data.class_names)}" if data.class_names else "no classes"
        say(f"{data.name}: {len(data)} images of {tuple(data.images.shape[1:])}, {classes}")
        write = sheet_writer(options["out"], unet, device, autoencoder)
        plan = compile_plan(noise, noise.schedule(), "ddim", min(SHEET_STEPS, noise.num_train_timesteps))
        done = run(
            options["out"],
            data,
            unet,
            noise,
            TrainConfig(**fields),
            device=device,
            init_from=options["init_from"],
            autoencoder=autoencoder,
            held_out=held_out,
            on_sheet=lambda net, step: write(net, plan, step),
        )
    except (DataError, TrainError, CheckpointError, ValueError, OSError, torch.OutOfMemoryError) as error:
        fail(str(error))
    say(f"{options['out']}: {'done' if done else 'interrupted and saved; the same command goes on'}")


def _architecture(options: dict[str, Any], data: "ImageSet", latent: "AutoencoderConfig | None") -> "UNetConfig":
    from tminus.model.unet import UNetConfig

    widths, attends = integers("--widths", options["widths"]), integers("--attention-at", options["attention_at"])
    channels, size_px = data.images.shape[1], data.images.shape[-1]
    if latent is not None:
        if latent.in_channels != channels or size_px % latent.factor:
            kind = f"{latent.in_channels} channels and sides that divide by {latent.factor}"
            raise ValueError(f"the autoencoder takes images of {kind}, got {tuple(data.images.shape[1:])}")
        channels, size_px = latent.channels, size_px // latent.factor
    at_level = [(size_px >> level) in attends for level in range(len(widths))]
    config = UNetConfig(
        sample_size=size_px,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=options["layers"],
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in at_level),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(at_level)),
        attention_head_dim=options["head_dim"],
        norm_num_groups=options["groups"],
        dropout=options["dropout"],
        num_class_embeds=len(data.class_names) + 1 if data.class_names else None,
    )
    if size_px % config.size_multiple:
        what = "images" if latent is None else "latents"
        raise ValueError(f"the side of the {what} must divide by {config.size_multiple}, got {size_px}")
    return config
