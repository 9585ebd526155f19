"""The noise schedule: beta_t, alpha_bar_t, the closed form q(x_t|x_0) and the posterior q(x_{t-1}|x_t, x_0).

Timesteps are 0-based: t = 0 is the first, least noisy step, t = T - 1 the last. Tables are float64 on the host and are
cast once, at their use. (This is the *noise schedule*; the scheduler that picks rows lives in service/.)
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tminus.model.catalogue import SAMPLER_FACTS
from tminus.model.config import Checked, given_fields, is_off
from tminus.model.scheduler_kinds import FIELDS_OF_ANY, KIND_OF_SAMPLER, scheduler_kind

log = logging.getLogger(__name__)

MAX_TIMESTEPS = 100_000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
SIGMA_FIELDS = ("sigma_min", "sigma_max", "sigma_data", "rho")  # of consistency models
# The samplers that set_alpha_to_one false lets end at alpha_bar_0 instead of at 1.
END_AT_FIRST = ("ddim", "plms", "pndm")
NO_THRESHOLDING = ("plms", "pndm", "euler", "heun", "consistency")  # the samplers whose classes never threshold


def make_betas(schedule: str, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Make beta_t [T] in float64.

    linear: Ho et al. 2020, sec. 4. scaled_linear: Rombach et al. 2022. squaredcos_cap_v2: Nichol & Dhariwal 2021,
    eq. 17. sigmoid: Xu et al. 2022 (GeoDiff). Raises ValueError for a name that is none of these.
    """
    f64 = torch.float64
    if schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_timesteps, dtype=f64)
    if schedule == "scaled_linear":
        return torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_timesteps, dtype=f64) ** 2
    if schedule == "squaredcos_cap_v2":
        u = torch.linspace(0, 1, num_timesteps + 1, dtype=f64)
        f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    if schedule == "sigmoid":
        ramp = torch.sigmoid(torch.linspace(-6, 6, num_timesteps, dtype=f64))
        return ramp * (beta_end - beta_start) + beta_start
    raise ValueError(f"beta_schedule must be among {', '.join(BETA_SCHEDULES)}, got {schedule!r}")


