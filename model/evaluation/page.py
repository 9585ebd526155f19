"""Renders the report as a single HTML file, which is easy to send and archive.

A Markdown report would need separate image files, which mail programs and browsers do not show. The command itself
prints the tables of a model card as Markdown.
"""

import html
import importlib.util
import io
from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.evaluation.figures import FRECHET, Bound, PointFigures
from tminus.model.evaluation.report import Report, Table
from tminus.model.evaluation.samples import EvaluateError

MARKERS = "osD^v<>PX*"
GREY = "#555555"
PANEL_INCHES = (6.0, 4.4)
LEGEND_INCHES = 1.8
NEXT_TICK = 1.15  # minimum ratio of neighbouring ticks, so that their labels do not overlap
MAX_STRIPS = 4  # strips per sampler, each with a different number of steps
SMALL_PX = 64  # Smaller images are shown at twice their size.
HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
"""
STYLE = """<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .8rem .15rem 0; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
thead th { overflow-wrap: normal; }
tbody th { font-weight: normal; }
img { max-width: 100%; height: auto; }
.strips { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .3rem 1rem; align-items: center; }
.strips img { image-rendering: pixelated; }
pre { background: #f4f4f4; padding: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
section, details { overflow-x: auto; }
</style>
"""


def check_installed() -> None:
    """Raise EvaluateError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluateError("a report has plots, which need matplotlib: pip install '.[evaluate]' in a checkout")


def plot_distances(report: Report) -> bytes | None:
    """Plot Fréchet distance against passes, with a line for each sampler and a panel for each guidance scale.

    Error bars show the range over seeds. Horizontal lines show real images and references. Returns None if fewer than
    two points have a distance.
    """
    drawn = [point for point in report.points if point.spread(FRECHET) is not None]
    if len(drawn) < 2:
        return None
    plt = _pyplot()
    panels = report.guidances
    size = (PANEL_INCHES[0] + LEGEND_INCHES, PANEL_INCHES[1] * len(panels))
    figure, axes = plt.subplots(len(panels), figsize=size, layout="constrained", sharey=True, squeeze=False)
    names = list(dict.fromkeys(point.sampler for point in drawn))
    for axis, guidance in zip(axes[:, 0], panels, strict=True):
        for name in names:
            line = [point for point in drawn if (point.sampler, point.guidance) == (name, guidance)]
            _line(axis, name, sorted(line, key=lambda point: point.passes))
        for point in report.references:
            if point.guidance == guidance and (reference := point.spread(FRECHET)) is not None:
                label = f"{point.sampler}, {point.steps} steps"
                axis.axhline(reference.mean, color=GREY, linestyle="--", linewidth=1, label=label)
        if (real := report.points[0].spread(FRECHET, "real")) is not None:
            axis.axhline(real.mean, color=GREY, linestyle=":", linewidth=1.2, label="real images")
        axis.set_title(f"guidance {guidance:g}" if len(panels) > 1 or guidance != 1 else "")
        axis.set_xlabel("passes of the network, an image")
        axis.set_ylabel("classifier_frechet_distance")
        _log(axis, [point.passes for point in drawn])
        _plain(axis)
    handles: dict[str, Any] = {}
    for axis in axes[:, 0]:
        handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = sorted(handles, key=lambda label: names.index(label) if label in names else len(names))
    figure.legend([handles[label] for label in order], order, loc="outside right upper", frameon=False)
    return _svg(figure, plt)


def plot_terms(bound: Bound) -> bytes:
    """Plot L_t on held-out images against t, as a step plot with one level for each run of timesteps."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(PANEL_INCHES[0] + LEGEND_INCHES, 3.6), layout="constrained")
    values = [bound.L_0, *(term.bits_per_dim for term in bound.terms)]
    edges = [0, *(term.first for term in bound.terms), bound.terms[-1].last + 1 if bound.terms else 1]
    axis.stairs(values, edges, baseline=None, color=_colour(0), linewidth=1.6)
    axis.set_xscale("symlog", linthresh=1)
    axis.set_xlim(0, edges[-1])
    ticks = [0, *(10**k for k in range(7) if 10**k <= edges[-1])]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.set_yscale("log")
    axis.set_xlabel("t, counted from 0")
    axis.set_ylabel("L_t, bits/dim")
    _plain(axis)
    return _svg(figure, plt)


def _line(axis: Any, name: str, points: Sequence[PointFigures]) -> None:
    """Draw the line of one sampler. A sampler has the same colour and marker in every plot."""
    number = [*SAMPLER_FACTS, name].index(name)
    spreads = [spread for point in points if (spread := point.spread(FRECHET)) is not None]
    means = [one.mean for one in spreads]
    bars = [[one.mean - one.minimum for one in spreads], [one.maximum - one.mean for one in spreads]]
    axis.errorbar(
        [point.passes for point in points], means, yerr=bars, label=name, color=_colour(number),
        marker=MARKERS[number % len(MARKERS)], markersize=4.5, linewidth=1.4, elinewidth=0.8, capsize=2,
        linestyle="-" if number < 10 else "-.",
    )  # fmt: skip


def _colour(number: int) -> str:
    return f"C{number % 10}"


def _log(axis: Any, passes: Sequence[int]) -> None:
    """Make both axes logarithmic, with ticks at the points' passes and at distances like 1, 2 and 5.

    Where ticks would overlap, the passes that more points share keep theirs.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    ticks: list[int] = []
    for count, _ in Counter(sorted(passes)).most_common():
        if all(max(count, tick) >= NEXT_TICK * min(count, tick) for tick in ticks):
            ticks.append(count)
    axis.set_xscale("log")
    axis.set_yscale("log")
    for of, locator in ((axis.xaxis, FixedLocator(ticks)), (axis.yaxis, LogLocator(subs=(1, 2, 5)))):
        of.set_major_locator(locator)
        of.set_minor_locator(NullLocator())
        of.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _plain(axis: Any) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(visible=True, which="major", color="#dddddd", linewidth=0.6)


def _pyplot() -> Any:
    check_installed()
    import matplotlib

    matplotlib.use("Agg")
    # Make the SVG files reproducible, and keep their text as text.
    matplotlib.rcParams |= {"svg.hashsalt": "tminus", "svg.fonttype": "none", "font.size": 9}
    import matplotlib.pyplot as plt

    return plt


def _svg(figure: Any, plt: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    plt.close(figure)
    return out.getvalue()


def report_files(report: Report, command: str) -> dict[str, bytes]:
    """Return the report's files by name: report.html, its plots, and figures.json.

    The report shows `command`, which recreates it. The same report always gives the same bytes. Raises EvaluateError if
    matplotlib is not installed.
    """
    plots = {"distances.svg": plot_distances(report)}
    if report.bound is not None:
        plots["terms.svg"] = plot_terms(report.bound)
    files = {name: plot for name, plot in plots.items() if plot is not None}
    return {"report.html": render(report, command, files).encode(), "figures.json": report.to_json().encode(), **files}


def render(report: Report, command: str, plots: Mapping[str, bytes]) -> str:
    """Render the report as an HTML page."""
    title = html.escape(f"Evaluation of {report.checkpoint}")
    sections = [
        _section("Model", _facts(report).to_html()),
        _quality(report, plots.get("distances.svg")),
        _section("Samples", _samples(report)),
        _bound(report, plots.get("terms.svg")),
        _autoencoder(report),
    ]
    if report.left_out:
        items = "".join(f"<li>{html.escape(f'{item.what}: {item.why}')}</li>" for item in report.left_out)
        sections.append(_section("Left out", f"<ul>{items}</ul>"))
    again = f"<p>This command makes the report again:</p><pre>{html.escape(command)}</pre>"
    sections.append(_section("Settings", report.settings().to_html() + again))
    return f"{HEAD}<title>{title}</title>\n{STYLE}<body>\n<h1>{title}</h1>\n{''.join(sections)}</body>\n</html>\n"


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{body}\n</section>\n" if body else ""


def _facts(report: Report) -> Table:
    model = report.model
    height, width = model.size_px
    classes = f"{len(model.class_names)}: {', '.join(model.class_names)}" if model.class_names else "none"
    rows = (
        ("checkpoint", f"{report.checkpoint}, weights sha256 {report.weights_hash}"),
        ("network", f"{model.parameters:,} parameters, widths {', '.join(map(str, model.widths))}"),
        ("images", f"{height} x {width} pixels, {model.channels} channel{'s' * (model.channels > 1)}"),
        *([("latents", model.latents)] if model.latents is not None else []),
        ("classes", classes),
        ("noise", f"{model.beta_schedule}, T = {model.num_timesteps}, variance {model.variance_type}"),
        ("prediction", model.prediction_type),
    )
    return Table(("fact", "value"), rows)


def _quality(report: Report, plot: bytes | None) -> str:
    """Render the quality of the samples: all figures of a single point, or a comparison of points."""
    text = "".join(f"<p>{html.escape(note.replace('`', ''))}</p>" for note in report.notes)
    if report.is_single:
        tables = [report.figures(), report.by_class(), report.over_seeds()]
        return _section("Figures", "\n<p></p>\n".join(table.to_html() for table in tables if table.rows) + text)
    picture = _svg_image(plot, "Fréchet distance over passes of the network, a line a sampler") if plot else ""
    by_seed = f"<details><summary>By seed</summary>{report.by_seed().to_html()}</details>"
    count = len(report.seeds)
    seeds = "one seed" if count == 1 else f"{count} seeds: means, in brackets the least and the greatest"
    explained = (
        f"<p>{report.options.num_samples} images of {seeds}. A pass is one evaluation of the network for one image; a "
        "guided one computes it with and without its class.</p>"
    )
    return _section("Quality over passes", picture + explained + report.by_point().to_html() + by_seed + text)


def _samples(report: Report) -> str:
    """Render strips of the first seed's images. All images in a column start from the same noise."""
    groups: dict[str, list[PointFigures]] = {}
    for point in report.points:
        guided = f", guidance {point.guidance:g}" if report.guidances != (1.0,) else ""
        groups.setdefault(point.sampler + guided, []).append(point)
    for point in report.references:
        groups.setdefault(f"{point.sampler}, {point.steps} steps (reference)", []).append(point)
    classes = ", ".join(report.model.class_names)
    order = f" Classes in turn: {html.escape(classes)}." if classes else ""
    parts = [f"<p>Seed {report.seeds[0]}; a column starts from the same noise everywhere.{order}</p>"]
    for name, points in groups.items():
        strips = "".join(
            f"<span>{_effort(point)}</span>{_strip(point, report.model.size_px[0])}" for point in _few(points)
        )
        parts.append(f'<h3>{html.escape(name)}</h3>\n<div class="strips">{strips}</div>')
    return "\n".join(parts)


def _effort(point: PointFigures) -> str:
    return f"{point.steps} steps" + (f", {point.passes} passes" if point.passes != point.steps else "")


def _few(points: Sequence[PointFigures]) -> list[PointFigures]:
    """Choose up to MAX_STRIPS points, spread evenly from the fewest steps to the most."""
    ordered = sorted(points, key=lambda point: point.steps)
    if len(ordered) <= MAX_STRIPS:
        return ordered
    return [ordered[round(k * (len(ordered) - 1) / (MAX_STRIPS - 1))] for k in range(MAX_STRIPS)]


def _bound(report: Report, plot: bytes | None) -> str:
    if (bound := report.bound) is None:
        return ""
    table = Table(("figure of the network", "on real images"), tuple(report.bound_rows())).to_html()
    picture = _svg_image(plot, "L_t over t, in bits per dimension") if plot else ""
    caption = (
        f"<p>L_t is the step from t, L_0 the decoder's, on {bound.num_images} held-out images. A stair is the mean "
        f"over its timesteps; over all timesteps, and with L_T, they add up to the bound. 90 % of it lies at t = 0 to "
        f"{bound.reaches(0.9)}.</p>"
    )
    return _section("Variational bound", table + "\n" + picture + caption)


def _autoencoder(report: Report) -> str:
    rows = tuple(report.reconstruction_rows())
    return _section("Autoencoder", Table(("figure", "real images"), rows).to_html() if rows else "")


def _strip(point: PointFigures, height_px: int) -> str:
    zoom = 2 if height_px < SMALL_PX else 1
    label = html.escape(f"samples of {point.sampler} in {point.steps} steps")
    return f'<img height="{zoom * height_px}" alt="{label}" src="data:image/png;base64,{_base64(point.sheet)}">'


def _svg_image(svg: bytes, label: str) -> str:
    return f'<p><img alt="{html.escape(label)}" src="data:image/svg+xml;base64,{_base64(svg)}"></p>\n'


def _base64(data: bytes) -> str:
    return b64encode(data).decode()
