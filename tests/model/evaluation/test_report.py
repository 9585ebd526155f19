import dataclasses
import math
import re

import pytest

from tminus.model.evaluation.figures import (
    ClassAccuracy,
    ClassifierFacts,
    FrechetDistance,
    Memorisation,
    NearestSummary,
)
from tminus.model.evaluation.options import EvaluateOptions
from tminus.model.evaluation.report import EvaluationReport, Table, compare_reports

HOSTILE = "<script>alert(1)</script>|\"&'\n\n# b"
NEAREST = NearestSummary(minimum=0.1, percentile_1=0.2, median=0.3, num_images=10)
REFERENCE = EvaluationReport(
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
    class_accuracy=ClassAccuracy(samples=0.8, real=0.9, num_real=10, per_class=()),
    classifier_frechet_distance=FrechetDistance(samples=10.0, real=1.0, num_real=10, num_test=10),
    memorisation=Memorisation(samples=NEAREST, real=NEAREST, num_train=10),
    left_out=(),
)


def test_a_markdown_table_has_a_line_a_row_whatever_its_cells_hold() -> None:
    lines = Table(("a", "b"), ((HOSTILE, "1"), ("2", HOSTILE))).to_markdown().splitlines()
    assert lines[:2] == ["| a | b |", "| --- | --- |"]
    assert len(lines) == 4
    assert [line.replace("\\|", "").count("|") for line in lines] == [3] * 4


def candidate(frechet: float | None, accuracy: float | None) -> EvaluationReport:
    assert REFERENCE.class_accuracy is not None
    assert REFERENCE.classifier_frechet_distance is not None
    return dataclasses.replace(
        REFERENCE,
        device="a GPU",
        options=EvaluateOptions(precision="bfloat16", executor="openvino", batch_size=8),
        class_accuracy=None if accuracy is None else dataclasses.replace(REFERENCE.class_accuracy, samples=accuracy),
        classifier_frechet_distance=None
        if frechet is None
        else dataclasses.replace(REFERENCE.classifier_frechet_distance, samples=frechet),
    )


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
    result = compare_reports(REFERENCE, candidate(frechet, accuracy))
    assert result.ok is (reason is None)
    assert (result.frechet_ratio is None, result.accuracy_difference is None) == (frechet is None, accuracy is None)
    if frechet is not None and not math.isnan(frechet):
        assert result.frechet_ratio == pytest.approx(frechet / 10)
    if accuracy is not None:
        assert result.accuracy_difference == pytest.approx(accuracy - 0.8)
    if reason is not None:
        assert re.search(reason, result.reason)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"options": EvaluateOptions(seed=1)}, "seed is 0 in one and 1 in the other"),
        ({"options": EvaluateOptions(num_samples=2)}, "num_samples"),
        ({"options": EvaluateOptions(guidance_interval=(1, 2))}, "guidance_interval"),
        ({"weights_hash": "xyz"}, "weights_hash"),
        ({"test_data": "others"}, "test_data"),
        ({"classifier": None}, "classifier"),
    ],
)
def test_reports_of_different_samples_are_not_compared(change: dict[str, object], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        compare_reports(REFERENCE, dataclasses.replace(REFERENCE, **change))  # type: ignore[arg-type]
