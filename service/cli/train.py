"""`tminus train`, `train-autoencoder` and `distill`: the command line of model/training/."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.model.training.config import (
    AutoencoderTrainConfig,
    DistillConfig,
    TrainConfig,
    usual_batch,
    usual_steps,
)
from tminus.service.cli.options import (
    BACKGROUND,
    CHECKPOINT_TYPE,
    DATA_FOLDERS,
    DEVICE,
    FOLDER_TYPE,
    THREADS,
    Option,
    config_options,
    integers,
    options,
)
from tminus.service.cli.output import failing_in_one_line, say
from tminus.service.startup.logs import set_up_log

if TYPE_CHECKING:
    import torch

    from tminus.model.denoiser import Denoiser, NetConfig
    from tminus.model.latent.autoencoder import Autoencoder, AutoencoderConfig
    from tminus.model.samplers import Plan
    from tminus.model.training.data import ImageSet
    from tminus.model.unet_config import UNetConfig

SHEET_SAMPLER, SHEET_STEPS = "dpmpp_2m", 20
MOST_ON_SHEET = 64  # maximum number of samples on a sheet
ROWS_PER_CLASS = 2  # samples of each class on a sheet
IMAGES_WITHOUT_CLASSES = 16
RECONSTRUCTIONS = 8  # number of images to reconstruct
KINDS = {1: "grey", 3: "colour", 4: "RGBA"}  # keyed by number of channels
DATA_DIR = click.option(
    "--data-dir", type=FOLDER_TYPE, help="Folder of Fashion-MNIST's IDX files  [default: that of Debian's package]"
)
# Predictions whose noise level is a continuous function of t. For these, scheduler_config.json cannot hold a clip.
CONTINUOUS = ("flow", "edm")
PREDICTIONS = ("epsilon", "sample", "v_prediction", *CONTINUOUS)
CHANNELS = click.option(
    "--channels",
    type=click.Choice(["1", "3", "4"]),
    help="Channels of a folder's images; 4 is RGBA  [default: 1 if all of them are grey, else 3]",
)
OUT = click.option("--out", type=FOLDER_TYPE, required=True, help="Folder of the run; a run in it is resumed")
LAYERS = click.option("--layers", default=1, help="Layers in each block")
GROUPS = click.option("--groups", default=8, help="Groups of the group norms")


def size(default: int) -> Option:
    """Return the option --size."""
    what = "Side in pixels of the square images, which are cut from the centre of a folder's images"
    return click.option("--size", "size_px", default=default, help=what)


PRECISION = click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16"]),
    default="auto",
    help="Number format; auto takes the faster one",
)
ON_MACHINE = options(PRECISION, THREADS, DEVICE)


@click.command(short_help="Train a model on a folder of images.")
@click.option(
    "--data",
    shell_complete=DATA_FOLDERS,
    default="fashion-mnist",
    help="Training data: fashion-mnist, or a folder of images with a subfolder for each class",
)
@DATA_DIR
@click.option(
    "--test-data",
    type=FOLDER_TYPE,
    help="Folder of held-out images, whose loss losses.csv then has; fashion-mnist has its own",
)
@size(32)
@CHANNELS
@BACKGROUND
@OUT
@click.option("--latent", type=FOLDER_TYPE, help="Autoencoder on whose latents to train; it also sets --channels")
@click.option("--init-from", type=CHECKPOINT_TYPE, help="Checkpoint to begin from: a folder or a hub id")
@config_options(TrainConfig)
@click.option(
    "--widths", default="32,64,128", help="Channels at each resolution (block_out_channels), separated by commas"
)
@LAYERS
@click.option(
    "--attention-at",
    default="16",
    help="Resolutions with attention, in pixels, such as 16,8; the mid block always has it",
)
@click.option("--head-dim", default=32, help="Channels of each attention head")
@GROUPS
@click.option("--dropout", default=0.0, help="Dropout probability in the residual blocks")
@click.option(
    "--beta-schedule", default="linear", help="Schedule of beta: linear, scaled_linear, squaredcos_cap_v2 or sigmoid"
)
@click.option("--timesteps", default=1000, help="Number T of timesteps")
@click.option("--prediction", type=click.Choice(PREDICTIONS), default="v_prediction", help="What the network predicts")
@ON_MACHINE
def train(**flags: Any) -> None:
    """Train a model on a folder of images, or resume a run.

    \b
      tminus train --data digits/ --out runs/digits
      tminus serve --checkpoint runs/digits

    Put the images into digits/, or into a subfolder for each class. The defaults of the other options suit the number
    of images. During training, samples.png and loss.svg in runs/digits show the progress. Ctrl-C saves the run, and the
    same command resumes it. The result is the same as without the interruption.
    """
    set_up_log("INFO", "%(message)s")

    from tminus.model.latent.autoencoder import load_autoencoder
    from tminus.model.noise import NoiseConfig
    from tminus.model.samplers import compile_plan
    from tminus.model.training.data import listed
    from tminus.model.training.run import saved_config
    from tminus.model.training.train import train as run
    from tminus.service.engine.devices import choose_device

    out, data_dir = flags["out"], flags["data_dir"]
    with failing_in_one_line():
        device = choose_device(flags["device"])
        autoencoder = load_autoencoder(flags["latent"]) if flags["latent"] is not None else None
        if flags["channels"] is None and autoencoder is not None:
            flags["channels"] = autoencoder.config.in_channels
        like = flags["size_px"], flags["channels"], flags["background"]
        data = load_training_data(flags["data"], "train", data_dir, *like)
        begun = saved_config(out)
        for name, usual in (("steps", usual_steps), ("batch_size", usual_batch)):
            if flags[name] is None:
                flags[name] = begun.get(name) or usual(len(data))
        like = flags["size_px"], data.images.shape[1], flags["background"]
        held_out = None
        if flags["test_data"] is not None or flags["data"] == "fashion-mnist":
            held_out = load_training_data(str(flags["test_data"] or flags["data"]), "test", data_dir, *like)
        unet = _architecture(flags, data, autoencoder.config if autoencoder is not None else None)
        continuous = flags["prediction"] in CONTINUOUS
        if continuous and flags["beta_schedule"] != "linear":
            raise ValueError(f"--beta-schedule: --prediction {flags['prediction']} has noise levels of its own")
        noise = NoiseConfig(
            num_train_timesteps=flags["timesteps"],
            beta_schedule=flags["beta_schedule"],
            prediction_type=flags["prediction"],
            clip_sample=autoencoder is None and not continuous,  # latents are not bounded
            default_sampler="euler" if continuous else "ddpm",
        )
        classes = f"{len(data.class_names)} classes: {listed(data.class_names)}" if data.class_names else "no classes"
        say(f"{kind_of(data)}, {classes}")
        say(f"{out}: {flags['steps']} steps of {flags['batch_size']} images; see samples.png and loss.svg in it")
        write = sheet_writer(out, unet, device, autoencoder)
        plan = compile_plan(noise, noise.schedule(), SHEET_SAMPLER, min(SHEET_STEPS, noise.num_train_timesteps))
        done = run(
            out,
            data,
            unet,
            noise,
            TrainConfig(**{name: flags[name] for name in TrainConfig.__dataclass_fields__}),
            device=device,
            init_from=flags["init_from"],
            autoencoder=autoencoder,
            held_out=held_out,
            on_sheet=lambda net, step: write(net, plan, step),
        )
    say_how_it_ended(out, done, more="More --steps go on from here. ")


def _architecture(flags: dict[str, Any], data: "ImageSet", latent: "AutoencoderConfig | None") -> "UNetConfig":
    from tminus.model.unet_config import UNetConfig

    widths, attends = integers("--widths", flags["widths"]), integers("--attention-at", flags["attention_at"])
    channels, size_px = data.images.shape[1], data.images.shape[-1]
    if latent is not None:
        if latent.in_channels != channels or size_px % latent.factor:
            kind = f"{latent.in_channels} channels (--channels) and sides (--size) that divide by {latent.factor}"
            raise ValueError(f"the autoencoder takes images of {kind}, got {tuple(data.images.shape[1:])}")
        channels, size_px = latent.channels, size_px // latent.factor
    at_level = [(size_px >> level) in attends for level in range(len(widths))]
    config = UNetConfig(
        sample_size=size_px,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=flags["layers"],
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in at_level),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(at_level)),
        attention_head_dim=flags["head_dim"],
        norm_num_groups=flags["groups"],
        dropout=flags["dropout"],
        num_class_embeds=len(data.class_names) + 1 if data.class_names else None,
    )
    if size_px % config.size_multiple:
        what = "images" if latent is None else "latents"
        why = f"each of --widths but the last halves it: got {size_px}, and {len(widths)} widths"
        raise ValueError(f"--size: the side of the {what} must divide by {config.size_multiple}, as {why}")
    return config


@click.command(name="train-autoencoder", short_help="Train an autoencoder for latent models.")
@click.option(
    "--data", shell_complete=DATA_FOLDERS, required=True, help="Training data: fashion-mnist, or a folder of images"
)
@DATA_DIR
@size(64)
@CHANNELS
@BACKGROUND
@OUT
@click.option(
    "--kind",
    type=click.Choice(["kl", "vq"]),
    default="kl",
    help="Class of the autoencoder: kl is AutoencoderKL, vq is VQModel",
)
@click.option("--latent-channels", default=4, help="Channels of a latent")
@click.option(
    "--widths",
    default="16,32,64",
    help="Channels at each resolution (block_out_channels); each but the last halves the sides",
)
@LAYERS
@GROUPS
@click.option("--codes", default=1024, help="Size of a VQModel's codebook")
@config_options(AutoencoderTrainConfig)
@ON_MACHINE
def train_autoencoder(**flags: Any) -> None:
    """Train an autoencoder for latent diffusion, or resume a run.

    \b
      tminus train-autoencoder --data photos/ --size 64 --out runs/coder
      tminus train --data photos/ --size 64 --latent runs/coder --out runs/photos

    Ctrl-C saves the run, and the same command resumes it. The result is the same as without the interruption.
    """
    set_up_log("INFO", "%(message)s")

    from tminus.model.latent.autoencoder import DOWN_BLOCKS, KL, UP_BLOCKS, VQ, AutoencoderConfig
    from tminus.model.training.autoencoder import train_autoencoder as run
    from tminus.service.engine.devices import choose_device

    out = flags["out"]
    with failing_in_one_line():
        device = choose_device(flags["device"])
        config = AutoencoderTrainConfig(**{name: flags[name] for name in AutoencoderTrainConfig.__dataclass_fields__})
        like = flags["size_px"], flags["channels"], flags["background"]
        data = load_training_data(flags["data"], "train", flags["data_dir"], *like)
        widths = integers("--widths", flags["widths"])
        model = AutoencoderConfig(
            kind={"kl": KL, "vq": VQ}[flags["kind"]],
            in_channels=data.images.shape[1],
            out_channels=data.images.shape[1],
            down_block_types=DOWN_BLOCKS[:1] * len(widths),
            up_block_types=UP_BLOCKS[:1] * len(widths),
            block_out_channels=widths,
            layers_per_block=flags["layers"],
            latent_channels=flags["latent_channels"],
            sample_size=data.images.shape[-1],
            norm_num_groups=flags["groups"],
            scaling_factor=1.0,
            num_vq_embeddings=flags["codes"],
        )
        if data.images.shape[-1] % model.factor:
            raise ValueError(f"the side of the images must divide by {model.factor}, got {data.images.shape[-1]}")
        say(kind_of(data))
        done = run(out, data, model, config, device=device, on_sheet=reconstruction_writer(out, data, device))
    say_how_it_ended(out, done, served=False)


@click.command(short_help="Train a student that samples in 1 to 4 steps.")
@click.option("--checkpoint", type=CHECKPOINT_TYPE, required=True, help="Teacher: the checkpoint to learn from")
@OUT
@click.option(
    "--data",
    shell_complete=DATA_FOLDERS,
    help="Training data of the teacher: fashion-mnist, or a folder of images  [default: none]",
)
@DATA_DIR
@BACKGROUND
@config_options(DistillConfig)
@ON_MACHINE
def distill(**flags: Any) -> None:
    """Train a student that samples in 1 to 4 steps, or resume a run.

    \b
      tminus distill --checkpoint runs/digits --out runs/digits-student
      tminus serve --checkpoint runs/digits-student

    Ctrl-C saves the run, and the same command resumes it. The result is the same as without the interruption.
    """
    set_up_log("INFO", "%(message)s")

    from tminus.model.checkpoint import load_checkpoint
    from tminus.model.training.distill import distill as run
    from tminus.service.engine.devices import choose_device

    out, teacher = flags["out"], flags["checkpoint"]
    with failing_in_one_line():
        device = choose_device(flags["device"])
        flags["student_steps"] = integers("--student-steps", flags["student_steps"])
        config = DistillConfig(**{name: flags[name] for name in DistillConfig.__dataclass_fields__})
        loaded = load_checkpoint(teacher)
        data = None
        if flags["data"] is not None:
            (height, width), channels = loaded.size_px, loaded.image_shape[0]
            like = max(height, width), channels, flags["background"]
            data = load_training_data(flags["data"], "train", flags["data_dir"], *like)
        write = sheet_writer(out, loaded.net.config, device, loaded.autoencoder)
        done = run(out, teacher, config, device=device, data=data, on_sheet=write)
    say_how_it_ended(out, done)


def say_how_it_ended(out: Path, done: bool, *, served: bool = True, more: str = "") -> None:
    """Print that the run is done, or that it was interrupted and can be resumed."""
    say(f"{out}: {'done' if done else 'interrupted and saved; the same command goes on'}")
    if done and served:
        say(f"{more}Try: tminus serve --checkpoint {out}")


# --- shared: the training images, and the sheets of samples ---


def kind_of(data: "ImageSet") -> str:
    """Describe a set of images: its name, and the number, size and colours of the images."""
    _, channels, height, width = data.images.shape
    return f"{data.name}: {len(data)} images, {width}x{height}, {KINDS[channels]}"


def load_training_data(
    data: str, split: str, idx_folder: Path | None, size_px: int, channels: int | str | None, background: str
) -> "ImageSet":
    """Load a split of Fashion-MNIST ("train" or "test"), or all images in a folder.

    data: fashion-mnist, or the folder. idx_folder: the folder with the files of Fashion-MNIST; None: that of Debian's
    package. The other parameters are only for a folder of images. channels: None: as in the images. background: the
    colour behind transparent pixels. Raises DataError, or ValueError for an invalid colour or a missing folder.
    """
    from tminus.model.pixels import colour
    from tminus.model.training.data import FASHION_MNIST_DIR, load_fashion_mnist, load_image_folder

    if data == "fashion-mnist":
        return load_fashion_mnist(split, idx_folder or FASHION_MNIST_DIR)
    if not Path(data).is_dir():
        raise ValueError(f"{data}: neither fashion-mnist nor a folder of images")
    return load_image_folder(Path(data), size_px, None if channels is None else int(channels), colour(background))


def sheet_writer(
    folder: Path, unet: "NetConfig", device: "torch.device", autoencoder: "Autoencoder | None" = None
) -> Callable[["Denoiser", "Plan", int], None]:
    """Return a function that draws a sheet of samples, always from the same noise, so that sheets can be compared.

    autoencoder: decodes the samples of a latent model.
    """
    import torch

    from tminus.model.latent.autoencoder import images_of
    from tminus.model.rng import image_noise
    from tminus.model.samplers import sample

    num_classes = (unet.num_class_embeds or 1) - 1
    n = min(num_classes * ROWS_PER_CLASS, MOST_ON_SHEET) or IMAGES_WITHOUT_CLASSES
    labels = torch.arange(n, device=device) % num_classes if num_classes else None
    assert unet.size_px is not None  # a network that was trained or loaded always has a size
    shape = (unet.in_channels, *unet.size_px)

    def write(net: "Denoiser", plan: "Plan", step: int) -> None:
        x_T = image_noise(0, range(n), 0, shape, device)
        x = sample(net, plan, x_T, lambda k: image_noise(0, range(n), k + 1, shape, device), class_labels=labels)
        _write(folder, step, x if autoencoder is None else images_of(autoencoder, x))

    return write


def reconstruction_writer(
    folder: Path, data: "ImageSet", device: "torch.device"
) -> Callable[["Autoencoder", int], None]:
    """Return a function that draws a sheet: some of the images, and below them their reconstructions."""
    import torch

    from tminus.model.latent.autoencoder import images_of, latents_of
    from tminus.model.pixels import to_model_range

    images = data.images[:: max(1, len(data) // RECONSTRUCTIONS)][:RECONSTRUCTIONS]

    def write(autoencoder: "Autoencoder", step: int) -> None:
        again = images_of(autoencoder, latents_of(autoencoder, images, device))
        _write(folder, step, torch.cat([to_model_range(images.to(device)), again]))

    return write


def _write(folder: Path, step: int, x: "torch.Tensor") -> None:
    """Write the sheet of a step, and a copy as samples.png. x: images [n, C, H, W] in [-1, 1]."""
    from tminus.model.files import write_bytes
    from tminus.model.pixels import RGBA, shown_channels, to_uint8
    from tminus.service.images.encoder import contact_sheet, encode_png, enlarge, viewing_scale

    x = x[:, : shown_channels(x.shape[1], alpha=x.shape[1] == RGBA)]
    sheet = contact_sheet(to_uint8(x).permute(0, 2, 3, 1).contiguous().cpu().numpy())
    png = encode_png(enlarge(sheet, viewing_scale(len(x), *sheet.shape[:2])))
    sheets = folder / "sheets"
    sheets.mkdir(exist_ok=True)
    (sheets / f"{step:07d}.png").write_bytes(png)
    write_bytes(folder / "samples.png", png)
