"""The report on a checkpoint, which renders as JSON or as the tables of a model card.

`compare_reports` decides whether an executor or a precision makes images worse.
"""

import dataclasses
import html
import json
from dataclasses import dataclass

from tminus.model.evaluation.figures import (
    ACCURACY,
    FRECHET,
    METRICS,
    PIXEL_FRECHET,
    PRECISION,
    RECALL,
    VARIANCE_RATIO,
    Bound,
    ClassifierFacts,
    LeftOut,
    PointFigures,
    Reconstruction,
    SampleFigures,
    Spread,
)
from tminus.model.evaluation.samples import EvaluateOptions

NOT_FID = (
    "`classifier_frechet_distance` is not FID: its features are those of a small classifier of this data, not "
    "Inception's, so it compares only with figures of the same classifier, n and test split. The real images beside it "
    "are training images, the floor for that n."
)
OF_PIXELS = (
    "`pixel_frechet_distance` needs no classifier: it is the same distance in the first principal components of the "
    "training images' pixels. The variance ratio is the pixels' variance within a class, by that of the test split: 1 "
    "is right, and below it images of a class are too much alike."
)
OF_ONE_POINT = ("sampler", "steps", "guidance", "seed")  # options that each point and seed sets for itself
MAX_FRECHET_RATIO = 1.02
MAX_ACCURACY_LOSS = 0.01  # small, because the samples of both reports start from the same noise


