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
    timesteps are divided into runs of consecutive ones. Each of `terms` is the mean over one run. L_steps is the sum of
    these means, each multiplied by the length of its run.
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

    rms: float  # root mean square error on held-out images, with pixels in [-1, 1]
    psnr_db: float
    frechet: float | None  # for reconstructed training images; for the originals, see `FrechetDistance.real`
    num_images: int


@dataclass(frozen=True, slots=True)
class PerClass:
    """The accuracy on one class, for samples and for real test images; None if it has no images."""

    name: str
    samples: float | None
    num_samples: int
    real: float | None


@dataclass(frozen=True, slots=True)
class ClassAccuracy:
    """The classifier's accuracy on samples, and on real test images."""

    samples: float
    real: float
    num_real: int
    per_class: tuple[PerClass, ...]


@dataclass(frozen=True, slots=True)
class FrechetDistance:
    """The Fréchet distance from the test split, in the classifier's features.

    `real` is the distance of as many training images: in practice, a lower limit for samples. If samples cycle through
    the classes, test and training images are weighted so that all classes count equally.
    """

    samples: float
    real: float
    num_real: int
    num_test: int


@dataclass(frozen=True, slots=True)
class Compared:
    """A figure of samples, and of as many real training images. Both are compared with the test split."""

    samples: float
    real: float


@dataclass(frozen=True, slots=True)
class PixelFigures:
    """Figures that compare pixels, without a network (see distances.py).

    `frechet_distance` is between Gaussians fitted to principal components of the training images' pixels (Heusel et al.
    2017). `variance_ratio` is the variance within classes, divided by that of the test split; it is None if no class
    has two images. `precision` and `recall` use the same components (Kynkäänniemi et al. 2019).
    """

    frechet_distance: Compared
    variance_ratio: Compared | None
    precision: Compared
    recall: Compared
    num_components: int


@dataclass(frozen=True, slots=True)
class NearestSummary:
    """Distances to the nearest training image: root mean square differences of pixels in [-1, 1]."""

    minimum: float
    percentile_1: float
    median: float
    num_images: int


@dataclass(frozen=True, slots=True)
class Memorisation:
    """Distances to the nearest training image. They are small for memorised samples."""

    samples: NearestSummary
    real: NearestSummary
    num_train: int


@dataclass(frozen=True, slots=True)
class ClassifierFacts:
    """What the report says about the classifier that judged the samples."""

    weights_hash: str
    test_accuracy: float
    feature_dim: int
    data: str


@dataclass(frozen=True, slots=True)
class SampleFigures:
    """The figures of one seed's samples. None means that a figure cannot be computed."""

    seed: int
    class_accuracy: ClassAccuracy | None
    classifier_frechet_distance: FrechetDistance | None
    pixels: PixelFigures
    memorisation: Memorisation
    seconds_per_image: float = dataclasses.field(compare=False)


class Spread(NamedTuple):
    """The mean and range of a figure over seeds."""

    mean: float
    minimum: float
    maximum: float

    def __str__(self) -> str:
        mean, least, greatest = (f"{value:.3f}" for value in self)
        return mean if self.minimum == self.maximum else f"{mean} ({least}..{greatest})"


class Metric(NamedTuple):
    """A figure with its name in JSON, its label in tables, and a function that reads it."""

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
METRICS = (FRECHET, PIXEL_FRECHET, VARIANCE_RATIO, ACCURACY)  # metrics for comparing points


@dataclass(frozen=True, slots=True)
class PointFigures:
    """The figures of one point for each seed. `sheet` is a PNG of the first images of the first seed.

    `passes` is the number of network passes for one image. A guided pass takes two slots of a batch.
    """

    sampler: str
    steps: int
    guidance: float
    passes: int
    seeds: tuple[SampleFigures, ...]
    sheet: bytes = dataclasses.field(default=b"", repr=False)

    def spread(self, metric: Metric, side: Literal["samples", "real"] = "samples") -> Spread | None:
        """Return the mean and range of a figure over seeds, or None if it is missing for one of the seeds."""
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
        """Return plain values for JSON. They include the spreads of METRICS, but not the sheet."""
        values = dataclasses.asdict(self)
        del values["sheet"]
        for metric in METRICS:
            spread = self.spread(metric)
            values[metric.name] = spread._asdict() if spread is not None else None
        return values | {"seconds_per_image": self.seconds_per_image}
