"""The schedulers of diffusers that are served: which sampler each class is, by what its scheduler_config.json says."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

_NO_RAMP = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_NO_FLOW = {"use_flow_sigmas": False, "use_dynamic_shifting": False}
_NO_SIGMAS = {"sigma_min": None, "sigma_max": None}
_LINSPACE = {"timestep_spacing": "linspace"}
_DPM_SOLVER = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
    "lambda_min_clipped": -math.inf,
    "use_lu_lambdas": False,
    **_NO_RAMP,
    **_NO_FLOW,
}


# These fields change no image. Those of thresholding and of flows matter only where these are on, which is refused.
# tensor_format is of another tensor library. A solver's last step, to no noise, is of first order whatever they say.
WITHOUT_EFFECT = frozenset(
    {"dynamic_thresholding_ratio", "sample_max_value", "tensor_format", "flow_shift", "time_shift_type"}
    | {"lower_order_final", "euler_at_final"}
)


@dataclass(frozen=True, slots=True)
class SchedulerKind:
    """One class of diffusers, with the fields that make it one of our samplers."""

    class_name: str
    sampler: str
    must: Mapping[str, Any] = field(default_factory=dict)
    """Fields by which the class may be another sampler, with the values of this one."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What the class takes for fields that are left out, where that is not in `must`, nor DDPMScheduler's default."""
    other_names: Mapping[str, str] = field(default_factory=dict)
    """The names that the class has for fields that DDPMScheduler has under another name."""
    clips_by_threshold: bool = False
    """Whether it has no clip_sample, but dynamic thresholding, which with sample_max_value 1 is the same clip."""


KINDS = (
    SchedulerKind("DDPMScheduler", "ddpm"),
    SchedulerKind("DDIMScheduler", "ddim"),
    SchedulerKind("DPMSolverMultistepScheduler", "dpmpp_2m", _DPM_SOLVER, _LINSPACE, clips_by_threshold=True),
    SchedulerKind(
        "DPMSolverMultistepScheduler",
        "dpmpp_3m",
        {**_DPM_SOLVER, "solver_order": 3, "lower_order_final": True},
        {"solver_order": 2, **_LINSPACE},
        clips_by_threshold=True,
    ),
    SchedulerKind(
        "DPMSolverMultistepScheduler",
        "dpmpp_2m_sde",
        {**_DPM_SOLVER, "algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver++", **_LINSPACE},
        clips_by_threshold=True,
    ),
    SchedulerKind(
        "UniPCMultistepScheduler",
        "unipc",
        {
            "solver_order": 2,
            "solver_type": "bh2",
            "predict_x0": True,
            "disable_corrector": [],
            "lower_order_final": True,
            "final_sigmas_type": "zero",
            **_NO_RAMP,
            **_NO_FLOW,
            **_NO_SIGMAS,
            "solver_p": None,
            "shift_terminal": None,
        },
        _LINSPACE,
        clips_by_threshold=True,
    ),
    SchedulerKind(
        "DEISMultistepScheduler",
        "deis",
        {
            "solver_order": 2,
            "solver_type": "logrho",
            "algorithm_type": "deis",
            "lower_order_final": True,
            **_NO_RAMP,
            **_NO_FLOW,
        },
        _LINSPACE,
        clips_by_threshold=True,
    ),
    SchedulerKind(
        "PNDMScheduler", "plms", {"skip_prk_steps": True}, {"skip_prk_steps": False, "set_alpha_to_one": False}
    ),
    SchedulerKind("PNDMScheduler", "pndm", {"skip_prk_steps": False}, {"set_alpha_to_one": False}),
    SchedulerKind(
        "EulerDiscreteScheduler",
        "euler",
        {
            "interpolation_type": "linear",
            "timestep_type": "discrete",
            "final_sigmas_type": "zero",
            **_NO_RAMP,
            **_NO_SIGMAS,
        },
        _LINSPACE,
    ),
    SchedulerKind(
        "HeunDiscreteScheduler",
        "heun",
        _NO_RAMP,
        {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, **_LINSPACE},
    ),
    SchedulerKind(
        "CMStochasticIterativeScheduler",
        "consistency",
        {"s_noise": 1.0},
        {"num_train_timesteps": 40, "prediction_type": "consistency"},
        {"clip_denoised": "clip_sample"},
    ),
)
SAME_AS = {"DDPMParallelScheduler": "DDPMScheduler", "DDIMParallelScheduler": "DDIMScheduler"}
KIND_OF_SAMPLER = {kind.sampler: kind for kind in KINDS}
# diffusers' from_config keeps the fields of the class that a config was written for, and no class reads another's.
FIELDS_OF_ANY = WITHOUT_EFFECT.union(*({*kind.must, *kind.other_names} for kind in KINDS))
CLASS_NAMES = tuple(dict.fromkeys([*(kind.class_name for kind in KINDS), *SAME_AS]))


def scheduler_kind(class_name: object, given: Mapping[str, Any]) -> SchedulerKind:
    """Find what a class with these fields is. Raises ValueError for a class, and for a value, that is not served."""
    name = SAME_AS.get(class_name, class_name) if isinstance(class_name, str) else None
    of_class = [kind for kind in KINDS if kind.class_name == name]
    if not of_class:
        raise ValueError(
            f"scheduler config: {class_name!r:.100} is not served; those that are: {', '.join(CLASS_NAMES)}. If the "
            "network was trained with the same betas, the config of one of these can take its place"
        )
    # Of a class that is several samplers, that of which the most fields are right before one is wrong.
    kind = max(of_class, key=lambda kind: len(_right(kind, given)))
    wrong = list(kind.must)[len(_right(kind, given)) :]
    if wrong:
        wanted, got = kind.must[wrong[0]], given.get(wrong[0], kind.defaults.get(wrong[0]))
        raise ValueError(f"scheduler config: {wrong[0]} must be {wanted!r} for {kind.sampler}, got {got!r:.100}")
    return kind


def _right(kind: SchedulerKind, given: Mapping[str, Any]) -> list[str]:
    """The fields that must be as they are, up to the first that is not; null is the same as left out."""
    values = {**kind.must, **kind.defaults, **{key: value for key, value in given.items() if value is not None}}
    return list(takewhile(lambda name: values[name] == kind.must[name], kind.must))
