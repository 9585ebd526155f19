"""The timesteps of each sampler, as plain numbers. Does not import torch.

The service computes the cost of a request from them.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np

from tminus.model.catalogue import SAMPLER_FACTS

SPACINGS = ("leading", "trailing", "linspace", "karras")
# A jump from this sigma to no noise changes a pixel by less than 4 of 255 grey levels (0.03 * 127.5), so steps at lower
# noise would be wasted.
SIGMA_MIN = 0.03
# The schedule of Ho et al. 2020 ends at sigma 157. A cosine schedule reaches 20,000, but above 157 x_t is pure noise
# anyway.
SIGMA_MAX = 160.0
RHO = 3  # equalises the truncation errors of steps; Karras et al. 2022, eq. 5, have 7


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
    """Choose `steps` of the T timesteps, in decreasing order.

    leading, trailing, linspace: as in Lin et al. 2024, table 2, and in diffusers, with the exceptions below.
    karras: a ramp of noise levels (Karras et al. 2022, eq. 5), the same for all samplers. Needs log_sigmas.

    offset: a number added to the timesteps of leading, reduced if the largest timestep would exceed T - 1.
    log_sigmas: log sqrt((1 - alpha_bar) / alpha_bar) for t = 0..T-1, ascending.
    fractional: True if the network accepts fractional timesteps. If the sampler can use them, the timesteps of linspace
    and karras are not rounded.
    continuous: True if the noise levels are a formula of t, as in EDM and flow matching. The timesteps of linspace and
    karras are then not rounded for any sampler, and linspace is `steps` points from T - 1 to 0.

    A multistep solver jumps from its last timestep to no noise. For these solvers leading and linspace choose steps + 1
    points and drop the cleanest.

    There are three differences from diffusers: no timestep occurs twice, so a multistep solver with T steps visits
    every timestep; trailing never includes timestep -1; and the offset never leads past T - 1.

    Raises ValueError for an unknown spacing, for karras without T log_sigmas, and unless 1 <= steps <= T. The upper
    limit is lower for samplers that take more passes than steps.
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
        stride = num_timesteps - second  # same rounding as np.arange in diffusers
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
        # np.linspace ends at exactly T - 1, whereas (points - 1) * stride can exceed it due to rounding.
        even = np.linspace(0, num_timesteps - 1, points)
        t = (even if exact else even.round().astype(int)).tolist()
    else:
        raise ValueError(f"timestep_spacing must be among {', '.join(SPACINGS)}, got {spacing!r}")
    return t[::-1][:steps]


def timesteps_of_passes(sampler: str, timesteps: Sequence[float]) -> list[float]:
    """Return the timestep of each pass, given the decreasing timesteps at which the steps start.

    heun and plms use some timesteps twice. A Runge-Kutta step of pndm takes four passes: one at its start, two in its
    middle and one at its end.
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
    """Return the timestep in the middle of each of pndm's Runge-Kutta steps, rounded down.

    With three steps or fewer, pndm has no Runge-Kutta steps. Near the cleanest timestep, such a step would divide an
    error in x_0 by a small sigma to get eps, and then multiply it by the larger sigma at the start of the step.
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
    """Return the timestep at a noise level, by linear interpolation in log sigma.

    The result is clamped to timesteps with a finite sigma.
    """
    high = min(max(1, bisect_left(log_sigmas, log_sigma)), len(log_sigmas) - 1)
    low, above = log_sigmas[high - 1], log_sigmas[high]
    if not math.isfinite(above):
        return float(high - 1)
    return min(float(high), max(high - 1.0, high - 1 + (log_sigma - low) / (above - low)))


def _karras_ramp(steps: int, log_sigmas: Sequence[float]) -> list[float]:
    """Return the log sigma of each step, non-increasing (Karras et al. 2022, eq. 5).

    The ramp starts at the schedule's largest finite sigma, or at SIGMA_MAX if that is smaller. It ends at SIGMA_MIN,
    unless all of the schedule's sigmas are larger or the ramp starts below SIGMA_MIN; then it ends at the schedule's
    smallest finite sigma.
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
    """Return distinct timesteps whose log sigmas are nearest to a ramp. The first one is T - 1.

    If a timestep is already used, the next cleaner one takes its place, or a noisier one if too few cleaner timesteps
    would be left for the remaining steps.
    """
    nearest, steps = len(log_sigmas) - 1, len(ramp)
    t = [nearest]
    for k, log_sigma in enumerate(ramp[1:], 1):
        while nearest and abs(log_sigmas[nearest - 1] - log_sigma) <= abs(log_sigmas[nearest] - log_sigma):
            nearest -= 1  # the ramp descends, so continue from the last position
        t.append(max(min(nearest, t[-1] - 1), steps - 1 - k))
    return [*t]


def _between(ramp: Sequence[float], log_sigmas: Sequence[float]) -> list[float]:
    """Return the fractional timesteps of a ramp of log sigmas. The first one is T - 1."""
    return [float(len(log_sigmas) - 1), *(timestep_at(log_sigma, log_sigmas) for log_sigma in ramp[1:])]
