"""What tminus.json may recommend."""

from typing import Any

import pytest

from tminus.model.catalogue import SAMPLERS, Recommended

GOOD: dict[str, Any] = {"sampler": "dpmpp_2m", "steps": 20, "guidance": 1.5}


def read(value: object, *, has_null_class: bool = True) -> Recommended:
    return Recommended.from_json(value, samplers=SAMPLERS, num_timesteps=1000, has_null_class=has_null_class)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dpmpp_2m", r"recommended must be an object with sampler, steps, guidance, got 'dpmpp_2m'"),
        (GOOD | {"eta": 0}, r"each member of recommended must be one of sampler, steps, guidance, got 'eta'"),
        (GOOD | {"sampler": "rk45"}, r"recommended sampler must be one of ddpm, ddim, dpmpp_2m, .*, got 'rk45'"),
        (GOOD | {"steps": 0}, r"recommended steps must be an integer in 1\.\.1000, got 0"),
        (GOOD | {"guidance": 50.1}, r"recommended guidance must be a number in 0\.\.50, got 50\.1"),
        (GOOD | {"sampler": "x" * 1000}, r"got 'x{99}$"),
    ],
)
def test_what_could_not_be_asked_for_is_refused_by_name_bound_and_value(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(value)
