"""The distance is the formula's, is zero for the same image alone, and gradients go to the images."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.tiny import TINY, randomize
from tminus.model.noise import NoiseConfig
from tminus.model.training.network_features import NetworkFeatures
from tminus.model.unet import UNet2D

SCHEDULE = NoiseConfig(num_train_timesteps=50, beta_end=0.1).schedule()


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


def test_an_image_is_at_no_distance_from_itself_and_rows_do_not_mix(net: UNet2D) -> None:
    one, other, eps, labels = pictures(0), pictures(1), pictures(2), torch.tensor([0, 1, 2])
    mixed = torch.cat([one[:1], other[1:]])
    found = NetworkFeatures(net, SCHEDULE, net).distance(one, mixed, labels, eps)
    assert found[0] < 1e-6 < found[1:].min()
    assert found[1:].max() < 4


def test_the_gradient_reaches_the_images_and_nothing_stays_on_the_network(net: UNet2D) -> None:
    one = pictures(0).requires_grad_()
    features = NetworkFeatures(net, SCHEDULE, net)
    features.distance(one, pictures(1), torch.tensor([0, 1, 2]), pictures(2)).sum().backward()
    assert one.grad is not None
    assert one.grad.abs().amax((1, 2, 3)).min() > 0
    assert not any(block._forward_hooks for block in net.blocks)


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
