"""Refines the coefficients of a table by gradient descent.

Least squares fits each step to the teacher's next point. But only the final image matters, and the mean square error
says little about how an image looks. So refinement minimises the distance of the final images from the teacher's: the
mean square error plus a distance between features of the network (network_features.py). Gradients flow through all
passes, but only the coefficients change.
"""

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

FEATURE_WEIGHT = 0.05  # weight of the feature distance relative to the mean square error
LEARNING_RATE = 4e-3
DECAY_FROM = 0.5  # share of the iterations after which the learning rate starts to fall
BETAS = (0.9, 0.95)
CHECK_EVERY = 25  # iterations between checks
PATIENCE = 3  # checks without improvement before the learning rate is lowered
SLOWER = (1.0, 0.25, 0.0625)  # successive factors for the learning rate
JUDGED_TOGETHER = 64


@dataclass(frozen=True, slots=True)
class Refinement:
    """The best coefficients [S, 4] and their distance on held-out rows; `fitted` is that before refinement."""

    lines: list[list[float]]
    fitted: float
    distance: float
    iterations: int


class Refiner:
    """Refines the coefficients of tables with given timesteps and guidance."""

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
        """`images` [N, C, H, W] are the teacher's. The last `held_out` rows are only used for judging.

        `precision` is fp32 or bf16. For a gradient, bf16 is precise enough.
        """
        noise, schedule = checkpoint.noise, checkpoint.noise.schedule()
        self._net, self._guidance = checkpoint.net, guidance
        self._null_class = checkpoint.labels.null_class
        self._bfloat16 = precision == "bf16"
        self._images, self._rows, self._cut = images, rows, len(images) - held_out
        at = parametrize(noise, schedule.alpha_bar_at(timesteps), torch.tensor(timesteps))
        self._at = torch.stack([at.p, at.q, at.scale, at.time], dim=1).tolist()
        self._bound = noise.clip_sample_range if noise.clip_sample else math.inf
        self._range = 1.0 if checkpoint.autoencoder is None else math.inf  # largest pixel value; latents have no limit
        self._features = NetworkFeatures(checkpoint.net, schedule, as_ours(self._forward, noise, schedule))

    def run(
        self,
        lines: Sequence[Sequence[float]],
        iterations: int,
        batch_size: int,
        on_check: Callable[[int, float], None],
    ) -> Refinement:
        """Refine the coefficients a, b, c and d of a table's lines in at most `iterations`.

        After PATIENCE checks without improvement, refinement restarts from the best coefficients with the next lower
        learning rate. `on_check` receives the iteration and the lowest distance so far.
        """
        best, iteration = torch.tensor([line[:4] for line in lines]), 0
        fitted = distance = self.judge(best)
        for slower in SLOWER:
            C, checks_since = best.clone().requires_grad_(), 0
            optimizer = torch.optim.Adam([C], betas=BETAS)
            while iteration < iterations and checks_since < PATIENCE:
                falls = min(1.0, (iterations - iteration) / ((1 - DECAY_FROM) * iterations))
                optimizer.param_groups[0]["lr"] = LEARNING_RATE * slower * falls
                generator = torch.Generator().manual_seed(iteration)
                picked = torch.randperm(self._cut, generator=generator)[:batch_size]
                (C.grad,) = torch.autograd.grad(self.distance(self.images(C, picked), picked, generator), C)
                optimizer.step()
                iteration += 1
                if iteration % CHECK_EVERY == 0 or iteration == iterations:
                    found, checks_since = self.judge(C), checks_since + 1
                    if found < distance:
                        best, distance, checks_since = C.detach().clone(), found, 0
                    on_check(iteration, distance)
        return Refinement(best.tolist(), fitted, distance, iteration)

    @torch.no_grad()
    def judge(self, C: Tensor) -> float:
        """Return the distance on the held-out rows. Every call uses the same noise."""
        generator = torch.Generator().manual_seed(0)
        judged = range(self._cut, len(self._images), JUDGED_TOGETHER)
        parts = [torch.arange(start, min(start + JUDGED_TOGETHER, len(self._images))) for start in judged]
        distances = [self.distance(self.images(C, part), part, generator) * len(part) for part in parts]
        return float(torch.stack(distances).sum() / (len(self._images) - self._cut))

    def images(self, C: Tensor, picked: Tensor) -> Tensor:
        """Sample the picked rows with coefficients C [S, 4]. Returns images clipped to [-1, 1], or latents."""
        x = self._rows.noise[picked]
        labels = self._rows.class_labels[picked] if self._rows.class_labels is not None else None
        previous = before = torch.zeros_like(x)
        for (a, b, c, d), (p, q, scale, time) in zip(C, self._at, strict=True):
            # Recompute activations in the backward pass, so that memory holds those of one pass only.
            out = recompute(self._predict, scale * x, time, labels, use_reentrant=False)
            x0 = (p * x + q * out).clamp(-self._bound, self._bound)
            x, previous, before = a * x + b * x0 + c * previous + d * before, x0, previous
        return x.clamp(-self._range, self._range)

    def distance(self, images: Tensor, picked: Tensor, generator: torch.Generator) -> Tensor:
        """Return the mean square error from the teacher's images plus the weighted feature distance."""
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
