"""Refine the coefficients of a table by the gradient of a distance from the teacher's images.

Least squares fits each step to the teacher's next point. But only the end of the last step counts, and the mean square
error says little about how an image looks. So the distance here is that error plus a distance between features of the
network itself (network_features.py). The gradient goes through all passes; only the coefficients change.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from tminus.model.checkpoint import Checkpoint
from tminus.model.guidance import guided
from tminus.model.parametrization import as_ours, parametrize
from tminus.model.training.network_features import NetworkFeatures
from tminus.model.tuning.fit import Rows

FEATURE_WEIGHT = 0.05  # of the distance of features, beside the mean square error
LEARNING_RATE = 4e-3
DECAY_FROM = 0.5  # of the iterations on, the learning rate falls to zero
BETAS = (0.9, 0.95)
CHECK_EVERY = 25  # iterations
PATIENCE = 3  # checks without anything better, before the rate falls
SLOWER = (1.0, 0.25, 0.0625)  # shares of the learning rate, one after the other; after the last it ends
JUDGED_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class Refinement:
    """The state of a refinement: coefficients [S, 4], and the optimiser's two moments of them, as plain lists.

    The best coefficients so far are those with the least distance on rows that only judge.
    """

    iteration: int
    lines: list[list[float]]
    moments: list[list[list[float]]]
    best: list[list[float]]
    distance: float
    fitted: float  # the distance that it began with
    checks_since: int = 0  # how often it was judged since, and no better
    stage: int = 0  # in SLOWER
    steps: int = 0  # of the optimiser, since the stage began


class Refiner:
    """Runs the network with gradients, for one table's timesteps and guidance."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        timesteps: Sequence[float],
        guidance: float,
        rows: Rows,
        images: Tensor,
        *,
        held_out: int,
        precision: str = "fp32",
    ) -> None:
        """images [N, C, H, W]: the teacher's, of these rows, of which the last `held_out` only judge.

        precision: fp32, or bf16, which is enough for a gradient.
        """
        noise, schedule = checkpoint.noise, checkpoint.noise.schedule()
        self._net, self._guidance = checkpoint.net, guidance
        self._null_class = checkpoint.labels.null_class
        self._bfloat16 = precision == "bf16"
        self._images, self._rows, self._cut = images, rows, len(images) - held_out
        at = parametrize(noise, schedule.alpha_bar_at(timesteps), torch.tensor(timesteps))
        self._at = torch.stack([at.p, at.q, at.scale, at.time], dim=1).tolist()
        self._bound = noise.clip_sample_range if noise.clip_sample else math.inf
        self._range = 1.0 if checkpoint.autoencoder is None else math.inf  # of images; latents have none
        self._features = NetworkFeatures(checkpoint.net, schedule, as_ours(self._forward, noise, schedule))

    def begin(self, lines: Sequence[Sequence[float]]) -> Refinement:
        """Begin with the a, b, c, d of lines; further columns are left out."""
        C = [list(line[:4]) for line in lines]
        distance = self.judge(C)
        return Refinement(0, C, [[[0.0] * 4 for _ in C]] * 2, C, distance, fitted=distance)

    def run(
        self, state: Refinement, iterations: int, batch_size: int, on_check: Callable[[Refinement], None]
    ) -> Refinement:
        """Go on to so many iterations, or until rows that only judge find nothing better any more.

        Where they find nothing better for a while, it goes on from the best in smaller steps.
        """
        while state.iteration < iterations and state.stage < len(SLOWER):
            C = torch.tensor(state.lines, requires_grad=True)
            generator = torch.Generator().manual_seed(state.iteration)
            picked = torch.randperm(self._cut, generator=generator)[:batch_size]
            loss = self.distance(self.images(C, picked), picked, generator)
            (gradient,) = torch.autograd.grad(loss, C)
            state = _adam(state, gradient, iterations)
            if state.iteration % CHECK_EVERY == 0 or state.iteration == iterations:
                distance = self.judge(state.lines)
                if distance < state.distance:
                    state = dataclasses.replace(state, best=state.lines, distance=distance, checks_since=0)
                else:
                    state = dataclasses.replace(state, checks_since=state.checks_since + 1)
                if state.checks_since == PATIENCE:
                    state = _from_the_best(state)
                on_check(state)
        return state

    @torch.no_grad()
    def judge(self, lines: list[list[float]]) -> float:
        """The distance on the rows that only judge, always with the same noise."""
        generator, C = torch.Generator().manual_seed(0), torch.tensor(lines)
        judged = range(self._cut, len(self._images), JUDGED_TOGETHER)
        parts = [torch.arange(start, min(start + JUDGED_TOGETHER, len(self._images))) for start in judged]
        distances = [self.distance(self.images(C, part), part, generator) * len(part) for part in parts]
        return float(torch.stack(distances).sum() / (len(self._images) - self._cut))

    def images(self, C: Tensor, picked: Tensor) -> Tensor:
        """Sample some rows by a table with coefficients C [S, 4]: images within their range, or latents."""
        x = self._rows.noise[picked]
        labels = self._rows.class_labels[picked] if self._rows.class_labels is not None else None
        previous = before = torch.zeros_like(x)
        for (a, b, c, d), (p, q, scale, time) in zip(C, self._at, strict=True):
            # Its activations are made again on the way back, so that one pass is held and not all of them.
            out = recompute(self._predict, scale * x, time, labels, use_reentrant=False)
            x0 = (p * x + q * out).clamp(-self._bound, self._bound)
            x, previous, before = a * x + b * x0 + c * previous + d * before, x0, previous
        return x.clamp(-self._range, self._range)

    def distance(self, images: Tensor, picked: Tensor, generator: torch.Generator) -> Tensor:
        """The mean square error to the teacher's images, and that of the network's features."""
        target = self._images[picked]
        eps = torch.randn(images.shape, generator=generator).to(images.device)
        labels = self._rows.class_labels[picked] if self._rows.class_labels is not None else None
        of_features = self._features.distance(images, target, labels, eps).mean()
        return (images - target).square().mean() + FEATURE_WEIGHT * of_features

    def _predict(self, x: Tensor, t: float, labels: Tensor | None) -> Tensor:
        ts = torch.full((len(x),), t, device=x.device)
        return guided(self._forward, x, ts, labels, self._null_class, self._guidance)[:, : x.shape[1]]

    def _forward(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self._bfloat16):
            out: Tensor = self._net(x, t, labels)
        return out.float()


