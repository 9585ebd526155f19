import math
from itertools import pairwise

import numpy as np
import pytest
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from tminus.model.catalogue import SAMPLER_FACTS, SAMPLERS
from tminus.model.noise import NoiseConfig
from tminus.model.timesteps import RHO, SIGMA_MAX, SIGMA_MIN, log_sigma_at, make_timesteps, timesteps_of_passes

EVEN_SPACINGS = ("leading", "trailing", "linspace")  # in t; these need no noise schedule
LINEAR = NoiseConfig().schedule().log_sigmas

SOME = (1, 2, 3, 7, 14, 15, 20, 48, 50, 100, 250, 333, 499, 500, 501, 667, 999)


@pytest.mark.parametrize(("num_timesteps", "steps"), [(37, range(1, 38)), (1000, SOME)])
@pytest.mark.parametrize("spacing", EVEN_SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_timesteps_equal_those_of_diffusers(sampler: str, spacing: str, num_timesteps: int, steps: range) -> None:
    multistep = SAMPLER_FACTS[sampler].leaves_out_cleanest
    cls = DPMSolverMultistepScheduler if multistep else DDPMScheduler
    scheduler = cls(num_train_timesteps=num_timesteps, timestep_spacing=spacing)
    for count in steps:
        if count > SAMPLER_FACTS[sampler].max_steps(num_timesteps):
            continue
        scheduler.set_timesteps(count)
        theirs = scheduler.timesteps.tolist()
        if spacing == "trailing" and len(theirs) == count + 1:
            assert theirs.pop() == -1  # their arange goes one too far
        if len(set(theirs)) < count:
            assert (multistep, count) == (True, num_timesteps)  # theirs repeat themselves; ours are the whole chain
            theirs = list(range(num_timesteps - 1, -1, -1))
        assert make_timesteps(sampler, spacing, count, num_timesteps) == theirs


PASSES = {
    "ddim": (DDIMScheduler, {}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True}),
    "pndm": (PNDMScheduler, {}),
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
}


@pytest.mark.parametrize("steps", [1, 2, 3, 20, 98, 333])
@pytest.mark.parametrize("spacing", EVEN_SPACINGS)
@pytest.mark.parametrize("sampler", PASSES)
def test_passes_that_revisit_a_timestep_or_lie_between_are_those_of_diffusers(
    sampler: str, spacing: str, steps: int
) -> None:
    if sampler == "pndm" and (steps < 4 or spacing != "leading"):
        return  # not defined in diffusers, or with middles that are those of equal steps
    cls, settings = PASSES[sampler]
    scheduler = cls(timestep_spacing=spacing, **settings)
    scheduler.set_timesteps(steps)
    ours = timesteps_of_passes(sampler, make_timesteps(sampler, spacing, steps, 1000, fractional=True))
    assert len(ours) == SAMPLER_FACTS[sampler].num_passes(steps)
    np.testing.assert_allclose(ours, scheduler.timesteps.numpy(), rtol=0, atol=1e-4)  # theirs are float32


@pytest.mark.parametrize(("spacing", "differ"), [("leading", 0), ("trailing", 507), ("linspace", 540)])
def test_middles_of_pndm_differ_from_those_of_diffusers_at_these_step_counts_alone(spacing: str, differ: int) -> None:
    theirs, others = PNDMScheduler(timestep_spacing=spacing), 0
    for steps in range(4, SAMPLER_FACTS["pndm"].max_steps(1000) + 1):
        theirs.set_timesteps(steps)
        ours = timesteps_of_passes("pndm", make_timesteps("pndm", spacing, steps, 1000))
        others += ours != theirs.timesteps.tolist()[: len(ours)]
    assert others == differ


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_takes_more_passes_than_there_are_timesteps(sampler: str) -> None:
    facts = SAMPLER_FACTS[sampler]
    for T in (1, 2, 3, 10, 999, 1000):
        most = facts.max_steps(T)
        assert facts.num_passes(most) <= T or most == 1
        assert facts.num_passes(most + 1) > T
        for steps in {1, 2, 3, 4, most}:
            if steps <= most:
                t = make_timesteps(sampler, "linspace", steps, T)
                assert len(timesteps_of_passes(sampler, t)) == facts.num_passes(steps)
        with pytest.raises(ValueError, match=rf"steps must be 1\.\.{most}( for {sampler})?, got {most + 1}"):
            make_timesteps(sampler, "linspace", most + 1, T)


