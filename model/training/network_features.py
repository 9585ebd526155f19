"""What a network sees in images: how far two are apart in it, as LPIPS, and the numbers that sets are compared by.

The pixels' mean square error prefers soft images to sharp ones that differ a little. Features of a network tell better
which images look alike (Zhang et al. 2018); those of a denoising network too, and no other network is needed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tminus.model.denoiser import Denoiser
from tminus.model.guidance import Forward
from tminus.model.noise import NoiseSchedule

READ_AT = 0.02  # of T: the timestep at which the network reads images, with the noise that belongs there


class NetworkFeatures:
    """Reads images with a network that does not change. The gradient goes through to the images."""

    def __init__(self, net: Denoiser, schedule: NoiseSchedule, forward: Forward) -> None:
        """forward: runs `net`, so that its blocks are called."""
        self._net, self._forward = net, forward
        self._t = max(1, round(READ_AT * schedule.num_timesteps)) - 1
        alpha_bar = float(schedule.alpha_bar[self._t])
        self._signal, self._sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def distance(self, images: Tensor, wanted: Tensor, labels: Tensor | None, eps: Tensor) -> Tensor:
        """How far each image looks from the wanted one: both [B, C, H, W], with the same noise eps on them -> [B].

        At each place of each block, the square of the distance between features of length 1, from 0 to 4; the mean.
        """
        with torch.no_grad():
            theirs = self._read(wanted, labels, eps)
        pairs = zip(self._read(images, labels, eps), theirs, strict=True)
        return torch.stack([(_unit(one) - _unit(other)).square().sum(1).mean((1, 2)) for one, other in pairs]).mean(0)

    def numbers(self, images: Tensor, labels: Tensor | None, eps: Tensor) -> Tensor:
        """The mean of each channel of each block, with noise eps on the images [B, C, H, W] -> [B, D]."""
        return torch.cat([each.mean((2, 3)) for each in self._read(images, labels, eps)], dim=1)

    def _read(self, images: Tensor, labels: Tensor | None, eps: Tensor) -> list[Tensor]:
        t = torch.full((len(images),), self._t, device=images.device)
        with _outputs_of_blocks(self._net) as outputs:
            self._forward(self._signal * images + self._sigma * eps, t, labels)
        return [each.float() for each in outputs]


def _unit(features: Tensor) -> Tensor:
    """Features [B, C, H, W] of length 1 at each place."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


@contextmanager
def _outputs_of_blocks(net: Denoiser) -> Iterator[list[Tensor]]:
    """Collect what each block gives while the network runs."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, object]) -> None:
        outputs.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_hook(keep) for block in net.blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()
