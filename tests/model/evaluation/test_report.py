import dataclasses
import math
import re

import pytest

from tminus.model.evaluation.figures import (
    ClassAccuracy,
    ClassifierFacts,
    Compared,
    FrechetDistance,
    Memorisation,
    NearestSummary,
    PixelFigures,
    PointFigures,
    SampleFigures,
)
from tminus.model.evaluation.report import ModelFacts, Report, Table, compare_reports
from tminus.model.evaluation.samples import EvaluateOptions

HOSTILE = "<script>alert(1)</script>|\"&'\n\n# b"
NEAREST = NearestSummary(minimum=0.1, percentile_1=0.2, median=0.3, num_images=10)
PIXELS = PixelFigures(*(Compared(1.5, 1.0),) * 4, num_components=48)
REFERENCE = Report(
    checkpoint="toy",
    weights_hash="abc",
    train_data="train",
    test_data="test",
    device="cpu",
    torch_version="2",
    options=EvaluateOptions(),
    classifier=ClassifierFacts(weights_hash="def", test_accuracy=0.9, feature_dim=8, data="train"),
    bound=None,
    reconstruction=None,
    left_out=(),
    model=ModelFacts(1, (8, 8), 1, None, (), 20, "linear", "epsilon", "fixed_small", (8,)),
    seeds=(0,),
    points=(),
)


def report_of(frechet: float | None, accuracy: float | None) -> Report:
    figures = SampleFigures(
        seed=0,
        class_accuracy=None if accuracy is None else ClassAccuracy(accuracy, real=0.9, num_real=10, per_class=()),
        classifier_frechet_distance=None if frechet is None else FrechetDistance(frechet, 1.0, 10, 10),
        pixels=PIXELS,
        memorisation=Memorisation(samples=NEAREST, real=NEAREST, num_train=10),
        seconds_per_image=0.1,
    )
    return dataclasses.replace(REFERENCE, points=(PointFigures("ddim", 50, 1.0, 50, (figures,)),))


def test_a_markdown_table_has_a_line_a_row_whatever_its_cells_hold() -> None:
    lines = Table(("a", "b"), ((HOSTILE, "1"), ("2", HOSTILE))).to_markdown().splitlines()
    assert lines[:2] == ["| a | b |", "| --- | --- |"]
    assert len(lines) == 4
    assert [line.replace("\\|", "").count("|") for line in lines] == [3] * 4


@pytest.mark.parametrize(
    ("frechet", "accuracy", "reason"),
    [
        (10.0, 0.8, None),
        (10.19, 0.791, None),
        (10.21, 0.8, r"the Fréchet distance is 1\.021 times"),
        (10.0, 0.789, r"class accuracy moves by -0\.011"),
        (11.0, None, "Fréchet"),
        (None, 0.5, "class accuracy"),
        (math.nan, 0.8, "Fréchet"),
    ],
)
def test_candidate_is_ok_unless_a_figure_is_worse(
    frechet: float | None, accuracy: float | None, reason: str | None
) -> None:
    result = compare_reports(report_of(10.0, 0.8), report_of(frechet, accuracy))
    assert result.ok is (reason is None)
    assert (result.frechet_ratio is None, result.accuracy_difference is None) == (frechet is None, accuracy is None)
    if frechet is not None and not math.isnan(frechet):
        assert result.frechet_ratio == pytest.approx(frechet / 10)
    if accuracy is not None:
        assert result.accuracy_difference == pytest.approx(accuracy - 0.8)
    if reason is not None:
        assert re.search(reason, result.reason)
