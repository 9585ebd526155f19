import inspect
import json
import logging
import math
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
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

from tminus.model.noise import BETA_SCHEDULES, NoiseConfig, NoiseSchedule, make_betas, posterior_between
from tminus.model.samplers import compile_plan
from tminus.model.scheduler_kinds import FIELDS, KIND_OF, KINDS, READ_OF_BETAS

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


def test_between_timesteps_log_sigma_is_a_line_where_sigma_is_one_in_diffusers() -> None:
    noise = NoiseConfig(20, beta_schedule="squaredcos_cap_v2", default_sampler="euler", timestep_spacing="linspace")
    theirs = EulerDiscreteScheduler.from_config(noise.to_dict())
    theirs.set_timesteps(4)
    log_sigmas, t = noise.schedule().log_sigmas, theirs.timesteps.double().numpy()
    assert t[1] % 1 > 0.1, "it lies between two"
    np.testing.assert_allclose(theirs.sigmas[:-1], np.interp(t, range(20), np.exp(log_sigmas)), rtol=1e-3)
    alpha_bar = noise.schedule().alpha_bar_at(t.tolist())
    np.testing.assert_allclose((1 / alpha_bar - 1).sqrt(), np.exp(np.interp(t, range(20), log_sigmas)), rtol=1e-9)


# --- the forward process ------------------------------------------------------------------------------------------


def test_noising_equals_that_of_diffusers(linear: NoiseSchedule) -> None:
    x_0, eps, t = torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4), torch.tensor([0, 10, 500, 999])
    scheduler = DDPMScheduler()
    torch.testing.assert_close(linear.q_sample(x_0, t, eps), scheduler.add_noise(x_0, eps, t), rtol=0, atol=1e-5)
    torch.testing.assert_close(linear.velocity(x_0, t, eps), scheduler.get_velocity(x_0, eps, t), rtol=0, atol=1e-5)


# --- the posterior ------------------------------------------------------------------------------------------------


