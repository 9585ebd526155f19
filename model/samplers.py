"""Samplers as tables: each compiles to a plan with one line of coefficients per step; one update rule runs all.

x0 = clip(p x + q out)            epsilon-, x0- and v-prediction differ only in p and q
x' = a x + b x0 + c x0_previous + s exp(r v) z

v is the second half of the output channels of a network with learned variance; for others exp(r v) is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tminus.model.noise import NoiseConfig, NoiseSchedule, posterior_between
from tminus.model.timesteps import make_timesteps

SAMPLERS = ("ddpm", "ddim", "dpmpp_2m")
NUM_COEFFICIENTS = 8  # the columns of Plan.lines: p, q, a, b, c, s, clip, r

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A U-Net, however it is run: x [B, C, H, W], t [B], class_labels [B] or None -> out [B, C or 2C, H, W]."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled sampler: timesteps int64 [S], from noisy to clean; lines float64 [S, 8].

    known float64 [S, 2]: sqrt(alpha_bar) and sqrt(1 - alpha_bar) after each step; 1 and 0 after the last.
    """

    timesteps: Tensor
    lines: Tensor
    known: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def adds_noise(self) -> bool:
        """Whether any step needs z; ddim with eta 0 and dpmpp_2m draw none after x_T."""
        return bool((self.lines[:, 5] > 0).any())


def compile_plan(
    noise: NoiseConfig,
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    *,
    eta: float = 0.0,
    clip: bool | None = None,
    spacing: str | None = None,
    start: int = 0,
) -> Plan:
    """Compile a sampler for this model. clip=None takes the checkpoint's own clip_sample, spacing=None its spacing.

    ddpm: ancestral sampling with the posterior's variance or beta (Ho et al. 2020, eq. 7 and algorithm 2), or what the
    network learned between the two, after `variance_type`. ddim: Song et al. 2021, eq. 12 and 16, with noise eta.
    dpmpp_2m: Lu et al. 2022. A step's previous timestep is the next one of the plan; the last step adds no noise.
    start leaves out that many first steps; the first step of the remaining plan then has no x0_previous.
    Raises ValueError for an unknown sampler or spacing, or a bad number of steps.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be among {', '.join(SAMPLERS)}, got {sampler!r}")
    spacing = spacing or noise.default_spacing(sampler)
    T, offset = schedule.num_timesteps, noise.steps_offset
    t = torch.tensor(make_timesteps(sampler, spacing, steps, T, offset, schedule.log_sigmas)[start:])
    assert len(t) > 0
    alpha_bar = schedule.alpha_bar[t]
    last = torch.ones(1, dtype=torch.float64)
    if sampler == "ddim" and not noise.set_alpha_to_one:
        last = schedule.alpha_bar[:1]
    alpha_bar_prev = torch.cat([alpha_bar[1:], last])

    c, s, r = torch.zeros(3, len(t), dtype=torch.float64)
    if sampler == "ddpm":
        b, a, variance = posterior_between(alpha_bar, alpha_bar_prev)
        s, r = _ancestral_noise(noise.variance_type, 1 - alpha_bar / alpha_bar_prev, variance)
    elif sampler == "ddim":
        s = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
        s[-1] = 0
        towards_x_t = (1 - alpha_bar_prev - s**2).clamp(min=0).sqrt()  # times eps = (x - sqrt(abar) x0) / sqrt(1-abar)
        a = towards_x_t / (1 - alpha_bar).sqrt()
        b = alpha_bar_prev.sqrt() - a * alpha_bar.sqrt()
    else:
        a, b, c = _dpm_solver(alpha_bar, alpha_bar_prev)

    p, q = x0_coefficients(noise.prediction_type, alpha_bar)
    clips = noise.clip_sample if clip is None else clip
    bound = torch.full_like(s, noise.clip_sample_range if clips else torch.inf)
    reached = torch.cat([alpha_bar[1:], torch.ones(1, dtype=torch.float64)])  # independent of set_alpha_to_one
    known = torch.stack([reached.sqrt(), (1 - reached).sqrt()], dim=1)
    return Plan(t, torch.stack([p, q, a, b, c, s, bound, r], dim=1), known)


def _ancestral_noise(variance_type: str, beta: Tensor, posterior_variance: Tensor) -> tuple[Tensor, Tensor]:
    """s and r of ddpm's standard deviation s exp(r v), from beta and the posterior variance: each [S].

    learned_range: log variance = (1 + v)/2 log beta + (1 - v)/2 log beta~ (Nichol & Dhariwal 2021, eq. 15).
    """
    r = torch.zeros_like(beta)
    if variance_type == "fixed_small":
        s = posterior_variance.sqrt()
    elif variance_type == "fixed_large":
        s = beta.sqrt()
    else:
        s = (beta * posterior_variance) ** 0.25
        r = (beta.log() - posterior_variance.log()) / 4
    s[-1] = r[-1] = 0
    return s, r


def _dpm_solver(alpha_bar: Tensor, alpha_bar_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """a, b, c of DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), from the alpha_bar of each step and its next.

    x' = (sigma'/sigma) x - alpha' (e^-h - 1) D, where D = x0 + (x0 - x0_previous) / (2 r_k) extrapolates to the middle
    of the step; h is the step in lambda = log(alpha/sigma) and r_k = h_previous / h. D = x0 in the first step, which
    has nothing to extrapolate from, in the last, where h is infinite, and after a step from alpha_bar = 0, whose h is.
    """
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    a = (1 - alpha_bar_prev).sqrt() / sigma
    towards_D = alpha_bar_prev.sqrt() - a * alpha  # alpha' (1 - e^-h), in a form that allows lambda = -inf
    h = (alpha / sigma).log().diff()
    w = torch.zeros_like(a)  # 1 / (2 r_k)
    w[1:-1] = h[1:] / (2 * h[:-1])
    return a, towards_D * (1 + w), -towards_D * w


def x0_coefficients(prediction_type: str, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of x0 = p x_t + q out, each of alpha_bar's shape.

    Raises ValueError where eps is predicted at a timestep without signal (a zero-SNR schedule).
    """
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction_type == "epsilon":
        if bool((alpha_bar <= 0).any()):
            raise ValueError("prediction_type epsilon cannot start from alpha_bar = 0: x0 is not defined there")
        return 1 / signal, -noise / signal
    if prediction_type == "sample":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction_type == "v_prediction":
        return signal, -noise
    raise ValueError(f"prediction_type must be epsilon, sample or v_prediction, got {prediction_type!r}")


