"""The results of an evaluation as frozen values, rendered as JSON or as the tables of a model card."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from tminus.model.timesteps import SPACINGS


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """How samples are made and how much is measured. Sample i is asked to be of class i % K."""

    num_samples: int = 1000
    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    guidance: float = 1.0
    seed: int = 0
    batch_size: int = 100
    precision: str = "float32"  # float32, tf32 or bfloat16; the update is always float32
    bound_images: int = 200
    bound_timesteps: int = 100  # drawn for each image; the first ones, where most of the bound lies, are all drawn
    spacing: str | None = None  # of the timesteps; None is the checkpoint's own for this sampler
    guidance_interval: tuple[int, int] | None = None  # the timesteps lo <= t <= hi that are guided; None is all
    executor: str = "eager"  # the name of the executor that made the samples

    def __post_init__(self) -> None:
        for field, least in (("num_samples", 2), ("batch_size", 1), ("bound_images", 1), ("bound_timesteps", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} must be {least} or more, got {getattr(self, field)}")
        if self.precision not in ("float32", "tf32", "bfloat16"):
            raise ValueError(f"precision must be float32, tf32 or bfloat16, got {self.precision!r}")
        if self.spacing is not None and self.spacing not in SPACINGS:
            raise ValueError(f"spacing must be among {', '.join(SPACINGS)} or None, got {self.spacing!r}")
        low, high = self.guidance_interval or (0, 0)
        if not 0 <= low <= high:
            raise ValueError(f"guidance_interval must be lo, hi with 0 <= lo <= hi, got {self.guidance_interval}")


@dataclass(frozen=True, slots=True)
class Bound:
    """The variational bound on held-out images, means in bits per dimension (Ho et al. 2020, eq. 5).

    L_steps is the sum of the L_{t-1}, estimated from `timesteps_per_image` of them (0: T is 1 and there are none).
    """

    L_T: float
    L_steps: float
    L_0: float
    total: float
    standard_error: float  # of the total, over images
    num_images: int
    timesteps_per_image: int


@dataclass(frozen=True, slots=True)
class PerClass:
    """One class: the share of its samples, and of its real test images, that the classifier reads as that class.

    None where there are no such images.
    """

    name: str
    samples: float | None
    num_samples: int
    real: float | None


@dataclass(frozen=True, slots=True)
class ClassAccuracy:
    """Share of samples, and of real images, that the classifier assigns to their own class."""

    samples: float
    real: float
    num_real: int
    per_class: tuple[PerClass, ...]


@dataclass(frozen=True, slots=True)
class FrechetDistance:
    """Distance to the test split in the classifier's features; `real` is that of as many training images, a floor."""

    samples: float
    real: float
    num_real: int
    num_test: int


@dataclass(frozen=True, slots=True)
class NearestSummary:
    """Distances to the nearest training image: root mean square per pixel, images in [-1, 1]."""

    minimum: float
    percentile_1: float
    median: float
    num_images: int


@dataclass(frozen=True, slots=True)
class Memorisation:
    """Distances of samples and of real test images to training images: copies would be nearer than test images are."""

    samples: NearestSummary
    real: NearestSummary
    num_train: int