def rescale_zero_snr(betas: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that alpha_bar_T = 0 (Lin et al. 2024, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


def karras_sigmas(num_timesteps: int, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """sigma_t [T] in float64, ascending (Karras et al. 2022, eq. 5)."""
    ramp = torch.linspace(sigma_min ** (1 / rho), sigma_max ** (1 / rho), num_timesteps, dtype=torch.float64)
    return ramp**rho


class NoiseSchedule:
    """The tables of the forward process: betas, alphas and alpha_bar, each [T] in float64 on the host."""

    def __init__(self, betas: Tensor) -> None:
        if betas.dtype != torch.float64 or betas.ndim != 1 or len(betas) < 1:
            raise ValueError(f"betas must be a float64 vector, got {betas.dtype} {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(f"betas must lie in (0, 1], got {betas.min():g} to {betas.max():g}")
        self.betas = betas
        self.alphas = 1 - betas
        self.alpha_bar = self.alphas.cumprod(0)  # alpha_bar_t = prod_{s<=t} alpha_s

    @property
    def num_timesteps(self) -> int:
        """T, the number of timesteps."""
        return len(self.betas)

    @property
    def log_sigmas(self) -> list[float]:
        """log sigma_t [T], ascending, of sigma = sqrt((1 - alpha_bar) / alpha_bar); inf where alpha_bar = 0."""
        log_sigmas: list[float] = (((1 - self.alpha_bar).log() - self.alpha_bar.log()) / 2).tolist()
        return log_sigmas

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t|x_0) in closed form, sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps (Ho et al. 2020, eq. 4).

        x_0, eps [B, C, H, W]; t [B] -> [B, C, H, W]. The coefficients are taken in float64 and cast to x_0's dtype.
        """
        signal, noise = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        return gather(signal, t, x_0) * x_0 + gather(noise, t, x_0) * eps

    def velocity(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, eq. 10); shapes as q_sample."""
        signal, noise = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        return gather(signal, t, x_0) * eps - gather(noise, t, x_0) * x_0

    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Coefficients of q(x_{t-1}|x_t, x_0): mean = coef_x0 x_0 + coef_xt x_t, and its variance beta~ (eq. 6, 7).

        Each [T] in float64; at t = 0 the mean is x_0 and the variance zero.
        """
        prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        return posterior_between(self.alpha_bar, prev)


def posterior_between(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The posterior of a jump from alpha_bar to alpha_bar_prev (Ho et al. 2020, eq. 6 and 7, for any pair of steps).

    Returns coef_x0, coef_xt and the variance, of the inputs' shape. With neighbouring timesteps this is the posterior
    of the full chain; with a respaced pair, that of the shorter chain (Nichol & Dhariwal 2021, sec. 4).
    """
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    coef_x0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    coef_xt = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return coef_x0, coef_xt, beta * (1 - alpha_bar_prev) / (1 - alpha_bar)


def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Take table[t] as [B, 1, 1, 1] in the dtype and on the device of `like`."""
    values = table[t.to(table.device)].to(device=like.device, dtype=like.dtype)
    return values.reshape(-1, *([1] * (like.ndim - 1)))


@dataclass(frozen=True, slots=True)
class NoiseConfig(Checked):
    """A checkpoint's scheduler_config.json: the noise schedule it was trained on and how it is sampled.

    Field names and defaults are those of diffusers' DDPMScheduler. Raises ValueError naming the field and the value.
    """

    KIND: ClassVar[str] = "scheduler config: "

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: str = "fixed_small"
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    rescale_betas_zero_snr: bool = False
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    """These four are of consistency models, whose noise levels are no betas but a ramp of sigmas."""
    default_sampler: str = "ddpm"
    """For requests that name steps and no sampler: that of the scheduler's class, see scheduler_kinds.py."""

    def __post_init__(self) -> None:
        require, among = self.require, self.require_among
        self.require_flags("clip_sample", "thresholding", "set_alpha_to_one", "rescale_betas_zero_snr")
        self.require_numbers("beta_start", "beta_end", "sigma_min", "sigma_max")
        self.require_positive_numbers("clip_sample_range", "sigma_data", "rho")
        self.require_counts("num_train_timesteps")
        offset = self.steps_offset
        require(isinstance(offset, int) and not isinstance(offset, bool), "steps_offset", "an integer")
        betas = () if self.trained_betas is None else self.trained_betas
        numbers = isinstance(betas, tuple) and all(isinstance(beta, (int, float)) for beta in betas)
        require(numbers, "trained_betas", "a list of numbers or null")
        steps = self.num_train_timesteps
        require(1 <= steps <= MAX_TIMESTEPS, "num_train_timesteps", f"1..{MAX_TIMESTEPS}")
        among("beta_schedule", *BETA_SCHEDULES)
        # `learned` is the logarithm of the variance in OpenAI's code and the variance itself in diffusers'.
        variances = "among fixed_small, fixed_large, learned_range (what `learned` holds differs between libraries)"
        require(self.variance_type in ("fixed_small", "fixed_large", "learned_range"), "variance_type", variances)
        among("prediction_type", "epsilon", "sample", "v_prediction", "consistency")
        among("timestep_spacing", "leading", "trailing", "linspace")
        among("default_sampler", *KIND_OF_SAMPLER)
        ramp = (self.default_sampler == "consistency") == self.is_consistency
        require(ramp, "prediction_type", "consistency for a consistency model, and for no other")
        require(steps >= 2 or not self.is_consistency, "num_train_timesteps", "2 or more for a consistency model")
        require(0 < self.sigma_min < self.sigma_max, "sigma_min", f"above 0 and below sigma_max {self.sigma_max}")
        require(not self.thresholding, "thresholding", "false (dynamic thresholding is not supported)")
        require(0 <= self.steps_offset < steps, "steps_offset", f"0..{steps - 1}")
        require(0 < self.beta_start <= self.beta_end, "beta_start", f"above 0, at most beta_end {self.beta_end}")
        require(self.beta_end < 1, "beta_end", "below 1")
        if self.rescale_betas_zero_snr:
            require(self.prediction_type != "epsilon", "prediction_type", "sample or v_prediction with zero-SNR betas")
            require(steps >= 2, "num_train_timesteps", "2 or more with zero-SNR betas")  # the first would be the last
        if self.trained_betas is not None:
            require(len(self.trained_betas) == steps, "trained_betas", f"{steps} numbers")
            require(all(0 < beta <= 1 for beta in self.trained_betas), "trained_betas", "numbers in (0, 1]")
            require(all(beta < 1 for beta in self.trained_betas[:-1]), "trained_betas", "below 1, but for the last")

    @property
    def is_consistency(self) -> bool:
        """Whether it is of a consistency model (Song et al. 2023)."""
        return self.prediction_type == "consistency"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], class_name: str | None = None) -> "NoiseConfig":
        """Read a diffusers scheduler_config.json. Raises ValueError for what changes images and is not honoured.

        A field of another of these classes changes nothing, as in diffusers: configs keep it when the class is swapped.
        class_name: of model_index.json, which diffusers believes more than the config's own.

        The classes of most solvers have no clip_sample. Without one x_0 is clipped, as for DDPM: near t = T an error in
        eps is a hundred times larger in x_0, and without the clip DPM-Solver++ gives white and black squares on pixel
        models. (`"clip_sample": false` turns it off.)
        """
        name = class_name or config.get("_class_name", "DDPMScheduler")
        given = given_fields(config)
        kind = scheduler_kind(name, given)
        if "predict_epsilon" in given:  # of 2022, before prediction_type
            given.setdefault("prediction_type", "epsilon" if given.pop("predict_epsilon") else "sample")
        if given.get("variance_type", "") is None:  # of a solver: the network's variance is not learned
            del given["variance_type"]
        if kind.clips_by_threshold and given.get("thresholding") is True and given.get("sample_max_value", 1.0) == 1.0:
            # A dynamic threshold that is at most 1 is the clip to [-1, 1], which such a class cannot express otherwise.
            given |= {"thresholding": False, "clip_sample": True, "clip_sample_range": 1.0}
        fields = {field.name for field in dataclasses.fields(cls)} - {"default_sampler"}
        known = fields - set(() if kind.sampler == "consistency" else SIGMA_FIELDS)
        known -= {"thresholding"} if kind.sampler in NO_THRESHOLDING else set()
        values = {key: value for key, value in kind.defaults.items() if key in known}
        for key, value in given.items():
            key = kind.other_names.get(key, key)
            if key in known:
                values[key] = value
            elif is_off(value) or key in FIELDS_OF_ANY or key in fields:
                log.info("scheduler config: %s=%r changes nothing", key, value)
            else:
                raise ValueError(f"scheduler config: {key}={value!r:.100} is not something {name} is known to have")
        return cls.from_json(values, default_sampler=kind.sampler)

    def to_dict(self) -> dict[str, Any]:
        """The scheduler_config.json of diffusers' scheduler for the default sampler."""
        fields = dataclasses.asdict(self)
        if self.trained_betas is not None:
            fields["trained_betas"] = list(self.trained_betas)  # as JSON has it
        kind = KIND_OF_SAMPLER[fields.pop("default_sampler")]
        if kind.sampler == "consistency":
            own = ("num_train_timesteps", *SIGMA_FIELDS)
            others = {theirs: fields[ours] for theirs, ours in kind.other_names.items()}
            return {"_class_name": kind.class_name, **{name: fields[name] for name in own}, **others, **kind.must}
        fields = {name: value for name, value in fields.items() if name not in SIGMA_FIELDS}
        if kind.sampler not in END_AT_FIRST:
            fields.pop("set_alpha_to_one")
        if kind.sampler != "ddpm" and self.variance_type != "learned_range":
            fields.pop("variance_type")  # only DDPM's fixed variances differ
        # lambda_min_clipped is infinite, which JSON has not.
        fields |= {key: value for key, value in kind.must.items() if key != "lambda_min_clipped" and value is not None}
        if kind.clips_by_threshold and self.clip_sample and self.clip_sample_range == 1.0:  # in that class's terms
            del fields["clip_sample"], fields["clip_sample_range"]
            fields |= {"thresholding": True, "sample_max_value": 1.0}
        return {"_class_name": kind.class_name, **fields}

    def default_spacing(self, sampler: str) -> str:
        """The spacing of requests that name none: the config's own, if the config is for this kind of sampler.

        A DDPM or DDIM config does not cover the later solvers, which then take the spacing that suits them best.
        """
        facts, own = SAMPLER_FACTS[sampler], SAMPLER_FACTS[self.default_sampler]
        alike = (facts.multistep and own.multistep) or (facts.fractional and own.fractional)
        return self.timestep_spacing if facts.spacing is None or alike else facts.spacing

    def schedule(self) -> NoiseSchedule:
        """Make the tables."""
        if self.is_consistency:
            sigmas = karras_sigmas(self.num_train_timesteps, self.sigma_min, self.sigma_max, self.rho)
            alpha_bar = 1 / (1 + sigmas**2)
            betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        elif self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float64)
        else:
            betas = make_betas(self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end)
        return NoiseSchedule(rescale_zero_snr(betas) if self.rescale_betas_zero_snr else betas)
