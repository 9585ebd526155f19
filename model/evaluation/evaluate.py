"""Measures a checkpoint: the variational bound on held-out images, and the quality of samples."""

import copy
import dataclasses
import hashlib
import json
import logging
import time
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import TypeAdapter
from torch import Tensor
from tqdm import tqdm

from tminus.model.checkpoint import Checkpoint
from tminus.model.denoiser import Denoiser
from tminus.model.evaluation.classifier import Classifier
from tminus.model.evaluation.figures import Bound, LeftOut, PointFigures, SampleFigures, Term
from tminus.model.evaluation.judge import Judge
from tminus.model.evaluation.report import ModelFacts, Report
from tminus.model.evaluation.samples import (
    EvaluateError,
    EvaluateOptions,
    Point,
    balanced_picks,
    compile_options,
    draw_samples,
    image_classes,
    strip,
    strip_length,
    without_guidance,
)
from tminus.model.files import CheckpointError, read_json, write_json
from tminus.model.guidance import Forward
from tminus.model.loss import variational_bound
from tminus.model.machine import torch_threads
from tminus.model.pixels import to_model_range
from tminus.model.samplers import Plan
from tminus.model.training.data import ImageSet

log = logging.getLogger(__name__)

BOUND, SAMPLE_FIGURES = TypeAdapter(Bound), TypeAdapter(SampleFigures)  # to parse cached results
OF_SAMPLES = ("seed", "num_samples", "guidance", "guidance_interval", "guidance_rescale", "precision", "executor")
OF_BOUND = ("seed", "bound_images", "bound_timesteps")
RESULT_FORMAT = 3  # Increase it whenever the figures for the same key change.
MAX_RESULT_BYTES = 256 * 2**20  # Results can include a sheet of large images.


