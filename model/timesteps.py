"""Which timesteps a sampler visits. Plain numbers, no torch: the service computes a request's cost from them."""

import math
from collections.abc import Sequence

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
) -> list[int]:
    """Choose `steps` of the T timesteps, falling. leading, trailing, linspace as in Lin et al. 2024, table 2.

    karras is one ramp for all samplers (Karras et al. 2022, eq. 5) and needs log_sigmas: log sqrt((1 - alpha_bar) /
    alpha_bar) of t = 0..T-1, ascending. It takes no offset, which only leading has.

    dpmpp_2m ends in a jump from its last timestep to no noise at all, so leading and linspace spread steps + 1 points
    and leave out the cleanest. These three give diffusers' timesteps, except that there are always `steps` of them, all
    different and inside the chain: dpmpp_2m visits the whole chain where steps = T (diffusers repeats some), trailing
    has no timestep -1 (diffusers' arange goes one too far for some steps), and the offset never leads past T - 1.
    Raises ValueError for an unknown spacing, unless 1 <= steps <= T, and for karras without T log_sigmas.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be 1..{num_timesteps}, got {steps}")
    if spacing == "karras":
        if log_sigmas is None or len(log_sigmas) != num_timesteps:
            got = None if log_sigmas is None else len(log_sigmas)
            raise ValueError(f"timestep_spacing karras needs log_sigmas, {num_timesteps} of them, got {got}")
        return _nearest_to_karras(steps, log_sigmas)
    if spacing == "trailing":
        second = num_timesteps - num_timesteps / steps
        stride = num_timesteps - second  # rounded as numpy's arange does, so that halves round as theirs do
        return [round(num_timesteps - k * stride) - 1 for k in range(steps)]
    points = steps + 1 if sampler == "dpmpp_2m" and steps < num_timesteps else steps
    if spacing == "leading":
        t = [k * (num_timesteps // points) for k in range(points)]
        room = min(offset, num_timesteps - 1 - t[-1])
        t = [k + room for k in t]
    elif spacing == "linspace":
        stride = (num_timesteps - 1) / max(1, points - 1)
        t = [round(k * stride) for k in range(points)]
    else:
        raise ValueError(f"timestep_spacing must be among {', '.join(SPACINGS)}, got {spacing!r}")
    return t[::-1][:steps]


def _nearest_to_karras(steps: int, log_sigmas: Sequence[float]) -> list[int]:
    """Round the noise levels of Karras et al. 2022, eq. 5, to timesteps, nearest in log sigma, then make all different.

    A timestep that is already taken is replaced by the next cleaner one, or by a noisier one where the remaining steps
    would not fit otherwise. The first is always T - 1. The ramp starts at its sigma, but at most at SIGMA_MAX, and at
    least at the schedule's smallest sigma. It ends at SIGMA_MIN, or at the smallest sigma of a schedule that does not
    reach as low as that, or nowhere rises above it.
    """
    finite = [log_sigma for log_sigma in log_sigmas if math.isfinite(log_sigma)]
    bottom = min(finite, default=0.0)
    top = max(bottom, min(log_sigmas[-1], math.log(SIGMA_MAX)))
    if top > math.log(SIGMA_MIN):
        bottom = max(bottom, math.log(SIGMA_MIN))
    high, low = math.exp(top / RHO), math.exp(bottom / RHO)
    nearest = len(log_sigmas) - 1
    t = [nearest]
    for k in range(1, steps):
        u = k / (steps - 1)
        log_sigma = RHO * math.log((1 - u) * high + u * low)
        while nearest and abs(log_sigmas[nearest - 1] - log_sigma) <= abs(log_sigmas[nearest] - log_sigma):
            nearest -= 1  # the ramp falls, so the search continues from the last one
        t.append(max(min(nearest, t[-1] - 1), steps - 1 - k))
    return t
