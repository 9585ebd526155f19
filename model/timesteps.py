"""The timesteps of each sampler, as plain numbers without torch. The service computes costs from these."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np

from tminus.model.catalogue import SAMPLER_FACTS

SPACINGS = ("leading", "trailing", "linspace", "karras")
# A jump from this sigma to no noise moves a pixel by under 4 of 255 grey levels (0.03 * 127.5). Steps below are wasted.
SIGMA_MIN = 0.03
# The schedule of Ho et al. 2020 ends at sigma 157. A cosine schedule reaches 20,000, but above 157 x_t is pure noise.
SIGMA_MAX = 160.0
RHO = 3  # Karras et al. 2022, eq. 5: 3 equalises the truncation error. Their 7 gave 1.35 times the Fréchet distance.


def make_timesteps(
    sampler: str,
    spacing: str,
    steps: int,
    num_timesteps: int,
    offset: int = 0,
    log_sigmas: Sequence[float] | None = None,
    *,
    fractional: bool = False,
    continuous: bool = False,
) -> list[float]:
    """Return `steps` of the T timesteps in decreasing order.

    leading, trailing, linspace: as in Lin et al. 2024, table 2, and as in diffusers with the exceptions below.
    karras: one ramp of noise levels for all samplers (Karras et al. 2022, eq. 5). Needs log_sigmas.

    offset: added to the timesteps of leading, at most up to T - 1.
    log_sigmas: log sqrt((1 - alpha_bar) / alpha_bar) of t = 0..T-1, ascending.
    fractional: True if the network accepts fractional timesteps. A sampler that uses them gets unrounded timesteps with
    linspace and karras.
    continuous: True if the noise levels are a formula of t, as in EDM and flow matching. Every sampler then gets
    unrounded timesteps, and linspace is `steps` points from T - 1 to 0.

    A multistep solver jumps from its last timestep to no noise, so leading and linspace drop the cleanest of steps + 1
    points. Unlike diffusers, all timesteps differ: with steps = T a multistep solver visits every timestep. Unlike
    diffusers, trailing never includes timestep -1.

    Raises ValueError for an unknown spacing, for karras without T log_sigmas, and unless 1 <= steps <= T. The upper
    bound is lower for a sampler with more passes than steps.
    """
    facts = SAMPLER_FACTS[sampler]
    most = facts.max_steps(num_timesteps)
    if not 1 <= steps <= most:
        raise ValueError(f"steps must be 1..{most}{'' if most == num_timesteps else f' for {sampler}'}, got {steps}")
    exact = continuous or (fractional and facts.fractional)
    if spacing == "karras":
        if log_sigmas is None or len(log_sigmas) != num_timesteps:
            got = None if log_sigmas is None else len(log_sigmas)
            raise ValueError(f"timestep_spacing karras needs log_sigmas, {num_timesteps} of them, got {got}")
        ramp = _karras_ramp(steps, log_sigmas)
        return _between(ramp, log_sigmas) if exact else _nearest(ramp, log_sigmas)
    if spacing == "trailing":
        second = num_timesteps - num_timesteps / steps
        stride = num_timesteps - second  # round as numpy's arange does, so halves round as in diffusers
        return [round(num_timesteps - k * stride) - 1 for k in range(steps)]
    points = steps + 1 if facts.leaves_out_cleanest and steps < num_timesteps else steps
    t: list[float]
    if spacing == "leading":
        t = [k * (num_timesteps // points) for k in range(points)]
        room = min(offset, num_timesteps - 1 - int(t[-1]))
        t = [k + room for k in t]
    elif spacing == "linspace" and continuous:
        t = np.linspace(0, num_timesteps - 1, steps).tolist() if steps > 1 else [float(num_timesteps - 1)]
    elif spacing == "linspace":
        # np.linspace ends at exactly T - 1. With some step counts (points - 1) * stride exceeds T - 1 by rounding.
        even = np.linspace(0, num_timesteps - 1, points)
        t = (even if exact else even.round().astype(int)).tolist()
    else:
        raise ValueError(f"timestep_spacing must be among {', '.join(SPACINGS)}, got {spacing!r}")
    return t[::-1][:steps]


def timesteps_of_passes(sampler: str, timesteps: Sequence[float]) -> list[float]:
    """Return the timestep of each pass, given the decreasing timesteps of the steps.

    heun and plms use some timesteps twice. A Runge-Kutta step of pndm takes four passes: one at its start, two in its
    middle, and one at its end.
    """
    facts = SAMPLER_FACTS[sampler]
    if len(timesteps) < 2:
        return list(timesteps)
    if facts.passes_per_step == 2:
        return [timesteps[0], *(t for t in timesteps[1:] for _ in range(2))]
    if sampler == "pndm":
        middle = middles(timesteps)
        steps = zip(timesteps, middle, middle, timesteps[1:], strict=False)
        return [*chain.from_iterable(steps), *timesteps[len(middle) :]]
    return [timesteps[0], *[timesteps[1]] * facts.passes_to_start, *timesteps[1:]]


def middles(timesteps: Sequence[float]) -> list[float]:
    """Return the integer timestep in the middle of each Runge-Kutta step of pndm, rounded towards the cleaner end.

    Up to three steps there are no Runge-Kutta steps. Close to the cleanest timestep an error in x_0 is divided by a
    small sigma to become an error in eps, and is multiplied by the sigma at the step's start.
    """
    count = SAMPLER_FACTS["pndm"].steps_to_start
    return [after + (t - after) // 2 for t, after in pairwise(timesteps[: count + 1])] if len(timesteps) > count else []


def log_sigma_at(t: float, log_sigmas: Sequence[float]) -> float:
    """Return log sigma at a timestep. Fractional timesteps are interpolated linearly."""
    low = int(t)
    if t == low:
        return log_sigmas[low]
    return log_sigmas[low] + (t - low) * (log_sigmas[low + 1] - log_sigmas[low])


def timestep_at(log_sigma: float, log_sigmas: Sequence[float]) -> float:
    """Return the timestep at a noise level, interpolated linearly in log sigma. Clamped to finite sigmas."""
    high = min(max(1, bisect_left(log_sigmas, log_sigma)), len(log_sigmas) - 1)
    low, above = log_sigmas[high - 1], log_sigmas[high]
    if not math.isfinite(above):
        return float(high - 1)
    return min(float(high), max(high - 1.0, high - 1 + (log_sigma - low) / (above - low)))


def _karras_ramp(steps: int, log_sigmas: Sequence[float]) -> list[float]:
    """Return log sigma for each step (Karras et al. 2022, eq. 5), not increasing.

    The ramp starts at the schedule's largest finite sigma, but at most at SIGMA_MAX. It ends at SIGMA_MIN if the start
    is above SIGMA_MIN. Both ends are clamped to the range of the schedule's sigmas.
    """
    finite = [log_sigma for log_sigma in log_sigmas if math.isfinite(log_sigma)]
    bottom = min(finite, default=0.0)
    top = max(bottom, min(max(finite, default=0.0), math.log(SIGMA_MAX)))
    if top > math.log(SIGMA_MIN):
        bottom = max(bottom, math.log(SIGMA_MIN))
    high, low = math.exp(top / RHO), math.exp(bottom / RHO)
    shares = [k / max(1, steps - 1) for k in range(steps)]
    return [RHO * math.log((1 - u) * high + u * low) for u in shares]


def _nearest(ramp: Sequence[float], log_sigmas: Sequence[float]) -> list[float]:
    """Round noise levels to the nearest timesteps in log sigma, without repetitions. The first timestep is T - 1.

    A timestep that is already used is replaced by the next cleaner timestep, or by a noisier one if too few cleaner
    timesteps would remain.
    """
    nearest, steps = len(log_sigmas) - 1, len(ramp)
    t = [nearest]
    for k, log_sigma in enumerate(ramp[1:], 1):
        while nearest and abs(log_sigmas[nearest - 1] - log_sigma) <= abs(log_sigmas[nearest] - log_sigma):
            nearest -= 1  # the ramp falls, so continue from the previous timestep
        t.append(max(min(nearest, t[-1] - 1), steps - 1 - k))
    return [*t]


def _between(ramp: Sequence[float], log_sigmas: Sequence[float]) -> list[float]:
    """Return the fractional timesteps at these noise levels. The first timestep is T - 1."""
    return [float(len(log_sigmas) - 1), *(timestep_at(log_sigma, log_sigmas) for log_sigma in ramp[1:])]
