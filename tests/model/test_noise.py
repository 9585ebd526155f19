import dataclasses
import inspect
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st

from tminus.model.catalogue import SAMPLERS
from tminus.model.noise import (
    BETA_SCHEDULES,
    NoiseConfig,
    NoiseSchedule,
    make_betas,
    posterior_between,
    rescale_zero_snr,
)
from tminus.model.samplers import compile_plan
from tminus.model.scheduler_kinds import KIND_OF_SAMPLER

F64 = torch.float64


@pytest.fixture
def linear() -> NoiseSchedule:
    """The schedule of Ho et al. 2020."""
    return NoiseSchedule(make_betas("linear", 1000))


# --- the tables ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BETA_SCHEDULES)
@pytest.mark.parametrize("steps", [1000, 50])
def test_betas_equal_those_of_diffusers(name: str, steps: int) -> None:
    theirs = DDPMScheduler(num_train_timesteps=steps, beta_schedule=name, beta_start=2e-4, beta_end=0.03)
    ours = make_betas(name, steps, 2e-4, 0.03)
    assert ours.dtype == F64
    # theirs are float32; the cosine's are 1 - a ratio near 1, taken in float64 and then cast
    torch.testing.assert_close(ours, theirs.betas.double(), rtol=2e-6, atol=1e-9)


def test_unknown_beta_schedule_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'cosine'"):
        make_betas("cosine", 1000)


def test_linear_schedule_meets_the_published_numbers(linear: NoiseSchedule) -> None:
    assert linear.num_timesteps == 1000
    assert linear.betas[0].item() == pytest.approx(1e-4, rel=1e-15)
    assert linear.betas[-1].item() == pytest.approx(0.02, rel=1e-15)
    assert linear.alpha_bar[0].item() == pytest.approx(0.9999, rel=1e-15)
    assert linear.alpha_bar[999].item() == pytest.approx(4.035829765e-5, rel=1e-9)


def test_alpha_bar_is_the_product_taken_in_pure_python(linear: NoiseSchedule) -> None:
    factors = [1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(1000)]
    expected = [math.exp(math.fsum(math.log(f) for f in factors[: t + 1])) for t in (0, 1, 17, 500, 999)]
    assert linear.alpha_bar[[0, 1, 17, 500, 999]].tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "betas",
    [[0.0, 0.1], [0.1, 1.5], [0.1, -0.1], [0.1, math.nan], []],
    ids=["zero", "over one", "negative", "nan", "none"],
)
def test_betas_outside_their_interval_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas must"):
        NoiseSchedule(torch.tensor(betas, dtype=F64))


