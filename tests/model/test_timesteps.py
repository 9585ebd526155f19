from itertools import pairwise

import pytest
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from hypothesis import given
from hypothesis import strategies as st

from model.timesteps import SPACINGS, make_timesteps

ALL = range(1, 61)
SOME = (1, 2, 3, 7, 14, 15, 20, 48, 50, 100, 250, 333, 499, 500, 501, 667, 999)


@pytest.mark.parametrize(("num_timesteps", "steps"), [(60, ALL), (37, range(1, 38)), (1000, SOME), (999, SOME)])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m"])
def test_timesteps_equal_those_of_diffusers(sampler: str, spacing: str, num_timesteps: int, steps: range) -> None:
    cls = DPMSolverMultistepScheduler if sampler == "dpmpp_2m" else DDPMScheduler
    scheduler = cls(num_train_timesteps=num_timesteps, timestep_spacing=spacing)
    for count in steps:
        scheduler.set_timesteps(count)
        theirs = scheduler.timesteps.tolist()
        if spacing == "trailing" and len(theirs) == count + 1:
            assert theirs.pop() == -1  # their arange goes one too far
        if len(set(theirs)) < count:
            assert (sampler, count) == ("dpmpp_2m", num_timesteps)  # theirs repeat themselves; ours are the whole chain
            theirs = list(range(num_timesteps - 1, -1, -1))
        assert make_timesteps(sampler, spacing, count, num_timesteps) == theirs


@pytest.mark.parametrize("steps", [1, 5, 20, 333])
@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
def test_leading_offset_equals_that_of_diffusers(sampler: str, steps: int) -> None:
    cls = DPMSolverMultistepScheduler if sampler == "dpmpp_2m" else DDPMScheduler
    scheduler = cls(timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(steps)
    assert make_timesteps(sampler, "leading", steps, 1000, 1) == scheduler.timesteps.tolist()


@given(
    st.sampled_from(("ddpm", "dpmpp_2m")),
    st.sampled_from(SPACINGS),
    st.one_of(st.integers(1, 1200), st.integers(90_000, 100_000)),
    st.data(),
)
def test_timesteps_fall_strictly_inside_the_chain(
    sampler: str, spacing: str, num_timesteps: int, data: st.DataObject
) -> None:
    steps = data.draw(st.integers(1, num_timesteps))
    offset = data.draw(st.integers(0, num_timesteps - 1))
    t = make_timesteps(sampler, spacing, steps, num_timesteps, offset)
    assert len(t) == steps
    assert 0 <= t[-1] <= t[0] < num_timesteps
    assert all(now > then for now, then in pairwise(t))


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_every_spacing_of_all_steps_is_the_whole_chain(spacing: str, sampler: str) -> None:
    assert make_timesteps(sampler, spacing, 1000, 1000, 1) == list(range(999, -1, -1))


def test_timesteps_of_each_spacing_are_those_of_lin_et_al_table_2() -> None:
    assert make_timesteps("ddpm", "leading", 10, 1000) == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert make_timesteps("ddpm", "leading", 10, 1000, 1) == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert make_timesteps("ddpm", "trailing", 10, 1000) == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    assert make_timesteps("ddpm", "linspace", 10, 1000) == [999, 888, 777, 666, 555, 444, 333, 222, 111, 0]


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_number_of_steps_out_of_bounds_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"steps must be 1\.\.1000, got {steps}"):
        make_timesteps("ddpm", "leading", steps, 1000)


def test_unknown_spacing_is_refused() -> None:
    with pytest.raises(ValueError, match="'karras'"):
        make_timesteps("ddpm", "karras", 10, 1000)
