"""How good the images of the bundled checkpoints are, by sampler, steps and guidance: bench/results/quality.json.

    python -m bench.quality [--minutes 10] [--only fashion-mnist-32] [--threads 1]

Each setting is sampled with two seeds, 1000 images each, and judged as `tminus evaluate` judges: the share of the
images that a classifier gives their own class, and Fréchet distances to the test split, in the classifier's features
and in pixels. As many training images are judged too: they show what the figures are for real images. Each figure is
the mean of both seeds. What the file has of the same code, weights, sampler tables and number of images is not
measured again, so the command goes on where it was stopped.

The data of pixel-art-32 and avatars-64 is rendered by checkpoints/data/render.mjs into runs/data; their classifiers are
trained into runs/classifiers, a few minutes each. A checkpoint without its data is left out. Two processes may write to
the same file.
"""

import fcntl
import json
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path
from statistics import mean
from typing import Any, Literal

import torch

from bench.result_file import RESULTS, ROOT, Begun, begin, changed, say, write
from bench.servers import describe, options_of
from tminus.model.checkpoint import Checkpoint, load_checkpoint
from tminus.model.evaluation.evaluate import Measure, ResultCache, plan_hash
from tminus.model.evaluation.figures import SampleFigures
from tminus.model.evaluation.judge import Judge
from tminus.model.evaluation.samples import EvaluateOptions, Point
from tminus.service.cli.evaluate import load_compared
from tminus.service.engine import openvino_executor
from tminus.service.engine.autotune import Wish, choose_executor
from tminus.service.engine.choice_cache import default_cache

FILE = RESULTS / "quality.json"
DATA, CLASSIFIERS, KEPT = (ROOT / "runs" / name for name in ("data", "classifiers", "quality"))
IMAGES, SEEDS, BATCH = 1000, (0, 1), 96
CODE = ("model", "service/engine")  # that decides the images
# What the pages speak of, the most important first: a run that is short of time leaves out the rest.
POINTS: dict[str, Sequence[Point]] = {
    "fashion-mnist-32": (
        Point("tuned", 8), Point("tuned", 5), Point("dpmpp_2m", 20), Point("dpmpp_2m", 10), Point("plms", 10),
        Point("dpmpp_3m", 20), Point("plms", 20), Point("dpmpp_2m", 20, 2.0), Point("ddpm", 50), Point("unipc", 10),
        Point("dpmpp_3m", 10), Point("ddim", 20), Point("deis", 10), Point("dpmpp_2m_sde", 20), Point("unipc", 20),
        Point("heun", 10), Point("pndm", 10), Point("euler", 20), Point("dpmpp_2m", 5), Point("unipc", 5),
        Point("dpmpp_2m", 20, 1.5), Point("deis", 20), Point("ddim", 10), Point("dpmpp_2m_sde", 10), Point("ddim", 50),
        Point("dpmpp_2m", 50), Point("ddpm", 100), Point("dpmpp_3m", 50), Point("euler", 40), Point("plms", 50),
        Point("heun", 25), Point("pndm", 50), Point("ddpm", 250),
    ),
    "fashion-mnist-32-student": (Point("consistency", 2), Point("consistency", 1)),
    "pixel-art-32": (
        Point("dpmpp_2m", 20, 1.5), Point("dpmpp_2m", 20), Point("dpmpp_2m", 10, 1.5), Point("dpmpp_2m", 20, 2.0),
    ),
    "avatars-64": (
        Point("dpmpp_2m", 20, 1.5), Point("dpmpp_2m", 20), Point("dpmpp_2m", 10, 1.5), Point("dpmpp_2m", 20, 2.0),
    ),
}  # fmt: skip


def main() -> None:
    """Measure what the file lacks, and write it."""
    args = options_of(__doc__, minutes=60.0, only="", threads=0)
    until_s, begun = time.monotonic() + 60 * args.minutes, begin(wait=False, code=CODE)
    if args.threads:
        torch.set_num_threads(args.threads)
    for name in args.only.split(",") if args.only else POINTS:
        if (why := missing_data(name)) is not None:
            say(f"{name}: left out: {why}")
        elif wanted := lacking(name):
            measure(name, wanted, until_s, begun)


def key_of(point: Point) -> str:
    """Name a setting in the file: `dpmpp_2m-20`, `dpmpp_2m-20-guidance-1_5`. It holds no dot, which parts a path."""
    guided = f"-guidance-{point.guidance:g}".replace(".", "_") if point.guidance != 1 else ""
    return f"{point.sampler}-{point.steps}{guided}"


def identity(checkpoint: Checkpoint, point: Point) -> dict[str, Any]:
    """Return what an entry depends on. Where any of it has changed, the setting is measured again."""
    plan = checkpoint.plan(point.sampler, point.steps, guidance=point.guidance)
    return {
        "weights_hash": checkpoint.weights_hash,
        "plan_hash": plan_hash(plan)[:16],
        "images": IMAGES,
        "seeds": [*SEEDS],
    }


def lacking(name: str) -> list[Point]:
    """List the settings of a checkpoint that the file lacks, or has of other code, weights or tables."""
    checkpoint = load_checkpoint(ROOT / "checkpoints" / name)
    found = read().get(name, {})

    def is_there(point: Point) -> bool:
        wanted = identity(checkpoint, point)
        entry: dict[str, Any] = found.get(key_of(point), {})
        return all(entry.get(field) == value for field, value in wanted.items())

    return [point for point in POINTS[name] if not is_there(point)]