def _from_the_best(state: Refinement) -> Refinement:
    """Begin the next stage."""
    still = [[0.0] * 4 for _ in state.best]
    return dataclasses.replace(
        state, lines=state.best, moments=[still] * 2, checks_since=0, stage=state.stage + 1, steps=0
    )


def _adam(state: Refinement, gradient: Tensor, iterations: int) -> Refinement:
    """One step of Adam (Kingma & Ba 2015), in plain numbers, so that an interrupted run can keep them in a file."""
    count = state.steps + 1
    falls = min(1.0, (iterations - state.iteration) / ((1 - DECAY_FROM) * iterations))
    rate = LEARNING_RATE * SLOWER[state.stage] * falls
    C, (first, second) = torch.tensor(state.lines), (torch.tensor(each) for each in state.moments)
    gradient = gradient.cpu()
    first = BETAS[0] * first + (1 - BETAS[0]) * gradient
    second = BETAS[1] * second + (1 - BETAS[1]) * gradient.square()
    step = first / (1 - BETAS[0] ** count) / ((second / (1 - BETAS[1] ** count)).sqrt() + 1e-8)
    moments = [first.tolist(), second.tolist()]
    lines = (C - rate * step).tolist()
    return dataclasses.replace(state, iteration=state.iteration + 1, lines=lines, moments=moments, steps=count)
