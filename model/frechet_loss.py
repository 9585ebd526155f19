"""The Fréchet distance between images and a reference as a loss, though a batch has too few images for a covariance.

Mean and covariance of the images' features are averages over the batches before. The gradient of the distance at these
moments is known in closed form, and the loss has it: for each row a quadratic function of its features.
"""

import torch
from torch import Tensor, nn

from tminus.model.evaluation.distances import Gaussian

HALF_LIFE = 1000.0  # rows, after which what an average knew counts for half
LEAST_ROWS, ALL_ROWS = 1500, 6000  # of a kind, from which on its loss counts, and counts in full
RENEWED_EVERY = 5  # calls: the moments change slowly, and two decompositions take as long as a pass
RIDGE = 1e-3  # of the mean variance of the reference: added to that of each direction, as some have none


class FrechetLoss(nn.Module):
    """One for each kind of image, all with one reference. What it knows are buffers, so that a run saves it."""

    mean: Tensor
    second: Tensor
    weight: Tensor
    rows: Tensor
    calls: Tensor
    distance: Tensor
    centre: Tensor
    slope: Tensor
    bend: Tensor
    scale: Tensor
    wanted_mean: Tensor
    wanted_covariance: Tensor

    def __init__(self, kinds: int, features: int) -> None:
        super().__init__()

        def keep(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=dtype))

        keep("wanted_mean", features)
        keep("wanted_covariance", features, features)
        keep("scale")
        keep("mean", kinds, features)
        keep("second", kinds, features, features)
        keep("weight", kinds)
        keep("rows", kinds, dtype=torch.int64)
        keep("calls", kinds, dtype=torch.int64)
        keep("distance", kinds)  # as it was when the loss was renewed, in units of the reference's total variance
        # The loss of a row's features f: (f - centre) slope + (f - centre) bend (f - centre).
        keep("centre", kinds, features, dtype=torch.float32)
        keep("slope", kinds, features, dtype=torch.float32)
        keep("bend", kinds, features, features, dtype=torch.float32)

    def set_reference(self, reference: Gaussian) -> None:
        """What the images' features are to be distributed as."""
        scale = reference.covariance.trace().sqrt()
        self.scale.copy_(scale)
        self.wanted_mean.copy_(reference.mean / scale)
        covariance = reference.covariance / scale**2
        self.wanted_covariance.copy_(covariance + self._ridge())

    def forward(self, features: Tensor, kind: Tensor) -> Tensor:
        """The loss of each row: features [B, D] of images of several kinds [B] -> [B]. Remembers the features."""
        features = features / self.scale.to(features)
        kinds = sorted(set(kind.tolist()))
        for each in kinds:  # all before the first loss, whose gradient needs the buffers as they are
            self._remember(each, features.detach()[kind == each].double())
        losses = torch.zeros(len(features), device=features.device)
        for each in kinds:
            known = int(self.rows[each])
            if known >= LEAST_ROWS:
                off = features[kind == each] - self.centre[each]
                of_rows = off @ self.slope[each] + ((off @ self.bend[each]) * off).sum(1)
                losses = losses.index_put((kind == each,), of_rows * min(1.0, known / ALL_ROWS))
        return losses

    def _remember(self, kind: int, rows: Tensor) -> None:
        kept = 0.5 ** (len(rows) / HALF_LIFE)
        self.mean[kind].lerp_(rows.mean(0), 1 - kept)
        self.second[kind].lerp_(rows.T @ rows / len(rows), 1 - kept)
        self.weight[kind].lerp_(torch.ones_like(self.weight[kind]), 1 - kept)
        self.rows[kind] += len(rows)
        if int(self.rows[kind]) >= LEAST_ROWS:
            if int(self.calls[kind]) % RENEWED_EVERY == 0:
                self._renew(kind)
            self.calls[kind] += 1

    def _renew(self, kind: int) -> None:
        """Take the gradient of |m - m'|^2 + tr(S + S' - 2 (S'^1/2 S S'^1/2)^1/2) in m and S at what is remembered.

        It is 2 (m - m') in m, and 1 - S'^1/2 (S'^1/2 S S'^1/2)^-1/2 S'^1/2 in S, for m', S' of the reference.
        """
        mean = self.mean[kind] / self.weight[kind]
        covariance = self.second[kind] / self.weight[kind] - torch.outer(mean, mean) + self._ridge()
        values, vectors = torch.linalg.eigh(self.wanted_covariance)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        product = root @ covariance @ root
        values, vectors = torch.linalg.eigh((product + product.T) / 2)
        values = values.clamp(min=1e-12)
        away = mean - self.wanted_mean
        traces = covariance.trace() + self.wanted_covariance.trace()
        self.distance[kind] = away.square().sum() + traces - 2 * values.sqrt().sum()
        self.centre[kind] = mean
        self.slope[kind] = 2 * away
        bend = -root @ ((vectors * values.rsqrt()) @ vectors.T) @ root
        bend.diagonal().add_(1)
        self.bend[kind] = bend

    def _ridge(self) -> Tensor:
        size = len(self.wanted_mean)
        return torch.eye(size, dtype=torch.float64, device=self.scale.device) * (RIDGE / size)