def data_of(name: str) -> dict[str, Any]:
    """Return the options of `tminus evaluate` that name the data."""
    options: dict[str, Any] = {"data_dir": None, "background": "black", "device": "cpu"}
    if name.startswith("fashion-mnist"):
        return options | {"data": "fashion-mnist", "test_data": None}
    data = name.rpartition("-")[0]
    return options | {"data": str(DATA / f"{data}-train"), "test_data": DATA / f"{data}-test"}


def missing_data(name: str) -> str | None:
    """Say how to make the data of a checkpoint, where it is missing; None where nothing is to be done."""
    options = data_of(name)
    if options["test_data"] is None or (Path(options["data"]).is_dir() and options["test_data"].is_dir()):
        return None
    data, script = name.rpartition("-")[0], "checkpoints/data/render.mjs"
    return f"no {options['data']}: run node {script} --set {data} --out runs/data --split train, then --split test"


def measure(name: str, wanted: Sequence[Point], until_s: float, begun: Begun) -> None:
    """Measure settings of a checkpoint, each written as soon as it is done, until the time is up."""
    folder, device = ROOT / "checkpoints" / name, torch.device("cpu")
    checkpoint = load_checkpoint(folder)
    is_fast = ("openvino", "bfloat16") in checkpoint.approved and "bfloat16" in openvino_executor.precisions()
    precision, threads = "bfloat16" if is_fast else "float32", torch.get_num_threads()
    classifier = None if name.startswith("fashion-mnist") else CLASSIFIERS / name
    train, test, judging = load_compared(folder, checkpoint, classifier, data_of(name))
    wish = Wish("openvino", precision, True, BATCH, threads)
    forward = choose_executor(load_checkpoint(folder), device, wish, default_cache())
    judge = Judge(checkpoint, train, test, judging, device)
    cache = ResultCache(KEPT / "-".join(begun.code.values()))
    evaluation = Measure(
        checkpoint, judge, (train, test), device=device, forward=forward, draw_threads=threads, cache=cache
    )
    options = EvaluateOptions(num_samples=IMAGES, batch_size=BATCH, precision=precision, executor=forward.name)
    for point in wanted:
        if time.monotonic() > until_s:
            say(f"{name}: out of time before {point}")
            return
        began_s = time.monotonic()
        points, errors = evaluation.points([point], SEEDS, options)
        if errors:
            raise errors[point]
        figures, passes = points[point].seeds, points[point].passes
        how = {
            "precision": precision,
            "executor": forward.name,
            "classifier_hash": figures[0].classifier_frechet_distance and judge.facts and judge.facts.weights_hash,
            "commit": begun.commit,
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        }
        entry = {
            "sampler": point.sampler, "steps": point.steps, "guidance": point.guidance, "passes": passes,
            **mean_of(figures, "samples"), **identity(checkpoint, point), **how,
            "distances": [each["distance"] for each in (of(one, "samples") for one in figures)],
        }  # fmt: skip
        keep({name: {key_of(point): entry, "real": mean_of(figures, "real")} | of_autoencoder(judge)}, begun)
        say(f"{name}: {point}: distance {entry['distance']:.2f}, {time.monotonic() - began_s:.0f} s")


def mean_of(figures: Sequence[SampleFigures], side: Literal["samples", "real"]) -> dict[str, Any]:
    """Return the means over the seeds; a figure that was not measured stays None."""
    every = [of(each, side) for each in figures]
    return {key: None if every[0][key] is None else mean(each[key] for each in every) for key in every[0]}


def of(figures: SampleFigures, side: Literal["samples", "real"]) -> dict[str, Any]:
    """Return the figures of the samples, or those of real images: of test images for class_accuracy and nearest."""
    value = attrgetter(side)
    accuracy, frechet, pixels = figures.class_accuracy, figures.classifier_frechet_distance, figures.pixels
    return {
        "class_accuracy": accuracy and value(accuracy),
        "distance": frechet and value(frechet),
        "pixel_distance": value(pixels.frechet_distance),
        "variance": pixels.variance_ratio and value(pixels.variance_ratio),
        "nearest": value(figures.memorisation).median,
        "nearest_1_percent": value(figures.memorisation).percentile_1,
    }


def of_autoencoder(judge: Judge) -> dict[str, Any]:
    """Return what the autoencoder of a latent model loses of real images; nothing for a pixel model."""
    found = judge.reconstruction(IMAGES, SEEDS[0])
    return {} if found is None else {"autoencoder": {"distance": found.frechet, "psnr_db": found.psnr_db}}


def keep(entries: dict[str, dict[str, Any]], begun: Begun) -> None:
    """Put entries, by checkpoint, into the file, with how it was made. A busy machine changes no figure."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with (KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = read()
        for name, new in entries.items():
            of_name = found.get(name, {}) | new
            order = ["real", "autoencoder", *map(key_of, POINTS[name])]
            found[name] = {key: of_name[key] for key in order if key in of_name}
        made = begun.made(describe(peak_s=0), timed=False) | {"command": "python -m bench.quality", "images": IMAGES}
        made |= {"seeds": [*SEEDS]}
        write(FILE.stem, made, {name: found[name] for name in POINTS if name in found}, FILE.parent)


def read() -> dict[str, Any]:
    """Read the file; empty where there is none, or one of other code."""
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8")) if FILE.exists() else {}
    return {} if changed(found.get("made", {})) else found


if __name__ == "__main__":
    main()
