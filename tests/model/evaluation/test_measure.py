"""Several points and seeds: each is what it is alone, and what is kept is not measured again."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.model.evaluation.toys import CPU, OPTIONS, toy_checkpoint, toy_images
from tminus.model import checkpoint as checkpoint_module
from tminus.model.checkpoint import Checkpoint
from tminus.model.evaluation import evaluate as measure
from tminus.model.evaluation import samples
from tminus.model.evaluation.classifier import Classifier
from tminus.model.evaluation.evaluate import ResultCache, evaluate
from tminus.model.evaluation.report import Report
from tminus.model.evaluation.samples import EvaluateError, EvaluateOptions, Point
from tminus.model.samplers import Plan, compile_plan
from tminus.model.unet import UNet2D

pytestmark = pytest.mark.slow

TRAIN, TEST = toy_images(96, 0), toy_images(60, 1)
PLAIN = dataclasses.replace(OPTIONS, guidance=1.0)
POINTS = (Point("ddim", 2), Point("ddim", 4), Point("ddpm", 3))
SEEDS = (5, 2**64 - 1)
Run = Callable[..., Report]


@pytest.fixture
def run(toy_classifier: Classifier) -> Run:
    """Evaluate the toy checkpoint at POINTS by SEEDS, unless told otherwise."""

    def evaluated(
        points: Sequence[Point] = POINTS,
        seeds: Sequence[int] = SEEDS,
        *,
        checkpoint: Checkpoint | None = None,
        options: EvaluateOptions = PLAIN,
        references: Sequence[Point] = (),
        folder: Path | None = None,
    ) -> Report:
        return evaluate(
            checkpoint or toy_checkpoint(), TRAIN, TEST, toy_classifier, options, device=CPU,
            points=points, seeds=seeds, references=references, cache=ResultCache(folder),
        )  # fmt: skip

    return evaluated


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Which samples were drawn: sampler, steps, seed."""
    calls: list[tuple[str, int, int]] = []

    def counted(net: object, checkpoint: Checkpoint, options: EvaluateOptions, **others: object) -> Tensor:
        calls.append((options.sampler, options.steps, options.seed))
        return samples.draw_samples(net, checkpoint, options, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "draw_samples", counted)
    return calls


# --- several points and seeds ---


def test_each_point_and_seed_has_the_figures_of_a_run_of_its_own(run: Run, toy_classifier: Classifier) -> None:
    report = run()
    assert [(point.sampler, point.steps) for point in report.points] == [("ddim", 2), ("ddim", 4), ("ddpm", 3)]
    for point in report.points:
        for each in point.seeds:
            options = dataclasses.replace(PLAIN, sampler=point.sampler, steps=point.steps, seed=each.seed)
            alone = evaluate(toy_checkpoint(), TRAIN, TEST, toy_classifier, options, device=CPU)
            assert alone.first == each
            assert alone.points[0].passes == point.passes
    assert len({each.classifier_frechet_distance for point in report.points for each in point.seeds}) == 6


def test_points_that_cannot_be_made_are_left_out_with_their_reason(run: Run) -> None:
    report = run((Point("ddim", 21), *POINTS), references=(Point("ddpm", 1000),))
    assert [(point.sampler, point.steps) for point in report.points] == [("ddim", 2), ("ddim", 4), ("ddpm", 3)]
    assert report.references == ()
    left_out = {item.what: item.why for item in report.left_out}
    assert left_out == {
        "ddim, 21 steps": "steps must be 1..20, got 21",
        "ddpm, 1000 steps": "steps must be 1..20, got 1000",
    }
    with pytest.raises(ValueError, match=r"steps must be 1\.\.20, got 50"):
        run((Point("ddim", 50), Point("ddpm", 60)))


def test_samples_that_are_not_finite_leave_out_their_point_only(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(net: object, checkpoint: Checkpoint, options: EvaluateOptions, **others: object) -> Tensor:
        if options.sampler == "ddpm" and options.seed == SEEDS[1]:
            raise EvaluateError("toy: samples 0..3 are not finite")
        return samples.draw_samples(net, checkpoint, options, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(measure, "draw_samples", draw)
    report = run()
    assert [point.sampler for point in report.points] == ["ddim", "ddim"]
    assert [item.what for item in report.left_out] == ["ddpm, 3 steps"]
    with pytest.raises(EvaluateError, match="not finite"):
        run(POINTS[2:])


# --- what is kept ---


def test_what_is_kept_is_not_measured_again(
    run: Run, drawn: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(folder=tmp_path)
    assert len(drawn) == 6
    assert first == run()
    drawn.clear()
    monkeypatch.setattr(measure, "measure_bound", None)
    again = run(folder=tmp_path)
    assert drawn == []
    assert again == first
    assert again.to_json() == first.to_json(), "seconds an image are kept too"
    assert [point.sheet for point in again.points] == [point.sheet for point in first.points]


def test_other_settings_images_and_checkpoints_are_measured_afresh(
    run: Run, toy_classifier: Classifier, drawn: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = 1
    run(POINTS[:1], (5,), folder=tmp_path)
    changes: tuple[dict[str, Any], ...] = ({"num_samples": 11}, {"executor": "another"}, {"guidance_interval": (0, 5)})
    for change in changes:
        expected += 1
        run(POINTS[:1], (5,), folder=tmp_path, options=dataclasses.replace(PLAIN, **change))
        assert len(drawn) == expected, change
    run(POINTS[:1], (5,), folder=tmp_path, options=dataclasses.replace(PLAIN, batch_size=3))
    assert len(drawn) == expected, "samples do not depend on how they are batched"

    checkpoint = toy_checkpoint()
    net = UNet2D(dataclasses.replace(checkpoint.net.config, flip_sin_to_cos=False))  # of the same weights
    net.load_state_dict(checkpoint.net.state_dict())
    for other in (dataclasses.replace(checkpoint, weights_hash="another"), dataclasses.replace(checkpoint, net=net)):
        expected += 1
        run(POINTS[:1], (5,), folder=tmp_path, checkpoint=other)
        assert len(drawn) == expected
    flipped = dataclasses.replace(TEST, images=TEST.images.flip(0).clone(), labels=TEST.labels.flip(0))  # type: ignore[union-attr]
    for test in (TEST, flipped, TEST):
        evaluate(toy_checkpoint(), TRAIN, test, toy_classifier, PLAIN, device=CPU, cache=ResultCache(tmp_path))
    assert len(drawn) == expected + 2

    def changed(*arguments: object, **others: object) -> Plan:
        plan = compile_plan(*arguments, **others)  # type: ignore[arg-type]
        return dataclasses.replace(plan, lines=plan.lines * 1.0001)

    monkeypatch.setattr(checkpoint_module, "compile_plan", changed)
    run(POINTS[:1], (5,), folder=tmp_path)
    assert len(drawn) == expected + 3


@pytest.mark.parametrize("damage", ["{", "{}", "whole"])
def test_what_is_damaged_is_measured_again(run: Run, drawn: list[object], tmp_path: Path, damage: str) -> None:
    first = run(POINTS[:1], (5,), folder=tmp_path)
    for file in tmp_path.iterdir():
        content = json.loads(file.read_text())
        content["result"] = {"other": 1}
        file.write_text(json.dumps(content) if damage == "whole" else damage)
    assert run(POINTS[:1], (5,), folder=tmp_path) == first
    assert len(drawn) == 2
    assert run(POINTS[:1], (5,), folder=tmp_path) == first
    assert len(drawn) == 2, "and is kept again"
