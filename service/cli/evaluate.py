"""`tminus evaluate`: measures a checkpoint, writes the report folder, and approves a precision."""

import json
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tminus.model.catalogue import MAX_GUIDANCE, Rung
from tminus.service.cli.options import (
    BACKGROUND,
    CHECKPOINT,
    DATA_FOLDERS,
    DEVICE,
    EXECUTOR,
    FOLDER_TYPE,
    comma_separated,
)
from tminus.service.cli.output import fail, failing_in_one_line, make_folder, say, write_file
from tminus.service.cli.train import DATA_DIR, load_training_data
from tminus.service.startup.logs import set_up_log

if TYPE_CHECKING:
    from tminus.model.checkpoint import Checkpoint
    from tminus.model.evaluation.classifier import Classifier
    from tminus.model.evaluation.report import Report
    from tminus.model.evaluation.samples import Point
    from tminus.model.training.data import ImageSet


NAMES = comma_separated(str, "a name", bool)
STEPS = comma_separated(int, "a whole number, 1 or more", lambda steps: bool(steps >= 1))
SCALES = comma_separated(float, f"a number, 0..{MAX_GUIDANCE:g}", lambda scale: bool(0 <= scale <= MAX_GUIDANCE))
BESIDE_A_SETTING = ("eta", "spacing", "guidance_interval", "guidance_rescale")
SEEDS = comma_separated(int, "a whole number, 0..2^64-1", lambda seed: bool(0 <= seed < 2**64))


@click.command(short_help="Measure a checkpoint, compare samplers.")
@CHECKPOINT
@click.option(
    "--data",
    shell_complete=DATA_FOLDERS,
    help="Training data: fashion-mnist, or a folder of images  [default: fashion-mnist, if the checkpoint was "
    "trained on it]",
)
@click.option("--test-data", type=FOLDER_TYPE, help="Folder of held-out images, if --data is a folder")
@DATA_DIR
@BACKGROUND
@click.option(
    "--classifier",
    type=FOLDER_TYPE,
    help="Folder of the classifier that judges; if it is missing, one is trained on --data  [default: "
    "fashion-mnist-classifier beside the checkpoint; if --data is a folder, classifier in the checkpoint]",
)
@click.option(
    "-n", "--num-samples", default=1000, help="Samples of each combination of sampler, steps, guidance and seed"
)
@click.option(
    "--sampler", callback=NAMES, metavar="LIST", default="ddim", help="One sampler, several separated by commas, or all"
)
@click.option(
    "--steps", callback=STEPS, metavar="LIST", default="50", help="One number of steps, or several separated by commas"
)
@click.option("--eta", default=0.0, help="Noise of ddim: 0 for none, 1 for that of ddpm")
@click.option(
    "--guidance",
    callback=SCALES,
    metavar="LIST",
    default="1",
    help="One scale of guidance, or several separated by commas; 1 is off",
)
@click.option(
    "--guidance-interval", type=int, nargs=2, help="Lowest and highest timestep at which guidance acts  [default: all]"
)
@click.option(
    "--guidance-rescale",
    default=0.0,
    help="Rescale the guided output to the spread of the conditional one, by this share, 0..1",
)
@click.option("--spacing", help="Spacing of the timesteps: leading, trailing, linspace or karras  [default: as served]")
@click.option(
    "--seed",
    "--seeds",
    "seeds",
    callback=SEEDS,
    metavar="LIST",
    default="0",
    help="One seed, or several separated by commas, to see the spread",
)
@click.option("--reference", metavar="SAMPLER:STEPS", help="Also sample in this way, and compare the others with it")
@click.option("--batch-size", default=96, help="Samples in one forward pass")
@EXECUTOR
@click.option(
    "--precision",
    type=click.Choice(["float32", "tf32", "bfloat16"]),
    default="float32",
    help="Number format of the forward passes",
)
@click.option(
    "--approve",
    is_flag=True,
    help="Also sample in float32; if --precision is no worse, note that in the checkpoint, so that servers use it",
)
@click.option(
    "--ladder",
    "ladder_folder",
    type=FOLDER_TYPE,
    help="Checkpoint that gets the measured settings into its ladder, for quality=adaptive: this one, or the teacher",
)
@click.option("--bound-images", default=200, help="Held-out images for the variational bound")
@click.option("--bound-timesteps", default=100, help="Timesteps drawn for each of these images")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures to this file, as JSON"
)
@click.option(
    "--report",
    "report_folder",
    type=FOLDER_TYPE,
    help="Write report.html into this folder, with plots and samples; the same command continues a stopped run",
)
@DEVICE
def evaluate(
    checkpoint: Path,
    classifier: Path | None,
    json_file: Path | None,
    report_folder: Path | None,
    approve: bool,
    ladder_folder: Path | None,
    **options: Any,
) -> None:
    """Measure a checkpoint: variational bound, class accuracy, Fréchet distance and memorisation.

    \b
      tminus evaluate --checkpoint runs/digits --data digits/ --steps 50
      tminus evaluate --sampler all --steps 10,20,50 --report report/

    The command prints Markdown tables for a model card. With several samplers, numbers of steps or guidance scales, it
    measures every combination with every seed.
    """
    set_up_log("INFO", "%(message)s")
    from tminus.model.checkpoint import add_to_ladder, load_checkpoint
    from tminus.model.evaluation.page import check_installed, report_files

    if approve and options["precision"] == "float32":
        fail("--approve: needs a --precision below float32 to approve")
    if ladder_folder is not None and any(options[name] for name in BESIDE_A_SETTING):
        fail("--ladder: a setting is a sampler, steps and guidance; leave out --eta, --spacing and --guidance-...")
    with failing_in_one_line():
        if report_folder is not None:
            check_installed()
            make_folder(f"--report {report_folder}", report_folder)
        loaded = load_checkpoint(checkpoint)
        if ladder_folder is not None:
            load_checkpoint(ladder_folder)  # now, because measuring takes long
        points, references = choose_points(loaded, options)
        single = len(points) == 1 and not references
        if approve and not (single and len(options["seeds"]) == 1):
            fail("--approve: compares one sampler, number of steps, guidance and seed, and several were given")
        compared = load_compared(checkpoint, loaded, classifier, options)
        measured = partial(measure, checkpoint, compared, report_folder, points, references)
        reference = measured(options | {"precision": "float32"}) if approve else None
        report = measured(options)
        say(report.to_markdown())
        if json_file is not None:
            write_file(f"--json {json_file}", json_file, report.to_json().encode())
        if report_folder is not None:
            for name, content in report_files(report, shlex.join(["tminus", *sys.argv[1:]])).items():
                write_file(f"--report {report_folder}", report_folder / name, content)
            say(f"{report_folder / 'report.html'}: written")
        if ladder_folder is not None:
            model = None if ladder_folder.samefile(checkpoint) else loaded.name
            say(ladder_text(add_to_ladder(ladder_folder, rungs_of(report, model))))
        if reference is not None:  # comes last, because the checkpoint may not be writable
            judge_precision(checkpoint, reference, report)


