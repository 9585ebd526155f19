"""The losses of a run as points, and as a plot that an XML parser reads."""

import json
import math
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tminus.model.training.curve import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    LossCurve,
    loss_svg,
)

SVG = "{http://www.w3.org/2000/svg}"
losses = st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=200)


def fed(values: list[float], curve: LossCurve | None = None, after: int = 0) -> LossCurve:
    curve = curve or LossCurve()
    for step, value in enumerate(values, after + 1):
        curve.add(step, torch.tensor(value))
    return curve


@given(st.lists(st.floats(0.125, 10, width=32), max_size=60), st.integers(0, 60))
def test_a_curve_that_is_kept_as_json_goes_on_to_the_bit(values: list[float], cut: int) -> None:
    again = LossCurve()
    again.load(json.loads(json.dumps(fed(values[:cut]).state())))
    assert fed(values[cut:], again, after=min(cut, len(values))).state() == fed(values).state()


def test_a_long_run_has_few_points_each_of_which_is_the_mean_of_its_steps() -> None:
    steps = 10 * MOST_POINTS + 60
    curve = fed([float(step) for step in range(1, steps + 1)])
    assert len(curve.points) == MOST_POINTS // 2 + 3
    for (before, _), (step, mean) in zip([(0, 0.0), *curve.points], curve.points, strict=False):
        assert mean == pytest.approx((before + 1 + step) / 2)
    assert curve.points[-1][0] == steps


@given(st.lists(st.floats(0.125, 10, width=32), min_size=1, max_size=400))
def test_the_loss_in_the_progress_is_the_mean_over_the_last_hundred_steps(values: list[float]) -> None:
    last = values[-(100 + len(values) % 10) :] if len(values) > 100 else values
    assert fed(values).recent() == pytest.approx(sum(last) / len(last), rel=1e-4)
    assert math.isnan(LossCurve().recent())


@given(losses, st.text(st.characters(exclude_categories=["C"]), max_size=20))
def test_a_plot_is_xml_within_its_frame_and_falls_where_the_loss_does(values: list[float], name: str) -> None:
    points = [(10 * k, value) for k, value in enumerate(values, 1)]
    root = ElementTree.fromstring(loss_svg(points, name))
    every, _ = root.findall(f"{SVG}polyline")
    drawn = [tuple(map(float, pair.split(","))) for pair in every.get("points", "").split()]
    assert len(drawn) == len(points)
    for (x, y), (step, value), (_, further) in zip(drawn, points, points[1:], strict=False):
        assert LEFT <= x <= WIDTH - RIGHT
        assert TOP - 0.1 <= y <= HEIGHT - BOTTOM + 0.1
        following = drawn[step // 10][1]
        assert following >= y - 0.11 if further <= value else following <= y + 0.11
    ticks = [each for each in root.findall(f"{SVG}text") if each.get("text-anchor")]
    assert len([each for each in ticks if each.get("text-anchor") == "end"]) >= 1
    assert 2 <= len([each for each in ticks if each.get("text-anchor") == "middle"]) <= 11
    assert name in (root.findtext(f"{SVG}text") or "")
