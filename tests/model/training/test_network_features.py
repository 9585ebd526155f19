"""The distance is the formula's, is zero for the same image alone, and gradients go to the images."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.tiny import TINY, randomize
from tminus.model.evaluation.distances import Gaussian, fit_gaussian
from tminus.model.noise import NoiseConfig
from tminus.model.training import network_features as frechet_loss
from tminus.model.training.network_features import FrechetLoss, NetworkFeatures
from tminus.model.unet import UNet2D

SCHEDULE = NoiseConfig(num_train_timesteps=50, beta_end=0.1).schedule()
D = 6


@pytest.fixture(scope="module")
def net() -> UNet2D:
    net = UNet2D(dataclasses.replace(TINY, num_class_embeds=4)).eval().requires_grad_(False)
    randomize(net)
    return net


def pictures(seed: int) -> Tensor:
    return torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_distance_is_that_between_unit_features_of_all_blocks(net: UNet2D) -> None:
    one, other, eps, labels = pictures(0), pictures(1), pictures(2), torch.tensor([0, 1, 3])
    found = NetworkFeatures(net, SCHEDULE, net).distance(one, other, labels, eps)
    alpha_bar = float(SCHEDULE.alpha_bar[0])  # 2 % of 50 timesteps is the first
    outputs: list[list[Tensor]] = []
    for images in (one, other):
        seen: list[Tensor] = []
        handles = [
            block.register_forward_hook(
                lambda _m, _i, out, seen=seen: seen.append(out if isinstance(out, Tensor) else out[0])
            )
            for block in net.blocks
        ]
        net(alpha_bar**0.5 * images + (1 - alpha_bar) ** 0.5 * eps, torch.zeros(3), labels)
        for handle in handles:
            handle.remove()
        outputs.append(seen)
    assert len(outputs[0]) == len(list(net.blocks)) > 2
    cosines = [
        torch.cosine_similarity(a.double(), b.double(), dim=1).mean((1, 2)) for a, b in zip(*outputs, strict=True)
    ]
    torch.testing.assert_close(
        found.double(), torch.stack([2 - 2 * each for each in cosines]).mean(0), rtol=1e-3, atol=1e-4
    )


def test_numbers_are_the_means_of_channels_whatever_is_beside_an_image(net: UNet2D) -> None:
    images, eps, labels = pictures(0).requires_grad_(), pictures(2), torch.tensor([0, 1, 2])
    features = NetworkFeatures(net, SCHEDULE, net)
    numbers = features.numbers(images, labels, eps)
    alpha_bar = float(SCHEDULE.alpha_bar[0])
    seen: list[Tensor] = []
    handle = net.blocks[-1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    net(alpha_bar**0.5 * images + (1 - alpha_bar) ** 0.5 * eps, torch.zeros(3), labels)
    handle.remove()
    last = seen[0].shape[1]
    torch.testing.assert_close(numbers[:, -last:], seen[0].mean((2, 3)))
    torch.testing.assert_close(numbers[1:2], features.numbers(images[1:2], labels[1:2], eps[1:2]), rtol=1e-4, atol=1e-5)
    numbers.sum().backward()
    assert images.grad is not None
    assert images.grad.abs().amax((1, 2, 3)).min() > 0


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet_loss, "LEAST_ROWS", 1)
    monkeypatch.setattr(frechet_loss, "ALL_ROWS", 1)


def rows(count: int, seed: int) -> Tensor:
    """Rows of a Gaussian of its own for each seed."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return torch.randn(count, D, generator=generator, dtype=torch.float64) @ mix + torch.randn(D, generator=generator)


def loss_with(reference: Gaussian, kinds: int = 1) -> FrechetLoss:
    loss = FrechetLoss(kinds, D)
    loss.set_reference(reference)
    return loss


def distance(features: Tensor, reference: Gaussian) -> Tensor:
    """The Fréchet distance by the formula, differentiable, with the ridge that the loss adds to both covariances."""
    scale = reference.covariance.trace().sqrt()
    ridge = torch.eye(D, dtype=torch.float64) * frechet_loss.RIDGE
    f = features / scale
    mean, wanted = f.mean(0), reference.mean / scale
    one, other = f.T.cov(correction=0) + ridge, reference.covariance / scale**2 + ridge
    values, vectors = torch.linalg.eigh(other)
    root = (vectors * values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ one @ root).sqrt().sum()
    return (mean - wanted).square().sum() + one.trace() + other.trace() - 2 * cross


def test_gradient_is_that_of_the_distance() -> None:
    reference = fit_gaussian(rows(300, 1))
    features = rows(200, 2).requires_grad_()
    expected = torch.autograd.grad(distance(features, reference), features)[0]
    loss = loss_with(reference)
    found = torch.autograd.grad(loss(features.float(), torch.zeros(200, dtype=torch.long)).mean(), features)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float(loss.distance[0]) == pytest.approx(float(distance(features.detach(), reference)), rel=1e-6)


def test_it_does_not_count_before_it_knows_enough_and_then_more_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet_loss, "LEAST_ROWS", 100)
    monkeypatch.setattr(frechet_loss, "ALL_ROWS", 400)
    loss, kind = loss_with(fit_gaussian(rows(300, 1))), torch.zeros(50, dtype=torch.long)
    probe = rows(50, 2).float()
    assert loss(probe, kind).abs().max() == 0
    growing = [float(loss(probe, kind).abs().max()) for _ in range(10)]
    assert growing[0] > 0
    assert growing == sorted(growing)
    assert growing[-1] == pytest.approx(4 * growing[0], rel=1e-3), (
        "of the same rows again and again, four times as much"
    )


def test_what_it_remembers_is_all_in_its_state() -> None:
    reference = fit_gaussian(rows(300, 1))
    loss, again = loss_with(reference), FrechetLoss(1, D)
    kind = torch.zeros(30, dtype=torch.long)
    for seed in range(3):
        loss(rows(30, seed).float(), kind)
    again.load_state_dict(loss.state_dict())
    for seed in range(3, 9):
        probe = rows(30, seed).float()
        assert torch.equal(loss(probe, kind), again(probe, kind))
