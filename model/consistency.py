"""Sampler tables for multistep consistency sampling (Song et al. 2023, algorithm 1).

The tables are used for consistency models and for students of `tminus distill`.

The x of a consistency model has variance 1 + sigma^2. Our x is the same times sqrt(alpha_bar), where alpha_bar = 1 / (1
+ sigma^2). A student's trajectories end at sigma 0, those of a consistency model at sigma_min.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tminus.model.noise import NoiseConfig
from tminus.model.parametrization import sigma_of
from tminus.model.sampler_tables import Table

SAMPLER = "consistency"
MAX_STEPS = 8


def consistency_table(noise: NoiseConfig, timesteps: Sequence[float], about: Mapping[str, Any] | None = None) -> Table:
    """Return the table for decreasing timesteps.

    Each step computes x' = sqrt(alpha_bar') (x0 + sqrt(sigma'^2 - sigma_min^2) z), and the last step returns x0. The
    table's guidance is 1, because a student's guidance is folded into its weights.
    """
    reached = noise.schedule().alpha_bar_at(timesteps)[1:]
    sigma_min = noise.sigma_min if noise.is_consistency else 0.0
    added = (sigma_of(reached) ** 2 - sigma_min**2).clamp(min=0).sqrt()
    signal = reached.sqrt()
    lines = [(0.0, b, 0.0, 0.0, s) for b, s in zip(signal.tolist(), (signal * added).tolist(), strict=True)]
    return Table(SAMPLER, len(timesteps), 1.0, tuple(timesteps), (*lines, (0.0, 1.0, 0.0, 0.0, 0.0)), about or {})


def consistency_tables(noise: NoiseConfig) -> tuple[Table, ...]:
    """Return a consistency model's tables for 1 to MAX_STEPS steps, with diffusers' timesteps."""
    T = noise.num_train_timesteps
    counts = range(1, min(MAX_STEPS, T) + 1)
    return tuple(consistency_table(noise, [float(T - 1 - k * (T // n)) for k in range(n)]) for n in counts)
