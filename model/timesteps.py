"""The timesteps that a sampler visits, as plain numbers without torch: the service computes costs from them."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np

from tminus.model.catalogue import SAMPLER_FACTS

SPACINGS = ("leading", "trailing", "linspace", "karras")
# A jump from here to no noise moves a pixel by under 4 of 255 grey levels (0.03 * 127.5), so lower steps are wasted.
SIGMA_MIN = 0.03
# In Ho et al.'s schedule t = T - 1 has sigma 157. A cosine schedule goes on to 20,000, but above 157 x_t is noise.
SIGMA_MAX = 160.0
RHO = 3  # Karras et al. 2022, eq. 5: 3 evens out the truncation error. Their 7 gave 1.35 times the Fréchet distance


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
    """Choose `steps` of the T timesteps, in descending order. leading, trailing, linspace: Lin et al. 2024, table 2.

    karras is one ramp for all samplers (Karras et al. 2022, eq. 5). It needs log_sigmas: log sqrt((1 - alpha_bar) /
    alpha_bar) of t = 0..T-1, ascending. Only leading uses the offset.

    fractional: the network accepts fractional timesteps. A sampler with fractional timesteps then gets them unrounded
    with linspace and karras. continuous: noise levels are a formula of t, as for EDM and flow matching. Every sampler
    then gets timesteps unrounded, and linspace is `steps` points from T - 1 to 0.

    A multistep solver ends in a jump from its last timestep to no noise, so leading and linspace spread steps + 1
    points and leave out the cleanest. leading, trailing and linspace give diffusers' timesteps, with three exceptions.
    All timesteps differ: with steps = T a multistep solver visits every timestep (diffusers repeats some). trailing
    never has timestep -1 (diffusers' arange goes one too far for some steps). The offset never leads past T - 1.

    Raises ValueError for an unknown spacing, for karras without T log_sigmas, and unless 1 <= steps <= T, or a lower
    bound for a sampler with more passes than steps.
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
        stride = num_timesteps - second  # numpy's arange rounds, so halves round as in diffusers
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
        # numpy's linspace ends at exactly T - 1; for some step counts (points - 1) * stride exceeds it by rounding.
        even = np.linspace(0, num_timesteps - 1, points)
        t = (even if exact else even.round().astype(int)).tolist()
    else:
        raise ValueError(f"timestep_spacing must be among {', '.join(SPACINGS)}, got {spacing!r}")
    return t[::-1][:steps]


def timesteps_of_passes(sampler: str, timesteps: Sequence[float]) -> list[float]:
    """Return the timestep of each pass through the network, from the descending timesteps of the steps.

    heun and plms revisit some timesteps. A Runge-Kutta step of pndm takes four passes: one at its start, two in its
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
    """Return the integer timestep in the middle of each Runge-Kutta step of pndm; of two middles, the cleaner one.

    The list is empty if a Runge-Kutta step would end at the cleanest timestep. Such a step would divide an error in x_0
    by a small sigma, to get an error in eps, and multiply it by the sigma at the step's start.
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
    """Return the timestep at a noise level, interpolated in log sigma, or the nearest timestep with a finite sigma."""
    high = min(max(1, bisect_left(log_sigmas, log_sigma)), len(log_sigmas) - 1)
    low, above = log_sigmas[high - 1], log_sigmas[high]
    if not math.isfinite(above):
        return float(high - 1)
    return min(float(high), max(high - 1.0, high - 1 + (log_sigma - low) / (above - low)))


def _karras_ramp(steps: int, log_sigmas: Sequence[float]) -> list[float]:
    """Return log sigma of each step (Karras et al. 2022, eq. 5).

    The ramp starts at the schedule's largest finite sigma, limited to between its smallest sigma and SIGMA_MAX. It
    ends at SIGMA_MIN, or at the schedule's smallest sigma if that is larger, and never rises.
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
    """Round noise levels to the nearest timesteps in log sigma, then make all timesteps different.

    A repeated timestep is replaced by the next cleaner one, or by a noisier one if the remaining steps would not fit
    otherwise. The first is always T - 1.
    """
    nearest, steps = len(log_sigmas) - 1, len(ramp)
    t = [nearest]
    for k, log_sigma in enumerate(ramp[1:], 1):
        while nearest and abs(log_sigmas[nearest - 1] - log_sigma) <= abs(log_sigmas[nearest] - log_sigma):
            nearest -= 1  # the ramp falls, so continue the search from the last timestep
        t.append(max(min(nearest, t[-1] - 1), steps - 1 - k))
    return [*t]


def _between(ramp: Sequence[float], log_sigmas: Sequence[float]) -> list[float]:
    """Return the fractional timesteps at these noise levels, interpolated in log sigma. The first is always T - 1."""
    return [float(len(log_sigmas) - 1), *(timestep_at(log_sigma, log_sigmas) for log_sigma in ramp[1:])]
