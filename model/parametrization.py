"""How each kind of network takes x and t, and how x_0 follows from its output.

All samplers use x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps. The x that a network was trained on may differ by a
factor:

    EDM, consistency    x_0 + sigma eps                     = x / sqrt(alpha_bar),     alpha_bar = 1 / (1 + sigma^2)
    flow matching       (1 - sigma) x_0 + sigma eps         = x sqrt((1 - sigma)^2 + sigma^2)
    VE                  images y_0 = (x_0 + 1) / 2 in [0, 1]: 2 (y_0 + s eps) - 1 = x / sqrt(alpha_bar), sigma = 2 s

Four numbers describe a network at a noise level: p and q in x0 = p x + q out, the scale of x at the network's input,
and the time passed to the network.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tminus.model.guidance import Forward
from tminus.model.noise import NoiseConfig, NoiseSchedule, gather

# The network's time is log sigma times this factor, in Karras et al. 2022 (edm) and in OpenAI's code (cm_edm).
LOG_SIGMA_TIMES = {"edm": 0.25, "cm_edm": 250.0}


@dataclass(frozen=True, slots=True)
class Parametrization:
    """The coefficients of x0 = p x + q net(scale x, time). Each is float64 [S]."""

    p: Tensor
    q: Tensor
    scale: Tensor
    time: Tensor


def parametrize(noise: NoiseConfig, alpha_bar: Tensor, timesteps: Tensor) -> Parametrization:
    """Return the coefficients for S timesteps and their noise levels alpha_bar [S], in float64.

    Raises ValueError if the network predicts eps and a timestep has no signal (alpha_bar = 0).
    """
    made = _OF_FAMILY[noise.family](noise, alpha_bar, timesteps.to(torch.float64))
    if noise.divides_by_time:
        return Parametrization(made.p, made.q / made.time, made.scale, made.time)
    return made


def as_ours(net: Forward, noise: NoiseConfig, schedule: NoiseSchedule) -> Forward:
    """Wrap a network as a function of our x and of integer timesteps t [B]."""
    if not noise.is_continuous:
        return net
    at = parametrize(noise, schedule.alpha_bar, torch.arange(schedule.num_timesteps, device=schedule.alpha_bar.device))

    def forward(x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        out: Tensor = net(gather(at.scale, t, x) * x, gather(at.time, t, x).flatten(), class_labels)
        return out

    return forward


def sigma_of(alpha_bar: Tensor) -> Tensor:
    """Return sigma, where x_0 + sigma eps = x / sqrt(alpha_bar)."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def _of_betas(noise: NoiseConfig, alpha_bar: Tensor, timesteps: Tensor) -> Parametrization:
    """The output is eps (Ho et al. 2020, eq. 15), x_0, or v (Salimans & Ho 2022, sec. 4)."""
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if noise.prediction_type == "epsilon":
        if bool((alpha_bar <= 0).any()):
            raise ValueError("prediction_type epsilon cannot start from alpha_bar = 0: x0 is not defined there")
        p, q = 1 / signal, -sigma / signal
    elif noise.prediction_type == "sample":
        p, q = torch.zeros_like(signal), torch.ones_like(signal)
    else:
        p, q = signal, -sigma
    return Parametrization(p, q, torch.ones_like(signal), timesteps)


def _of_edm(noise: NoiseConfig, alpha_bar: Tensor, _timesteps: Tensor) -> Parametrization:
    """c_skip, c_out, c_in and c_noise of Karras et al. 2022, table 1.

    For v prediction, c_out is negated, as in diffusers.
    """
    signal, sigma, data = alpha_bar.sqrt(), sigma_of(alpha_bar), noise.sigma_data
    root = (sigma**2 + data**2).sqrt()
    sign = -1 if noise.prediction_type == "edm_v_prediction" else 1
    time = LOG_SIGMA_TIMES[noise.precondition_type] * sigma.log()
    return Parametrization((data / root) ** 2 / signal, sign * sigma * data / root, 1 / (root * signal), time)


def _of_consistency(noise: NoiseConfig, alpha_bar: Tensor, _timesteps: Tensor) -> Parametrization:
    """c_skip and c_out of Song et al. 2023, appendix C. At sigma_min q is 0, so x0 = p x."""
    signal, sigma, data = alpha_bar.sqrt(), sigma_of(alpha_bar), noise.sigma_data
    root, beyond = (sigma**2 + data**2).sqrt(), sigma - noise.sigma_min
    time = LOG_SIGMA_TIMES["cm_edm"] * sigma.log()
    return Parametrization(data**2 / (beyond**2 + data**2) / signal, beyond * data / root, 1 / (root * signal), time)


def _of_flow(noise: NoiseConfig, alpha_bar: Tensor, _timesteps: Tensor) -> Parametrization:
    """The output is eps - x_0 (Lipman et al. 2023, Liu et al. 2023).

    With the x of flow matching, x_0 = x - sigma out.
    """
    sigma = (1 - alpha_bar).sqrt() / (alpha_bar.sqrt() + (1 - alpha_bar).sqrt())
    scale = ((1 - sigma) ** 2 + sigma**2).sqrt()
    return Parametrization(scale, -sigma, scale, noise.num_train_timesteps * sigma)


def _of_ve(noise: NoiseConfig, alpha_bar: Tensor, _timesteps: Tensor) -> Parametrization:
    """The output is the score (y_0 - y) / s^2, and the network's time is s (Song et al. 2021, SDE).

    As in diffusers, the s passed to the network belongs to a continuous time between sampling_eps and 1, so it can be
    slightly larger than the s of the noise in x.
    """
    s = sigma_of(alpha_bar) / 2
    whole = math.log(noise.sigma_max / noise.sigma_min)
    share = (s / noise.sigma_min).log() / whole
    time = noise.sigma_min * ((noise.sampling_eps + (1 - noise.sampling_eps) * share) * whole).exp()
    return Parametrization(1 / alpha_bar.sqrt(), 2 * s**2, 1 / alpha_bar.sqrt(), time)


_OF_FAMILY = {
    "betas": _of_betas,
    "consistency": _of_consistency,
    "edm": _of_edm,
    "flow": _of_flow,
    "ve": _of_ve,
}
