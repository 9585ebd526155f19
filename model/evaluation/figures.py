"""The figures of an evaluation, as frozen dataclasses."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A figure or point that could not be computed for this checkpoint and data, with the reason."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class Term:
    """The mean of L_t in bits/dim, over held-out images and timesteps first <= t <= last (counted from 0)."""

    first: int
    last: int
    bits_per_dim: float


@dataclass(frozen=True, slots=True)
class Bound:
    """The variational bound on held-out images: means in bits per dimension (Ho et al. 2020, eq. 5).

    L_steps is the sum of L_1 to L_{T-1}, estimated from `timesteps_per_image` terms for each image (0 if T is 1). The
    timesteps are divided into runs. Each of `terms` is the mean over one run. L_steps is the sum of these means, each
    multiplied by the length of its run.
    """

    L_T: float
    L_steps: float
    L_0: float
    total: float
    standard_error: float  # of `total`, over the images
    num_images: int
    timesteps_per_image: int
    terms: tuple[Term, ...] = ()

    def reaches(self, share: float) -> int:
        """Return the timestep up to which the terms add up to this share of L_0 + L_1 + … + L_{T-1}."""
        reached, last = self.L_0, 0
        for term in self.terms:
            if reached >= share * (self.L_0 + self.L_steps):
                break
            reached += term.bits_per_dim * (term.last + 1 - term.first)
            last = term.last
        return last


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """The error of a latent model's autoencoder on real images, which limits the quality of samples."""

    rms: float  # root mean square error over the pixels of held-out images in [-1, 1]
    psnr_db: float
    frechet: float | None  # distance of reconstructed training images; `FrechetDistance.real` is that of the originals
    num_images: int


@dataclass(frozen=True, slots=True)
class PerClass:
    """The classifier's accuracy on one class, for samples and for real test images; None without images."""

    name: str
    samples: float | None
    num_samples: int
    real: float | None


@dataclass(frozen=True, slots=True)
class ClassAccuracy:
    """The share of samples, and of real test images, that the classifier assigns to the right class."""

    samples: float
    real: float
    num_real: int
    per_class: tuple[PerClass, ...]


@dataclass(frozen=True, slots=True)
class FrechetDistance:
    """Distance to the test split in the classifier's features.

    `real` is the distance of the same number of training images: a floor for the samples. If samples cycle through the
    classes, test and training images are weighted so that each class counts equally.
    """

    samples: float
    real: float
    num_real: int
    num_test: int


@dataclass(frozen=True, slots=True)
class Compared:
    """A figure of samples, and of the same number of real training images, each compared with the test split."""

    samples: float
    real: float


@dataclass(frozen=True, slots=True)
class PixelFigures:
    """Figures of the pixels alone, without a network (see distances.py).

    frechet_distance: the distance of Gaussians in the first principal components of the training images' pixels (Heusel
    et al. 2017). variance_ratio: the pixels' variance within a class, divided by that of the test split; None if no
    class has two images. precision and recall: as in Kynkäänniemi et al. 2019, in the same components.
    """

    frechet_distance: Compared
    variance_ratio: Compared | None
    precision: Compared
    recall: Compared
    num_components: int


@dataclass(frozen=True, slots=True)
class NearestSummary:
    """Distances to the nearest training image: root mean square over pixels in [-1, 1]."""

    minimum: float
    percentile_1: float
    median: float
    num_images: int


@dataclass(frozen=True, slots=True)
class Memorisation:
    """Distances from samples and from real test images to training images. Copies are nearer than test images."""

    samples: NearestSummary
    real: NearestSummary
    num_train: int


@dataclass(frozen=True, slots=True)
class ClassifierFacts:
    """Facts about the classifier that judged the samples."""

    weights_hash: str
    test_accuracy: float
    feature_dim: int
    data: str


@dataclass(frozen=True, slots=True)
class SampleFigures:
    """Figures of one seed's samples. A figure is None if the checkpoint or the data does not allow it."""

    seed: int
    class_accuracy: ClassAccuracy | None
    classifier_frechet_distance: FrechetDistance | None
    pixels: PixelFigures
    memorisation: Memorisation
    seconds_per_image: float = dataclasses.field(compare=False)


class Spread(NamedTuple):
    """The mean and the range of a figure over seeds."""

    mean: float
    minimum: float
    maximum: float

    def __str__(self) -> str:
        mean, least, greatest = (f"{value:.3f}" for value in self)
        return mean if self.minimum == self.maximum else f"{mean} ({least}..{greatest})"


class Metric(NamedTuple):
    """A figure of samples and of real images: its name in JSON, its text in tables, and a function that returns it."""

    name: str
    text: str
    of: Callable[[SampleFigures], ClassAccuracy | FrechetDistance | Compared | None]


FRECHET = Metric(
    "classifier_frechet_distance", "classifier_frechet_distance", lambda each: each.classifier_frechet_distance
)
PIXEL_FRECHET = Metric("pixel_frechet_distance", "pixel_frechet_distance", lambda each: each.pixels.frechet_distance)
VARIANCE_RATIO = Metric("variance_ratio", "variance ratio", lambda each: each.pixels.variance_ratio)
ACCURACY = Metric("class_accuracy", "class accuracy", lambda each: each.class_accuracy)
PRECISION = Metric("precision", "precision, of the pixels' components", lambda each: each.pixels.precision)
RECALL = Metric("recall", "recall, of the pixels' components", lambda each: each.pixels.recall)
METRICS = (FRECHET, PIXEL_FRECHET, VARIANCE_RATIO, ACCURACY)  # metrics that compare points


@dataclass(frozen=True, slots=True)
class PointFigures:
    """The figures of one point by seed, and `sheet`: a PNG of the first images of the first seed.

    `passes` counts the network's passes for one image. A guided pass takes two rows of a batch.
    """

    sampler: str
    steps: int
    guidance: float
    passes: int
    seeds: tuple[SampleFigures, ...]
    sheet: bytes = dataclasses.field(default=b"", repr=False)

    def spread(self, metric: Metric, side: Literal["samples", "real"] = "samples") -> Spread | None:
        """Return the spread of a figure over seeds, for samples or for real images; None if a seed lacks the figure."""
        figures = [metric.of(each) for each in self.seeds]
        values = [getattr(figure, side) for figure in figures if figure is not None]
        if len(values) < len(figures):
            return None
        return Spread(sum(values) / len(values), min(values), max(values))

    @property
    def seconds_per_image(self) -> float:
        """The mean over seeds."""
        return sum(each.seconds_per_image for each in self.seeds) / len(self.seeds)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with the spreads and without the sheet."""
        values = dataclasses.asdict(self)
        del values["sheet"]
        for metric in METRICS:
            spread = self.spread(metric)
            values[metric.name] = spread._asdict() if spread is not None else None
        return values | {"seconds_per_image": self.seconds_per_image}
