"""Measure a checkpoint on held-out images: the bound, and, of its samples, class accuracy, a Fréchet distance and
memorisation. Sampled in one way, or in several that are compared.
"""

import dataclasses
from collections.abc import Sequence

import torch

from tminus.model.checkpoint import Checkpoint
from tminus.model.evaluation.classifier import Classifier
from tminus.model.evaluation.figures import LeftOut
from tminus.model.evaluation.judge import Judge
from tminus.model.evaluation.kept import Kept
from tminus.model.evaluation.measure import Measure
from tminus.model.evaluation.options import EvaluateOptions
from tminus.model.evaluation.points import Point, without_guidance
from tminus.model.evaluation.sweep_report import ModelFacts, SweepReport
from tminus.model.guidance import Forward
from tminus.model.training.data import ImageSet


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
    kept: Kept | None = None,
) -> SweepReport:
    """Make samples and compare them with the two splits. classifier=None leaves out the figures that need one.

    Each point is sampled by each seed; without points or seeds they are those of the options. `references` are points
    that the others are compared with. What `kept` has is not made again.

    `forward` is another way of running the checkpoint's network, to be judged by the samples it makes (see
    `draw_samples`); the bound stays that of the network itself. options.executor and options.precision should name it.
    `draw_threads` are torch's while samples are drawn, where it wants the cores to itself.

    A figure that this checkpoint or this data does not allow is None in the report, with the reason in `left_out`. So
    is a point that cannot be made; where no point can, the first one's error is raised: ValueError for a sampler or
    number of steps that is not possible, EvaluateError for samples that are not finite. Raises EvaluateError where
    checkpoint, data and classifier do not fit together, and OSError where a result cannot be kept.
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
        kept=kept or Kept(None),
    )
    every = tuple(dict.fromkeys((*points, *references)))
    found, errors = measure.points(every, seeds, options)
    if not any(point in found for point in points):
        raise errors[points[0]]
    bound = measure.bound(options)
    left_out += tuple(LeftOut(str(point), str(error)) for point, error in errors.items())
    left_out += (bound,) if isinstance(bound, LeftOut) else ()
    first = next(point for point in points if point in found)
    return SweepReport(
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
        beta_schedule=noise.beta_schedule,
        prediction_type=noise.prediction_type,
        variance_type=noise.variance_type,
        widths=config.widths,
    )