def choose_points(loaded: "Checkpoint", options: dict[str, Any]) -> "tuple[tuple[Point, ...], tuple[Point, ...]]":
    """Return the points to measure, and the points to compare them with. Raises ValueError."""
    from tminus.model.evaluation.samples import make_points

    references: tuple[Point, ...] = ()
    if (reference := options["reference"]) is not None:
        name, _, steps = reference.partition(":")
        if not steps.isdecimal() or int(steps) < 1:
            fail(f"--reference: must be a sampler and a number of steps, as ddpm:1000, got {reference!r:.100}")
        references = make_points(loaded, [name], [int(steps)], options["guidance"])
    return make_points(loaded, options["sampler"], options["steps"], options["guidance"]), references


def load_compared(
    checkpoint: Path, loaded: "Checkpoint", classifier: Path | None, options: dict[str, Any]
) -> "tuple[ImageSet, ImageSet, Classifier | None]":
    """Load the training images, the held-out images and the classifier.

    If the classifier does not exist yet, it is trained. It is None if there are fewer than two classes.
    """
    from tminus.model.checkpoint import TminusJson
    from tminus.model.evaluation.classifier import load_or_train_classifier
    from tminus.service.engine.devices import choose_device

    if (data := options["data"]) is None:
        known = TminusJson.read(checkpoint).trained_on()
        if known != "fashion-mnist train":
            trained = "its tminus.json names no data" if known is None else f"it was trained on {known!r:.100}"
            fail(f"--data: name the folder of images that {checkpoint} was trained on ({trained}), and --test-data")
        data = "fashion-mnist"
    if data != "fashion-mnist" and options["test_data"] is None:
        fail("--test-data: needed if --data is a folder, or there would be no held-out images")
    device = choose_device(options["device"])
    where = options["data_dir"], loaded.size_px[0], loaded.image_shape[0], options["background"]
    train_split = load_training_data(data, "train", *where)
    test_split = load_training_data(str(options["test_data"] or data), "test", *where)
    if train_split.labels is None or test_split.labels is None or len(train_split.class_names) < 2:
        return train_split, test_split, None
    bundled = checkpoint.parent / "fashion-mnist-classifier" if test_split.name.startswith("fashion") else None
    folder = classifier or bundled or checkpoint / "classifier"
    return train_split, test_split, load_or_train_classifier(folder, train_split, test_split, device=device)


