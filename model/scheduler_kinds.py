"""The supported diffusers schedulers, and which of our samplers each of them corresponds to."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

Family = Literal["betas", "consistency", "edm", "flow", "ve"]
# For each prediction type, what the noise levels follow from: betas, or a formula of t.
FAMILY_OF: Mapping[str, Family] = {
    "epsilon": "betas",
    "sample": "betas",
    "v_prediction": "betas",
    "consistency": "consistency",
    "edm": "edm",
    "edm_v_prediction": "edm",  # with the output negated, as in diffusers
    "flow": "flow",
    "score": "ve",
}
_OF_BETAS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "steps_offset",
)
_OF_RAMP = ("num_train_timesteps", "sigma_min", "sigma_max", "sigma_data", "rho")
_CLIP = ("clip_sample", "clip_sample_range")
# For each diffusers class, the names of the fields that NoiseConfig supports.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "DDPMScheduler": (*_OF_BETAS, *_CLIP, "variance_type", "thresholding", "rescale_betas_zero_snr"),
    "DDIMScheduler": (*_OF_BETAS, *_CLIP, "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr"),
    "DPMSolverMultistepScheduler": (*_OF_BETAS, "variance_type", "thresholding", "rescale_betas_zero_snr"),
    "UniPCMultistepScheduler": (*_OF_BETAS, "thresholding", "rescale_betas_zero_snr"),
    "DEISMultistepScheduler": (*_OF_BETAS, "thresholding"),
    "PNDMScheduler": (*_OF_BETAS, "set_alpha_to_one"),
    "EulerDiscreteScheduler": (*_OF_BETAS, "rescale_betas_zero_snr"),
    "HeunDiscreteScheduler": (*_OF_BETAS, *_CLIP),
    "CMStochasticIterativeScheduler": (*_OF_RAMP, "clip_denoised"),
    "EDMEulerScheduler": (*_OF_RAMP, "sigma_schedule", "prediction_type"),
    "EDMDPMSolverMultistepScheduler": (*_OF_RAMP, "sigma_schedule", "prediction_type", "thresholding"),
    "KarrasEDMScheduler": (*_OF_RAMP, "precondition_type", "prediction_type", *_CLIP),
    "FlowMatchEulerDiscreteScheduler": ("num_train_timesteps", "shift"),
    "ScoreSdeVeScheduler": ("num_train_timesteps", "sigma_min", "sigma_max", "sampling_eps", "snr", "correct_steps"),
}
# Fields that are read for all classes with betas, even for a class that lacks them: any sampler may clip, and
# variance_type determines the number of output channels.
READ_OF_BETAS = (*_CLIP, "variance_type")

_NO_RAMP = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_NO_FLOW = {"use_flow_sigmas": False, "use_dynamic_shifting": False}
_NO_SIGMAS = {"sigma_min": None, "sigma_max": None}
_LINSPACE = {"timestep_spacing": "linspace"}
_DPM_READS = {("solver_type", other): "midpoint" for other in ("logrho", "bh1", "bh2")}
_DEIS_READS = {("algorithm_type", other): "deis" for other in ("dpmsolver", "dpmsolver++")} | {
    ("solver_type", other): "logrho" for other in ("midpoint", "heun", "bh1", "bh2")
}
_UNIPC_READS = {("solver_type", other): "bh2" for other in ("midpoint", "heun", "logrho")}
_EDM_SOLVER = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "final_sigmas_type": "zero",
}
_DPM_SOLVER = {
    **_EDM_SOLVER,
    "lambda_min_clipped": -math.inf,
    "use_lu_lambdas": False,
    **_NO_RAMP,
    **_NO_FLOW,
}


# Fields that do not affect images. Those for thresholding, flows, size-dependent shift and churn matter only if the
# feature is on, and then the config is rejected. tensor_format chooses a tensor library. lower_order_final and
# euler_at_final reduce the order of the last step, which is 1 anyway because the step ends without noise.
WITHOUT_EFFECT = frozenset(
    {"dynamic_thresholding_ratio", "sample_max_value", "tensor_format", "flow_shift", "time_shift_type"}
    | {"lower_order_final", "euler_at_final"}
    | {"base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "s_tmin", "s_tmax"}
)
# Fields of unsupported schedulers: LCM, TCD, SA-Solver, RePaint, DPM-Solver SDE, ScoreSdeVp and others.
OF_OTHER_CLASSES = frozenset(
    {"original_inference_steps", "timestep_scaling", "predictor_order", "corrector_order", "tau_func", "eta"}
    | {"noise_sampler_seed", "s_min", "s_max", "beta_min", "beta_max", "set_alpha_to_zero", "snr_shift_scale"}
)
_OF_DDPM = {"epsilon": "epsilon", "sample": "sample", "v_prediction": "v_prediction"}


@dataclass(frozen=True, slots=True)
class SchedulerKind:
    """A diffusers scheduler class, with the settings that make it equivalent to one of our samplers."""

    class_name: str
    sampler: str
    must: Mapping[str, Any] = field(default_factory=dict)
    """Field values that select this sampler within the class. A config must have all of them, stated or by default."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of the class that differ from the values in `must` or from the defaults of DDPMScheduler."""
    other_names: Mapping[str, str] = field(default_factory=dict)
    """For fields that the class names differently: the name in NoiseConfig, keyed by the name in the class."""
    reads: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Values that the class replaces by others, keyed by (field, value). A config made by from_config may have them."""
    family: Family = "betas"
    predictions: Mapping[str, str] = field(default_factory=lambda: _OF_DDPM)
    """Our name for each prediction_type that the class allows."""

    @property
    def fields(self) -> frozenset[str]:
        """The fields that are read from a config of this class, by their names in the class."""
        return frozenset(FIELDS[self.class_name]).union(READ_OF_BETAS if self.family == "betas" else ())

    @property
    def clips_by_threshold(self) -> bool:
        """True if the class has `thresholding` but no clip_sample.

        With a sample_max_value of 1, thresholding is the same as clipping to [-1, 1].
        """
        own = FIELDS[self.class_name]
        return "thresholding" in own and "clip_sample" not in own


_EDM = {"prediction_type": "epsilon", "clip_sample": False}
_OF_EDM = {"epsilon": "edm", "v_prediction": "edm_v_prediction"}

KINDS = (
    SchedulerKind("DDPMScheduler", "ddpm"),
    SchedulerKind("DDIMScheduler", "ddim"),
    SchedulerKind("DPMSolverMultistepScheduler", "dpmpp_2m", _DPM_SOLVER, _LINSPACE, reads=_DPM_READS),
    SchedulerKind(
        "DPMSolverMultistepScheduler",
        "dpmpp_3m",
        {**_DPM_SOLVER, "solver_order": 3, "lower_order_final": True},
        {"solver_order": 2, **_LINSPACE},
        reads=_DPM_READS,
    ),
    SchedulerKind(
        "DPMSolverMultistepScheduler",
        "dpmpp_2m_sde",
        {**_DPM_SOLVER, "algorithm_type": "sde-dpmsolver++"},
        {"algorithm_type": "dpmsolver++", **_LINSPACE},
        reads=_DPM_READS,
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
        reads=_UNIPC_READS,
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
        reads=_DEIS_READS,
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
        family="consistency",
    ),
    SchedulerKind("EDMEulerScheduler", "euler", {"final_sigmas_type": "zero"}, _EDM, family="edm", predictions=_OF_EDM),
    *(
        SchedulerKind(
            "EDMDPMSolverMultistepScheduler",
            sampler,
            {**_EDM_SOLVER, **other},
            {**_EDM, **_EDM_SOLVER},
            reads=_DPM_READS,
            family="edm",
            predictions=_OF_EDM,
        )
        for sampler, other in (
            ("dpmpp_2m", {}),
            ("dpmpp_3m", {"solver_order": 3, "lower_order_final": True}),
            ("dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}),
        )
    ),
    # From a pull request to diffusers (4481). Some published checkpoints use this class.
    SchedulerKind(
        "KarrasEDMScheduler",
        "heun",
        {"prediction_type": "sample", "use_karras_sigmas": True, "s_churn": 0.0, "s_noise": 1.0},
        {"num_train_timesteps": 40, "prediction_type": "sample", "clip_sample": False},
        family="edm",
        predictions={"sample": "edm"},
    ),
    SchedulerKind(
        "FlowMatchEulerDiscreteScheduler",
        "euler",
        {
            "use_dynamic_shifting": False,
            **_NO_RAMP,
            "shift_terminal": None,
            "invert_sigmas": False,
            "stochastic_sampling": False,
        },
        {"prediction_type": "flow", "clip_sample": False},
        family="flow",
    ),
    SchedulerKind(
        "ScoreSdeVeScheduler",
        "ddpm",
        {},
        {
            "num_train_timesteps": 2000,
            "sigma_min": 0.01,
            "sigma_max": 1348.0,
            "prediction_type": "score",
            "variance_type": "reverse_diffusion",
            "clip_sample": False,
        },
        family="ve",
    ),
)
SAME_AS = {"DDPMParallelScheduler": "DDPMScheduler", "DDIMParallelScheduler": "DDIMScheduler"}
KIND_OF = {(kind.family, kind.sampler): kind for kind in KINDS}
# When a user switches scheduler classes, diffusers' from_config keeps the fields of the old class. The new class
# ignores them.
FIELDS_OF_ANY = WITHOUT_EFFECT.union(OF_OTHER_CLASSES, *({*kind.must, *kind.fields} for kind in KINDS))
CLASS_NAMES = tuple(dict.fromkeys([*(kind.class_name for kind in KINDS), *SAME_AS]))


def scheduler_kind(class_name: object, given: Mapping[str, Any]) -> SchedulerKind:
    """Return the kind for a class and its settings. Raises ValueError if they are not supported."""
    name = SAME_AS.get(class_name, class_name) if isinstance(class_name, str) else None
    of_class = [kind for kind in KINDS if kind.class_name == name]
    if not of_class:
        raise ValueError(
            f"scheduler config: {class_name!r:.100} is not served; those that are: {', '.join(CLASS_NAMES)}. If the "
            "network was trained with the same betas, the config of one of these can take its place"
        )
    # A class can correspond to several samplers. Choose the kind with the longest run of matching values.
    kind = max(of_class, key=lambda kind: len(_right(kind, given)))
    wrong = list(kind.must)[len(_right(kind, given)) :]
    if wrong:
        wanted, got = kind.must[wrong[0]], given.get(wrong[0], kind.defaults.get(wrong[0]))
        raise ValueError(f"scheduler config: {wrong[0]} must be {wanted!r} for {kind.sampler}, got {got!r:.100}")
    return kind


def _right(kind: SchedulerKind, given: Mapping[str, Any]) -> list[str]:
    """Return the fields of `kind.must` up to the first that has a wrong value. null counts as missing."""
    told = {key: value for key, value in given.items() if value is not None}
    read = {name: as_read for (name, value), as_read in kind.reads.items() if told.get(name) == value}
    values = {**kind.must, **kind.defaults, **told, **read}
    return list(takewhile(lambda name: values[name] == kind.must[name], kind.must))
