"""The report on one way of sampling: frozen values, rendered as JSON or as the tables of a model card."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tminus.model.evaluation.figures import (
    Bound,
    ClassAccuracy,
    ClassifierFacts,
    FrechetDistance,
    LeftOut,
    Memorisation,
    Reconstruction,
    SampleFigures,
    Spread,
    spread,
)
from tminus.model.evaluation.options import EvaluateOptions
from tminus.model.evaluation.tables import Table

NOT_FID = (
    "`classifier_frechet_distance` is not FID: its features are those of a small classifier of this data, not "
    "Inception's, so it compares only with figures of the same classifier, n and test split. The real images beside it "
    "are training images, the floor for that n."
)


@dataclass(frozen=True, slots=True)
class Subject:
    """What was measured, with what, and the figures that do not depend on samples. `left_out` says why one is None."""

    checkpoint: str
    weights_hash: str
    train_data: str
    test_data: str
    device: str
    torch_version: str
    options: EvaluateOptions
    classifier: ClassifierFacts | None
    bound: Bound | None
    reconstruction: Reconstruction | None
    left_out: tuple[LeftOut, ...]

    def left_out_lines(self) -> list[str]:
        """A line for each figure that is left out, and why."""
        return [f"Left out: {item.what} ({item.why})." for item in self.left_out]

    def bound_rows(self) -> list[tuple[str, str]]:
        """The bound and its terms. It is measured on real images: there is no figure of samples beside it."""
        if (bound := self.bound) is None:
            return []
        rows = [("variational bound (bits/dim)", f"{bound.total:.4f} ± {bound.standard_error:.4f}")]
        for what, value in (("L_T", bound.L_T), ("sum of L_{t-1}", bound.L_steps), ("L_0", bound.L_0)):
            rows.append((f"of it {what}", f"{value:.4f}"))
        return rows

    def reconstruction_rows(self) -> list[tuple[str, str]]:
        """What the autoencoder of a latent model loses; measured on real images too."""
        if (lost := self.reconstruction) is None:
            return []
        what = "real images through the autoencoder"
        rows = [(f"{what}, RMS error", f"{lost.rms:.4f}"), (f"{what}, PSNR (dB)", f"{lost.psnr_db:.1f}")]
        if lost.frechet is not None:
            rows.append((f"{what}, classifier_frechet_distance", f"{lost.frechet:.3f}"))
        return rows

    def settings(self, sampler: str, seeds: Sequence[int], of: SampleFigures, speed: str = "") -> Table:
        """The settings to reproduce the figures. `of` are figures of any seed: they say how many images there are."""
        options = self.options
        numbers = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        rows = [
            ("checkpoint", f"{self.checkpoint}, weights sha256 {self.weights_hash[:16]}"),
            ("samples", f"{options.num_samples}, {numbers}, in batches of {options.batch_size}"),
            ("sampler", sampler),
            (
                "precision, executor, device",
                f"{options.precision}, {options.executor}, {self.device}, torch {self.torch_version}",
            ),
            ("data", f"{self.train_data} ({of.memorisation.num_train}); {self.test_data}"),
        ]
        if speed:
            rows.insert(3, ("speed", speed))
        if self.bound is not None:
            n = f"{self.bound.num_images} test images, {self.bound.timesteps_per_image} stratified timesteps each"
            rows.append(("bound", n))
        if (frechet := of.classifier_frechet_distance) is not None:
            n = f"{options.num_samples} samples, {frechet.num_real} training images, {frechet.num_test} test images"
            rows.append(("classifier_frechet_distance", n))
        near = of.memorisation
        n = f"{near.samples.num_images} samples, {near.real.num_images} test images"
        rows.append(("nearest training image", n))
        if (judge := self.classifier) is not None:
            what = f"{judge.feature_dim} features, trained on {judge.data}, test accuracy {judge.test_accuracy:.4f}"
            rows.append(("classifier", f"{what}, weights sha256 {judge.weights_hash[:16]}"))
        return Table(("setting", "value"), tuple(rows))


@dataclass(frozen=True, slots=True)
class EvaluationReport(Subject):
    """The figures of one checkpoint, sampled in one way. `seeds` has figures by seed, where there are several.

    All else is of the first seed.
    """

    class_accuracy: ClassAccuracy | None
    classifier_frechet_distance: FrechetDistance | None
    memorisation: Memorisation
    seeds: tuple[SampleFigures, ...] = ()
    passes: int = 0  # of the network, an image
    seconds_per_image: float = dataclasses.field(default=0.0, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    def to_markdown(self) -> str:
        """Render the tables of a model card: figures, classes, what is left out and the settings."""
        blocks = [table.to_markdown() for table in (self.figures(), self.by_class(), self.by_seed()) if table.rows]
        if self.classifier_frechet_distance is not None:
            blocks.append(NOT_FID)
        if self.left_out:
            blocks.append("\n".join(f"- {line}" for line in self.left_out_lines()))
        blocks.append(self.all_settings().to_markdown())
        return "\n\n".join(blocks) + "\n"

    def figures(self) -> Table:
        """The figures of the samples beside those of real images."""
        rows = [(what, "", value) for what, value in (*self.bound_rows(), *self.reconstruction_rows())]
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
        return Table(("figure", "samples", "real images"), tuple(rows))

    def by_class(self) -> Table:
        """The class accuracy of each class; no rows where there is none."""
        classes = self.class_accuracy.per_class if self.class_accuracy is not None else ()
        rows = [(c.name, _share(c.samples), str(c.num_samples), _share(c.real)) for c in classes]
        return Table(("class accuracy", "samples", "n", "real test images"), tuple(rows))

    def by_seed(self) -> Table:
        """The figures of each seed and their spread; no rows where there is one seed."""
        head = ("seed", "classifier_frechet_distance", "real images", "class accuracy")
        distances = [each.classifier_frechet_distance for each in self.seeds]
        columns = [
            [f.samples if f is not None else None for f in distances],
            [f.real if f is not None else None for f in distances],
            [a.samples if (a := each.class_accuracy) is not None else None for each in self.seeds],
        ]
        rows = [(str(each.seed), *map(_share, row)) for each, *row in zip(self.seeds, *columns, strict=True)]
        if rows:
            spreads = [spread(column) for column in columns]
            rows.append(("mean (least..greatest)", *(spread_text(one, 3) for one in spreads)))
        return Table(head, tuple(rows))

    def all_settings(self) -> Table:
        """The settings to reproduce the figures."""
        options = self.options
        sampler = f"{options.sampler}, {options.steps} steps, eta {options.eta:g}, guidance {options.guidance:g}"
        if options.guidance_interval is not None:
            sampler += " at timesteps {}..{}".format(*options.guidance_interval)
        if options.guidance_rescale:
            sampler += f", rescaled by {options.guidance_rescale:g}"
        if options.spacing is not None:
            sampler += f", {options.spacing} spacing"
        seeds = [each.seed for each in self.seeds] or [options.seed]
        of = SampleFigures(options.seed, self.class_accuracy, self.classifier_frechet_distance, self.memorisation, 0.0)
        speed = f"{self.passes} passes and {self.seconds_per_image:.3g} s an image" if self.passes else ""
        return self.settings(sampler, seeds, of, speed)


def spread_text(figure: Spread | None, digits: int) -> str:
    """A mean, with the least and the greatest value where they differ."""
    if figure is None:
        return "-"
    mean, least, greatest = (f"{value:.{digits}f}" for value in figure)
    return mean if figure.minimum == figure.maximum else f"{mean} ({least}..{greatest})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