def keep_known(x: Tensor, new: Tensor, x_0: Tensor, eps: Tensor, known: Tensor) -> Tensor:
    """Put the known pixels back at the noise level of x (Lugmayr et al. 2022, eq. 8).

    x, x_0, eps [B, C, H, W]; new [B, 1, H, W] bool: where x is kept; known [B, 2]: lines of Plan.known.
    """
    signal, noise = known.reshape(len(known), 2, 1, 1, 1).unbind(1)
    return torch.where(new, x, signal * x_0 + noise * eps)


class Denoised(NamedTuple):
    """The result of one step: x at the next timestep and the current prediction of x_0, both [B, C, H, W]."""

    x: Tensor
    x0: Tensor


def denoise(x: Tensor, out: Tensor, x0_previous: Tensor, z: Tensor, lines: Tensor) -> Denoised:
    """Apply the update rule, each row by its own line: lines [B, 8], all else [B, C, H, W].

    out may be [B, 2C, H, W]: the prediction and the v of a learned variance.
    """
    p, q, a, b, c, s, clip, r = lines.reshape(len(lines), NUM_COEFFICIENTS, 1, 1, 1).unbind(1)
    channels = x.shape[1]
    if out.shape[1] != channels:
        out, v = out[:, :channels], out[:, channels:]
        s = s * torch.exp(r * v)
    x0 = (p * x + q * out).clamp(-clip, clip)
    return Denoised(a * x + b * x0 + c * x0_previous + s * z, x0)


def guide(out_u: Tensor, out_c: Tensor, guidance: Tensor | float, channels: int | None = None) -> Tensor:
    """Classifier-free guidance, out_u + g (out_c - out_u); g = 1 + w of Ho & Salimans 2022, eq. 6.

    Only the first `channels` are guided (None: all); the rest, the v of a learned variance, is taken from out_c.
    """
    if channels is None or channels == out_c.shape[1]:
        return out_u + guidance * (out_c - out_u)
    guided = guide(out_u[:, :channels], out_c[:, :channels], guidance)
    return torch.cat([guided, out_c[:, channels:]], dim=1)


@torch.inference_mode()
def sample(
    net: Forward,
    plan: Plan,
    x_T: Tensor,
    z_of: Callable[[int], Tensor],
    *,
    class_labels: Tensor | None = None,
    null_class: int | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[int, int] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Run a plan on one batch whose rows share each step: x_T [B, C, H, W] -> x_0. z_of(k) gives the noise of step k.

    For training sheets and evaluation; the server's engine has a loop of its own.

    Guidance is on at the timesteps lo <= t <= hi of its interval (Kynkäänniemi et al. 2024); None is all of them.
    """
    x, x0 = x_T, torch.zeros_like(x_T)
    lines = plan.lines.to(device=x.device, dtype=x.dtype)
    for k, t in enumerate(plan.timesteps.tolist()):
        ts = torch.full((len(x),), t, device=x.device)
        inside = guidance_interval is None or guidance_interval[0] <= t <= guidance_interval[1]
        if guidance == 1.0 or class_labels is None or null_class is None or not inside:
            out = net(x, ts, class_labels)
        else:
            both = torch.cat([class_labels, torch.full_like(class_labels, null_class)])
            out_c, out_u = net(torch.cat([x, x]), torch.cat([ts, ts]), both).chunk(2)
            out = guide(out_u, out_c, guidance, x.shape[1])
        x, x0 = denoise(x, out, x0, z_of(k), lines[k : k + 1].expand(len(x), -1))
        if on_step is not None:
            on_step(k)
    return x
