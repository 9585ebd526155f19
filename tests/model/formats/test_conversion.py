from typing import Any

import pytest

from tminus.model.formats.conversion import GivenFacts


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"variance": "learned"}, "--variance must be fixed_small or fixed_large, got 'learned'"),
        ({"image_size": 0}, r"--image-size must be 1\.\.4096, got 0"),
        ({"timesteps": 10**9}, r"--timesteps must be 1\.\.100000, got 1000000000"),
        ({"beta_start": -0.1}, r"--beta-start must be 0\.\.1, got -0.1"),
        ({"heads": 4, "head_width": 64}, "--heads or --head-width, not both: got 4 and 64"),
    ],
)
def test_value_out_of_bounds_is_refused_by_its_flag(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GivenFacts(**facts)


def test_ends_of_a_schedule_are_asked_for_where_projects_differ_and_told_where_they_are_taken() -> None:
    facts = {"timesteps": 1000, "prediction": "epsilon", "variance": "fixed_small"}
    for schedule in ("scaled_linear", "sigmoid"):
        assert {"beta_start", "beta_end"} <= set(GivenFacts(beta_schedule=schedule).needed_for_noise())
    own = GivenFacts(**facts, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)  # type: ignore[arg-type]
    assert (own.noise().beta_start, own.noise().beta_end) == (0.00085, 0.012)
    assert own.noise_notes(own.noise()) == ("x_0 is clipped to [-1, 1]",)
    usual = GivenFacts(**facts, beta_schedule="linear")  # type: ignore[arg-type]
    assert usual.noise_notes(usual.noise()) == ("betas from 0.0001 to 0.02", "x_0 is clipped to [-1, 1]")
    assert (
        usual.noise(scaled=True).beta_end,
        GivenFacts(timesteps=4000, beta_schedule="linear").noise(scaled=True).beta_end,
    ) == (0.02, 0.005)
