"""`tminus train` and `tminus evaluate`: options to the functions of model/."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli.main import CHECKPOINT_TYPE, DEFAULT_CHECKPOINT, fail, main

if TYPE_CHECKING:
    import torch

    from model.data import ImageSet
    from model.noise import NoiseConfig
    from model.unet import UNet2D, UNetConfig

SHEET_STEPS = 50
SHEET_ROWS_PER_CLASS = 2
SHEET_IMAGES_WITHOUT_CLASSES = 16


@main.command()
@click.option("--data", default="fashion-mnist", help="fashion-mnist, or a folder of images (a subfolder a class)")
@click.option("--data-dir", type=CHECKPOINT_TYPE, help="where Fashion-MNIST's IDX files lie  [default: Debian's place]")
@click.option("--size", "size_px", default=32, help="side of the square images of a folder, in pixels")
@click.option("--channels", type=click.Choice(["1", "3"]), default="3", help="of the images of a folder")
@click.option("--out", type=CHECKPOINT_TYPE, required=True, help="folder of the run; holding one, it is resumed")
@click.option("--init-from", type=CHECKPOINT_TYPE, help="begin from the weights of this checkpoint")
@click.option("--steps", default=15_000, help="optimiser steps in all")
@click.option("--batch-size", default=64)
@click.option("--learning-rate", default=1e-3)
@click.option("--warmup-steps", default=500)
@click.option("--decay-fraction", default=0.2, help="last part of the run, over which the rate falls to zero")
@click.option("--ema-decay", default=0.999)
@click.option("--class-dropout", default=0.1, help="how often a label becomes the null class, for guidance")
@click.option("--flip", is_flag=True, help="mirror half of the images")
@click.option("--grad-clip", default=1.0)
@click.option("--seed", default=0)
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", help="auto: the faster")
@click.option("--compile", is_flag=True, help="torch.compile the network")
@click.option("--save-every", default=500, help="steps between saves")
@click.option("--sheet-every", default=1000, help="steps between sample sheets")
@click.option("--widths", default="32,64,128", help="block_out_channels, one a resolution")
@click.option("--layers", default=1, help="layers a block")
@click.option("--attention-at", default="16", help="resolutions that attend, in pixels, e.g. 16,8; the mid block does")
@click.option("--head-dim", default=32, help="width of an attention head")
@click.option("--groups", default=8, help="of the group norms")
@click.option("--dropout", default=0.0)
@click.option("--beta-schedule", default="linear", help="linear, scaled_linear, squaredcos_cap_v2 or sigmoid")
@click.option("--timesteps", default=1000, help="T")
@click.option("--prediction", default="epsilon", help="epsilon, sample or v_prediction")
@click.option("--device", default="auto")
def train(**options: Any) -> None:
    """Train a U-Net, or go on with a run. Ctrl-C saves; the same command resumes exactly."""
    logging.basicConfig(level="INFO", format="%(message)s")
    import torch

    from model.checkpoint import CheckpointError
    from model.data import DataError
    from model.noise import NoiseConfig
    from model.train import TrainConfig, TrainError
    from model.train import train as run
    from service.engine.engine import choose_device

    fields = {name: options[name] for name in TrainConfig.__dataclass_fields__}
    try:
        device = choose_device(options["device"])
        data = _load_data(options, "train")
        unet = _architecture(options, data)
        noise = NoiseConfig(
            num_train_timesteps=options["timesteps"],
            beta_schedule=options["beta_schedule"],
            prediction_type=options["prediction"],
        )
        click.echo(
            f"{data.name}: {len(data)} images of {tuple(data.images.shape[1:])}, {len(data.class_names)} classes"
        )
        done = run(
            options["out"],
            data,
            unet,
            noise,
            TrainConfig(**fields),
            device=device,
            init_from=options["init_from"],
            on_sheet=_sheet_writer(options["out"], unet, noise, device),
        )
    except (DataError, TrainError, CheckpointError, ValueError, torch.OutOfMemoryError) as error:
        fail(str(error))
    click.echo(f"{options['out']}: {'done' if done else 'interrupted and saved; the same command goes on'}")


@main.command()
@click.option("--checkpoint", type=CHECKPOINT_TYPE, default=DEFAULT_CHECKPOINT)
@click.option("--data", default="fashion-mnist", help="fashion-mnist, or the folder of images it was trained on")
@click.option("--test-data", type=CHECKPOINT_TYPE, help="folder of held-out images, where --data is a folder")
@click.option("--data-dir", type=CHECKPOINT_TYPE, help="where Fashion-MNIST's IDX files lie  [default: Debian's place]")
@click.option(
    "--classifier",
    type=CHECKPOINT_TYPE,
    help="folder of the judge; trained there on --data if missing  [default: beside the checkpoint]",
)
@click.option("-n", "--num-samples", default=1000)
@click.option("--sampler", default="ddim")
@click.option("--steps", default=50)
@click.option("--eta", default=0.0)
@click.option("--guidance", default=1.0)
@click.option("--guidance-interval", type=int, nargs=2, help="lowest and highest timestep that is guided")
@click.option("--spacing", help="of the timesteps: leading, trailing, linspace or karras  [default: as served]")
@click.option("--seed", default=0)
@click.option("--batch-size", default=96, help="samples that move in step")
@click.option(
    "--executor", default="auto", help="auto, eager, compile or openvino: what runs the network for the samples"
)
@click.option(
    "--precision", type=click.Choice(["float32", "tf32", "bfloat16"]), default="float32", help="of the samples' passes"
)
@click.option(
    "--approve",
    is_flag=True,
    help="sample in float32 too; where --precision is no worse, note it in tminus.json, and serve takes it",
)
@click.option("--bound-images", default=200, help="held-out images whose bound is taken")
@click.option("--bound-timesteps", default=100, help="timesteps drawn for each of them")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write the figures here as JSON too")
@click.option("--device", default="auto")
def evaluate(checkpoint: Path, classifier: Path | None, json_file: Path | None, approve: bool, **options: Any) -> None:
    """Measure a checkpoint: bound, class accuracy, Fréchet distance, memorisation. Prints tables for a model card."""
    logging.basicConfig(level="INFO", format="%(message)s")
    import torch

    from model.checkpoint import CheckpointError, load_checkpoint
    from model.checkpoint import approve as note_approval
    from model.data import DataError
    from model.evaluation.classifier import ClassifierError, load_or_train_classifier
    from model.evaluation.compare import compare_reports
    from model.evaluation.evaluate import EvaluateError
    from model.evaluation.evaluate import evaluate as measure
    from model.evaluation.report import EvaluateOptions, EvaluationReport
    from service.engine.autotune import Wish, choose_executor
    from service.engine.autotune_cache import default_cache
    from service.engine.engine import choose_device

    if approve and options["precision"] == "float32":
        fail("--approve: needs a --precision below float32 to approve")
    try:
        device = choose_device(options["device"])
        if options["data"] != "fashion-mnist" and options["test_data"] is None:
            fail("--test-data: needed where --data is a folder, or nothing would be held out")
        loaded = load_checkpoint(checkpoint)
        options |= {"size_px": loaded.size_px[0], "channels": loaded.net.config.in_channels}
        train_split = _load_data(options, "train")
        test_split = _load_data(options | {"data": options["test_data"] or options["data"]}, "test")
        judge = None
        if train_split.labels is not None and test_split.labels is not None:
            own = checkpoint.parent / "fashion-mnist-classifier" if test_split.name.startswith("fashion") else None
            folder = classifier or own or checkpoint / "classifier"
            judge = load_or_train_classifier(folder, train_split, test_split, device=device)

        threads = torch.get_num_threads()

        def report_on(precision: str) -> EvaluationReport:
            # Loaded anew: an executor may keep the network it is given.
            fresh, batch = load_checkpoint(checkpoint), options["batch_size"]
            wish = Wish(options["executor"], precision, device.type == "cpu", batch, threads)
            executor = choose_executor(fresh, device, wish, default_cache())
            torch.set_num_threads(threads)  # the executor may have taken torch's for itself; the judging wants them
            fields = {name: options[name] for name in EvaluateOptions.__dataclass_fields__}
            fields |= {"executor": executor.name, "precision": precision}
            return measure(
                loaded, train_split, test_split, judge, EvaluateOptions(**fields), device=device, forward=executor
            )

        reference = report_on("float32") if approve else None
        report = report_on(options["precision"])
        if reference is not None:
            verdict = compare_reports(reference, report)
            check = {
                "executor": report.options.executor,
                "precision": options["precision"],
                "weights_hash": report.weights_hash,
                "samples": f"{report.options.num_samples} by {report.options.sampler} in {report.options.steps} steps, "
                f"guidance {report.options.guidance:g}",
                "frechet_ratio": verdict.frechet_ratio,
                "accuracy_difference": verdict.accuracy_difference,
            }
            if verdict.ok:
                note_approval(checkpoint, check)
            click.echo(f"{options['precision']}: {'approved' if verdict.ok else 'not approved'}, {json.dumps(check)}")
            click.echo(verdict.reason)
    except (DataError, CheckpointError, ClassifierError, EvaluateError, ValueError) as error:
        fail(str(error))
    click.echo(report.to_markdown())
    if json_file is not None:
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n")


def _load_data(options: dict[str, Any], split: str) -> "ImageSet":
    from model.data import FASHION_MNIST_DIR, load_fashion_mnist, load_image_folder

    if options["data"] == "fashion-mnist":
        return load_fashion_mnist(split, options["data_dir"] or FASHION_MNIST_DIR)
    return load_image_folder(Path(options["data"]), options["size_px"], int(options["channels"]))


def _architecture(options: dict[str, Any], data: "ImageSet") -> "UNetConfig":
    from model.unet import UNetConfig

    widths, attends = _integers("--widths", options["widths"]), _integers("--attention-at", options["attention_at"])
    channels, size_px = data.images.shape[1], data.images.shape[-1]
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
        raise ValueError(f"the side of the images must divide by {config.size_multiple}, got {size_px}")
    return config


def _integers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{flag} must be integers joined by commas, got {text!r}") from None


def _sheet_writer(
    folder: Path, unet: "UNetConfig", noise: "NoiseConfig", device: "torch.device"
) -> Callable[["UNet2D", int], None]:
    """Make the function that draws a sheet of samples, the same noise each time, so that progress shows."""
    import torch

    from model.data import to_uint8
    from model.rng import image_noise
    from model.samplers import compile_plan
    from model.samplers import sample as sample_rows
    from service.images.encoder import contact_sheet, encode_png

    plan = compile_plan(noise, noise.schedule(), "ddim", min(SHEET_STEPS, noise.num_train_timesteps))
    num_classes = (unet.num_class_embeds or 1) - 1
    n = num_classes * SHEET_ROWS_PER_CLASS or SHEET_IMAGES_WITHOUT_CLASSES
    labels = torch.arange(n, device=device) % num_classes if num_classes else None
    x_T = image_noise(0, range(n), 0, (unet.in_channels, *(unet.size_px or (0, 0))), device)

    def write(net: "UNet2D", step: int) -> None:
        zero = torch.zeros_like(x_T)
        x = sample_rows(net, plan, x_T, lambda _k: zero, class_labels=labels)
        pixels = to_uint8(x).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        sheets = folder / "sheets"
        sheets.mkdir(exist_ok=True)
        (sheets / f"{step:07d}.png").write_bytes(encode_png(contact_sheet(pixels)))

    return write
