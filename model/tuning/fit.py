"""Fits the coefficients of a sampler with few steps to one checkpoint, for given timesteps.

The teacher is the same checkpoint, sampled in more steps. From the same noise x_T, the fitted table should give the
same image as the teacher. The coefficients of each step solve a linear least-squares problem:

    minimise over a, b, c, d of  || a x + b x0 + c x0_previous + d x0_before - x* ||^2

Here x* is the teacher's x at the next timestep. The inputs come from the table's own earlier steps, so each step
corrects their errors. Tables are judged on held-out rows (a row is one image). Other linear solvers fitted to a network
are BNS (Shaul et al. 2024) and S4S (Frankel et al. 2025).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from tminus.model.checkpoint import Checkpoint
from tminus.model.guidance import Forward, guided
from tminus.model.parametrization import parametrize
from tminus.model.samplers import Plan, solve
from tminus.model.solvers import Levels
from tminus.model.timesteps import log_sigma_at, timestep_at

RIDGE = 1e-6  # share of each input's mean square; limits coefficients that the rows hardly determine
LARGEST_MOVE, SMALLEST_MOVE = 0.5, 0.06  # shares of the distance to the neighbouring timestep, in log rho
LONGEST_WAY = 2.0  # limit for that distance, because the first timesteps can be further apart
WORTHWHILE = 0.01  # If a round reduces the error by a smaller share, the moves are halved.


@dataclass(frozen=True, slots=True)
class Rows:
    """The images to sample: x_T [N, C, H, W] as `noise`, and class_labels [N] or None."""

    noise: Tensor
    class_labels: Tensor | None


@dataclass(frozen=True, slots=True)
class Solution:
    """The teacher's trajectory at G noise levels, from noise to images.

    alpha_bar [G] rises to 1 and is float64. The points x [G, N, C, H, W] are float16.
    """

    alpha_bar: Tensor
    points: Tensor

    @property
    def images(self) -> Tensor:
        return self.points[-1].float()

    def at(self, alpha_bar: Tensor) -> Tensor:
        """Return x [N, C, H, W] at a noise level. Between the teacher's levels, x / alpha is linear in rho."""
        known, rho = _rho(self.alpha_bar), _rho(alpha_bar)
        high = int((known > rho).sum().clamp(1, len(known) - 1))
        share = min(1.0, max(0.0, float((known[high - 1] - rho) / (known[high - 1] - known[high]))))
        before, after = ((alpha_bar / self.alpha_bar[k]).sqrt().item() for k in (high - 1, high))
        return (1 - share) * before * self.points[high - 1].float() + share * after * self.points[high].float()


def _rho(alpha_bar: Tensor) -> Tensor:
    """Return sigma / alpha."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted table, with its mean square errors on the rows used for fitting and on held-out rows."""

    timesteps: tuple[float, ...]
    lines: tuple[tuple[float, ...], ...]
    fitted: float
    held_out: float
    passes: "tuple[_Pass, ...]" = field(default=(), repr=False, compare=False)  # reused by fits with the same start


