"""Consistency models as they were trained (Song et al. 2023): noise levels sigma, and a network that scales its input.

Their x has variance 1 + sigma^2; ours is sqrt(alpha_bar) times that, with alpha_bar = 1 / (1 + sigma^2). (Students of
`tminus distill` are consistency models too, but of the ordinary kind of network: see training/distill.py.)
"""

from tminus.model.noise import NoiseConfig
from tminus.model.parametrization import sigma_of
from tminus.model.sampler_tables import Table

MAX_STEPS = 8


def consistency_tables(noise: NoiseConfig) -> tuple[Table, ...]:
    """The sampler in 1, 2, ... steps (Song et al. 2023, algorithm 1), at diffusers' timesteps.

    x' = x0 + sqrt(sigma'^2 - sigma_min^2) z in their x, and x0 at the last.
    """
    alpha_bar = noise.schedule().alpha_bar
    last = noise.num_train_timesteps - 1
    tables = []
    for steps in range(1, min(MAX_STEPS, noise.num_train_timesteps) + 1):
        t = [last - k * (noise.num_train_timesteps // steps) for k in range(steps)]
        reached = alpha_bar[t[1:]]
        added = (sigma_of(reached) ** 2 - noise.sigma_min**2).clamp(min=0).sqrt()
        signal = reached.sqrt()
        lines = [(0.0, b, 0.0, 0.0, s) for b, s in zip(signal.tolist(), (signal * added).tolist(), strict=True)]
        lines.append((0.0, 1.0, 0.0, 0.0, 0.0))
        tables.append(Table("consistency", steps, 1.0, tuple(map(float, t)), tuple(lines)))
    return tuple(tables)
