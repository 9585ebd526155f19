"""The report on several ways of sampling: frozen values, rendered as JSON or as tables."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from tminus.model.evaluation.figures import PointFigures, Spread, spread
from tminus.model.evaluation.report import NOT_FID, EvaluationReport, Subject, spread_text
from tminus.model.evaluation.tables import Table

OF_ONE_POINT = ("sampler", "steps", "guidance", "seed")  # fields of the options that the points have instead


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a checkpoint is."""

    parameters: int
    size_px: tuple[int, int]
    channels: int
    latents: str | None  # of a latent model: what makes them, and their shape
    class_names: tuple[str, ...]
    num_timesteps: int
    beta_schedule: str
    prediction_type: str
    variance_type: str
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SweepReport(Subject):
    """The figures of one checkpoint, sampled in several ways by the same seeds. `options` are those of the first way.

    `references` are ways that the others are compared with: horizontal lines of the plot.
    """

    model: ModelFacts
    seeds: tuple[int, ...]
    points: tuple[PointFigures, ...]
    references: tuple[PointFigures, ...] = ()

    @property
    def real_frechet(self) -> Spread | None:
        """The Fréchet distance of as many real images, over seeds: a floor."""
        return self.points[0].real_frechet

    @property
    def guidances(self) -> tuple[float, ...]:
        """The guidance scales of the points."""
        return tuple(dict.fromkeys(point.guidance for point in self.points))

    def single(self) -> EvaluationReport:
        """The report on the first way of sampling alone."""
        common = {field.name: getattr(self, field.name) for field in dataclasses.fields(Subject)}
        point = self.points[0]
        first = point.seeds[0]
        return EvaluationReport(
            **common,
            class_accuracy=first.class_accuracy,
            classifier_frechet_distance=first.classifier_frechet_distance,
            memorisation=first.memorisation,
            seeds=point.seeds if len(point.seeds) > 1 else (),
            passes=point.passes,
            seconds_per_image=point.seconds_per_image,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if "point" not in field.name
        }
        for name in ("options", "classifier", "bound", "reconstruction", "model"):
            values[name] = dataclasses.asdict(values[name]) if values[name] is not None else None
        values["options"] = {key: value for key, value in values["options"].items() if key not in OF_ONE_POINT}
        values["left_out"] = [dataclasses.asdict(item) for item in self.left_out]
        values["points"] = [point.to_dict() for point in self.points]
        values["references"] = [point.to_dict() for point in self.references]
        return values

    def to_markdown(self) -> str:
        """Render the tables: the ways of sampling, the bound, what is left out and the settings."""
        blocks = [self.by_point().to_markdown()]
        if self.real_frechet is not None:
            blocks.append(NOT_FID)
        if rows := [*self.bound_rows(), *self.reconstruction_rows()]:
            blocks.append(Table(("figure of the network", "real images"), tuple(rows)).to_markdown())
        if self.left_out:
            blocks.append("\n".join(f"- {line}" for line in self.left_out_lines()))
        blocks.append(self.all_settings().to_markdown())
        return "\n\n".join(blocks) + "\n"

    def by_point(self) -> Table:
        """A row for each way of sampling, and one for real images."""
        head: tuple[str, ...] = ("sampler", "steps", "passes", "guidance")
        head += ("classifier_frechet_distance", "class accuracy", "s an image")
        rows: list[tuple[str, ...]] = []
        for point in (*self.points, *self.references):
            figures = spread_text(point.frechet, 2), spread_text(point.accuracy, 3)
            way = point.sampler, str(point.steps), str(point.passes), f"{point.guidance:g}"
            rows.append((*way, *figures, f"{point.seconds_per_image:.3g}"))
        if self.real_frechet is not None:
            accuracies = [each.class_accuracy for each in self.points[0].seeds]
            real = spread([accuracy.real if accuracy is not None else None for accuracy in accuracies])
            accuracy = f"{real.mean:.3f}" if real is not None else "-"
            rows.append(("real images", "", "", "", spread_text(self.real_frechet, 2), accuracy, ""))
        if self.guidances == (1.0,):
            head, rows = (*head[:3], *head[4:]), [(*row[:3], *row[4:]) for row in rows]
        return Table(head, tuple(rows))

    def by_seed(self) -> Table:
        """The Fréchet distance of each way of sampling by seed."""
        head = ("sampler", "steps", "guidance", *(f"seed {seed}" for seed in self.seeds))
        rows = []
        for point in (*self.points, *self.references):
            distances = [each.classifier_frechet_distance for each in point.seeds]
            texts = ["-" if each is None else f"{each.samples:.3f}" for each in distances]
            rows.append((point.sampler, str(point.steps), f"{point.guidance:g}", *texts))
        return Table(head, tuple(rows))

    def all_settings(self) -> Table:
        """The settings to reproduce the figures."""
        options = self.options
        sampler = f"{', '.join(dict.fromkeys(point.sampler for point in self.points))}; eta {options.eta:g}"
        if options.guidance_interval is not None:
            sampler += ", guided at timesteps {}..{}".format(*options.guidance_interval)
        if options.guidance_rescale:
            sampler += f", guidance rescaled by {options.guidance_rescale:g}"
        if options.spacing is not None:
            sampler += f", {options.spacing} spacing"
        return self.settings(sampler, self.seeds, self.points[0].seeds[0])
