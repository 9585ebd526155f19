"""Trajectories: what each stochastic pass drew from, and how likely its outcome was. NumPy alone, no torch.

A pass that adds noise draws x' from N(mean, s^2), each value by itself. The mean is the update rule of samplers.py
without its noise, a x + b x0 + c x0_previous and what registers add; s is the factor of the noise, s exp(r v) where the
network learned its variance. All of it follows from the plan, x_t and the predictions x0, so float64 is exact here
whatever the precision in which the rows were stepped.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]

# Columns of a line, p, q, a, b, c, s, clip, r, and of M: see Plan in samplers.py and the columns in solvers.py.
A, S, R, Z = 2, 5, 7, 3

# Of ddim, for a log p that says something. Below, s comes near the rounding of x in float32: at 1e-4 log p is off by
# 0.01 nats a value, at 1e-6 by 3.
LEAST_ETA = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class PlanNumbers:
    """A compiled sampler of P passes, all float64; see `Plan`.

    timesteps [P]; lines [P, 8]; inputs [P, 2]: what x is multiplied by on its way into the network, and the timestep
    that the network is given; matrices [P, 1 + R, 4 + R] of a sampler with R registers, else None.
    """

    timesteps: Float64
    lines: Float64
    inputs: Float64
    matrices: Float64 | None = None

    @property
    def noisy(self) -> npt.NDArray[np.int64]:
        """The K passes that add noise."""
        return np.flatnonzero(self.lines[:, S] > 0)

    @property
    def learned(self) -> bool:
        """Whether s differs by value: the network learned its variance, and the sampler uses it."""
        return bool(self.lines[:, R].any())


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """n rows from x_T to x_0.

    x_t [P + 1, n, C, H, W]: before the first pass, and after each. x_0 [P, n, C, H, W]: what the network predicted in
    each pass, guided and clipped as the plan says. v [P, n, C, H, W]: of a learned variance.
    """

    plan: PlanNumbers
    x_t: Float32
    x_0: Float32
    v: Float32 | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Transitions:
    """What the K passes that add noise drew from; a pass without noise has no density, and is not here.

    passes [K]; mean [K, n, C, H, W]; s [K, 1, 1, 1, 1] in float64, or of a learned variance [K, n, C, H, W];
    log_p [K, n]: log p(x_t[k + 1] | x_t[k]) in nats, summed over C, H and W.
    """

    passes: npt.NDArray[np.int64]
    mean: Float32
    s: Float32 | Float64
    log_p: Float64


def transitions(trajectory: Trajectory) -> Transitions:
    """Compute mean, s and log p of every pass that adds noise, in float64; mean is rounded once log p is known."""
    plan, x_t, x_0 = trajectory.plan, trajectory.x_t, trajectory.x_0
    passes, row = plan.noisy, x_0.shape[1:]
    mean = np.empty((len(passes), *row), np.float32)
    s = np.empty((len(passes), *row), np.float32) if plan.learned else plan.lines[passes, S].reshape(-1, 1, 1, 1, 1)
    log_p = np.empty((len(passes), row[0]))
    M = plan.lines[:, None, A : S + 1] if plan.matrices is None else plan.matrices
    assert not M[:, 1:, Z].any(), "no sampler keeps noise in a register"
    x0_previous, registers = np.zeros(row), np.zeros((M.shape[1] - 1, *row))
    at = 0
    for k in range(int(passes[-1]) + 1 if len(passes) else 0):
        x, x0 = x_t[k].astype(np.float64), x_0[k].astype(np.float64)
        after = _combine(M[k], (x, x0, x0_previous, None, *registers))
        if passes[at] == k:
            spread: Float64 = plan.lines[k, S : S + 1]
            if plan.learned:
                assert trajectory.v is not None
                spread = spread * np.exp(plan.lines[k, R] * trajectory.v[k].astype(np.float64))
                s[at] = spread
            log_p[at] = log_density(x_t[k + 1], after[0], spread)
            mean[at] = after[0]
            at += 1
        x0_previous, registers = x0, after[1:]
    return Transitions(passes, mean, s, log_p)


def log_density(x: Float32 | Float64, mean: Float64, s: Float64) -> Float64:
    """Sum log N(x; mean, s^2) over all dimensions but the first: x, mean [n, ...], s that broadcasts -> [n]."""
    each = ((x - mean) / s) ** 2 / -2 - np.log(s) - math.log(2 * math.pi) / 2
    total: Float64 = each.reshape(len(each), -1).sum(1)
    return total


def _combine(M: Float64, state: tuple[Float64 | None, ...]) -> Float64:
    """M [1 + R, 4 + R] times the state of 4 + R [n, C, H, W], without noise -> [1 + R, n, C, H, W]."""
    total: Float64 | float = 0.0
    for column, values in enumerate(state):
        if values is not None:
            total = total + M[:, column].reshape(-1, 1, 1, 1, 1) * values
    assert isinstance(total, np.ndarray)
    return total
