"""A student predicts, from points of a trajectory of its teacher, where that ends (Song et al. 2023).

What it predicts, its samplers as tables, and the timesteps in them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from tminus.model.noise import NoiseConfig
from tminus.model.samplers import Plan, alpha_bar_at, table_plan
from tminus.model.tables import Table

SAMPLER = "consistency"
MAX_STEPS = 4  # that a student is made for
LEVELS = (0.3, 0.05, 0.7)  # of alpha_bar, where the second step of two begins, and what three and four add
HUBER = 0.03  # c of the loss, in units of the model's range


def student_noise(noise: NoiseConfig) -> NoiseConfig:
    """The noise of a teacher's student, which predicts v: an error of eps counts sigma_T times in x0, one of v once."""
    return replace(noise, prediction_type="v_prediction", default_sampler="ddpm")


def predict_x0(plan: Plan, k: Tensor, x: Tensor, out: Tensor) -> Tensor:
    """x0 = p x + q out of points k [B] of a plan: x, out [B, C, H, W]. Not clipped, as gradients go through it."""
    p, q = plan.lines[:, :2].to(x)[k].reshape(-1, 2, 1, 1, 1).unbind(1)
    return p * x + q * out.to(x.dtype)


def pseudo_huber(x0: Tensor, target: Tensor) -> Tensor:
    """The mean over rows of sqrt(d^2 + c^2) - c, for d the root mean square of x0 - target (Song & Dhariwal 2023).

    Far errors count by their size, not their square: at high noise they are large and teach little.
    """
    squares = (x0 - target).square().flatten(1).mean(1)
    return ((squares + HUBER**2).sqrt() - HUBER).mean()


def consistency_table(noise: NoiseConfig, timesteps: Sequence[float], about: Mapping[str, Any] | None = None) -> Table:
    """The table of multistep consistency sampling (Song et al. 2023, algorithm 1) at these timesteps, falling.

    x' = sqrt(alpha_bar') x0 + sqrt(1 - alpha_bar') z, and x0 at the last. Its guidance is 1: the student's is in the
    weights.
    """
    reached = alpha_bar_at(noise.schedule(), timesteps)[1:]
    signal, sigma = reached.sqrt().tolist(), (1 - reached).sqrt().tolist()
    lines = [(0.0, b, 0.0, 0.0, s) for b, s in zip(signal, sigma, strict=True)]
    return Table(SAMPLER, len(timesteps), 1.0, tuple(timesteps), (*lines, (0.0, 1.0, 0.0, 0.0, 0.0)), about or {})


def consistency_plan(noise: NoiseConfig, timesteps: Sequence[float]) -> Plan:
    """The plan of consistency sampling at these timesteps."""
    return table_plan(noise, noise.schedule(), consistency_table(noise, timesteps), clip=None)


def student_points(alpha_bar: Tensor, steps: int) -> list[int]:
    """Which points of the teacher's plan, of alpha_bar [P], a student visits in so many steps, first to last.

    Those of few steps are among those of more, so that a student of several numbers of steps has few to learn.
    """
    chosen = [0]
    for level in LEVELS[: steps - 1]:
        free = [k for k in range(len(alpha_bar)) if k not in chosen]
        chosen.append(min(free, key=lambda k: abs(float(alpha_bar[k]) - level)))
    return sorted(chosen)