def test_betas_in_single_precision_are_refused() -> None:
    with pytest.raises(ValueError, match="float64"):
        NoiseSchedule(torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_log_sigmas_are_those_of_diffusers_and_rise(name: str) -> None:
    noise = NoiseConfig(beta_schedule=name)
    log_sigmas = noise.schedule().log_sigmas
    theirs = DDPMScheduler.from_config(noise.to_dict()).alphas_cumprod.double()
    expected = ((1 - theirs) / theirs).sqrt().log()
    # theirs are of float32 alphas_cumprod, near 1 at t = 0 and near 0 at t = T - 1
    torch.testing.assert_close(torch.tensor(log_sigmas, dtype=F64), expected, rtol=0, atol=2e-3)
    assert log_sigmas == sorted(log_sigmas)


def test_log_sigma_is_infinite_only_where_no_signal_is_left(linear: NoiseSchedule) -> None:
    assert linear.log_sigmas[0] == pytest.approx(math.log(math.sqrt(1e-4 / 0.9999)), rel=1e-12)
    assert linear.log_sigmas[-1] == pytest.approx(math.log(157.40728), rel=1e-7)
    rescaled = NoiseConfig(rescale_betas_zero_snr=True, prediction_type="sample").schedule().log_sigmas
    assert rescaled[-1] == math.inf
    assert all(math.isfinite(log_sigma) for log_sigma in rescaled[:-1])


# --- the forward process ------------------------------------------------------------------------------------------


def test_closed_form_has_the_moments_of_the_chain_stepped_one_by_one(linear: NoiseSchedule) -> None:
    mean, variance = torch.tensor(1.0, dtype=F64), torch.tensor(0.0, dtype=F64)
    x_0, zero = torch.ones(1, 1, 1, 1, dtype=F64), torch.zeros(1, 1, 1, 1, dtype=F64)
    for i, beta in enumerate(linear.betas):  # q(x_t|x_{t-1}) = N(sqrt(1 - beta) x_{t-1}, beta)
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
        t = torch.tensor([i])
        torch.testing.assert_close(linear.q_sample(x_0, t, zero).squeeze(), mean, rtol=1e-11, atol=0)
        torch.testing.assert_close(linear.q_sample(zero, t, x_0).squeeze() ** 2, variance, rtol=1e-11, atol=0)


def test_closed_form_and_a_simulated_chain_agree_in_distribution() -> None:
    schedule = NoiseSchedule(make_betas("linear", 20, 0.01, 0.3))
    generator = torch.Generator().manual_seed(0)
    x = torch.full((20_000, 1, 1, 1), 0.7, dtype=F64)
    for beta in schedule.betas:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(x.shape, generator=generator, dtype=F64)
    t = torch.tensor([19])
    eps = torch.randn(x.shape, generator=generator, dtype=F64)
    closed = schedule.q_sample(torch.full_like(x, 0.7), t, eps)
    assert x.mean().item() == pytest.approx(closed.mean().item(), abs=0.04)
    assert x.var().item() == pytest.approx(closed.var().item(), rel=0.06)
    assert x.mean().item() == pytest.approx(0.7 * math.sqrt(schedule.alpha_bar[-1]), abs=0.03)


def test_each_row_is_noised_at_its_own_timestep(linear: NoiseSchedule) -> None:
    x_0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    together = linear.q_sample(x_0, t, eps)
    for i in range(3):
        alone = linear.q_sample(x_0[i : i + 1], t[i : i + 1], eps[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_noising_equals_that_of_diffusers(linear: NoiseSchedule) -> None:
    x_0, eps, t = torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4), torch.tensor([0, 10, 500, 999])
    scheduler = DDPMScheduler()
    torch.testing.assert_close(linear.q_sample(x_0, t, eps), scheduler.add_noise(x_0, eps, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(linear.velocity(x_0, t, eps), scheduler.get_velocity(x_0, eps, t), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_images_keep_their_noise_at_the_first_timesteps(
    linear: NoiseSchedule, dtype: torch.dtype
) -> None:
    # 1 - alpha_bar taken in bfloat16 is 0 at t = 0, where diffusers adds no noise at all; it is 1e-4.
    x_0, one = torch.zeros(3, 1, 1, 1, dtype=dtype), torch.ones(3, 1, 1, 1, dtype=dtype)
    noised = linear.q_sample(x_0, torch.tensor([0, 1, 2]), one)
    assert noised.dtype == dtype
    expected = (1 - linear.alpha_bar[:3]).sqrt()
    torch.testing.assert_close(noised.flatten().double(), expected, rtol=2**-8, atol=0)


# --- the posterior ------------------------------------------------------------------------------------------------


def bayes(alpha_bar: torch.Tensor, alpha_bar_prev: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q(x_prev|x_t, x_0) by multiplying likelihood and prior, precisions adding: not Ho et al.'s closed form.

    Likelihood x_t = sqrt(a) x_prev + N(0, 1 - a) with a = alpha_bar / alpha_bar_prev; prior x_prev = sqrt(abar_prev)
    x_0 + N(0, 1 - abar_prev).
    """
    a = alpha_bar / alpha_bar_prev
    precision = a / (1 - a) + 1 / (1 - alpha_bar_prev)
    return alpha_bar_prev.sqrt() / (1 - alpha_bar_prev) / precision, a.sqrt() / (1 - a) / precision, 1 / precision


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_posterior_is_bayes_rule(name: str) -> None:
    schedule = NoiseSchedule(make_betas(name, 1000))
    expected = bayes(schedule.alpha_bar[1:], schedule.alpha_bar[:-1])
    for ours, theirs in zip(schedule.posterior(), expected, strict=True):
        torch.testing.assert_close(ours[1:], theirs, rtol=1e-9, atol=0)


def test_posterior_of_the_first_timestep_is_x_0_without_variance(linear: NoiseSchedule) -> None:
    coef_x0, coef_xt, variance = linear.posterior()
    assert (coef_x0[0].item(), coef_xt[0].item(), variance[0].item()) == (1.0, 0.0, 0.0)


def test_posterior_variance_is_below_beta_and_nears_it(linear: NoiseSchedule) -> None:
    variance = linear.posterior()[2]
    assert (variance < linear.betas).all()
    assert variance[-1] / linear.betas[-1] > 0.9999


@given(st.floats(1e-6, 1 - 1e-6), st.floats(1e-6, 1 - 1e-6))
def test_posterior_of_any_pair_of_steps_is_bayes_rule(one: float, other: float) -> None:
    low, high = sorted((one, other))
    if high - low < 1e-6:
        high = low + 0.5 * (1 - low)
    pair = torch.tensor(low, dtype=F64), torch.tensor(high, dtype=F64)
    for ours, theirs in zip(posterior_between(*pair), bayes(*pair), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)


def test_posterior_marginalises_to_the_closed_form(linear: NoiseSchedule) -> None:
    """Averaging q(x_{t-1}|x_t, x_0) over q(x_t|x_0) gives q(x_{t-1}|x_0)."""
    coef_x0, coef_xt, variance = (table[1:] for table in linear.posterior())
    alpha_bar, prev = linear.alpha_bar[1:], linear.alpha_bar[:-1]
    torch.testing.assert_close(coef_x0 + coef_xt * alpha_bar.sqrt(), prev.sqrt(), rtol=1e-11, atol=0)
    torch.testing.assert_close(coef_xt**2 * (1 - alpha_bar) + variance, 1 - prev, rtol=1e-9, atol=0)


# --- zero terminal SNR --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
def test_zero_snr_rescale_equals_that_of_diffusers(name: str) -> None:
    theirs = DDPMScheduler(beta_schedule=name, rescale_betas_zero_snr=True)
    ours = NoiseConfig(beta_schedule=name, rescale_betas_zero_snr=True, prediction_type="v_prediction").schedule()
    torch.testing.assert_close(ours.betas, theirs.betas.double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod.double(), rtol=0, atol=2e-6)


def test_zero_snr_rescale_keeps_the_first_alpha_bar_and_empties_the_last(linear: NoiseSchedule) -> None:
    rescaled = NoiseSchedule(rescale_zero_snr(linear.betas))
    assert rescaled.alpha_bar[0].item() == pytest.approx(linear.alpha_bar[0].item(), rel=1e-12)
    assert rescaled.alpha_bar[-1].item() == 0
    assert (rescaled.alpha_bar.diff() < 0).all()


# --- the config ---------------------------------------------------------------------------------------------------

ROUND_TRIPS = {
    "defaults": NoiseConfig(),
    "ddpm": NoiseConfig(variance_type="fixed_large", timestep_spacing="trailing", steps_offset=1, clip_sample=False),
    "ddim": NoiseConfig(default_sampler="ddim", set_alpha_to_one=False, prediction_type="v_prediction"),
    "cosine": NoiseConfig(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2", clip_sample_range=2.5),
    "own betas": NoiseConfig(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3)),
    "zero snr": NoiseConfig(rescale_betas_zero_snr=True, prediction_type="sample"),
    "learned variance": NoiseConfig(variance_type="learned_range"),
    "ddim of learned variance": NoiseConfig(default_sampler="ddim", variance_type="learned_range"),
    "dpm solver": NoiseConfig(default_sampler="dpmpp_2m"),
    "dpm solver of learned variance": NoiseConfig(
        default_sampler="dpmpp_2m", timestep_spacing="trailing", variance_type="learned_range", clip_sample=False
    ),
    "dpm solver of another range": NoiseConfig(default_sampler="dpmpp_2m", clip_sample_range=2.0),
    **{sampler: NoiseConfig(default_sampler=sampler, timestep_spacing="trailing") for sampler in SAMPLERS},
    "plms that ends at the first level": NoiseConfig(default_sampler="plms", set_alpha_to_one=False),
    "heun without a clip": NoiseConfig(default_sampler="heun", clip_sample=False, beta_schedule="scaled_linear"),
}


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_config_survives_a_round_trip(config: NoiseConfig) -> None:
    assert NoiseConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("config", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_diffusers_makes_the_same_tables_of_our_config(config: NoiseConfig) -> None:
    values = config.to_dict()
    cls = {cls.__name__: cls for cls in CLASSES}[values["_class_name"]]
    theirs = cls.from_config({key: list(v) if isinstance(v, tuple) else v for key, v in values.items()})
    torch.testing.assert_close(config.schedule().alpha_bar, theirs.alphas_cumprod.double(), rtol=0, atol=3e-6)
    for field in ("prediction_type", "timestep_spacing", "steps_offset"):
        assert theirs.config[field] == getattr(config, field)
    if cls in (DDPMScheduler, DDIMScheduler, HeunDiscreteScheduler):
        assert theirs.config["clip_sample"] == config.clip_sample
        assert theirs.config["clip_sample_range"] == config.clip_sample_range
    elif cls in (DPMSolverMultistepScheduler, UniPCMultistepScheduler, DEISMultistepScheduler) and (
        config.clip_sample_range == 1.0
    ):
        assert theirs.config["thresholding"] == config.clip_sample
        assert theirs.config["sample_max_value"] == 1.0


def of_solver(sampler: str, **fields: Any) -> NoiseConfig:
    return NoiseConfig(default_sampler=sampler, **{"timestep_spacing": "linspace", **fields})


DEFAULTS: list[tuple[Any, dict[str, Any], NoiseConfig]] = [
    (DDPMScheduler, {}, NoiseConfig()),
    (DDIMScheduler, {}, NoiseConfig(default_sampler="ddim")),
    (DPMSolverMultistepScheduler, {}, of_solver("dpmpp_2m")),
    (DPMSolverMultistepScheduler, {"solver_order": 3}, of_solver("dpmpp_3m")),
    (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, of_solver("dpmpp_2m_sde")),
    (UniPCMultistepScheduler, {}, of_solver("unipc")),
    (DEISMultistepScheduler, {}, of_solver("deis")),
    (
        PNDMScheduler,
        {"skip_prk_steps": True},
        of_solver("plms", timestep_spacing="leading", set_alpha_to_one=False),
    ),
    (EulerDiscreteScheduler, {}, of_solver("euler")),
    (HeunDiscreteScheduler, {}, of_solver("heun", beta_start=0.00085, beta_end=0.012, clip_sample=False)),
]
CLASSES = {cls for cls, _, _ in DEFAULTS}


@pytest.mark.parametrize(
    ("cls", "settings", "expected"), DEFAULTS, ids=[noise.default_sampler for *_, noise in DEFAULTS]
)
def test_config_diffusers_writes_by_default_is_read_as_the_defaults_of_its_sampler(
    cls: Any, settings: dict[str, Any], expected: NoiseConfig, tmp_path: Path
) -> None:
    cls(**settings).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert NoiseConfig.from_dict(written) == expected
    # A field that is left out has the default of its class.
    left_out = {"_class_name": cls.__name__, **settings}
    assert NoiseConfig.from_dict(left_out) == expected


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
    ("cls", "settings", "expected"), DEFAULTS, ids=[noise.default_sampler for *_, noise in DEFAULTS]
)
def test_a_request_without_settings_visits_the_timesteps_of_the_checkpoints_own_scheduler(
    cls: Any, settings: dict[str, Any], expected: NoiseConfig, spacing: str
) -> None:
    theirs = cls(**settings, timestep_spacing=spacing, steps_offset=1)
    noise = NoiseConfig.from_dict({"_class_name": cls.__name__, **theirs.config})
    sampler = expected.default_sampler
    plan = compile_plan(noise, noise.schedule(), sampler, 20, fractional=True)
    theirs.set_timesteps(20)
    torch.testing.assert_close(plan.timesteps, theirs.timesteps.double(), rtol=0, atol=1e-4)


DPM_SOLVER = {"_class_name": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize(
    ("config", "clip"),
    [
        ({}, True),
        ({"clip_sample": False}, False),
        ({"thresholding": False}, True),
        ({"thresholding": True, "sample_max_value": 1.0}, True),
        ({"thresholding": True, "clip_sample": False}, True),
    ],
)
def test_dpm_solver_config_clips_unless_it_says_otherwise(config: dict[str, Any], clip: bool) -> None:
    noise = NoiseConfig.from_dict(DPM_SOLVER | config)
    assert noise.timestep_spacing == "linspace"  # that class's own default
    assert (noise.clip_sample, noise.clip_sample_range, noise.thresholding) == (clip, 1.0, False)


def test_dpm_solver_config_that_spells_its_defaults_out_is_read() -> None:
    spelt = {
        **KIND_OF_SAMPLER["dpmpp_2m"].must,
        "lower_order_final": True,
        "euler_at_final": False,
        "variance_type": None,
    }
    noise = NoiseConfig.from_dict(DPM_SOLVER | spelt | {"timestep_spacing": "leading", "use_lu_lambdas": None})
    assert noise == NoiseConfig(default_sampler="dpmpp_2m", timestep_spacing="leading")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("solver_order", 1),
        ("algorithm_type", "dpmsolver"),
        ("solver_type", "heun"),
        ("final_sigmas_type", "sigma_min"),
        ("use_karras_sigmas", True),
        ("use_lu_lambdas", True),
        ("lambda_min_clipped", -5.1),
    ],
)
def test_config_of_another_dpm_solver_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"scheduler config: {field} must be .* for dpmpp_2m, got") as refusal:
        NoiseConfig.from_dict(DPM_SOLVER | {field: value})
    assert repr(value) in str(refusal.value)
    reverted = NoiseConfig.from_dict(DPM_SOLVER | {field: value, "_use_default_values": [field]})
    assert reverted.default_sampler == "dpmpp_2m"


@pytest.mark.parametrize(
    ("sampler", "changes"),
    [
        ("dpmpp_3m", {"solver_order": 3, "lower_order_final": False}),
        ("dpmpp_2m_sde", {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"}),
        ("unipc", {"predict_x0": False}),
        ("unipc", {"disable_corrector": [0]}),
        ("unipc", {"solver_type": "bh1"}),
        ("deis", {"solver_order": 3}),
        ("deis", {"lower_order_final": False}),
        ("unipc", {"lower_order_final": False}),
        ("plms", {"skip_prk_steps": False}),
        ("plms", {}),  # whose class begins with Runge-Kutta steps
        ("euler", {"final_sigmas_type": "sigma_min"}),
        ("euler", {"timestep_type": "continuous"}),
        ("heun", {"use_beta_sigmas": True}),
    ],
)
def test_config_of_a_solver_that_is_none_of_ours_is_refused_by_field_and_value(
    sampler: str, changes: dict[str, Any]
) -> None:
    config = {"_class_name": KIND_OF_SAMPLER[sampler].class_name, **changes}
    with pytest.raises(ValueError, match=rf"scheduler config: \w+ must be .* for {sampler}, got"):
        NoiseConfig.from_dict(config)


@pytest.mark.parametrize(("field", "value"), [("sigma_min", 0.1), ("shift_terminal", 0.2), ("solver_p", "x")])
def test_field_of_a_solver_that_is_not_served_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"scheduler config: {field} must be None for unipc, got {value!r}"):
        NoiseConfig.from_dict({"_class_name": "UniPCMultistepScheduler", field: value})


REFUSED_BY_DIFFUSERS = {("dpmpp_2m_sde", DEISMultistepScheduler), ("deis", DPMSolverMultistepScheduler)}


@pytest.mark.parametrize("to", sorted(CLASSES, key=lambda cls: cls.__name__))
def test_what_a_config_keeps_of_another_class_after_a_swap_changes_nothing(to: Any, tmp_path: Path) -> None:
    read_by_us = {field.name for field in dataclasses.fields(NoiseConfig)}  # clip_sample counts for every class
    for cls, settings, noise in DEFAULTS:
        if (noise.default_sampler, to) in REFUSED_BY_DIFFUSERS:
            continue
        before = {key: value for key, value in cls(**settings).config.items() if key != "_use_default_values"}
        to.from_config(before).save_pretrained(tmp_path)
        after = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert {name for name in before if not name.startswith("_")} <= set(after), "diffusers keeps all fields"
        read = {*inspect.signature(to.__init__).parameters, *read_by_us, "_class_name"}
        assert outcome(after) == outcome({key: value for key, value in after.items() if key in read}), cls


def test_a_folder_swapped_from_pndm_and_one_from_a_thresholding_class_are_served() -> None:
    swapped = NoiseConfig.from_dict({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "DDIMScheduler")
    assert swapped == NoiseConfig(default_sampler="ddim")
    swapped = NoiseConfig.from_dict(
        {**DPM_SOLVER, "thresholding": True, "sample_max_value": 2}, "EulerDiscreteScheduler"
    )
    assert swapped == of_solver("euler")


def outcome(config: dict[str, Any]) -> NoiseConfig | str:
    try:
        return NoiseConfig.from_dict(config)
    except ValueError as refusal:
        return str(refusal)


def test_dynamic_threshold_that_is_more_than_a_clip_is_refused_of_every_class() -> None:
    for config in (DPM_SOLVER | {"thresholding": True, "sample_max_value": 1.5}, {"thresholding": True}):
        with pytest.raises(ValueError, match="thresholding must be false"):
            NoiseConfig.from_dict(config)


def test_spacing_is_the_config_s_own_for_the_sampler_it_was_written_for() -> None:
    trailing = NoiseConfig(timestep_spacing="trailing")
    assert [trailing.default_spacing(s) for s in ("ddpm", "ddim", "dpmpp_2m")] == ["trailing", "trailing", "karras"]
    solver = NoiseConfig(timestep_spacing="trailing", default_sampler="dpmpp_2m")
    assert [solver.default_spacing(s) for s in ("ddpm", "ddim", "dpmpp_2m", "unipc")] == ["trailing"] * 4
    assert [solver.default_spacing(s) for s in ("euler", "heun")] == ["karras"] * 2
    sigmas = NoiseConfig(timestep_spacing="trailing", default_sampler="euler")
    assert [sigmas.default_spacing(s) for s in ("ddpm", "euler", "heun")] == ["trailing"] * 3
    assert [sigmas.default_spacing(s) for s in ("dpmpp_2m", "unipc")] == ["karras"] * 2


def test_keys_in_use_default_values_revert_to_the_defaults() -> None:
    config = NoiseConfig.from_dict({"beta_end": 0.5, "_use_default_values": ["beta_end"]})
    assert config.beta_end == 0.02


def test_a_field_that_would_change_images_is_refused_and_one_that_is_off_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert NoiseConfig.from_dict({"use_sde": False, "sample_max_value": 1.0}) == NoiseConfig()
    with pytest.raises(ValueError, match="use_sde=0 is not something DDPMScheduler is known to have"):
        NoiseConfig.from_dict({"use_sde": 0})
    assert "use_sde=False changes nothing" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        *("EulerAncestralDiscreteScheduler", "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler"),
        *("LMSDiscreteScheduler", "ScoreSdeVeScheduler", "SASolverScheduler"),
        *("DDIMInverseScheduler", "", 5),
    ],
)
def test_another_scheduler_is_refused_by_name(name: object) -> None:
    with pytest.raises(ValueError, match="is not served; those that are: DDPMScheduler, DDIMScheduler") as caught:
        NoiseConfig.from_dict({"_class_name": name})
    assert repr(name) in str(caught.value)


def test_the_class_of_model_index_counts_more_than_the_config_s_own() -> None:
    config = {"_class_name": "DDPMScheduler", "set_alpha_to_one": False}
    assert NoiseConfig.from_dict(config).default_sampler == "ddpm"
    assert NoiseConfig.from_dict(config, "DDIMScheduler").default_sampler == "ddim"


def test_the_sampler_is_not_a_field_of_the_config() -> None:
    with pytest.raises(ValueError, match="default_sampler='ddim' is not something"):
        NoiseConfig.from_dict({"default_sampler": "ddim"})


def test_predict_epsilon_of_old_configs_is_honoured() -> None:
    assert NoiseConfig.from_dict({"predict_epsilon": True}).prediction_type == "epsilon"
    assert NoiseConfig.from_dict({"predict_epsilon": False}).prediction_type == "sample"


def test_own_betas_are_used_as_they_are() -> None:
    config = NoiseConfig.from_dict({"num_train_timesteps": 2, "trained_betas": [0.25, 0.5]})
    assert config.schedule().alpha_bar.tolist() == [0.75, 0.375]


BAD: list[tuple[str, Any]] = [
    ("num_train_timesteps", 0),
    ("num_train_timesteps", 10**9),
    ("num_train_timesteps", 1000.0),
    ("beta_schedule", "laplace"),
    ("variance_type", "learned"),
    ("variance_type", "fixed_large_log"),
    ("prediction_type", "flow"),
    ("timestep_spacing", "karras"),
    ("thresholding", True),
    ("clip_sample_range", 0),
    ("clip_sample_range", math.nan),
    ("steps_offset", -1),
    ("steps_offset", 1000),
    ("beta_start", 0.0),
    ("beta_start", 0.5),
    ("beta_start", math.nan),
    ("trained_betas", [0.1, 0.2]),
    ("clip_sample_range", None),
    ("beta_end", "0.02"),
    ("clip_sample", "yes"),
    ("timestep_spacing", ["leading"]),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_config_value_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"scheduler config: {field} must be") as refusal:
        NoiseConfig.from_dict({field: value})
    assert repr(tuple(value) if isinstance(value, list) else value) in str(refusal.value)


def test_eps_prediction_with_zero_snr_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type must be sample or v_prediction with zero-SNR betas"):
        NoiseConfig.from_dict({"rescale_betas_zero_snr": True})


def test_a_single_timestep_with_zero_snr_is_refused_with_the_config() -> None:
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match="num_train_timesteps must be 2 or more with zero-SNR betas, got 1"):
        NoiseConfig.from_dict({**zero_snr, "num_train_timesteps": 1})
    assert NoiseConfig.from_dict({**zero_snr, "num_train_timesteps": 2}).schedule().alpha_bar[-1] == 0
    assert NoiseConfig(num_train_timesteps=1).schedule().num_timesteps == 1


@pytest.mark.parametrize("beta", [0.0, 1.5, math.nan])
def test_own_beta_outside_its_interval_is_refused_with_the_config(beta: float) -> None:
    with pytest.raises(ValueError, match=r"trained_betas must be numbers in \(0, 1\]"):
        NoiseConfig(num_train_timesteps=2, trained_betas=(0.1, beta))


def test_only_the_last_of_own_betas_may_leave_no_signal() -> None:
    assert NoiseConfig(num_train_timesteps=2, trained_betas=(0.1, 1.0)).schedule().alpha_bar[-1] == 0
    with pytest.raises(ValueError, match="trained_betas must be below 1, but for the last"):  # 0 / 0 in every sampler
        NoiseConfig(num_train_timesteps=3, trained_betas=(0.1, 1.0, 0.5))


@pytest.mark.parametrize("change", [{"beta_start": "small"}, {"clip_sample_range": None}, {"steps_offset": [1]}])
def test_value_of_a_type_nobody_expects_is_a_value_error_too(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="scheduler config"):
        NoiseConfig.from_dict(change)


def test_learned_variance_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"what `learned` holds differs between libraries\), got 'learned'"):
        NoiseConfig(variance_type="learned")


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        NoiseConfig().beta_end = 0.5  # type: ignore[misc]
