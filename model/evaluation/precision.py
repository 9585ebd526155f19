"""Judges a lower precision without data: its images are compared with float32 images from the same noise.

The difference is measured against the sampler's truncation, which is the error due to its small number of steps.
Truncation is the distance from the images that REFERENCE makes from the same noise. Users of the sampler accept this
error, so a much smaller error does no harm.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tminus.model.catalogue import SAMPLER_FACTS, TABLE_SAMPLERS, Recommended
from tminus.model.checkpoint import Checkpoint
from tminus.model.evaluation.samples import Point, sample_classes
from tminus.model.guidance import Forward
from tminus.model.rng import image_noise
from tminus.model.samplers import sample_passes

REFERENCE = Point("dpmpp_2m", 40)  # treated as exact
PRECISE, COMMON = Point("dpmpp_2m", 20), Point("ddim", 50)
# Step limits for recommended samplers: more steps take longer, and the difference does not grow. All other samplers,
# except tables, are limited to PRECISE.steps, because with more steps they are as exact as the reference.
MAX_STEPS = {"ddim": 50, "euler": 50}
SHARE = 0.5  # largest accepted difference over all images, as a share of the truncation
DRIFT, SPREADS = 1.0, 3.0  # in levels and standard errors; a mean shift above both is systematic
LEVELS = 127.5  # levels per unit of x: -1 to 1 spans 255 levels
MIN_IMAGES, MAX_IMAGES = 4, 16
SEED = 0


@dataclass(frozen=True, slots=True)
class Difference:
    """The difference between a sampler's images in two precisions. A level is 1/255 of a pixel's range.

    `rms` is the root mean square difference over all images, in levels, and `worst` is that of the worst image.
    `truncation_rms` and `truncation_worst` are the same for the truncation. `drift` is the mean shift of one channel
    over all images. The channel is the one that exceeds its limit most, or comes closest to it. `drift_error` is the
    standard error of `drift`.
    """

    point: Point
    rms: float
    worst: float
    truncation_rms: float
    truncation_worst: float
    drift: float
    drift_error: float

    @property
    def ok(self) -> bool:
        """Whether the difference is harmless. False if it is not finite."""
        steady = abs(self.drift) <= max(DRIFT, SPREADS * self.drift_error)
        return self.rms <= SHARE * self.truncation_rms and self.worst <= self.truncation_worst and steady

    def __str__(self) -> str:
        return (
            f"{self.point}: differs by {self.rms:.2f} levels of 255 (worst image {self.worst:.2f}), its truncation is "
            f"{self.truncation_rms:.2f} (worst {self.truncation_worst:.2f}), brightness shifts by {self.drift:+.2f}"
        )


def measure_difference(point: Point, exact: Tensor, lower: Tensor, solution: Tensor) -> Difference:
    """Compare `exact` with `lower` and with `solution`: images [N, C, H, W] in levels."""
    shifts = (lower - exact).flatten(2).mean(2)  # [N, C]
    mean, error = shifts.mean(0), shifts.std(0) / len(shifts) ** 0.5
    channel = int((mean.abs() - (SPREADS * error).clamp(min=DRIFT)).argmax())
    return Difference(
        point,
        *_rms_and_worst(lower - exact),
        *_rms_and_worst(exact - solution),
        float(mean[channel]),
        float(error[channel]),
    )


def _rms_and_worst(difference: Tensor) -> tuple[float, float]:
    of_images = difference.flatten(1).square().mean(1)
    return float(of_images.mean().sqrt()), float(of_images.max().sqrt())


def compared_points(recommended: Recommended | None) -> tuple[Point, ...]:
    """Return the samplers to compare: PRECISE and the recommended one, or PRECISE and COMMON if there is none.

    PRECISE is the strictest test, because it has little truncation. It gets the guidance of the recommended sampler.
    The recommended sampler is compared without its noise.
    """
    if recommended is None:
        return PRECISE, COMMON
    sampler, steps = recommended.sampler, recommended.steps
    if sampler not in TABLE_SAMPLERS:
        if (facts := SAMPLER_FACTS[sampler]).noise == "always":
            # Noise would hide the truncation. A sampler of first order without noise is DDIM, of second order dpmpp_2m.
            sampler = "dpmpp_2m" if facts.looks_back else "ddim"
        steps = min(steps, MAX_STEPS.get(sampler, PRECISE.steps))
    own = Point(sampler, steps, recommended.guidance)
    return tuple(dict.fromkeys((replace(PRECISE, guidance=own.guidance), own)))


def check_comparable(checkpoint: Checkpoint) -> None:
    """Raise ValueError if the checkpoint's truncation cannot be measured."""
    why, num_timesteps = None, checkpoint.noise.num_train_timesteps
    if checkpoint.student is not None:
        why = "a student is sampled by its own tables alone, whose truncation cannot be measured"
    elif num_timesteps < COMMON.steps:
        why = f"truncation is measured with {COMMON.steps} steps, and there are {num_timesteps} timesteps"
    if why is not None:
        raise ValueError(f"{checkpoint.name}: {why}; tminus evaluate --approve judges it by data")


