"""Samplers as tables: each compiles to a plan, a line of coefficients per step, and one update rule runs them all.

x0 = clip(p x + q out)            epsilon-, x0- and v-prediction differ only in p and q
x' = a x + b x0 + c x0_previous + s z
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from model.noise import NoiseConfig, NoiseSchedule, posterior_between
from model.unet import UNet2D

SAMPLERS = ("ddpm", "ddim")
NUM_COEFFICIENTS = 7  # the columns of Plan.lines: p, q, a, b, c, s, clip


@dataclass(frozen=True, slots=True)
class Plan:
    """A compiled sampler: timesteps int64 [S], from noisy to clean; lines float64 [S, 7] = p, q, a, b, c, s, clip."""

    timesteps: Tensor
    lines: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


def make_timesteps(spacing: str, steps: int, num_timesteps: int, offset: int = 0) -> Tensor:
    """Choose `steps` of the T timesteps [S], falling. leading, trailing, linspace as in Lin et al. 2024, table 2.

    Raises ValueError unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be 1..{num_timesteps}, got {steps}")
    if spacing == "leading":
        t = torch.arange(steps) * (num_timesteps // steps)
        t = t + min(offset, num_timesteps - 1 - int(t[-1]))  # the offset must not lead past T - 1
        return t.flip(0)
    if spacing == "trailing":
        t = num_timesteps - torch.arange(steps, dtype=torch.float64) * (num_timesteps / steps)
        return t.round().long() - 1
    if spacing == "linspace":
        return torch.linspace(0, num_timesteps - 1, steps, dtype=torch.float64).round().long().flip(0)
    raise ValueError(f"timestep_spacing must be leading, trailing or linspace, got {spacing!r}")


def compile_plan(
    noise: NoiseConfig, schedule: NoiseSchedule, sampler: str, steps: int, *, eta: float = 0.0, clip: bool | None = None
) -> Plan:
    """Compile a sampler for this model. clip=None takes the checkpoint's own clip_sample.

    ddpm: ancestral sampling with the posterior's variance or beta (Ho et al. 2020, eq. 7 and algorithm 2), after
    `variance_type`. ddim: Song et al. 2021, eq. 12 and 16, with noise eta. A step's previous timestep is the next one
    of the plan; the last step adds no noise. Raises ValueError for an unknown sampler or a bad number of steps.
    """
    t = make_timesteps(noise.timestep_spacing, steps, schedule.num_timesteps, noise.steps_offset)
    alpha_bar = schedule.alpha_bar[t]
    last = torch.ones(1, dtype=torch.float64)
    if sampler == "ddim" and not noise.set_alpha_to_one:
        last = schedule.alpha_bar[:1]
    alpha_bar_prev = torch.cat([alpha_bar[1:], last])

    if sampler == "ddpm":
        b, a, variance = posterior_between(alpha_bar, alpha_bar_prev)
        if noise.variance_type == "fixed_large":
            variance = 1 - alpha_bar / alpha_bar_prev
        s = variance.sqrt()
        s[-1] = 0
    elif sampler == "ddim":
        s = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_prev)).sqrt()
        s[-1] = 0
        towards_x_t = (1 - alpha_bar_prev - s**2).clamp(min=0).sqrt()  # times eps = (x - sqrt(abar) x0) / sqrt(1-abar)
        a = towards_x_t / (1 - alpha_bar).sqrt()
        b = alpha_bar_prev.sqrt() - a * alpha_bar.sqrt()
    else:
        raise ValueError(f"sampler must be among {', '.join(SAMPLERS)}, got {sampler!r}")

    p, q = x0_coefficients(noise.prediction_type, alpha_bar)
    clips = noise.clip_sample if clip is None else clip
    bound = torch.full_like(s, noise.clip_sample_range if clips else torch.inf)
    return Plan(t, torch.stack([p, q, a, b, torch.zeros_like(s), s, bound], dim=1))


def x0_coefficients(prediction_type: str, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """p and q of x0 = p x_t + q out, each of alpha_bar's shape.

    Raises ValueError where eps is predicted at a timestep that keeps no signal (a zero-SNR schedule).
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


class Denoised(NamedTuple):
    """What one step yields: x at the next timestep and the present guess of x_0, both [B, C, H, W]."""

    x: Tensor
    x0: Tensor


def denoise(x: Tensor, out: Tensor, x0_previous: Tensor, z: Tensor, lines: Tensor) -> Denoised:
    """Apply the update rule to rows that each have their own line: all [B, C, H, W], lines [B, 7]."""
    p, q, a, b, c, s, clip = lines.reshape(len(lines), NUM_COEFFICIENTS, 1, 1, 1).unbind(1)
    x0 = (p * x + q * out).clamp(-clip, clip)
    return Denoised(a * x + b * x0 + c * x0_previous + s * z, x0)


def guide(out_u: Tensor, out_c: Tensor, guidance: Tensor | float) -> Tensor:
    """Classifier-free guidance, out_u + g (out_c - out_u); g = 1 + w of Ho & Salimans 2022, eq. 6."""
    return out_u + guidance * (out_c - out_u)


@torch.inference_mode()
def sample(
    net: UNet2D,
    plan: Plan,
    x_T: Tensor,
    z_of: Callable[[int], Tensor],
    *,
    class_labels: Tensor | None = None,
    null_class: int | None = None,
    guidance: float = 1.0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Run a plan on one batch that moves in step: x_T [B, C, H, W] -> x_0. The server's engine does not need this loop;
    training sheets and evaluation do. z_of(k) gives the noise of step k.
    """
    x, x0 = x_T, torch.zeros_like(x_T)
    lines = plan.lines.to(device=x.device, dtype=x.dtype)
    for k, t in enumerate(plan.timesteps.tolist()):
        ts = torch.full((len(x),), t, device=x.device)
        if guidance == 1.0 or class_labels is None or null_class is None:
            out = net(x, ts, class_labels)
        else:
            both = torch.cat([class_labels, torch.full_like(class_labels, null_class)])
            out_c, out_u = net(torch.cat([x, x]), torch.cat([ts, ts]), both).chunk(2)
            out = guide(out_u, out_c, guidance)
        x, x0 = denoise(x, out, x0, z_of(k), lines[k : k + 1].expand(len(x), -1))
        if on_step is not None:
            on_step(k)
    return x
