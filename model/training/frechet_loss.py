"""The Fréchet distance between images and a reference as a loss, though a batch has too few images for a covariance.

Mean and covariance of the images' features are averages over the batches before. The gradient of the distance at these
moments is known in closed form, and the loss has it: for each row a quadratic function of its features.
"""

import torch
from torch import Tensor, nn

from tminus.model.evaluation.distances import Gaussian

HALF_LIFE = 2000.0  # rows, after which what an average knew counts for half
LEAST_ROWS, ALL_ROWS = 1500, 6000  # of a kind, from which on its loss counts, and counts in full
MOST_DIRECTIONS = 128  # of the features, those in which the reference varies most
RIDGE = 1e-6  # of the variance of the reference: added to that of each direction, as some have none


class FrechetLoss(nn.Module):
    """One for each kind of image, all with one reference. What it knows are buffers, so that a run saves it.

    Of the features only some directions count. A covariance from N rows in D directions looks, in the mean, less even
    than it is, and the loss would make up for that with a variance too large by a share of about 3 D / 4 N.
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
        keep("wanted_root", size, size)  # of the covariance
        keep("mean", kinds, size)
        keep("second", kinds, size, size)
        keep("weight", kinds)
        keep("rows", kinds, dtype=torch.int64)
        keep("distance", kinds)  # at the last call, in units of the reference's variance

    def set_reference(self, reference: Gaussian) -> None:
        """What the images' features are to be distributed as."""
        values, vectors = torch.linalg.eigh(reference.covariance)
        scale, size = values.clamp(min=0).sum().sqrt(), len(self.wanted_mean)
        self.directions.copy_(vectors[:, -size:] / scale)
        self.wanted_mean.copy_(reference.mean @ vectors[:, -size:] / scale)
        self.wanted_root.copy_(torch.diag((values[-size:].clamp(min=0) / scale**2 + RIDGE).sqrt()))

    def forward(self, features: Tensor, kind: Tensor) -> Tensor:
        """The loss of each row: features [B, D] of images of several kinds [B] -> [B]. Remembers the features."""
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
        """Take that of |m - m'|^2 + tr(S + S' - 2 (S'^1/2 S S'^1/2)^1/2) at the mean m and covariance S remembered.

        m, and the gradients in m and in S: 2 (m - m') and 1 - S'^1/2 (S'^1/2 S S'^1/2)^-1/2 S'^1/2, for m', S' of the
        reference.
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
