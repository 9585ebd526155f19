"""Ladders."""

from hypothesis import given
from hypothesis import strategies as st

from tminus.model.catalogue import Recommended, Rung, default_ladder, ladder_from_json, ladder_of

TABLES = [Recommended("tuned", 5, 1.5), Recommended("tuned", 8, 1.5), Recommended("tuned", 3)]


def settings(own: Recommended, tables: list[Recommended] | None = None) -> list[tuple[str, int]]:
    rungs = default_ladder(own, tables or [])
    assert {rung.guidance for rung in rungs} == {own.guidance}
    return [(rung.sampler, rung.steps) for rung in rungs]


def test_without_a_ladder_the_steps_are_halved_down_to_the_good_ones_and_then_come_tables() -> None:
    assert settings(Recommended("ddpm", 1000)) == [("ddpm", steps) for steps in (1000, 500, 250, 125, 100)]
    assert settings(Recommended("dpmpp_2m", 20)) == [("dpmpp_2m", 20)]
    assert settings(Recommended("dpmpp_2m", 7)) == [("dpmpp_2m", 7)], "fewer than the good ones"
    assert settings(Recommended("ddim", 60, 1.5), TABLES) == [("ddim", 60), ("ddim", 50), ("tuned", 8), ("tuned", 5)]
    assert settings(Recommended("tuned", 8, 1.5), TABLES) == [("tuned", 8), ("tuned", 5)]
    assert settings(Recommended("tuned", 5, 1.5), TABLES) == [("tuned", 5)]


def test_a_setting_that_takes_longer_and_is_no_better_is_left_out() -> None:
    best, fast = Rung("tuned", 8, 1.0, None, 2.3, 1.4), Rung("tuned", 5, 1.0, None, 3.7, 1.6)
    beaten = Rung("ddim", 20, 1.0, None, 2.4, 1.4)
    student = Rung("consistency", 2, 1.0, "student", 3.65, 1.8)
    assert ladder_of([fast, beaten, student, best]) == (best, fast, student)
    near, far = Rung("ddim", 10, 1.0, None, 2.0, 9.0), Rung("plms", 9, 1.0, None, 3.0, 1.0)
    assert ladder_of([far, near]) == (near,), "as many passes: the shorter distance in the classifier's features"
    blind, blinder = Rung("ddim", 20, 1.0, None, None, 1.0), Rung("ddim", 10, 1.0, None, None, 2.0)
    assert ladder_of([blinder, blind]) == (blind, blinder), "a model without classes has no classifier"


@given(st.lists(st.tuples(st.integers(1, 50), st.none() | st.floats(0, 9), st.none() | st.floats(0, 9)), min_size=1))
def test_a_measured_ladder_is_one_that_tminus_json_may_have(
    found: list[tuple[int, float | None, float | None]],
) -> None:
    measured = [Rung("ddim", steps, 1.0, None, distance, in_pixels) for steps, distance, in_pixels in found]
    ladder = ladder_of(measured)[-16:]
    members = [
        {"sampler": "ddim", "steps": r.steps, "distance": r.distance, "pixel_distance": r.pixel_distance}
        for r in ladder
    ]
    assert ladder_from_json(members, 1000, has_null_class=False) == ladder
    assert ladder_of(ladder) == ladder
    for rung in measured:
        assert any(r.passes <= rung.passes and min(r.distances) <= max(rung.distances) for r in ladder_of(measured))