@dataclass(frozen=True, slots=True)
class ClassifierFacts:
    """The classifier that judged."""

    weights_hash: str
    test_accuracy: float
    feature_dim: int
    data: str


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A figure that this checkpoint or this data does not allow, and why."""

    what: str
    why: str


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """The figures of one checkpoint, with the settings to reproduce them. `left_out` says why a figure is None."""

    checkpoint: str
    weights_hash: str
    train_data: str
    test_data: str
    device: str
    torch_version: str
    options: EvaluateOptions
    classifier: ClassifierFacts | None
    bound: Bound | None
    class_accuracy: ClassAccuracy | None
    classifier_frechet_distance: FrechetDistance | None
    memorisation: Memorisation
    left_out: tuple[LeftOut, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """Render the tables of a model card: figures, classes, what is left out and the settings."""
        blocks = [_table(("figure", "samples", "real images"), self._figures())]
        if self.class_accuracy is not None:
            classes = [
                (_cell(c.name), _share(c.samples), str(c.num_samples), _share(c.real))
                for c in self.class_accuracy.per_class
            ]
            blocks.append(_table(("class accuracy", "samples", "n", "real test images"), classes))
        if self.classifier_frechet_distance is not None:
            blocks.append(
                "`classifier_frechet_distance` is not FID: its features are those of a small classifier of this data, "
                "not Inception's, so it compares only with figures of the same classifier, n and test split. The real "
                "images beside it are training images, the floor for that n."
            )
        if self.left_out:
            blocks.append("\n".join(f"- Left out: {item.what} ({item.why})." for item in self.left_out))
        blocks.append(_table(("setting", "value"), self._settings()))
        return "\n\n".join(blocks) + "\n"

    def _figures(self) -> list[tuple[str, str, str]]:
        rows = []
        if (bound := self.bound) is not None:
            # The bound is measured on real images: there is no figure of samples beside it.
            rows.append(("variational bound (bits/dim)", "", f"{bound.total:.4f} ± {bound.standard_error:.4f}"))
            for what, value in (("L_T", bound.L_T), ("sum of L_{t-1}", bound.L_steps), ("L_0", bound.L_0)):
                rows.append((f"of it {what}", "", f"{value:.4f}"))
        if (accuracy := self.class_accuracy) is not None:
            rows.append(("class accuracy", f"{accuracy.samples:.3f}", f"{accuracy.real:.3f}"))
        if (frechet := self.classifier_frechet_distance) is not None:
            rows.append(("classifier_frechet_distance", f"{frechet.samples:.3f}", f"{frechet.real:.3f}"))
        ours, real = self.memorisation.samples, self.memorisation.real
        for what, mine, theirs in (
            ("median", ours.median, real.median),
            ("1st percentile", ours.percentile_1, real.percentile_1),
            ("minimum", ours.minimum, real.minimum),
        ):
            rows.append((f"RMS distance to the nearest training image, {what}", f"{mine:.4f}", f"{theirs:.4f}"))
        return rows

    def _settings(self) -> list[tuple[str, str]]:
        options = self.options
        sampler = f"{options.sampler}, {options.steps} steps, eta {options.eta:g}, guidance {options.guidance:g}"
        if options.guidance_interval is not None:
            sampler += " at timesteps {}..{}".format(*options.guidance_interval)
        if options.spacing is not None:
            sampler += f", {options.spacing} spacing"
        rows = [
            ("checkpoint", f"{_cell(self.checkpoint)}, weights sha256 {self.weights_hash[:16]}"),
            ("samples", f"{options.num_samples}, seed {options.seed}, in batches of {options.batch_size}"),
            ("sampler", sampler),
            (
                "precision, executor, device",
                f"{options.precision}, {_cell(options.executor)}, {self.device}, torch {self.torch_version}",
            ),
            ("data", f"{_cell(self.train_data)} ({self.memorisation.num_train}); {_cell(self.test_data)}"),
        ]
        if self.bound is not None:
            n = f"{self.bound.num_images} test images, {self.bound.timesteps_per_image} stratified timesteps each"
            rows.append(("bound", n))
        if (frechet := self.classifier_frechet_distance) is not None:
            n = f"{options.num_samples} samples, {frechet.num_real} training images, {frechet.num_test} test images"
            rows.append(("classifier_frechet_distance", n))
        n = f"{self.memorisation.samples.num_images} samples, {self.memorisation.real.num_images} test images"
        rows.append(("nearest training image", n))
        if (judge := self.classifier) is not None:
            what = (
                f"{judge.feature_dim} features, trained on {_cell(judge.data)}, test accuracy {judge.test_accuracy:.4f}"
            )
            rows.append(("classifier", f"{what}, weights sha256 {judge.weights_hash[:16]}"))
        return rows


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