class ResultCache:
    """Caches results in a folder, so that an interrupted evaluation does not repeat finished work.

    Each file holds a result and its key, which lists everything that the result depends on. The file name is a hash of
    the key. A damaged file, or a file with a different key, is treated as missing. With folder=None, nothing is cached.
    """

    def __init__(self, folder: Path | None) -> None:
        """Create the folder if needed. Raises OSError if that fails."""
        self._folder = folder
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def read(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        if self._folder is None:
            return None
        try:
            content = read_json(self._file(key), MAX_RESULT_BYTES)
        except (CheckpointError, OSError):
            return None
        value = content.get("result")
        return value if content.get("key") == _plain(key) and isinstance(value, dict) else None

    def write(self, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Write a result atomically. Raises OSError if that fails."""
        if self._folder is not None:
            write_json(self._file(key), {"key": _plain(key), "result": result})

    def _file(self, key: Mapping[str, Any]) -> Path:
        assert self._folder is not None
        digest = hashlib.sha256(json.dumps(_plain(key), sort_keys=True).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.json"


def plan_hash(plan: Plan) -> str:
    """Hash the plan of a sampler, because another version may compile the same sampler differently."""
    digest = hashlib.sha256()
    for field in dataclasses.fields(plan):
        value = getattr(plan, field.name)
        digest.update(f"{field.name} {getattr(value, 'shape', '')} ".encode())
        digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode())
    return digest.hexdigest()


def data_hash(data: ImageSet) -> str:
    """Hash images and classes, because different data sets can have the same name."""
    digest = hashlib.sha256(data.images.contiguous().numpy().data)
    digest.update(repr((tuple(data.images.shape), data.class_names)).encode())
    if data.labels is not None:
        digest.update(data.labels.numpy().tobytes())
    return digest.hexdigest()


def _plain(key: Mapping[str, Any]) -> dict[str, Any]:
    """Add RESULT_FORMAT to the key, and convert it to what JSON returns: tuples become lists."""
    plain: dict[str, Any] = json.loads(json.dumps({"format": RESULT_FORMAT, **key}))
    return plain


def measure_bound(net: Denoiser, checkpoint: Checkpoint, test: ImageSet, options: EvaluateOptions) -> Bound | LeftOut:
    """Measure the bound on options.bound_images images of the test split.

    Each image draws its own timesteps and noise. Runs on the device of `net`. If the bound is undefined, returns
    LeftOut with the reason.
    """
    noise, schedule = checkpoint.noise, checkpoint.noise.schedule()
    if checkpoint.autoencoder is not None:
        return LeftOut("bound", "it is one of pixels, and this network's are latents")
    if checkpoint.student is not None:
        return LeftOut("bound", "a student predicts where trajectories end, not the mean of x_0, so it has none")
    if noise.variance_type == "learned_range":
        return LeftOut("bound", "it is measured for a fixed variance only, and this network learned its own")
    if noise.prediction_type == "epsilon" and schedule.alpha_bar[-1] <= 0:
        return LeftOut("bound", "eps says nothing of x_0 at the last timestep, where alpha_bar is 0")
    try:
        classes = image_classes(checkpoint, test)
    except ValueError as error:
        return LeftOut("bound", str(error))
    timesteps = min(options.bound_timesteps, schedule.num_timesteps - 1)
    picked = balanced_picks(test, options.bound_images, options.seed)
    starts = range(0, len(picked), options.batch_size)
    device = next(net.parameters()).device
    parts = []
    with tqdm(total=len(starts) * (timesteps + 1), unit="pass", desc="bound", disable=None) as progress:

        def counted(x_t: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
            progress.update()
            out: Tensor = net(x_t, t, class_labels)
            return out

        for start in starts:
            batch = picked[start : start + options.batch_size]
            # Seed each image by its position in the split, so that its terms do not depend on the other images.
            part = variational_bound(
                counted,
                noise,
                schedule,
                to_model_range(test.images[batch].to(device)),
                classes[batch].to(device) if classes is not None else None,
                seed=options.seed,
                indices=batch.tolist(),
                timesteps=timesteps or None,
            )
            parts.append(part)
    total = torch.cat([part.total for part in parts])
    L_T, L_steps, L_0 = (
        float(torch.cat([getattr(part, name) for part in parts]).mean()) for name in ("L_T", "L_steps", "L_0")
    )
    standard_error = float(total.std(correction=0)) / max(1, len(picked) - 1) ** 0.5
    drawn = torch.cat([part.L_drawn for part in parts], dim=1).mean(1).tolist()  # [S]
    terms = tuple(Term(low, high - 1, mean) for (low, high), mean in zip(parts[0].runs, drawn, strict=True))
    return Bound(L_T, L_steps, L_0, float(total.mean()), standard_error, len(picked), timesteps, terms)


class _Drawn(NamedTuple):
    figures: SampleFigures
    sheet: bytes


class Measure:
    """Measures one checkpoint on one device.

    `forward`, if given, is called instead of the network while sampling (see `draw_samples`). `draw_threads` is the
    number of torch threads while sampling; None keeps the current number.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        judge: Judge,
        data: tuple[ImageSet, ImageSet],
        *,
        device: torch.device,
        forward: Forward | None,
        draw_threads: int | None,
        cache: ResultCache,
    ) -> None:
        self._net = copy.deepcopy(checkpoint.net).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._checkpoint, self._judge, self._cache = checkpoint, judge, cache
        self._device, self._forward, self._draw_threads = device, forward, draw_threads
        self._test = data[1]
        self.device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        self._key: dict[str, Any] = {
            "weights": checkpoint.weights_hash,
            "net": checkpoint.net.config.to_dict(),
            "noise": dataclasses.asdict(checkpoint.noise),
            "classes": dataclasses.asdict(checkpoint.labels),
            "data": [data_hash(split) for split in data],
            "device": self.device_name,
            "torch": str(torch.__version__),
            "openvino": _version("openvino"),
        }

    def bound(self, options: EvaluateOptions) -> Bound | LeftOut:
        key = self._key | {"bound": {name: getattr(options, name) for name in OF_BOUND}}
        try:
            if (values := self._cache.read(key)) is not None:
                return BOUND.validate_python(values)
        except ValueError:
            log.warning("a bound that was kept cannot be read: measuring it again")
        bound = measure_bound(self._net, self._checkpoint, self._test, options)
        if isinstance(bound, Bound):
            self._cache.write(key, dataclasses.asdict(bound))
        return bound

    def points(
        self, points: Sequence[Point], seeds: Sequence[int], options: EvaluateOptions
    ) -> tuple[dict[Point, PointFigures], dict[Point, Exception]]:
        """Sample and judge points. Returns the figures of points that succeed, and the errors of the others.

        The errors are ValueError or EvaluateError. All points are sampled with one seed before the next seed is used.
        """
        errors: dict[Point, Exception] = {}
        plans: dict[Point, Plan] = {}
        for point in points:
            try:
                plans[point] = compile_options(self._checkpoint, _at(options, point, seeds[0]))
            except ValueError as error:
                errors[point] = error
        drawn: dict[Point, list[_Drawn]] = {point: [] for point in plans}
        total = len(plans) * len(seeds)
        for number, (seed, point) in enumerate(product(seeds, plans), 1):
            if point not in errors:
                label = f"{number} of {total}: {point}, seed {seed}"
                try:
                    drawn[point].append(self._drawn(label, plans[point], _at(options, point, seed)))
                except EvaluateError as error:
                    errors[point] = error
        done = {point: each for point, each in drawn.items() if point not in errors}
        return {point: _over_seeds(point, plans[point], each) for point, each in done.items()}, errors

    def _drawn(self, label: str, plan: Plan, options: EvaluateOptions) -> _Drawn:
        facts = self._judge.facts
        what = {name: getattr(options, name) for name in OF_SAMPLES} | {
            "plan": plan_hash(plan),
            "of": f"{options.sampler}, {options.steps} steps",  # for people who read the file
            "classifier": facts.weights_hash if facts is not None else None,
        }
        key = self._key | {"samples": what}
        try:
            if (values := self._cache.read(key)) is not None:
                return _Drawn(
                    SAMPLE_FIGURES.validate_python(values["figures"]), b64decode(values["sheet"], validate=True)
                )
        except (KeyError, ValueError):
            log.warning("%s: what was kept cannot be read, sampling again", label)
        started_s = time.perf_counter()
        with torch_threads(self._draw_threads):
            samples = draw_samples(self._net, self._checkpoint, options, device=self._device, forward=self._forward)
        seconds = (time.perf_counter() - started_s) / len(samples)
        one = _Drawn(
            self._judge.figures(samples, options.seed, seconds), strip(samples[: strip_length(self._checkpoint)])
        )
        sheet = b64encode(one.sheet).decode()
        self._cache.write(key, {"figures": dataclasses.asdict(one.figures), "sheet": sheet})
        frechet = one.figures.classifier_frechet_distance
        distance = "" if frechet is None else f"Fréchet distance {frechet.samples:.3f}, "
        log.info("%s: %s%.3g s an image", label, distance, seconds)
        return one


def _version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _at(options: EvaluateOptions, point: Point, seed: int) -> EvaluateOptions:
    return dataclasses.replace(options, sampler=point.sampler, steps=point.steps, guidance=point.guidance, seed=seed)


def _over_seeds(point: Point, plan: Plan, drawn: Sequence[_Drawn]) -> PointFigures:
    seeds = tuple(one.figures for one in drawn)
    return PointFigures(point.sampler, point.steps, point.guidance, len(plan), seeds, drawn[0].sheet)


def evaluate(
    checkpoint: Checkpoint,
    real_train: ImageSet,
    real_test: ImageSet,
    classifier: Classifier | None,
    options: EvaluateOptions,
    *,
    device: torch.device,
    forward: Forward | None = None,
    draw_threads: int | None = None,
    points: Sequence[Point] = (),
    references: Sequence[Point] = (),
    seeds: Sequence[int] = (),
    cache: ResultCache | None = None,
) -> Report:
    """Sample a checkpoint, and compare the samples with the training and the test split.

    Each of `points` is sampled with each of `seeds`. By default, these are the point and the seed in `options`.
    `references` are further points, shown for comparison. With classifier=None, the figures that need a classifier are
    left out. Cached results are reused.

    `forward`, if given, is called instead of the checkpoint's network while sampling (see `draw_samples`). The bound is
    always measured on the network. options.executor and options.precision should describe `forward`. `draw_threads` is
    the number of torch threads while sampling, in case `forward` needs the cores.

    Figures that cannot be computed for this checkpoint and data are None in the report. The report's `left_out` lists
    them with the reasons, and also lists the points that could not be sampled.

    If no point can be sampled, raises the error of the first one: ValueError for an impossible sampler or number of
    steps, or EvaluateError for samples that are not finite. Also raises EvaluateError if the checkpoint, the data and
    the classifier do not match, and OSError if a result cannot be cached.
    """
    points = points or (Point(options.sampler, options.steps, options.guidance),)
    seeds = seeds or (options.seed,)
    options = dataclasses.replace(options, seed=seeds[0])
    judge = Judge(checkpoint, real_train, real_test, classifier, device)
    left_out: tuple[LeftOut, ...] = ()
    if checkpoint.labels.null_class is None:
        points, left_out = without_guidance(points)
        references, _ = without_guidance(references)
    measure = Measure(
        checkpoint,
        judge,
        (real_train, real_test),
        device=device,
        forward=forward,
        draw_threads=draw_threads,
        cache=cache or ResultCache(None),
    )
    every = tuple(dict.fromkeys((*points, *references)))
    found, errors = measure.points(every, seeds, options)
    if not any(point in found for point in points):
        raise errors[points[0]]
    bound = measure.bound(options)
    left_out += tuple(LeftOut(str(point), str(error)) for point, error in errors.items())
    left_out += (bound,) if isinstance(bound, LeftOut) else ()
    first = next(point for point in points if point in found)
    return Report(
        checkpoint=checkpoint.name,
        weights_hash=checkpoint.weights_hash,
        train_data=real_train.name,
        test_data=real_test.name,
        device=measure.device_name,
        torch_version=str(torch.__version__),
        options=dataclasses.replace(options, sampler=first.sampler, steps=first.steps, guidance=first.guidance),
        classifier=judge.facts,
        bound=None if isinstance(bound, LeftOut) else bound,
        reconstruction=judge.reconstruction(options.num_samples, options.seed),
        left_out=(*left_out, *judge.left_out),
        model=_facts(checkpoint),
        seeds=tuple(seeds),
        points=tuple(found[point] for point in points if point in found),
        references=tuple(found[point] for point in references if point in found),
    )


def _facts(checkpoint: Checkpoint) -> ModelFacts:
    noise, config, latent = checkpoint.noise, checkpoint.net.config, checkpoint.autoencoder
    return ModelFacts(
        parameters=sum(parameter.numel() for parameter in checkpoint.net.parameters()),
        size_px=checkpoint.size_px,
        channels=checkpoint.image_shape[0],
        latents=None if latent is None else f"{latent.config.kind}: {'x'.join(map(str, checkpoint.row_shape))}",
        class_names=checkpoint.labels.class_names,
        num_timesteps=noise.num_train_timesteps,
        beta_schedule=noise.levels,
        prediction_type=noise.prediction_type,
        variance_type=noise.variance_type,
        widths=config.widths,
    )
