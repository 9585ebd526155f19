import dataclasses
import re
import sys
from xml.etree import ElementTree

import pytest

from tminus.model.evaluation.figures import (
    Bound,
    FrechetDistance,
    Memorisation,
    NearestSummary,
    PointFigures,
    SampleFigures,
    Term,
)
from tminus.model.evaluation.options import EvaluateError, EvaluateOptions
from tminus.model.evaluation.plots import check_installed, plot_distances, plot_terms
from tminus.model.evaluation.sweep_report import ModelFacts, SweepReport

NEAREST = NearestSummary(0.1, 0.2, 0.3, 10)


def point(sampler: str, steps: int, *distances: float | None, guidance: float = 1.0) -> PointFigures:
    figures = [FrechetDistance(each, 1.5, 10, 10) if each is not None else None for each in distances]
    seeds = [SampleFigures(k, None, f, Memorisation(NEAREST, NEAREST, 10), 0.1) for k, f in enumerate(figures)]
    return PointFigures(sampler, steps, guidance, steps, tuple(seeds))


def report(*points: PointFigures, references: tuple[PointFigures, ...] = ()) -> SweepReport:
    model = ModelFacts(1, (8, 8), 1, None, (), 20, "linear", "epsilon", "fixed_small", (8,))
    return SweepReport(
        checkpoint="toy", weights_hash="abc", train_data="a", test_data="b", device="cpu", torch_version="2",
        options=EvaluateOptions(), classifier=None, bound=None, reconstruction=None, left_out=(), model=model,
        seeds=(0, 1), points=points, references=references,
    )  # fmt: skip


def texts(svg: bytes | None) -> list[str]:
    assert svg is not None
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_every_sampler_is_in_the_legend_before_what_it_is_compared_with() -> None:
    points = [point(name, n, 20.0 / n, 30.0 / n) for name in ("dpmpp_2m", "ddim", "tuned") for n in (4, 10, 50)]
    found = texts(plot_distances(report(*points, references=(point("ddpm", 1000, 4.0, 5.0),))))
    assert found[-5:] == ["dpmpp_2m", "ddim", "tuned", "ddpm, 1000 steps", "real images"]
    assert {"4", "10", "50", "classifier_frechet_distance"} <= {*found}


def test_a_sampler_keeps_its_colour_whichever_others_are_drawn() -> None:
    def colours(*names: str) -> set[str]:
        svg = plot_distances(report(*(point(name, n, 20.0 / n, 30.0 / n) for name in names for n in (4, 10))))
        assert svg is not None
        return {*re.findall(r"#(?!ddd|555|000|fff)[0-9a-f]{6}", svg.decode())}

    both = colours("ddim", "dpmpp_2m")
    assert len(both) == 2
    assert colours("ddim") | colours("dpmpp_2m") == both


def test_a_panel_a_guidance_scale() -> None:
    points = [point("ddim", n, 20.0 / n, guidance=scale) for scale in (1.0, 1.5) for n in (4, 10)]
    found = texts(plot_distances(report(*points)))
    assert {"guidance 1", "guidance 1.5"} <= {*found}
    assert found.count("ddim") == 1


def test_passes_that_most_samplers_have_are_named_first() -> None:
    points = [point(name, n, 20.0 / n) for name in ("ddim", "dpmpp_2m") for n in (4, 10, 100)]
    heun = [dataclasses.replace(point("heun", n, 20.0 / n), passes=2 * n - 1) for n in (4, 5, 50, 100)]
    found = texts(plot_distances(report(*heun, *points)))
    assert {"4", "7", "10", "100", "199"} <= {*found}
    assert not {"9", "99"} & {*found}, "no room beside 10 and 100"


def test_there_is_no_plot_of_less_than_two_points() -> None:
    assert plot_distances(report(point("ddim", 4, 3.0))) is None
    assert plot_distances(report(point("ddim", 4, 3.0), point("ddim", 5, None))) is None


@pytest.mark.parametrize("distance", [0.0, 1e-12, 1e9, float("nan")])
def test_no_distance_breaks_a_plot(distance: float) -> None:
    assert plot_distances(report(point("ddim", 4, distance), point("ddim", 5, 3.0))) is not None


def test_the_curve_of_the_terms_is_drawn_from_l_0_to_the_last_timestep() -> None:
    terms = (Term(1, 1, 0.3), Term(2, 9, 0.01), Term(10, 999, 1e-5))
    found = texts(plot_terms(Bound(0.0, 0.4, 1.3, 1.7, 0.1, 5, 3, terms)))
    assert {"0", "1", "10", "100", "1000", "L_t, bits/dim"} <= {*found}
    assert plot_terms(Bound(0.0, 0.0, 1.3, 1.3, 0.1, 5, 0, ()))


def test_the_same_figures_give_the_same_plot() -> None:
    points = [point("ddim", 4, 3.0), point("ddim", 5, 2.0)]
    assert plot_distances(report(*points)) == plot_distances(report(*points))


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(EvaluateError, match=r"pip install 'tminus\[evaluate\]'"):
        check_installed()
    with pytest.raises(EvaluateError, match="matplotlib"):
        plot_terms(Bound(0.0, 0.0, 1.3, 1.3, 0.1, 5, 0, ()))


def test_points_without_a_distance_have_no_spread() -> None:
    assert point("ddim", 4, 3.0, None).frechet is None
