"""Image distances in the features of the denoising network, similar to LPIPS, and feature statistics.

The mean square error of pixels prefers a blurred image to a sharp image with small differences. A distance between the
features of a network is closer to how similar images look (Zhang et al. 2018).
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from tminus.model.denoiser import Denoiser
from tminus.model.evaluation.distances import Gaussian
from tminus.model.guidance import Forward
from tminus.model.noise import NoiseSchedule

READ_AT = 0.02  # the timestep at which the network reads images, as a share of T
HALF_LIFE = 2000.0  # number of rows after which the weight of a row is halved
LEAST_ROWS, ALL_ROWS = 1500, 6000  # rows of a kind before its loss counts at all, and before it counts in full
MOST_DIRECTIONS = 128  # number of directions used: those in which the reference varies most
RIDGE = 1e-6  # share of the reference's variance added to each direction, because some have none


class NetworkFeatures:
    """Computes features of images with a frozen network. Gradients flow back to the images."""

    def __init__(self, net: Denoiser, schedule: NoiseSchedule, forward: Forward) -> None:
        """`forward` must call the blocks of `net`, because hooks on the blocks collect the features."""
        self._net, self._forward = net, forward
        self._t = max(1, round(READ_AT * schedule.num_timesteps)) - 1
        alpha_bar = float(schedule.alpha_bar[self._t])
        self._signal, self._sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5

    def distance(self, images: Tensor, target: Tensor, labels: Tensor | None, eps: Tensor) -> Tensor:
        """Return the distance [B] of each image from its target, both [B, C, H, W], with the same noise eps.

        The distance is 0 to 4. The features at each position are scaled to length 1. Their squared distance is averaged
        over positions and blocks.
        """
        with torch.no_grad():
            theirs = self._read(target, labels, eps)
        pairs = zip(self._read(images, labels, eps), theirs, strict=True)
        return torch.stack([(_unit(one) - _unit(other)).square().sum(1).mean((1, 2)) for one, other in pairs]).mean(0)

    def numbers(self, images: Tensor, labels: Tensor | None, eps: Tensor) -> Tensor:
        """Return the mean of each channel of each block, with noise eps added: images [B, C, H, W] -> [B, D]."""
        return torch.cat([each.mean((2, 3)) for each in self._read(images, labels, eps)], dim=1)

    def _read(self, images: Tensor, labels: Tensor | None, eps: Tensor) -> list[Tensor]:
        """Run the network, and return the output of each block."""
        outputs: list[Tensor] = []

        def keep(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, object]) -> None:
            outputs.append((output if isinstance(output, Tensor) else output[0]).float())

        t = torch.full((len(images),), self._t, device=images.device)
        with ExitStack() as hooks:
            for block in self._net.blocks:
                hooks.enter_context(block.register_forward_hook(keep))
            self._forward(self._signal * images + self._sigma * eps, t, labels)
        return outputs


def _unit(features: Tensor) -> Tensor:
    """Scale features [B, C, H, W] to length 1 at each position."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


class FrechetLoss(nn.Module):
    """The Fréchet distance of several kinds of images from one reference.

    The state is in buffers, so that it is saved with the run. Only the directions in which the reference varies most
    are used. With more directions D, the eigenvalues of a covariance estimated from N rows spread more widely, and the
    loss would compensate by making the variance about 3 D / 4 N too large.
    """

    wanted_mean: Tensor
    wanted_root: Tensor
    directions: Tensor
    mean: Tensor
    second: Tensor
    weight: Tensor
    rows: Tensor
    distance: Tensor

    def __init__(self, kinds: int, features: int) -> None:
        super().__init__()
        size = min(features, MOST_DIRECTIONS)

        def keep(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

        keep("directions", features, size)
        keep("wanted_mean", size)
        keep("wanted_root", size, size)  # square root of the covariance
        keep("mean", kinds, size)
        keep("second", kinds, size, size)
        keep("weight", kinds)
        keep("rows", kinds, dtype=torch.int64)
        keep("distance", kinds)  # latest distance, in units of the reference's variance

    def set_reference(self, reference: Gaussian) -> None:
        """Set the distribution that images are compared with."""
        values, vectors = torch.linalg.eigh(reference.covariance)
        scale, size = values.clamp(min=0).sum().sqrt(), len(self.wanted_mean)
        self.directions.copy_(vectors[:, -size:] / scale)
        self.wanted_mean.copy_(reference.mean @ vectors[:, -size:] / scale)
        self.wanted_root.copy_(torch.diag((values[-size:].clamp(min=0) / scale**2 + RIDGE).sqrt()))

    def forward(self, features: Tensor, kind: Tensor) -> Tensor:
        """Return each row's loss [B] for its features [B, D] and its kind [B]. Updates the running averages."""
        features = features @ self.directions.to(features)
        losses = torch.zeros(len(features), device=features.device)
        for each in sorted(set(kind.tolist())):
            of_kind = kind == each
            rows = features[of_kind]
            self._remember(each, rows.detach().double())
            known = int(self.rows[each])
            if known >= LEAST_ROWS:
                centre, slope, bend = (part.to(rows) for part in self._gradient(each))
                off = rows - centre
                of_rows = off @ slope + ((off @ bend) * off).sum(1)
                losses = losses.index_put((of_kind,), of_rows * min(1.0, known / ALL_ROWS))
        return losses

    def _remember(self, kind: int, rows: Tensor) -> None:
        kept = 0.5 ** (len(rows) / HALF_LIFE)
        self.mean[kind].lerp_(rows.mean(0), 1 - kept)
        self.second[kind].lerp_(rows.T @ rows / len(rows), 1 - kept)
        self.weight[kind].lerp_(torch.ones_like(self.weight[kind]), 1 - kept)
        self.rows[kind] += len(rows)

    def _gradient(self, kind: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the running mean m, and the distance's gradients with respect to m and to the covariance S.

        The distance is |m - m'|^2 + tr(S + S' - 2 (S'^1/2 S S'^1/2)^1/2), where m' and S' belong to the reference. The
        gradients are 2 (m - m') and 1 - S'^1/2 (S'^1/2 S S'^1/2)^-1/2 S'^1/2.
        """
        mean, root = self.mean[kind] / self.weight[kind], self.wanted_root
        identity = torch.eye(len(mean), dtype=torch.float64, device=mean.device)
        covariance = self.second[kind] / self.weight[kind] - torch.outer(mean, mean) + RIDGE * identity
        values, vectors = torch.linalg.eigh(root @ covariance @ root)
        values = values.clamp(min=1e-12)
        away = mean - self.wanted_mean
        traces = covariance.trace() + root.square().sum()
        self.distance[kind] = away.square().sum() + traces - 2 * values.sqrt().sum()
        return mean, 2 * away, identity - root @ ((vectors * values.rsqrt()) @ vectors.T) @ root
