"""Muon against torch's own, and against its Adam; singular values against their decomposition."""

import copy

import pytest
import torch
from torch import nn

from tminus.model.training.muon import Muon, orthogonal


def gradients(net: nn.Module, seed: int) -> None:
    """Give each parameter one, the same for copies of a network."""
    generator = torch.Generator().manual_seed(seed)
    for each in net.parameters():
        each.grad = torch.randn(each.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 200), (2, 200, 24), (1, 128, 1152)])
def test_singular_values_come_near_to_one_and_vectors_stay(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    kept = left.mT @ orthogonal(matrices) @ right.mT
    values = kept.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.3, "a singular value may be far below the greatest"
    assert values.median() > 0.6
    assert values.max() < 1.3
    assert (kept - torch.diag_embed(values)).abs().max() < 1e-3


def test_matrices_move_as_by_torchs_muon_and_all_else_as_by_its_adam() -> None:
    theirs = getattr(torch.optim, "Muon", None)
    assert theirs is not None, "torch has one from 2.9 on"
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(16, 48), nn.Linear(48, 20), nn.Linear(20, 48), nn.Embedding(30, 20))
    other = copy.deepcopy(net)
    ours = Muon(net, 1e-3)
    matrices = [other[k].weight for k in range(3)]
    rest = [other[0].bias, other[1].bias, other[2].bias, other[3].weight]
    optimizers = [
        theirs(matrices, lr=1e-3, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(rest, lr=1e-3),
    ]
    first = copy.deepcopy(net)
    for step in range(6):
        gradients(net, step)
        gradients(other, step)
        for each in (ours, *optimizers):
            each.step()
    for k, at_first in enumerate(first):
        moved, expected = net[k].weight - at_first.weight, other[k].weight - at_first.weight
        tolerance = 0.02 if k < 3 else 1e-5  # torch multiplies in bfloat16
        assert torch.linalg.norm(moved - expected) < tolerance * torch.linalg.norm(expected)
    for k in range(3):
        torch.testing.assert_close(net[k].bias, other[k].bias)