@dataclass(frozen=True, slots=True)
class Table:
    """A header and rows, all with the same number of cells."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def to_markdown(self) -> str:
        """Render as GitHub-flavoured Markdown."""
        rows = [tuple(map(_cell, row)) for row in self.rows]
        lines = ["| " + " | ".join(cells) + " |" for cells in (self.head, ("---",) * len(self.head), *rows)]
        return "\n".join(lines)

    def to_html(self) -> str:
        """Render as HTML, with the first column as row headers."""
        head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in self.head)
        rows = []
        for first, *others in self.rows:
            cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
            rows.append(f'<tr><th scope="row">{html.escape(first)}</th>{cells}</tr>')
        return f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(rows) + "\n</tbody></table>"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the report says about the checkpoint."""

    parameters: int
    size_px: tuple[int, int]
    channels: int
    latents: str | None  # the autoencoder's class and latent shape; None for a pixel model
    class_names: tuple[str, ...]
    num_timesteps: int
    beta_schedule: str
    prediction_type: str
    variance_type: str
    widths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """The figures of one checkpoint, sampled at one or more points with the same seeds.

    `options` are those of the first point and seed. `references` are points for comparison, shown as horizontal lines
    in the plot. `left_out` lists the missing figures and points, with the reasons.
    """

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
    model: ModelFacts
    seeds: tuple[int, ...]
    points: tuple[PointFigures, ...]
    references: tuple[PointFigures, ...] = ()

    @property
    def is_single(self) -> bool:
        """Whether there is only one point and no reference."""
        return len(self.points) + len(self.references) == 1

    @property
    def first(self) -> SampleFigures:
        """The figures of the first point and seed."""
        return self.points[0].seeds[0]

    @property
    def guidances(self) -> tuple[float, ...]:
        return tuple(dict.fromkeys(point.guidance for point in self.points))

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes that explain the distances, in Markdown."""
        return (OF_PIXELS,) if FRECHET.of(self.first) is None else (NOT_FID, OF_PIXELS)

    def to_json(self) -> str:
        values = dataclasses.asdict(dataclasses.replace(self, points=(), references=()))
        values["options"] = {key: value for key, value in values["options"].items() if key not in OF_ONE_POINT}
        values["points"] = [point.to_dict() for point in self.points]
        values["references"] = [point.to_dict() for point in self.references]
        return json.dumps(values, indent=2) + "\n"

    def to_markdown(self) -> str:
        """Render the tables of a model card in Markdown, with settings and the reasons for missing figures."""
        tables = [self.by_point()]
        if self.is_single:
            tables = [self.figures(), self.by_class(), self.over_seeds()]
        blocks = [table.to_markdown() for table in tables if table.rows]
        blocks += self.notes
        if not self.is_single and (rows := [*self.bound_rows(), *self.reconstruction_rows()]):
            blocks.append(Table(("figure of the network", "real images"), tuple(rows)).to_markdown())
        if self.left_out:
            blocks.append("\n".join(f"- Left out: {item.what} ({item.why})." for item in self.left_out))
        blocks.append(self.settings().to_markdown())
        return "\n\n".join(blocks) + "\n"

    def bound_rows(self) -> list[tuple[str, str]]:
        """Return rows for the bound and its parts, which are measured on real images only."""
        if (bound := self.bound) is None:
            return []
        rows = [("variational bound (bits/dim)", f"{bound.total:.4f} ± {bound.standard_error:.4f}")]
        for what, value in (("L_T", bound.L_T), ("sum of L_{t-1}", bound.L_steps), ("L_0", bound.L_0)):
            rows.append((f"of it {what}", f"{value:.4f}"))
        return rows

    def reconstruction_rows(self) -> list[tuple[str, str]]:
        """Return rows for the autoencoder's error on real images; empty for a pixel model."""
        if (lost := self.reconstruction) is None:
            return []
        what = "real images through the autoencoder"
        rows = [(f"{what}, RMS error", f"{lost.rms:.4f}"), (f"{what}, PSNR (dB)", f"{lost.psnr_db:.1f}")]
        if lost.frechet is not None:
            rows.append((f"{what}, classifier_frechet_distance", f"{lost.frechet:.3f}"))
        return rows

    def figures(self) -> Table:
        """Return a table of the first point's metrics, with the same metrics of real images."""
        rows = [(what, "", value) for what, value in (*self.bound_rows(), *self.reconstruction_rows())]
        metrics = (ACCURACY, FRECHET, PIXEL_FRECHET, VARIANCE_RATIO, PRECISION, RECALL)
        found = [(metric.text, figure) for metric in metrics if (figure := metric.of(self.first)) is not None]
        rows += [(text, _number(figure.samples), _number(figure.real)) for text, figure in found]
        ours, real = self.first.memorisation.samples, self.first.memorisation.real
        for what, mine, theirs in (
            ("median", ours.median, real.median),
            ("1st percentile", ours.percentile_1, real.percentile_1),
            ("minimum", ours.minimum, real.minimum),
        ):
            rows.append((f"RMS distance to the nearest training image, {what}", f"{mine:.4f}", f"{theirs:.4f}"))
        return Table(("figure", "samples", "real images"), tuple(rows))

    def by_class(self) -> Table:
        """Return the accuracy for each class at the first point; no rows if accuracy was not measured."""
        classes = accuracy.per_class if (accuracy := self.first.class_accuracy) is not None else ()
        rows = [(c.name, _number(c.samples), str(c.num_samples), _number(c.real)) for c in classes]
        return Table(("class accuracy", "samples", "n", "real test images"), tuple(rows))

    def over_seeds(self) -> Table:
        """Return the first point's figures for each seed, and their range; no rows for a single seed."""
        point, rows = self.points[0], list[tuple[str, ...]]()
        if len(point.seeds) > 1:
            rows += [(str(each.seed), *_samples(each)) for each in point.seeds]
            rows.append(("mean (least..greatest)", *(_text(point.spread(metric)) for metric in METRICS)))
            rows.append(("real images", *(_text(point.spread(metric, "real")) for metric in METRICS)))
        return Table(("seed", *(metric.text for metric in METRICS)), tuple(rows))

    def by_point(self) -> Table:
        """Return one row for each point, and one for real images."""
        rows: list[tuple[str, ...]] = []
        for point in (*self.points, *self.references):
            way = point.sampler, str(point.steps), str(point.passes), f"{point.guidance:g}"
            rows.append((*way, *(_text(point.spread(metric)) for metric in METRICS), f"{point.seconds_per_image:.3g}"))
        rows.append(("real images", "", "", "", *(_text(self.points[0].spread(each, "real")) for each in METRICS), ""))
        head = ("sampler", "steps", "passes", "guidance", *(metric.text for metric in METRICS), "s an image")
        if self.guidances == (1.0,):
            head, rows = (*head[:3], *head[4:]), [(*row[:3], *row[4:]) for row in rows]
        return Table(head, tuple(rows))

    def by_seed(self) -> Table:
        head = ("sampler", "steps", "guidance", "figure", *(f"seed {seed}" for seed in self.seeds))
        rows: list[tuple[str, ...]] = []
        for point in (*self.points, *self.references):
            way = point.sampler, str(point.steps), f"{point.guidance:g}"
            by_metric = zip(*map(_samples, point.seeds), strict=True)
            rows += [(*way, metric.text, *texts) for metric, texts in zip(METRICS, by_metric, strict=True)]
        return Table(head, tuple(rows))

    def settings(self) -> Table:
        options, point, first = self.options, self.points[0], self.first
        sampler = f"{', '.join(dict.fromkeys(each.sampler for each in self.points))}; eta {options.eta:g}"
        if self.is_single:
            sampler = f"{point.sampler}, {point.steps} steps, eta {options.eta:g}, guidance {point.guidance:g}"
        if options.guidance_interval is not None:
            sampler += ", guided at timesteps {}..{}".format(*options.guidance_interval)
        if options.guidance_rescale:
            sampler += f", guidance rescaled by {options.guidance_rescale:g}"
        if options.spacing is not None:
            sampler += f", {options.spacing} spacing"
        numbers = f"seed{'s' * (len(self.seeds) > 1)} {', '.join(map(str, self.seeds))}"
        how = f"{options.precision}, {options.executor}, {self.device}, torch {self.torch_version}"
        near, frechet = first.memorisation, first.classifier_frechet_distance
        rows = [
            ("checkpoint", f"{self.checkpoint}, weights sha256 {self.weights_hash[:16]}"),
            ("samples", f"{options.num_samples}, {numbers}, in batches of {options.batch_size}"),
            ("sampler", sampler),
        ]
        if self.is_single:
            rows.append(("speed", f"{point.passes} passes and {point.seconds_per_image:.3g} s an image"))
        rows += [
            ("precision, executor, device", how),
            ("data", f"{self.train_data} ({near.num_train}); {self.test_data}"),
        ]
        if self.bound is not None:
            n = f"{self.bound.num_images} test images, {self.bound.timesteps_per_image} stratified timesteps each"
            rows.append(("bound", n))
        if frechet is not None:
            n = f"{options.num_samples} samples, {frechet.num_real} training images, {frechet.num_test} test images"
            rows.append(("classifier_frechet_distance", n))
        rows.append(("pixels", f"{first.pixels.num_components} principal components of the training images"))
        n = f"{near.samples.num_images} samples, {near.real.num_images} test images"
        rows.append(("nearest training image", n))
        if (judge := self.classifier) is not None:
            what = f"{judge.feature_dim} features, trained on {judge.data}, test accuracy {judge.test_accuracy:.4f}"
            rows.append(("classifier", f"{what}, weights sha256 {judge.weights_hash[:16]}"))
        return Table(("setting", "value"), tuple(rows))


