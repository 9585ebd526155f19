"""The Muon optimiser (Jordan et al. 2024): it orthogonalises the update of each weight matrix."""

import math
from itertools import groupby

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
ADAM = 0.9, 0.999, 1e-8  # beta_1, beta_2 and epsilon of Adam (Kingma & Ba 2015), for parameters that are not matrices
STEP = 0.2  # RMS of an update at learning rate 1; similar to Adam's, so both can share a rate (Liu et al. 2025)
MIN_CHANNELS = 16  # Adam handles smaller layers: the first and last convolutions of a U-Net.
NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # from Jordan: five rounds bring singular values in 0.01..1 to about 0.7..1.2
ROUNDS = 5


class Muon(torch.optim.Optimizer):
    """Applies Muon to the weights of linear layers and convolutions, and Adam to all other parameters."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        layers = [each for each in net.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
        matrices = [each.weight for each in layers if min(each.weight.shape[:2]) >= MIN_CHANNELS]
        # Sort by shape, so that matrices of the same shape can be multiplied together.
        matrices.sort(key=lambda weight: weight.flatten(1).shape)
        known = set(matrices)
        others = [each for each in net.parameters() if each not in known]
        groups = [{"params": matrices, "is_matrix": True}, {"params": others, "is_matrix": False}]
        super().__init__([each for each in groups if each["params"]], {"lr": lr, "step": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 (torch has one)
        for group in self.param_groups:
            group["step"] += 1
            weights = [each for each in group["params"] if each.grad is not None]
            if group["is_matrix"]:
                self._step_matrices(weights, group["lr"])
            else:
                self._step_others(weights, group["lr"], group["step"])

    def _step_matrices(self, weights: list[Tensor], lr: float) -> None:
        for _, same in groupby(weights, key=lambda weight: weight.flatten(1).shape):
            alike = list(same)
            gradients, momenta = _gradients(alike), self._kept("momentum", alike)
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov momentum
            steps = orthogonal(torch.stack([each.flatten(1) for each in ahead]))
            size = lr * STEP * math.sqrt(max(steps.shape[1:]))
            for weight, step in zip(alike, steps, strict=True):
                weight.add_(step.view(weight.shape), alpha=-size)

    def _step_others(self, weights: list[Tensor], lr: float, step: int) -> None:
        beta_1, beta_2, epsilon = ADAM
        gradients = _gradients(weights)
        means, squares = self._kept("mean", weights), self._kept("square", weights)
        torch._foreach_lerp_(means, gradients, 1 - beta_1)
        torch._foreach_mul_(squares, beta_2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta_2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, math.sqrt(1 - beta_2**step))
        torch._foreach_add_(scales, epsilon)
        torch._foreach_addcdiv_(weights, means, scales, -lr / (1 - beta_1**step))

    def _kept(self, name: str, weights: list[Tensor]) -> list[Tensor]:
        """Return each weight's entry `name` in the optimiser's state, initially zero."""
        for each in weights:
            if name not in self.state[each]:
                self.state[each][name] = torch.zeros_like(each)
        return [self.state[each][name] for each in weights]


def _gradients(weights: list[Tensor]) -> list[Tensor]:
    return [each.grad for each in weights if each.grad is not None]


def orthogonal(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices [N, rows, columns] close to 1, and keep the singular vectors."""
    a, b, c = NEWTON_SCHULZ
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)  # ax + (bG + cGG)x
    return x.mT if is_tall else x
