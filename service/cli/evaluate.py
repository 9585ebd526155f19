"""`tminus evaluate`: its options, handed to model/evaluation/, and the approval of a precision."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.service.cli.options import BACKGROUND, FOLDER_TYPE
from tminus.service.cli.output import fail, say, set_up_log, write_file
from tminus.service.cli.training_data import load_training_data
from tminus.service.engine.options import BUNDLED

if TYPE_CHECKING:
    from tminus.model.data import ImageSet
    from tminus.model.evaluation.classifier import Classifier
    from tminus.model.evaluation.report import EvaluationReport


@click.command()
@click.option("--checkpoint", type=FOLDER_TYPE, default=BUNDLED)
@click.option("--data", default="fashion-mnist", help="fashion-mnist, or the folder of images it was trained on")
@click.option("--test-data", type=FOLDER_TYPE, help="folder of held-out images, where --data is a folder")
@click.option("--data-dir", type=FOLDER_TYPE, help="where Fashion-MNIST's IDX files lie  [default: Debian's place]")
@BACKGROUND
@click.option(
    "--classifier",
    type=FOLDER_TYPE,
    help="folder of the classifier that judges; trained there on --data if missing  [default: fashion-mnist-classifier "
    "beside the checkpoint; where --data is a folder, classifier in the checkpoint]",
)
@click.option("-n", "--num-samples", default=1000)
@click.option("--sampler", default="ddim")
@click.option("--steps", default=50)
@click.option("--eta", default=0.0)
@click.option("--guidance", default=1.0)
@click.option("--guidance-interval", type=int, nargs=2, help="lowest and highest timestep that is guided")
@click.option("--spacing", help="of the timesteps: leading, trailing, linspace or karras  [default: as served]")
@click.option("--seed", default=0)
@click.option("--batch-size", default=96, help="samples denoised together")
@click.option(
    "--executor", default="auto", help="what runs the network for the samples: auto, eager, compile or openvino"
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "tf32", "bfloat16"]),
    default="float32",
    help="number format of the forward passes of the samples",
)
@click.option(
    "--approve",
    is_flag=True,
    help="sample in float32 too; if --precision is no worse, note that in tminus.json, so that serve may use it",
)
@click.option("--bound-images", default=200, help="held-out images for the variational bound")
@click.option("--bound-timesteps", default=100, help="timesteps drawn for each of them")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="write the figures here as JSON too")
@click.option("--device", default="auto")
def evaluate(checkpoint: Path, classifier: Path | None, json_file: Path | None, approve: bool, **options: Any) -> None:
    """Measure a checkpoint: bound, class accuracy, Fréchet distance, memorisation. Prints tables for a model card."""
    set_up_log("INFO", "%(message)s")

    from tminus.model.checkpoint import load_checkpoint
    from tminus.model.data import DataError
    from tminus.model.evaluation.classifier import ClassifierError, load_or_train_classifier
    from tminus.model.evaluation.evaluate import EvaluateError
    from tminus.model.files import CheckpointError
    from tminus.service.engine.devices import choose_device

    data, precision = options["data"], options["precision"]
    if approve and precision == "float32":
        fail("--approve: needs a --precision below float32 to approve")
    try:
        device = choose_device(options["device"])
        if data != "fashion-mnist" and options["test_data"] is None:
            fail("--test-data: needed where --data is a folder, or nothing would be held out")
        loaded = load_checkpoint(checkpoint)
        where = options["data_dir"], loaded.size_px[0], loaded.net.config.in_channels, options["background"]
        train_split = load_training_data(data, "train", *where)
        test_split = load_training_data(str(options["test_data"] or data), "test", *where)
        judge = None
        if train_split.labels is not None and test_split.labels is not None:
            bundled = checkpoint.parent / "fashion-mnist-classifier" if test_split.name.startswith("fashion") else None
            folder = classifier or bundled or checkpoint / "classifier"
            judge = load_or_train_classifier(folder, train_split, test_split, device=device)
        reference = None
        if approve:
            reference = measure(checkpoint, train_split, test_split, judge, options | {"precision": "float32"})
        report = measure(checkpoint, train_split, test_split, judge, options)
        if reference is not None:
            judge_precision(checkpoint, reference, report)
    except (DataError, CheckpointError, ClassifierError, EvaluateError, ValueError) as error:
        fail(str(error))
    say(report.to_markdown())
    if json_file is not None:
        write_file(f"--json {json_file}", json_file, (json.dumps(report.to_dict(), indent=2) + "\n").encode())


def measure(
    checkpoint: Path, train: "ImageSet", test: "ImageSet", judge: "Classifier | None", options: dict[str, Any]
) -> "EvaluationReport":
    """Evaluate a checkpoint whose samples are made in options["precision"], by the executor that `serve` would take."""
    import torch

    from tminus.model.checkpoint import load_checkpoint
    from tminus.model.evaluation.evaluate import evaluate as evaluate_checkpoint
    from tminus.model.evaluation.report import EvaluateOptions
    from tminus.service.engine.autotune import choose_executor
    from tminus.service.engine.autotune_cache import default_cache
    from tminus.service.engine.candidates import Wish
    from tminus.service.engine.devices import choose_device

    device, threads = choose_device(options["device"]), torch.get_num_threads()
    wish = Wish(options["executor"], options["precision"], device.type == "cpu", options["batch_size"], threads)
    # Loaded apart from the one that is measured, since an executor may keep the network it is given.
    executor = choose_executor(load_checkpoint(checkpoint), device, wish, default_cache())
    torch.set_num_threads(threads)  # the executor may have taken torch's for itself, and judging needs them
    fields = {name: options[name] for name in EvaluateOptions.__dataclass_fields__} | {"executor": executor.name}
    return evaluate_checkpoint(
        load_checkpoint(checkpoint), train, test, judge, EvaluateOptions(**fields), device=device, forward=executor
    )


def judge_precision(checkpoint: Path, reference: "EvaluationReport", report: "EvaluationReport") -> None:
    """Compare a report with that of float32, print the verdict, and note an approval in tminus.json."""
    from tminus.model.checkpoint import approve
    from tminus.model.evaluation.compare import compare_reports

    verdict, options = compare_reports(reference, report), report.options
    check = {
        "executor": options.executor,
        "precision": options.precision,
        "weights_hash": report.weights_hash,
        "samples": f"{options.num_samples} by {options.sampler} in {options.steps} steps, "
        f"guidance {options.guidance:g}",
        "frechet_ratio": verdict.frechet_ratio,
        "accuracy_difference": verdict.accuracy_difference,
    }
    if verdict.ok:
        approve(checkpoint, check)
    say(f"{options.precision}: {'approved' if verdict.ok else 'not approved'}, {json.dumps(check)}")
    say(verdict.reason)