def measure(
    checkpoint: Path,
    compared: "tuple[ImageSet, ImageSet, Classifier | None]",
    report_folder: Path | None,
    points: "tuple[Point, ...]",
    references: "tuple[Point, ...]",
    options: dict[str, Any],
) -> "Report":
    """Evaluate a checkpoint in options["precision"], with the executor that `tminus serve` would choose."""
    import torch

    from tminus.model.checkpoint import load_checkpoint
    from tminus.model.evaluation.evaluate import ResultCache
    from tminus.model.evaluation.evaluate import evaluate as evaluate_checkpoint
    from tminus.model.evaluation.samples import EvaluateOptions
    from tminus.service.engine.autotune import Wish, choose_executor
    from tminus.service.engine.choice_cache import default_cache
    from tminus.service.engine.devices import choose_device

    device, threads = choose_device(options["device"]), torch.get_num_threads()
    wish = Wish(options["executor"], options["precision"], device.type == "cpu", options["batch_size"], threads)
    # Below, the checkpoint is loaded a second time, because an executor may keep the network for itself.
    executor = choose_executor(load_checkpoint(checkpoint), device, wish, default_cache())
    # If OpenVINO runs the network, choose_executor leaves only one thread to torch. With more torch threads, a pass
    # would take twice as long on a busy machine. Sampling keeps this number of threads; the classifier gets all
    # threads.
    draw_threads = torch.get_num_threads()
    torch.set_num_threads(threads)
    if device.type == "cuda":  # for the classifier, which runs in float32; executors set these flags themselves
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    of_points = {"sampler", "steps", "guidance", "seed", "executor"}
    fields = {name: options[name] for name in EvaluateOptions.__dataclass_fields__ if name not in of_points}
    try:
        return evaluate_checkpoint(
            load_checkpoint(checkpoint),
            *compared,
            EvaluateOptions(**fields, executor=executor.name),
            device=device,
            forward=executor,
            draw_threads=draw_threads,
            points=points,
            references=references,
            seeds=options["seeds"],
            cache=ResultCache(report_folder / "kept" if report_folder is not None else None),
        )
    except OSError as error:
        if report_folder is None:
            raise
        fail(f"--report {report_folder}: {error}")


def rungs_of(report: "Report", model: str | None) -> list[Rung]:
    """Return the measured settings, with their mean distances over the seeds. model: the name that serves them."""
    from tminus.model.evaluation.figures import FRECHET, PIXEL_FRECHET

    rungs = []
    for point in report.points:
        distance, in_pixels = (
            None if (spread := point.spread(metric)) is None else round(spread.mean, 4)
            for metric in (FRECHET, PIXEL_FRECHET)
        )
        rungs.append(Rung(point.sampler, point.steps, point.guidance, model, distance, in_pixels))
    return rungs


def ladder_text(ladder: Sequence[Rung]) -> str:
    """Describe a ladder, one line for each setting."""
    lines = ["the ladder, from the best setting to the fastest:"]
    for rung in ladder:
        whose = "" if rung.model is None else f" of {rung.model}"
        lines.append(f"  {rung}{whose}: distance {rung.distance}, in pixels {rung.pixel_distance}")
    return "\n".join(lines)


def judge_precision(checkpoint: Path, reference: "Report", report: "Report") -> None:
    """Compare a report with the float32 report, and print the verdict. Saves an approval in tminus.json."""
    from tminus.model.checkpoint import approve
    from tminus.model.evaluation.report import compare_reports

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