def bayes(alpha_bar: torch.Tensor, alpha_bar_prev: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q(x_prev|x_t, x_0) by multiplying likelihood and prior, precisions adding: not Ho et al.'s closed form.

    Likelihood x_t = sqrt(a) x_prev + N(0, 1 - a) with a = alpha_bar / alpha_bar_prev; prior x_prev = sqrt(abar_prev)
    x_0 + N(0, 1 - abar_prev).
    """
    a = alpha_bar / alpha_bar_prev
    precision = a / (1 - a) + 1 / (1 - alpha_bar_prev)
    return alpha_bar_prev.sqrt() / (1 - alpha_bar_prev) / precision, a.sqrt() / (1 - a) / precision, 1 / precision


@given(st.floats(1e-6, 1 - 1e-6), st.floats(1e-6, 1 - 1e-6))
def test_posterior_of_any_pair_of_steps_is_bayes_rule(one: float, other: float) -> None:
    low, high = sorted((one, other))
    if high - low < 1e-6:
        high = low + 0.5 * (1 - low)
    pair = torch.tensor(low, dtype=F64), torch.tensor(high, dtype=F64)
    for ours, theirs in zip(posterior_between(*pair), bayes(*pair), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=0)


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
    **{
        sampler: NoiseConfig(default_sampler=sampler, timestep_spacing="trailing")
        for family, sampler in KIND_OF
        if family == "betas"
    },
    "plms that ends at the first level": NoiseConfig(default_sampler="plms", set_alpha_to_one=False),
    "heun without a clip": NoiseConfig(default_sampler="heun", clip_sample=False, beta_schedule="scaled_linear"),
}


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
    (PNDMScheduler, {"skip_prk_steps": True}, of_solver("plms", timestep_spacing="leading", set_alpha_to_one=False)),
    (PNDMScheduler, {}, of_solver("pndm", timestep_spacing="leading", set_alpha_to_one=False)),
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
    # The middle of a Runge-Kutta step is that of T // steps for diffusers, whatever the spacing.
    atol = 1 if sampler == "pndm" and spacing == "linspace" else 1e-4
    torch.testing.assert_close(plan.timesteps, theirs.timesteps.double(), rtol=0, atol=atol)


DPM_SOLVER = {"_class_name": "DPMSolverMultistepScheduler"}


@pytest.mark.parametrize(
    ("config", "clip"),
    [
        ({}, True),
        ({"clip_sample": False}, False),
        ({"thresholding": True, "sample_max_value": 1.0}, True),
        ({"thresholding": True, "clip_sample": False}, True),
    ],
)
def test_dpm_solver_config_clips_unless_it_says_otherwise(config: dict[str, Any], clip: bool) -> None:
    noise = NoiseConfig.from_dict(DPM_SOLVER | config)
    assert noise.timestep_spacing == "linspace"  # that class's own default
    assert (noise.clip_sample, noise.clip_sample_range, noise.thresholding) == (clip, 1.0, False)


@pytest.mark.parametrize(("field", "value"), [("use_karras_sigmas", True), ("lambda_min_clipped", -5.1)])
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
        ("unipc", {"predict_x0": False}),
        ("deis", {"solver_order": 3}),
        ("plms", {"skip_prk_steps": 1.5}),
        ("euler", {"final_sigmas_type": "sigma_min"}),
    ],
)
def test_config_of_a_solver_that_is_none_of_ours_is_refused_by_field_and_value(
    sampler: str, changes: dict[str, Any]
) -> None:
    config = {"_class_name": KIND_OF["betas", sampler].class_name, **changes}
    with pytest.raises(ValueError, match=rf"scheduler config: \w+ must be .* for {sampler}, got"):
        NoiseConfig.from_dict(config)


REFUSED_BY_DIFFUSERS = {("dpmpp_2m_sde", DEISMultistepScheduler), ("deis", DPMSolverMultistepScheduler)}


@pytest.mark.parametrize("to", sorted(CLASSES, key=lambda cls: cls.__name__))
def test_what_a_config_keeps_of_another_class_after_a_swap_changes_nothing(to: Any, tmp_path: Path) -> None:
    for cls, settings, noise in DEFAULTS:
        if (noise.default_sampler, to) in REFUSED_BY_DIFFUSERS:
            continue
        before = {key: value for key, value in cls(**settings).config.items() if key != "_use_default_values"}
        to.from_config(before).save_pretrained(tmp_path)
        after = json.loads((tmp_path / "scheduler_config.json").read_text())
        assert {name for name in before if not name.startswith("_")} <= set(after), "diffusers keeps all fields"
        read = {*inspect.signature(to.__init__).parameters, *READ_OF_BETAS, "_class_name"}
        assert outcome(after) == outcome({key: value for key, value in after.items() if key in read}), cls


@pytest.mark.parametrize("to", sorted(CLASSES, key=lambda cls: cls.__name__))
def test_betas_are_rescaled_only_if_the_class_can_rescale_them(to: Any, tmp_path: Path) -> None:
    theirs = to.from_config(DDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction").config)
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert written["rescale_betas_zero_snr"] is True
    ours = NoiseConfig.from_dict(written).schedule().alpha_bar
    torch.testing.assert_close(ours[:-1], theirs.alphas_cumprod[:-1].double(), rtol=0, atol=3e-6)


@pytest.mark.parametrize("name", sorted(FIELDS.keys() - {"KarrasEDMScheduler"}))  # which no release of diffusers has
def test_the_table_of_fields_has_those_of_the_class_in_diffusers(name: str) -> None:
    own = inspect.signature(getattr(diffusers, name).__init__).parameters.keys()
    must = {field for kind in KINDS if kind.class_name == name for field in kind.must}
    assert set(FIELDS[name]) == {field for fields in FIELDS.values() for field in fields} & own - must


def test_predict_epsilon_of_2022_is_read_where_diffusers_ignores_it() -> None:
    assert NoiseConfig.from_dict({"predict_epsilon": False}).prediction_type == "sample"
    assert NoiseConfig.from_dict({"predict_epsilon": True}).prediction_type == "epsilon"
    assert DDPMScheduler.from_config({"predict_epsilon": False}).config.prediction_type == "epsilon"


def outcome(config: dict[str, Any]) -> NoiseConfig | str:
    try:
        return NoiseConfig.from_dict(config)
    except ValueError as refusal:
        return str(refusal)


def test_spacing_is_the_config_s_own_for_the_sampler_it_was_written_for() -> None:
    trailing = NoiseConfig(timestep_spacing="trailing")
    assert [trailing.default_spacing(s) for s in ("ddpm", "ddim", "dpmpp_2m")] == ["trailing", "trailing", "karras"]
    solver = NoiseConfig(timestep_spacing="trailing", default_sampler="dpmpp_2m")
    assert [solver.default_spacing(s) for s in ("ddpm", "ddim", "dpmpp_2m", "unipc")] == ["trailing"] * 4
    assert [solver.default_spacing(s) for s in ("euler", "heun")] == ["karras"] * 2
    sigmas = NoiseConfig(timestep_spacing="trailing", default_sampler="euler")
    assert [sigmas.default_spacing(s) for s in ("ddpm", "euler", "heun")] == ["trailing"] * 3
    assert [sigmas.default_spacing(s) for s in ("dpmpp_2m", "unipc")] == ["karras"] * 2


def test_a_field_that_would_change_images_is_refused_and_one_that_is_off_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        assert NoiseConfig.from_dict({"use_sde": False, "sample_max_value": 1.0}) == NoiseConfig()
    with pytest.raises(ValueError, match="use_sde=0 is not a known setting of DDPMScheduler"):
        NoiseConfig.from_dict({"use_sde": 0})
    assert "use_sde=False changes nothing" in caplog.text


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", 5])
def test_another_scheduler_is_refused_by_name(name: object) -> None:
    with pytest.raises(ValueError, match="is not served; those that are: DDPMScheduler, DDIMScheduler") as caught:
        NoiseConfig.from_dict({"_class_name": name})
    assert repr(name) in str(caught.value)


BAD: list[tuple[str, Any]] = [
    ("num_train_timesteps", 0),
    ("beta_schedule", "laplace"),
    ("variance_type", "learned"),
    ("prediction_type", "flow"),
    ("prediction_type", 5),
    ("timestep_spacing", "karras"),
    ("thresholding", True),
    ("clip_sample_range", math.nan),
    ("steps_offset", -1),
    ("beta_start", 0.0),
    ("trained_betas", [0.1, 0.2]),
]


@pytest.mark.parametrize(("field", "value"), BAD)
def test_bad_config_value_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"scheduler config: {field} must be") as refusal:
        NoiseConfig.from_dict({field: value})
    assert repr(tuple(value) if isinstance(value, list) else value) in str(refusal.value)


def test_a_single_timestep_with_zero_snr_is_refused_with_the_config() -> None:
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    with pytest.raises(ValueError, match="num_train_timesteps must be 2 or more with zero-SNR betas, got 1"):
        NoiseConfig.from_dict({**zero_snr, "num_train_timesteps": 1})
    assert NoiseConfig.from_dict({**zero_snr, "num_train_timesteps": 2}).schedule().alpha_bar[-1] == 0
    assert NoiseConfig(num_train_timesteps=1).schedule().num_timesteps == 1
