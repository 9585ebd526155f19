"""Measures a checkpoint point by point and seed by seed. What is kept of an earlier run is not measured again."""

import copy
import dataclasses
import logging
import time
from base64 import b64decode, b64encode
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any, NamedTuple

import torch

from tminus.model.checkpoint import Checkpoint
from tminus.model.evaluation.bound import measure_bound
from tminus.model.evaluation.figures import Bound, LeftOut, PointFigures, SampleFigures
from tminus.model.evaluation.judge import Judge
from tminus.model.evaluation.kept import Kept, data_hash, plan_hash
from tminus.model.evaluation.options import EvaluateError, EvaluateOptions
from tminus.model.evaluation.points import Point
from tminus.model.evaluation.samples import compile_options, draw_samples, strip, strip_length
from tminus.model.guidance import Forward
from tminus.model.samplers import Plan
from tminus.model.threads import torch_threads
from tminus.model.training.data import ImageSet

log = logging.getLogger(__name__)

OF_SAMPLES = ("seed", "num_samples", "guidance", "guidance_interval", "guidance_rescale", "precision", "executor")
OF_BOUND = ("seed", "bound_images", "bound_timesteps")


class _Drawn(NamedTuple):
    figures: SampleFigures
    sheet: bytes


class Measure:
    """Measures one checkpoint on one device; `forward` is another way of running its network (see `draw_samples`).

    `draw_threads` are torch's while samples are drawn; None leaves them.
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
        kept: Kept,
    ) -> None:
        self._net = copy.deepcopy(checkpoint.net).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._checkpoint, self._judge, self._kept = checkpoint, judge, kept
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
        """The bound on the test split, or why there is none."""
        key = self._key | {"bound": {name: getattr(options, name) for name in OF_BOUND}}
        try:
            if (values := self._kept.read(key)) is not None:
                return Bound.from_dict(values)
        except (TypeError, KeyError):
            log.warning("a bound that was kept cannot be read: measuring it again")
        bound = measure_bound(self._net, self._checkpoint, self._test, options)
        if isinstance(bound, Bound):
            self._kept.write(key, dataclasses.asdict(bound))
        return bound

    def points(
        self, points: Sequence[Point], seeds: Sequence[int], options: EvaluateOptions
    ) -> tuple[dict[Point, PointFigures], dict[Point, Exception]]:
        """The figures of the points that can be made, and the errors of the others: ValueError or EvaluateError.

        All points come by the first seed, then by the next.
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
            "of": f"{options.sampler}, {options.steps} steps",  # for who reads the file
            "classifier": facts.weights_hash if facts is not None else None,
        }
        key = self._key | {"samples": what}
        batches = self._kept.batches(key)
        try:
            if (values := self._kept.read(key)) is not None:
                batches.forget()  # of a run that was killed just after the result was there
                return _Drawn(SampleFigures.from_dict(values["figures"]), b64decode(values["sheet"], validate=True))
        except (TypeError, KeyError, ValueError):
            log.warning("%s: what was kept cannot be read, sampling again", label)
        started_s = time.perf_counter()
        try:
            with torch_threads(self._draw_threads):
                samples = draw_samples(
                    self._net, self._checkpoint, options, device=self._device, forward=self._forward, kept=batches
                )
        except EvaluateError:
            batches.forget()
            raise
        seconds = (batches.seconds + time.perf_counter() - started_s) / len(samples)
        one = _Drawn(
            self._judge.figures(samples, options.seed, seconds), strip(samples[: strip_length(self._checkpoint)])
        )
        sheet = b64encode(one.sheet).decode()
        self._kept.write(key, {"figures": dataclasses.asdict(one.figures), "sheet": sheet})
        batches.forget()
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