@given(st.integers(1, 60))
def test_exact_karras_has_the_noise_levels_of_the_ramp_between_whole_timesteps(steps: int) -> None:
    t = make_timesteps("euler", "karras", steps, 1000, log_sigmas=LINEAR, fractional=True)
    assert t[0] == 999
    assert all(now > then for now, then in pairwise(t))
    levels = [math.exp(log_sigma_at(each, LINEAR)) for each in t]
    np.testing.assert_allclose(levels[1:], paper(steps, LINEAR)[1:], rtol=1e-9)
    whole = make_timesteps("euler", "karras", steps, 1000, log_sigmas=LINEAR)
    assert whole == make_timesteps("ddim", "karras", steps, 1000, log_sigmas=LINEAR)


@given(
    st.sampled_from(("ddpm", "dpmpp_2m")),
    st.sampled_from(EVEN_SPACINGS),
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


# --- karras -------------------------------------------------------------------------------------------------------

CONFIGS = {
    "linear": NoiseConfig(),
    "cosine": NoiseConfig(beta_schedule="squaredcos_cap_v2"),
    "smallest sigma nearly SIGMA_MIN": NoiseConfig(beta_schedule="scaled_linear", beta_start=85e-5, beta_end=12e-3),
    "smallest sigma above SIGMA_MIN": NoiseConfig(num_train_timesteps=60, beta_start=0.01, beta_end=0.3),
    "largest sigma below SIGMA_MIN": NoiseConfig(num_train_timesteps=60, beta_start=1e-6, beta_end=2e-5),
    "all sigmas above SIGMA_MAX": NoiseConfig(num_train_timesteps=12, trained_betas=(1 - 1e-6, *[0.5] * 11)),
    "zero snr": NoiseConfig(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
}


def karras(steps: int, log_sigmas: list[float]) -> list[float]:
    return make_timesteps("dpmpp_2m", "karras", steps, len(log_sigmas), log_sigmas=log_sigmas)


def paper(steps: int, log_sigmas: list[float], rho: float = RHO) -> np.ndarray:
    """Karras et al. 2022, eq. 5: sigma_i = (max^(1/rho) + i / (N - 1) (min^(1/rho) - max^(1/rho)))^rho -> [S]."""
    sigmas = np.exp(np.array(log_sigmas))
    sigmas = sigmas[np.isfinite(sigmas)]
    sigma_min = sigmas.min()
    sigma_max = max(sigma_min, min(sigmas.max(), SIGMA_MAX))
    if sigma_min < SIGMA_MIN < sigma_max:
        sigma_min = SIGMA_MIN
    i = np.arange(steps)
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (high + i / max(1, steps - 1) * (low - high)) ** rho


def made_different(t: np.ndarray) -> np.ndarray:
    """The closest thing below t that falls by 1 or more, raised to what leaves room for the steps to come."""
    k = np.arange(len(t))
    return np.maximum(np.minimum.accumulate(t + k) - k, k[::-1])


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_karras_is_equation_5_rounded_to_the_nearest_log_sigma_and_made_different(config: NoiseConfig) -> None:
    alpha_bar = np.cumprod(1 - config.schedule().betas.numpy())
    with np.errstate(divide="ignore"):
        log_sigmas = np.log(np.sqrt((1 - alpha_bar) / alpha_bar))
    for steps in (s for s in (*range(1, 61), 100, 250, 500, 999, 1000) if s <= len(alpha_bar)):
        distance = np.abs(log_sigmas - np.log(paper(steps, log_sigmas.tolist()))[:, None])  # [S, T]
        t = distance.argmin(axis=1)
        t[0] = len(alpha_bar) - 1
        assert karras(steps, config.schedule().log_sigmas) == made_different(t).tolist()
