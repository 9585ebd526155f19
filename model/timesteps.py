"""The timesteps that a sampler visits. Plain numbers, no torch: the service computes a request's cost from them."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import chain, pairwise

import numpy as np

from tminus.model.catalogue import SAMPLER_FACTS

SPACINGS = ("leading", "trailing", "linspace", "karras")
# A jump from here to no noise moves a pixel by under 4 of 255 grey levels (0.03 * 127.5): steps below are wasted.
SIGMA_MIN = 0.03
# The sigma of t = T - 1 in Ho et al.'s schedule is 157. Above it x_t is noise, and a cosine schedule goes on to 20,000.
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
    """Choose `steps` of the T timesteps, falling. leading, trailing, linspace as in Lin et al. 2024, table 2.

    karras is one ramp for all samplers (Karras et al. 2022, eq. 5) and needs log_sigmas: log sqrt((1 - alpha_bar) /
    alpha_bar) of t = 0..T-1, ascending. It takes no offset, which only leading has.

    fractional says that the network takes timesteps between whole ones; a sampler that visits those gets them unrounded
    where the spacing is linspace or karras. continuous says that noise levels are a formula of t, as those of EDM and
    of flow matching: every sampler gets such timesteps unrounded, and linspace is `steps` points from T - 1 to 0.

    A multistep solver ends in a jump from its last timestep to no noise at all, so leading and linspace spread
    steps + 1 points and leave out the cleanest. These three give diffusers' timesteps, except that there are always
    `steps` of them, all different and inside the chain: a multistep solver visits the whole chain where steps = T
    (diffusers repeats some), trailing has no timestep -1 (diffusers' arange goes one too far for some steps), and the
    offset never leads past T - 1. Raises ValueError for an unknown spacing, unless 1 <= steps <= T, or fewer
    for a sampler that takes more passes than steps, and for karras without T log_sigmas.
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
        stride = num_timesteps - second  # rounded as numpy's arange does, so that halves round as theirs do
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
        # numpy's ends at exactly T - 1, where (points - 1) * stride passes it by rounding for some step counts.
        even = np.linspace(0, num_timesteps - 1, points)
        t = (even if exact else even.round().astype(int)).tolist()
    else:
        raise ValueError(f"timestep_spacing must be among {', '.join(SPACINGS)}, got {spacing!r}")
    return t[::-1][:steps]


def timesteps_of_passes(sampler: str, timesteps: Sequence[float]) -> list[float]:
    """The timestep of each pass through the network, from those of the steps, falling.

    heun and plms revisit some. A Runge-Kutta step of pndm takes four passes: at its start, twice in its middle, and at
    its end.
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
    """The whole timestep in the middle of each of pndm's Runge-Kutta steps, the cleaner one of two.

    Where one would end at the cleanest timestep there are none: an error in x_0 is divided by sigma there to be one in
    eps, and multiplied by the sigma that the step comes from.
    """
    count = SAMPLER_FACTS["pndm"].steps_to_start
    return [after + (t - after) // 2 for t, after in pairwise(timesteps[: count + 1])] if len(timesteps) > count else []


def log_sigma_at(t: float, log_sigmas: Sequence[float]) -> float:
    """Log sigma at a timestep, between whole ones by a line."""
    low = int(t)
    if t == low:
        return log_sigmas[low]
    return log_sigmas[low] + (t - low) * (log_sigmas[low + 1] - log_sigmas[low])


def timestep_at(log_sigma: float, log_sigmas: Sequence[float]) -> float:
    """The timestep at a noise level, between whole ones by a line in log sigma; the nearest that is finite."""
    high = min(max(1, bisect_left(log_sigmas, log_sigma)), len(log_sigmas) - 1)
    low, above = log_sigmas[high - 1], log_sigmas[high]
    if not math.isfinite(above):
        return float(high - 1)
    return min(float(high), max(high - 1.0, high - 1 + (log_sigma - low) / (above - low)))


def _karras_ramp(steps: int, log_sigmas: Sequence[float]) -> list[float]:
    """Log sigma of each step (Karras et al. 2022, eq. 5).

    The ramp starts at the schedule's largest finite sigma, but at most at SIGMA_MAX, and at least at its smallest. It
    ends at SIGMA_MIN, or at the smallest sigma of a schedule that does not reach as low as that, or nowhere rises above
    it.
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
    """Round noise levels to timesteps, nearest in log sigma, then make all different.

    A timestep that is already taken is replaced by the next cleaner one, or by a noisier one where the remaining steps
    would not fit otherwise. The first is always T - 1.
    """
    nearest, steps = len(log_sigmas) - 1, len(ramp)
    t = [nearest]
    for k, log_sigma in enumerate(ramp[1:], 1):
        while nearest and abs(log_sigmas[nearest - 1] - log_sigma) <= abs(log_sigmas[nearest] - log_sigma):
            nearest -= 1  # the ramp falls, so the search continues from the last one
        t.append(max(min(nearest, t[-1] - 1), steps - 1 - k))
    return [*t]


def _between(ramp: Sequence[float], log_sigmas: Sequence[float]) -> list[float]:
    """Timesteps at exactly these noise levels, but for the first, T - 1, between whole ones by a line in log sigma."""
    return [float(len(log_sigmas) - 1), *(timestep_at(log_sigma, log_sigmas) for log_sigma in ramp[1:])]
