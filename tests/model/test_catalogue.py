"""What tminus.json may recommend."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tminus.model.catalogue import MAX_GUIDANCE, SAMPLERS, Recommended

GOOD: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 20, "guidance": 1.5}


def read(value: object, *, has_null_class: bool = True) -> Recommended:
    return Recommended.from_json(value, samplers=SAMPLERS, num_timesteps=1000, has_null_class=has_null_class)


@given(st.sampled_from(SAMPLERS), st.integers(1, 1000), st.floats(0, MAX_GUIDANCE) | st.integers(0, int(MAX_GUIDANCE)))
def test_every_sampler_number_of_steps_and_guidance_that_is_served_is_read(
    sampler: str, steps: int, guidance: float
) -> None:
    assert read({"sampler": sampler, "steps": steps, "guidance": guidance}) == Recommended(sampler, steps, guidance)


@pytest.mark.parametrize("has_null_class", [False, True])
def test_guidance_may_be_left_out_and_is_off_then(has_null_class: bool) -> None:
    for value in ({"sampler": "ddim", "steps": 50}, {"sampler": "ddim", "steps": 50, "guidance": 1}):
        assert read(value, has_null_class=has_null_class) == Recommended("ddim", 50, 1.0)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dpmpp_2m", r"recommended must be an object with sampler, steps, guidance, got 'dpmpp_2m'"),
        ([], r"recommended must be an object with sampler, steps, guidance, got \[\]"),
        (GOOD | {"eta": 0}, r"each member of recommended must be one of sampler, steps, guidance, got 'eta'"),
        (GOOD | {"sampler": "rk45"}, r"recommended sampler must be one of ddpm, ddim, dpmpp_2m, .*, got 'rk45'"),
        ({"steps": 20}, r"recommended sampler must be one of ddpm, ddim, dpmpp_2m, .*, got None"),
        (GOOD | {"sampler": ["ddim"]}, r"recommended sampler must be one of .*, got \['ddim'\]"),
        ({"sampler": "ddim"}, r"recommended steps must be an integer in 1\.\.1000, got None"),
        (GOOD | {"steps": 0}, r"recommended steps must be an integer in 1\.\.1000, got 0"),
        (GOOD | {"steps": 1001}, r"recommended steps must be an integer in 1\.\.1000, got 1001"),
        (GOOD | {"steps": True}, r"recommended steps must be an integer in 1\.\.1000, got True"),
        (GOOD | {"steps": 20.0}, r"recommended steps must be an integer in 1\.\.1000, got 20\.0"),
        (GOOD | {"guidance": -0.1}, r"recommended guidance must be a number in 0\.\.50, got -0\.1"),
        (GOOD | {"guidance": 50.1}, r"recommended guidance must be a number in 0\.\.50, got 50\.1"),
        (GOOD | {"guidance": float("nan")}, r"recommended guidance must be a number in 0\.\.50, got nan"),
        (GOOD | {"guidance": True}, r"recommended guidance must be a number in 0\.\.50, got True"),
        (GOOD | {"guidance": None}, r"recommended guidance must be a number in 0\.\.50, got None"),
        (GOOD | {"sampler": "x" * 1000}, r"got 'x{99}$"),
    ],
)
def test_what_could_not_be_asked_for_is_refused_by_name_bound_and_value(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(value)


def test_guidance_is_not_recommended_where_there_is_no_null_class() -> None:
    with pytest.raises(ValueError, match=r"recommended guidance must be 1 \(off\) without a null_class, got 1\.5"):
        read(GOOD, has_null_class=False)
