"""The noise schedule: beta_t, alpha_bar_t, q(x_t|x_0) and the posterior q(x_{t-1}|x_t, x_0).

Timesteps are counted from 0: t = 0 is the least noisy and t = T - 1 the noisiest. Tables are float64, and values are
cast when they are used. The server's request scheduler is unrelated; it is in service/.
"""

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tminus.model.catalogue import SAMPLER_FACTS, TABLE
from tminus.model.config import Checked, Count, Flag, Number, PositiveNumber, given_fields, is_off
from tminus.model.scheduler_kinds import (
    FAMILY_OF,
    FIELDS_OF_ANY,
    KIND_OF,
    Family,
    scheduler_kind,
)
from tminus.model.timesteps import log_sigma_at

log = logging.getLogger(__name__)

MAX_TIMESTEPS, DEFAULT_TIMESTEPS = 100_000, 1000
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")


def make_betas(schedule: str, num_timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Tensor:
    """Return beta_t [T] in float64. Raises ValueError for an unknown schedule.

    linear: Ho et al. 2020, sec. 4.
    scaled_linear: Rombach et al. 2022.
    squaredcos_cap_v2: Nichol & Dhariwal 2021, eq. 17.
    sigmoid: Xu et al. 2022 (GeoDiff).
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
    """Shift and scale sqrt(alpha_bar) so that the last alpha_bar is 0 (Lin et al. 2024, algorithm 1)."""
    root = (1 - betas).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alpha_bar = root**2
    alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return 1 - alphas


class NoiseSchedule:
    """The tables of the forward process: betas, alphas and alpha_bar, each float64 [T]."""

    def __init__(self, betas: Tensor) -> None:
        if betas.dtype != torch.float64 or betas.ndim != 1 or len(betas) < 1:
            raise ValueError(f"betas must be a float64 vector, got {betas.dtype} {tuple(betas.shape)}")
        if not bool(((betas > 0) & (betas <= 1)).all()):
            raise ValueError(f"betas must lie in (0, 1], got {betas.min():g} to {betas.max():g}")
        self.betas = betas
        self.alphas = 1 - betas
        self.alpha_bar = self.alphas.cumprod(0)  # alpha_bar_t = prod_{s<=t} alpha_s
        self._formula: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of_formula(cls, alpha_bar_of: Callable[[Tensor], Tensor], num_timesteps: int) -> "NoiseSchedule":
        """Create a schedule from a formula for alpha_bar, which also holds for fractional t."""
        alpha_bar = alpha_bar_of(torch.arange(num_timesteps, dtype=torch.float64))
        schedule = cls(1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]]))
        schedule.alpha_bar, schedule._formula = alpha_bar, alpha_bar_of
        return schedule

    def to(self, device: torch.device) -> "NoiseSchedule":
        """Copy the tables to a device, so that a training step does not wait for the CPU."""
        copy = NoiseSchedule(self.betas.to(device))
        copy.alpha_bar, copy._formula = self.alpha_bar.to(device), self._formula
        return copy

    @property
    def num_timesteps(self) -> int:
        """The number of timesteps, T."""
        return len(self.betas)

    @property
    def log_sigmas(self) -> list[float]:
        """log sigma_t [T] in ascending order, where sigma = sqrt((1 - alpha_bar) / alpha_bar).

        The value is infinite where alpha_bar = 0.
        """
        log_sigmas: list[float] = (((1 - self.alpha_bar).log() - self.alpha_bar.log()) / 2).tolist()
        return log_sigmas

    def alpha_bar_at(self, timesteps: Sequence[float]) -> Tensor:
        """Return alpha_bar [S] at S timesteps, which may be fractional.

        If the schedule has no formula, fractional timesteps are interpolated in log sigma.
        """
        t = torch.tensor(timesteps, dtype=torch.float64)
        if self._formula is not None:
            return self._formula(t)
        whole = t.long()
        alpha_bar = self.alpha_bar[whole]
        if bool((whole == t).all()):
            return alpha_bar
        log_sigmas = self.log_sigmas
        between = torch.tensor([log_sigma_at(each, log_sigmas) for each in timesteps], dtype=torch.float64)
        return torch.where(whole == t, alpha_bar, torch.sigmoid(-2 * between))

    def q_sample(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Draw x_t ~ q(x_t|x_0) with the noise eps (Ho et al. 2020, eq. 4).

        x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps, where x_0, eps and x_t are [B, C, H, W] and t is [B]. The
        coefficients are computed in float64 and cast to the dtype of x_0.
        """
        signal, noise = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        return gather(signal, t, x_0) * x_0 + gather(noise, t, x_0) * eps

    def velocity(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Return v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans & Ho 2022, sec. 4).

        x_0, eps and v are [B, C, H, W], and t is [B].
        """
        signal, noise = self.alpha_bar.sqrt(), (1 - self.alpha_bar).sqrt()
        return gather(signal, t, x_0) * eps - gather(noise, t, x_0) * x_0

    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return coef_x0, coef_xt and the variance beta~ of q(x_{t-1}|x_t, x_0), each float64 [T].

        The mean is coef_x0 x_0 + coef_xt x_t (Ho et al. 2020, eq. 6 and 7). At t = 0 the mean is x_0 and the variance
        is 0.
        """
        prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        return posterior_between(self.alpha_bar, prev)


def posterior_between(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the posterior of a jump from alpha_bar to alpha_bar_prev (Ho et al. 2020, eq. 6 and 7).

    Returns coef_x0, coef_xt and the variance, in the shape of the arguments. If the noise levels do not belong to
    neighbouring timesteps, this is the posterior of a shorter chain (Nichol & Dhariwal 2021, sec. 4).
    """
    alpha = alpha_bar / alpha_bar_prev
    beta = 1 - alpha
    coef_x0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar)
    coef_xt = alpha.sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return coef_x0, coef_xt, beta * (1 - alpha_bar_prev) / (1 - alpha_bar)


def gather(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """Return table[t] as [B, 1, 1, 1], with the dtype and device of `like`."""
    values = table[t.to(table.device)].to(device=like.device, dtype=like.dtype)
    return values.reshape(-1, *([1] * (like.ndim - 1)))


@dataclass(frozen=True, slots=True)
class NoiseConfig(Checked):
    """The scheduler_config.json of a checkpoint: its noise schedule, and defaults for sampling.

    Most fields have the names and defaults that diffusers' schedulers use. Raises ValueError with the field and its
    value.
    """

    KIND: ClassVar[str] = "scheduler config: "

    num_train_timesteps: Count = DEFAULT_TIMESTEPS
    beta_start: Number = 1e-4
    beta_end: Number = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: str = "fixed_small"
    prediction_type: str = "epsilon"
    clip_sample: Flag = True
    clip_sample_range: PositiveNumber = 1.0
    thresholding: Flag = False
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: Flag = True
    rescale_betas_zero_snr: Flag = False
    sigma_min: Number = 0.002
    sigma_max: Number = 80.0
    sigma_data: PositiveNumber = 0.5
    rho: PositiveNumber = 7.0
    sigma_schedule: str = "karras"
    precondition_type: str = "edm"
    """The six fields from sigma_min to precondition_type are for EDM and consistency models. VE models also use
    sigma_min and sigma_max.
    """
    shift: PositiveNumber = 1.0
    """For flow matching."""
    sampling_eps: PositiveNumber = 1e-5
    snr: PositiveNumber = 0.15
    correct_steps: int = 1
    """sampling_eps, snr and correct_steps are for VE models of score_sde. The corrector that snr and correct_steps
    configure is never run.
    """
    divides_by_time: Flag = False
    """True if the network's output must be divided by its time, as diffusers does for a Fourier embedding.

    load_checkpoint derives the value from the network's config. It is not stored in scheduler_config.json.
    """
    default_sampler: str = "ddpm"
    """The sampler for requests with steps but no sampler. It follows from the scheduler class (scheduler_kinds.py)."""

    def __post_init__(self) -> None:
        Checked.__post_init__(self)
        require, among = self.require, self.require_among
        offset = self.steps_offset
        require(isinstance(offset, int) and not isinstance(offset, bool), "steps_offset", "an integer")
        betas = () if self.trained_betas is None else self.trained_betas
        numbers = isinstance(betas, tuple) and all(isinstance(beta, (int, float)) for beta in betas)
        require(numbers, "trained_betas", "a list of numbers or null")
        steps = self.num_train_timesteps
        require(1 <= steps <= MAX_TIMESTEPS, "num_train_timesteps", f"1..{MAX_TIMESTEPS}")
        among("beta_schedule", *BETA_SCHEDULES)
        # diffusers and OpenAI's code disagree on `learned`: a variance in the former, a log variance in the latter.
        variances = "among fixed_small, fixed_large, learned_range (what `learned` holds differs between libraries)"
        of_ddpm = self.variance_type in ("fixed_small", "fixed_large", "learned_range")
        of_ve = self.variance_type == "reverse_diffusion" and self.prediction_type == "score"
        require(of_ddpm or of_ve, "variance_type", variances)
        among("prediction_type", *FAMILY_OF)
        among("timestep_spacing", "leading", "trailing", "linspace")
        samplers = [sampler for family, sampler in KIND_OF if family == self.family]
        among("default_sampler", *(samplers if self.is_continuous else (sampler for _, sampler in KIND_OF)))
        ramp = (self.default_sampler == "consistency") == self.is_consistency
        require(ramp, "prediction_type", "consistency for a consistency model, and for no other")
        among("sigma_schedule", "karras", "exponential")
        among("precondition_type", "edm", "cm_edm")
        count = isinstance(self.correct_steps, int) and not isinstance(self.correct_steps, bool)
        require(count and self.correct_steps >= 0, "correct_steps", "an integer, 0 or more")
        require(self.sampling_eps < 1, "sampling_eps", "below 1")
        by_time = "false for a network that is given timesteps, of which the last is 0"
        require(self.is_continuous or not self.divides_by_time, "divides_by_time", by_time)
        require(0 < self.sigma_min < self.sigma_max, "sigma_min", f"above 0 and below sigma_max {self.sigma_max}")
        if self.is_continuous:
            require(steps >= 2, "num_train_timesteps", f"2 or more with prediction_type {self.prediction_type}")
            alpha_bar = self._alpha_bar_of(torch.arange(steps, dtype=torch.float64))
            apart = bool((alpha_bar[1:] < alpha_bar[:-1]).all()) and bool(alpha_bar[0] < 1)
            field = "shift" if self.prediction_type == "flow" else "sigma_min"
            require(apart, field, "such that all noise levels differ in float64")
        require(not self.thresholding, "thresholding", "false (dynamic thresholding is not supported)")
        require(0 <= self.steps_offset < steps, "steps_offset", f"0..{steps - 1}")
        require(0 < self.beta_start <= self.beta_end, "beta_start", f"above 0, at most beta_end {self.beta_end}")
        require(self.beta_end < 1, "beta_end", "below 1")
        if self.rescale_betas_zero_snr:
            require(self.prediction_type != "epsilon", "prediction_type", "sample or v_prediction with zero-SNR betas")
            # With a single timestep, rescale_zero_snr would divide by zero.
            require(steps >= 2, "num_train_timesteps", "2 or more with zero-SNR betas")
        if self.trained_betas is not None:
            require(len(self.trained_betas) == steps, "trained_betas", f"{steps} numbers")
            require(all(0 < beta <= 1 for beta in self.trained_betas), "trained_betas", "numbers in (0, 1]")
            require(all(beta < 1 for beta in self.trained_betas[:-1]), "trained_betas", "below 1, but for the last")

    @property
    def family(self) -> Family:
        """The family of noise levels, which follows from the prediction type."""
        return FAMILY_OF[self.prediction_type]

    @property
    def is_continuous(self) -> bool:
        """True if a formula of t gives the noise levels, False if they come from betas."""
        return self.family != "betas"

    @property
    def levels(self) -> str:
        """The name of the noise schedule, for display."""
        if not self.is_continuous:
            return self.beta_schedule if self.trained_betas is None else "trained_betas"
        return {"edm": self.sigma_schedule, "flow": "flow", "ve": "geometric"}.get(self.family, "karras")

    @property
    def is_consistency(self) -> bool:
        return self.prediction_type == "consistency"

    @classmethod
    def from_dict(cls, config: Mapping[str, Any], class_name: str | None = None) -> "NoiseConfig":
        """Read a scheduler_config.json. Raises ValueError for an unsupported setting that affects images.

        class_name: the scheduler class in model_index.json. As in diffusers, it overrides the class in the config.
        Fields of other scheduler classes are ignored, because diffusers keeps them when a user switches classes.

        Most solver classes have no clip_sample. If the field is missing, x_0 is clipped as for DDPM. Near t = T an
        error in eps is a hundred times as large in x_0, and without clipping DPM-Solver++ produces white and black
        squares on pixel models. `"clip_sample": false` turns clipping off.
        """
        name = class_name or config.get("_class_name", "DDPMScheduler")
        given = given_fields(config)
        kind = scheduler_kind(name, given)
        if "predict_epsilon" in given:  # files from 2022 use it instead of prediction_type
            given.setdefault("prediction_type", "epsilon" if given.pop("predict_epsilon") else "sample")
        if given.get("variance_type", "") is None:  # solver configs contain null if the variance is not learned
            del given["variance_type"]
        fields = {field.name for field in dataclasses.fields(cls)} - {"default_sampler", "divides_by_time"}
        values = {key: value for key, value in kind.defaults.items() if key in fields}
        if kind.clips_by_threshold and given.get("thresholding") is True and given.get("sample_max_value", 1.0) == 1.0:
            # The scheduler class has no clip_sample, but a threshold of 1 has the same effect as clipping to [-1, 1].
            given["thresholding"] = False
            values |= {"clip_sample": True, "clip_sample_range": 1.0}
            given = {key: value for key, value in given.items() if key not in ("clip_sample", "clip_sample_range")}
        T = given.get("num_train_timesteps", values.get("num_train_timesteps", DEFAULT_TIMESTEPS))
        if (repeated := given.pop("timesteps", None)) not in (None, T):  # some files from 2022 repeat T
            raise ValueError(f"scheduler config: timesteps must be num_train_timesteps, {T}, got {repeated!r:.100}")
        for key, value in given.items():
            if key in kind.fields:
                values[kind.other_names.get(key, key)] = value
            elif key in kind.must:
                continue  # already checked by scheduler_kind
            elif is_off(value) or key in FIELDS_OF_ANY:
                log.info("scheduler config: %s=%r changes nothing", key, value)
            else:
                raise ValueError(f"scheduler config: {key}={value!r:.100} is not a known setting of {name}")
        if "prediction_type" in kind.fields:  # the other classes have a fixed prediction type
            told = values.get("prediction_type", "epsilon")
            if not (isinstance(told, str) and told in kind.predictions):
                wanted = f"among {', '.join(kind.predictions)} for {name}"
                raise ValueError(f"scheduler config: prediction_type must be {wanted}, got {told!r:.100}")
            values["prediction_type"] = kind.predictions[told]
        noise = cls.from_json(values, default_sampler=kind.sampler)
        if kind.family == "ve" and noise.correct_steps:
            log.info(
                "scheduler config: correct_steps=%d is not run: a step's size would depend on the rows' norms",
                noise.correct_steps,
            )
        return noise

    def to_dict(self) -> dict[str, Any]:
        """Return the content of scheduler_config.json, for the diffusers class of the default sampler."""
        kind = KIND_OF[self.family, self.default_sampler]
        fields = {name: getattr(self, kind.other_names.get(name, name)) for name in sorted(kind.fields)}
        if self.trained_betas is not None:
            fields["trained_betas"] = list(self.trained_betas)  # JSON has no tuples
        if "prediction_type" in fields:
            fields["prediction_type"] = next(k for k, v in kind.predictions.items() if v == self.prediction_type)
        if kind.sampler != "ddpm" and self.variance_type != "learned_range":
            fields.pop("variance_type", None)  # the fixed variances affect only DDPM
        # The scheduler class has no clip_sample. A threshold of 1 has the same effect.
        if kind.clips_by_threshold and self.clip_sample and self.clip_sample_range == 1.0:
            fields = {name: value for name, value in fields.items() if name not in ("clip_sample", "clip_sample_range")}
            fields |= {"thresholding": True, "sample_max_value": 1.0}
        # The value of lambda_min_clipped is minus infinity, which JSON cannot express.
        must = {key: value for key, value in kind.must.items() if key != "lambda_min_clipped" and value is not None}
        return {"_class_name": kind.class_name, **fields, **must}

    def default_spacing(self, sampler: str) -> str:
        """Return the timestep spacing for requests that use this sampler and do not choose a spacing.

        A sampler without a spacing of its own, such as ddpm, uses the config's. Other samplers use the config's only if
        the config is for a sampler of the same kind. A DDPM or DDIM config says nothing about them, so each uses the
        spacing that suits it best. With a formula for the noise levels, the spacing is linspace.
        """
        facts, own = SAMPLER_FACTS[sampler], SAMPLER_FACTS[self.default_sampler]
        if self.is_continuous:
            return TABLE if facts.spacing == TABLE else "linspace"
        alike = (facts.leaves_out_cleanest and own.leaves_out_cleanest) or (facts.fractional and own.fractional)
        return self.timestep_spacing if facts.spacing is None or alike else facts.spacing

    def schedule(self) -> NoiseSchedule:
        if self.is_continuous:
            return NoiseSchedule.of_formula(self._alpha_bar_of, self.num_train_timesteps)
        if self.trained_betas is not None:
            betas = torch.tensor(self.trained_betas, dtype=torch.float64)
        else:
            betas = make_betas(self.beta_schedule, self.num_train_timesteps, self.beta_start, self.beta_end)
        return NoiseSchedule(rescale_zero_snr(betas) if self.rescale_betas_zero_snr else betas)

    def _alpha_bar_of(self, t: Tensor) -> Tensor:
        """Return alpha_bar at any t from 0 to T - 1, for a schedule with a formula.

        edm, consistency: sigma follows the ramp of Karras et al. 2022, eq. 5, or is evenly spaced in log sigma.
        flow: x = (1 - sigma) x_0 + sigma eps (Lipman et al. 2023).
        ve: Song et al. 2021 (SDE), where images are in [0, 1]. Our images are in [-1, 1], so the same noise has twice
        the sigma.
        """
        share = t / (self.num_train_timesteps - 1)
        if self.family == "flow":
            low, high = self._shifted(torch.tensor([1 / self.num_train_timesteps, 1.0], dtype=torch.float64))
            sigma = self._shifted(low + (high - low) * share)  # the second shift, as in diffusers
            return (1 - sigma) ** 2 / ((1 - sigma) ** 2 + sigma**2)
        low, high = torch.tensor([self.sigma_min, self.sigma_max], dtype=torch.float64)
        if self.levels == "karras":
            low, high = low ** (1 / self.rho), high ** (1 / self.rho)
            sigma = (low + (high - low) * share) ** self.rho
        else:
            sigma = (low.log() + (high.log() - low.log()) * share).exp()
        alpha_bar: Tensor = 1 / (1 + (sigma * (2 if self.family == "ve" else 1)) ** 2)
        return alpha_bar

    def _shifted(self, sigma: Tensor) -> Tensor:
        shifted: Tensor = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        return shifted