class Fitter:
    """Fits tables for one checkpoint and one guidance scale to the teacher's trajectory. Not thread-safe."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        forward: Forward,
        rows: Rows,
        guidance: float,
        *,
        held_out: int,
        batch_size: int = 64,
    ) -> None:
        """The last `held_out` rows are only used for judging."""
        self.noise, self.schedule = checkpoint.noise, checkpoint.noise.schedule()
        self._forward, self.rows, self._guidance, self._batch = forward, rows, guidance, batch_size
        self._null_class, self._cut = checkpoint.labels.null_class, len(rows.noise) - held_out
        self._bound = self.noise.clip_sample_range if self.noise.clip_sample else math.inf
        self._solution: Solution | None = None

    @property
    def images(self) -> Tensor:
        """A copy of the teacher's x_0 [N, C, H, W]."""
        assert self._solution is not None
        return self._solution.images.clone()

    def _run(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        parts = [slice(start, start + self._batch) for start in range(0, len(x), self._batch)]
        labels = [class_labels[part] if class_labels is not None else None for part in parts]
        return torch.cat([self._forward(x[part], t[part], mine) for part, mine in zip(parts, labels, strict=True)])

    def predict(self, x: Tensor, t: float, alpha_bar: Tensor) -> Tensor:
        """Return the guided and clipped prediction of x_0 for all rows: x [N, C, H, W] -> [N, C, H, W]."""
        at = parametrize(self.noise, alpha_bar, torch.tensor(t))
        p, q, scale, time = (float(each) for each in (at.p, at.q, at.scale, at.time))
        ts = torch.full((len(x),), time, device=x.device)
        out = guided(self._run, scale * x, ts, self.rows.class_labels, self._null_class, self._guidance)
        return (p * x + q * out[:, : x.shape[1]]).clamp(-self._bound, self._bound)

    @torch.inference_mode()
    def solve(self, plan: Plan) -> None:
        """Sample the rows with the teacher's plan, and keep the trajectory."""
        self._solution = Solution(torch.cat([plan.alpha_bar, plan.alpha_bar.new_ones(1)]), self._walk(plan).half())

    @torch.inference_mode()
    def error(self, plan: Plan) -> float:
        """Return the mean square error of another plan's images on the held-out rows."""
        return self._errors(self._walk(plan)[-1])[1]

    def _walk(self, plan: Plan) -> Tensor:
        """Return x of all rows before a plan's first pass, and after each pass."""
        rows = self.rows
        return solve(self._run, plan, rows.noise, rows.class_labels, self._null_class, self._guidance)

    @torch.inference_mode()
    def fit(self, timesteps: Sequence[float], like: Fit | None = None) -> Fit:
        """Fit the coefficients for these timesteps to the teacher's trajectory.

        `like` is a fit with the same number of timesteps. Its passes are reused up to the first timestep that differs.
        """
        assert self._solution is not None
        levels, passes = self._levels(timesteps), list[_Pass]()
        if like is not None:
            same = (mine == its for mine, its in zip(timesteps, like.timesteps, strict=True))
            passes = [each for each, _ in zip(like.passes, takewhile(bool, same), strict=False)]
        # The coefficients of a step depend on its timestep, the next timestep, and the state before the step.
        known = len(passes)
        state = passes[-1].state if passes else _Standing(self.rows.noise, (), ())
        for k in range(max(0, known - 1), len(timesteps)):
            if k >= known:
                passes.append(_Pass(state, self.predict(state.x, timesteps[k], levels.alpha_bar[k])))
            x0 = passes[k].x0
            inputs = torch.stack([state.x, x0, *state.history])
            last = k + 1 == len(timesteps)
            target = self._solution.images if last else self._solution.at(levels.alpha_bar_next[k])
            coefficients = least_squares(inputs[:, : self._cut], target[: self._cut])
            x = torch.einsum("i,i...->...", coefficients.float(), inputs)
            line = (*coefficients.tolist(), *[0.0] * (4 - len(coefficients)), 0.0)
            state = _Standing(x, (x0, *state.history)[:2], (*state.lines, line))
        fitted, held_out = self._errors(state.x)
        return Fit(tuple(timesteps), state.lines, fitted, held_out, tuple(passes))

    def _errors(self, x: Tensor) -> tuple[float, float]:
        assert self._solution is not None
        error = (x - self._solution.images).square().flatten(1).mean(1)
        return float(error[: self._cut].mean()), float(error[self._cut :].mean())

    def _levels(self, timesteps: Sequence[float]) -> Levels:
        alpha_bar = self.schedule.alpha_bar_at(timesteps)
        return Levels(alpha_bar, torch.cat([alpha_bar[1:], torch.ones(1, dtype=torch.float64)]))


@dataclass(frozen=True, slots=True)
class _Standing:
    """The state between two steps: x, the latest x0 (two at most, newest first), and the lines so far."""

    x: Tensor
    history: tuple[Tensor, ...]
    lines: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class _Pass:
    """One pass of the network over all rows: the state before the pass, and the predicted x0."""

    state: _Standing
    x0: Tensor


def least_squares(inputs: Tensor, target: Tensor) -> Tensor:
    """Return float64 coefficients [K] for which the weighted inputs [K, N, C, H, W] sum closest to target."""
    A, y = inputs.flatten(1).double(), target.flatten().double()
    gram = A @ A.T
    gram += torch.diag(RIDGE * gram.diagonal())
    solved: Tensor = torch.linalg.solve(gram, A @ y)
    return solved


def search_timesteps(
    fitter: Fitter,
    best: Fit,
    settle: Callable[[Sequence[float]], tuple[float, ...]],
    on_round: Callable[[int, Fit], None],
) -> tuple[Fit, int]:
    """Move the timesteps of a fit up and down, one at a time, as long as the error falls.

    A move is accepted if it lowers the error both on the fitted and on the held-out rows. The search ends when the
    moves are small. `settle` rounds timesteps to those that the network accepts. `on_round` receives the number of each
    round and the best fit so far. Returns the best fit, and the number of fits that were tried.
    """
    move, rounds, tried = LARGEST_MOVE, 0, 0
    while move >= SMALLEST_MOVE:
        begun = best
        for k in range(len(best.timesteps)):
            for sign in (1, -1):
                timesteps = settle(moved(best.timesteps, k, sign * move, fitter.schedule.log_sigmas))
                if timesteps == best.timesteps:
                    continue
                found, tried = fitter.fit(timesteps, like=best), tried + 1
                if found.held_out < best.held_out and found.fitted < best.fitted:
                    best = found
                    break
        if best.held_out > begun.held_out * (1 - WORTHWHILE):
            move /= 2
        rounds += 1
        on_round(rounds, best)
    return best, tried


def moved(timesteps: Sequence[float], k: int, share: float, log_sigmas: Sequence[float]) -> list[float]:
    """Move timestep k by a share of the log rho distance to its neighbour: the noisier one if share > 0."""
    levels = [log_sigma_at(t, log_sigmas) for t in timesteps]
    cleanest = log_sigmas[0] if k + 1 == len(timesteps) else levels[k + 1]
    noisiest = log_sigmas[-1] if k == 0 else levels[k - 1]
    way = noisiest - levels[k] if share > 0 else levels[k] - cleanest
    level = levels[k] + share * min(way, LONGEST_WAY)
    return [*timesteps[:k], timestep_at(level, log_sigmas), *timesteps[k + 1 :]]