class Comparison:
    """Compares two precisions, one pass at a time. Raises ValueError as `check_comparable` does."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        check_comparable(checkpoint)
        self.points = compared_points(checkpoint.recommended)
        self.differences: list[Difference] = []
        self.places = 1 if self.points[0].guidance == 1.0 else 2  # slots of a batch for each image; guidance needs two
        self._reference = replace(REFERENCE, guidance=self.points[0].guidance)
        self._checkpoint = checkpoint
        self._plans = {
            point: checkpoint.plan(point.sampler, point.steps, guidance=point.guidance)
            for point in (self._reference, *self.points)
        }

    @property
    def passes(self) -> tuple[int, int]:
        """The number of passes for each image, in float32 and in the lower precision."""
        lower = sum(len(self._plans[point]) for point in self.points)
        return len(self._plans[self._reference]) + lower, lower

    @property
    def ok(self) -> bool:
        """Whether the difference is harmless for every sampler."""
        return all(difference.ok for difference in self.differences)

    def run(
        self, exact: Forward, lower: Forward, device: torch.device, num_images: int, batch_size: int
    ) -> Iterator[None]:
        """Sample all images and fill `differences`. Yields after each pass of a batch."""

        def draw(point: Point, forward: Forward) -> Generator[None, None, Tensor]:
            images = []
            for start in range(0, num_images, batch_size):
                indices = range(start, min(start + batch_size, num_images))
                images.append((yield from self._draw(point, forward, device, indices)))
            return torch.cat(images)

        solution = yield from draw(self._reference, exact)
        for point in self.points:
            of_exact = yield from draw(point, exact)
            of_lower = yield from draw(point, lower)
            self.differences.append(measure_difference(point, of_exact, of_lower, solution))

    def _draw(
        self, point: Point, forward: Forward, device: torch.device, indices: range
    ) -> Generator[None, None, Tensor]:
        """Sample the images with these indices, in levels."""
        checkpoint = self._checkpoint
        classes = sample_classes(checkpoint, indices.stop)
        passes = sample_passes(
            forward,
            self._plans[point],
            image_noise(SEED, indices, 0, checkpoint.row_shape, device),
            lambda k: image_noise(SEED, indices, k + 1, checkpoint.row_shape, device),
            class_labels=classes[indices.start :].to(device) if classes is not None else None,
            null_class=checkpoint.labels.null_class,
            guidance=point.guidance,
        )
        x_0 = torch.zeros(0)
        for x in passes:
            x_0 = x
            yield
        bound = 1.0 if checkpoint.autoencoder is None else torch.inf  # Pixels are clipped for display.
        return LEVELS * x_0.clamp(-bound, bound).cpu()
