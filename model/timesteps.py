"""Which timesteps a sampler visits. Plain integers, no torch: the service counts a request's cost with it."""

SPACINGS = ("leading", "trailing", "linspace")


def make_timesteps(sampler: str, spacing: str, steps: int, num_timesteps: int, offset: int = 0) -> list[int]:
    """Choose `steps` of the T timesteps, falling. leading, trailing, linspace as in Lin et al. 2024, table 2.

    dpmpp_2m ends in a jump from its last timestep to no noise at all, so leading and linspace spread steps + 1 points
    and leave out the cleanest. These are diffusers' timesteps, except that there are always `steps` of them, all
    different and inside the chain: dpmpp_2m visits the whole chain where steps = T (diffusers repeats some), trailing
    has no timestep -1 (diffusers' arange goes one too far for some steps), and the offset never leads past T - 1.
    Raises ValueError for an unknown spacing, and unless 1 <= steps <= T.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be 1..{num_timesteps}, got {steps}")
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
