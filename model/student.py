"""A student predicts, from any point of a trajectory of its teacher, where that ends (Song et al. 2023).

The teacher's trajectories, the student's samplers as tables, and the choice of the timesteps in them.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tminus.model.denoiser import Denoiser
from tminus.model.evaluation.distances import fit_gaussian, frechet_distance
from tminus.model.guidance import Forward
from tminus.model.noise import NoiseConfig
from tminus.model.samplers import Plan, alpha_bar_at, table_plan
from tminus.model.tables import Table

log = logging.getLogger(__name__)

SAMPLER = "consistency"
MAX_STEPS = 4  # that a student is made for
Features = Callable[[Tensor, Tensor | None], Tensor]
"""Images [N, C, H, W] and their class labels [N] or None -> [N, D]."""

ROWS_AT_ONCE = 64
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


def even_points(num_points: int, steps: int) -> list[int]:
    """Points of the teacher's plan for a student that is not tried yet: the first, and others evenly spread over it."""
    return [i * num_points // steps for i in range(steps)]


def best_points(
    student: Forward,
    plan: Plan,
    solved: Tensor,
    labels: Tensor | None,
    features: Features,
    seed: int,
    max_steps: int = MAX_STEPS,
) -> dict[int, list[int]]:
    """Choose the points of the plan that students of 1..max_steps steps visit, by trial.

    The samples from the first points in `solved` [P + 1, N, C, H, W] are to be distributed as the teacher's own: of
    all points the one is added whose samples have the least Fréchet distance to them in `features`, that is, what
    a network computes of an image. The noise between steps is a function of the seed, and the same for all.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(max_steps, *solved.shape[1:], generator=generator).to(solved)
    reference = fit_gaussian(features(solved[-1], labels))
    first = _jump(student, plan, 0, solved[0], labels)

    def distance(points: Sequence[int]) -> float:
        x0 = first
        for i, k in enumerate(points[1:]):
            signal, sigma = plan.alpha_bar[k].sqrt().item(), (1 - plan.alpha_bar[k]).sqrt().item()
            x0 = _jump(student, plan, k, signal * x0 + sigma * noise[i], labels)
        return frechet_distance(fit_gaussian(features(x0, labels)), reference)

    chosen = {1: [0]}
    for steps in range(2, max_steps + 1):
        before = chosen[steps - 1]
        tried = [sorted([*before, k]) for k in range(1, len(plan)) if k not in before]
        distances = [distance(points) for points in tried]
        best = min(range(len(tried)), key=lambda i: distances[i])
        chosen[steps] = tried[best]
        timesteps = ", ".join(f"{plan.timesteps[k]:g}" for k in tried[best])
        log.info("%d steps at t = %s: %.4g from the teacher's images", steps, timesteps, distances[best])
    return chosen


def image_features(net: Denoiser, null_class: int | None) -> Features:
    """What a network sees in images: the channels of its middle, averaged over the image, [N, C, H, W] -> [N, D].

    At t = 0, and without a class where it can. So the judge of `evaluate` has no part in the choice.
    """

    @torch.no_grad()
    def features(x: Tensor, labels: Tensor | None) -> Tensor:
        if labels is not None and null_class is not None:
            labels = torch.full_like(labels, null_class)
        read = []
        for part in _parts(len(x)):
            t = torch.zeros(len(x[part]), device=x.device)
            h, _ = net.encode(x[part], net.embed(t, labels[part] if labels is not None else None))
            read.append(h.float().mean((2, 3)))
        return torch.cat(read)

    return features


@torch.no_grad()
def _jump(student: Forward, plan: Plan, k: int, x: Tensor, labels: Tensor | None) -> Tensor:
    """x0 of rows that are all at point k, clipped as the plan says."""
    t = torch.full((len(x),), float(plan.timesteps[k]), device=x.device)
    out = torch.cat([student(x[p], t[p], labels[p] if labels is not None else None) for p in _parts(len(x))])
    clip = float(plan.lines[k, 6])
    return predict_x0(plan, torch.full((len(x),), k, device=x.device), x, out).clamp(-clip, clip)


def _parts(rows: int) -> list[slice]:
    """What goes through a network at once, as in training."""
    return [slice(start, start + ROWS_AT_ONCE) for start in range(0, rows, ROWS_AT_ONCE)]
