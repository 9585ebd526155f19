import pytest

from tests.model.evaluation.toys import toy_checkpoint
from tminus.model.evaluation.options import Point, make_points, without_guidance


def test_every_combination_is_a_point_once() -> None:
    points = make_points(toy_checkpoint(), ["ddim", "ddpm", "ddim"], [5, 10], [1.0, 2.0])
    assert len(points) == 8
    assert {*points} == {Point(s, n, g) for s in ("ddim", "ddpm") for n in (5, 10) for g in (1.0, 2.0)}


def test_a_sampler_that_is_none_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"sampler must be all or among ddpm, ddim, .*, got 'dpm'"):
        make_points(toy_checkpoint(), ["ddim", "dpm"], [5], [1.0])


def test_points_without_guidance_are_plain_and_say_which_scales_are_left_out() -> None:
    points, left_out = without_guidance([Point("ddim", 5, 2.0), Point("ddim", 5), Point("ddpm", 5, 0.0)])
    assert points == (Point("ddim", 5), Point("ddpm", 5))
    assert [item.what for item in left_out] == ["guidance 0", "guidance 2"]
    assert without_guidance([Point("ddim", 5)]) == ((Point("ddim", 5),), ())
