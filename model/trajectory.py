"""Trajectories: the distribution from which each noisy pass draws x', and log p of the value drawn.

A pass that adds noise draws each value of x' independently from N(mean, s^2). The mean is the update of samplers.py
without its noise term: a x + b x0 + c x0_previous, and for a table with a coefficient d the corresponding term. s is
the coefficient of the noise, or s exp(r v) if the variance is learned. Mean and s follow from the plan, x_t, the
predicted x0 and v. This module computes them with NumPy in float64, whatever the precision of the passes was.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32] | npt.NDArray[np.float16]

# A, B, C, S and R are columns of Plan.lines, X0_PREVIOUS and H columns of M. See samplers.py.
A, B, C, S, R = 2, 3, 4, 5, 7
X0_PREVIOUS, H = 2, 4

# The smallest eta for which the log p of ddim is useful. With less noise, s approaches the rounding error of x in
# float32: log p is off by 0.01 nats per value at eta 1e-4, and by 3 nats at eta 1e-6.
LEAST_ETA = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class PlanNumbers:
    """A `Plan` of P passes as float64 NumPy arrays.

    timesteps [P].
    lines [P, 8].
    inputs [P, 2]: the factor by which x is scaled for the network, and the time passed to the network.
    matrices [P, 1 + R, 4 + R]: None without registers.
    """

    timesteps: Float64
    lines: Float64
    inputs: Float64
    matrices: Float64 | None = None

    @property
    def noisy(self) -> npt.NDArray[np.int64]:
        """The indices of the passes that add noise."""
        return np.flatnonzero(self.lines[:, S] > 0)

    @property
    def learned(self) -> bool:
        """True if each value of x' has an s of its own, from a learned variance."""
        return bool(self.lines[:, R].any())

    def of_register(self, k: int) -> float:
        """Return the coefficient in pass k of the x0 from two passes ago, which a register holds.

        Returns 0 for a plan without registers.
        """
        if self.matrices is None:
            return 0.0
        registers = self.matrices[:, 1:]
        assert registers.shape[1] == 1, "no sampler with noise has more"
        assert np.array_equal(registers[:, 0], np.eye(1, registers.shape[2], X0_PREVIOUS).repeat(len(registers), 0))
        return float(self.matrices[k, 0, H])


@dataclass(frozen=True, slots=True)
class Selection:
    """Which passes of a trajectory are stored. All fields are indices in ascending order.

    passes: the selected passes, counted from 0.
    points: the stored x_t. Pass k leads from point k to point k + 1.
    predictions: the passes whose x_0 is stored. These are the selected passes, and earlier passes that their means
    depend on.
    """

    passes: tuple[int, ...]
    points: tuple[int, ...]
    predictions: tuple[int, ...]

    @classmethod
    def of(cls, passes: Sequence[int], num_passes: int, looks_back: int) -> "Selection":
        """Select some of `num_passes` passes.

        looks_back: how many earlier predictions a mean depends on.

        Raises ValueError unless `passes` is a non-empty ascending sequence of numbers in 0..num_passes - 1.
        """
        if not passes or not all(a < b for a, b in zip((-1, *passes), (*passes, num_passes), strict=True)):
            raise ValueError(f"one or more numbers of passes in 0..{num_passes - 1}, each greater than the one before")
        seen = {each - back for each in passes for back in range(looks_back + 1)}
        points = {point for each in passes for point in (each, each + 1)}
        return cls(tuple(passes), tuple(sorted(points)), tuple(sorted(each for each in seen if each >= 0)))

    @classmethod
    def whole(cls, num_passes: int) -> "Selection":
        return cls.of(range(num_passes), num_passes, 0)


@dataclass(frozen=True, slots=True, eq=False)
class Trajectory:
    """The path of n images from x_T to x_0, in float32 or float16.

    x_t [points, n, C, H, W].
    x_0 [predictions, n, C, H, W]: the network's predictions, with guidance and clipping applied.
    v float32 [predictions, n, C, H, W]: None unless the variance is learned.
    selection: None if all P passes are stored, with P + 1 points and P predictions.
    """

    plan: PlanNumbers
    x_t: Floats
    x_0: Floats
    v: Float32 | None = None
    selection: Selection | None = None

    @property
    def selected(self) -> Selection:
        return self.selection or Selection.whole(len(self.plan.lines))


@dataclass(frozen=True, slots=True, eq=False)
class Transitions:
    """The distributions of K passes: those that are selected and add noise.

    passes [K].
    mean [K, n, C, H, W]: in the dtype of x_t.
    s: float64 [K, 1, 1, 1, 1], or float32 [K, n, C, H, W] for a learned variance.
    log_p [K, n]: log p(x_t[k + 1] | x_t[k]) in nats, summed over C, H and W.
    """

    passes: npt.NDArray[np.int64]
    mean: Floats
    s: Float32 | Float64
    log_p: Float64


def transitions(trajectory: Trajectory) -> Transitions:
    """Compute mean, s and log p of each selected pass that adds noise.

    The computation is in float64. The mean is rounded to the dtype of x_t only after log p is computed.
    """
    plan, selected, row = trajectory.plan, trajectory.selected, trajectory.x_0.shape[1:]
    passes = np.intersect1d(plan.noisy, selected.passes)
    mean = np.empty((len(passes), *row), trajectory.x_t.dtype)
    s = np.empty((len(passes), *row), np.float32) if plan.learned else plan.lines[passes, S].reshape(-1, 1, 1, 1, 1)
    log_p = np.empty((len(passes), row[0]))
    point, prediction = ({k: at for at, k in enumerate(each)} for each in (selected.points, selected.predictions))
    for at, k in enumerate(passes.tolist()):
        a, b, c = plan.lines[k, [A, B, C]]
        around = a * trajectory.x_t[point[k]].astype(np.float64) + b * trajectory.x_0[prediction[k]].astype(np.float64)
        for back, factor in ((1, c), (2, plan.of_register(k))):
            if factor and k >= back:
                around += factor * trajectory.x_0[prediction[k - back]].astype(np.float64)
        spread: Float64 = plan.lines[k, S : S + 1]
        if plan.learned:
            assert trajectory.v is not None
            spread = spread * np.exp(plan.lines[k, R] * trajectory.v[prediction[k]].astype(np.float64))
            s[at] = spread
        log_p[at] = log_density(trajectory.x_t[point[k + 1]], around, spread)
        mean[at] = around
    return Transitions(passes, mean, s, log_p)


def log_density(x: Floats | Float64, mean: Float64, s: Float64) -> Float64:
    """Return log N(x; mean, s^2), summed over all dimensions except the first.

    x and mean are [n, ...], and s is broadcast. Returns [n].
    """
    each = ((x - mean) / s) ** 2 / -2 - np.log(s) - math.log(2 * math.pi) / 2
    total: Float64 = each.reshape(len(each), -1).sum(1)
    return total