def _samples(figures: SampleFigures) -> tuple[str, ...]:
    values = (metric.of(figures) for metric in METRICS)
    return tuple(_number(value.samples if value is not None else None) for value in values)


def _text(figure: Spread | None) -> str:
    return "-" if figure is None else str(figure)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing a candidate with a reference. A figure is None if either report lacks it."""

    frechet_ratio: float | None  # candidate / reference; above 1 is worse
    accuracy_difference: float | None  # candidate - reference; below 0 is worse
    ok: bool
    reason: str


def compare_reports(reference: Report, candidate: Report) -> Comparison:
    """Decide whether a candidate's images are as good as a reference's.

    The Fréchet distance may be at most 2 % worse, and the class accuracy at most 0.01 worse. Both reports must agree in
    weights, sampling settings, data and classifier. Only their first point and seed are compared. An unconditional
    model is judged by the distance alone. If neither figure is known, the candidate is rejected.
    """
    assert reference.weights_hash == candidate.weights_hash
    ratio = difference = None
    one, other = reference.first.classifier_frechet_distance, candidate.first.classifier_frechet_distance
    if one is not None and other is not None:
        ratio = other.samples / max(one.samples, 1e-12)
    was, now = reference.first.class_accuracy, candidate.first.class_accuracy
    if was is not None and now is not None:
        difference = now.samples - was.samples
    if ratio is None and difference is None:
        return Comparison(None, None, ok=False, reason="no classifier judged the samples")
    faults = []
    if ratio is not None and not ratio <= MAX_FRECHET_RATIO:  # `not <=` also rejects NaN.
        faults.append(f"the Fréchet distance is {ratio:.3f} times the reference's, over {MAX_FRECHET_RATIO}")
    if difference is not None and not difference >= -MAX_ACCURACY_LOSS:
        faults.append(f"class accuracy moves by {difference:+.3f}, more than {-MAX_ACCURACY_LOSS}")
    return Comparison(ratio, difference, ok=not faults, reason="; ".join(faults) or "no worse than the reference")
