"""The judge that nobody trains: what sets of images are like in their pixels alone.

The classifier's features were learned by this project, and may have come to like what its samplers make. Principal
components of the real images' pixels need no training and no download, and neither `tune` nor `train` sees them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tminus.model.evaluation.distances import VALUES_AT_ONCE

COMPONENTS = 48
FITTED_VALUES = 2**25  # of the images that components are fitted to, at most: 256 MiB in float64
NEIGHBOURS = 3  # as Kynkäänniemi et al. 2019 have it
QUERIES_AT_ONCE = 1024
LEAST_SHARE = 1e-12  # of the largest component's variance: below it is rounding


class Components(NamedTuple):
    """The mean pixels [D] and the directions [D, K] in which images vary most, float64."""

    mean: Tensor
    directions: Tensor

    def project(self, images: Tensor) -> Tensor:
        """Say where images uint8 [N, C, H, W] lie along the directions: float64 [N, K]; pixels count from -1 to 1."""
        at_once = max(1, VALUES_AT_ONCE // len(self.mean))
        parts = [(_flat(part) - self.mean) @ self.directions for part in torch.split(images, at_once)]
        return torch.cat(parts)


def fit_components(images: Tensor) -> Components:
    """Fit the first components to images uint8 [N, C, H, W], N >= 2. There are fewer where the images span fewer."""
    flat = _flat(images)
    mean = flat.mean(0)
    flat -= mean
    by_image = len(flat) < flat.shape[1]  # the matrix of images is then the smaller, and has the same eigenvalues
    values, vectors = torch.linalg.eigh(flat @ flat.T if by_image else flat.T @ flat)
    kept = int((values[-COMPONENTS:] > LEAST_SHARE * values[-1]).sum())
    values, vectors = values[len(values) - kept :].flip(0), vectors[:, len(vectors) - kept :].flip(1)
    return Components(mean, flat.T @ vectors / values.sqrt() if by_image else vectors)


def class_variance(images: Tensor, classes: Tensor) -> dict[int, float]:
    """Compute the variance within each class, summed over pixels, of images uint8 [N, C, H, W] of classes int64 [N].

    Each is unbiased (N - 1), so that sets of different sizes compare. A class of one image has none.
    """
    found: dict[int, float] = {}
    for each in sorted(set(classes.tolist())):
        of_class = images[classes == each].flatten(1)
        if len(of_class) >= 2:
            parts = torch.split(of_class, max(1, VALUES_AT_ONCE // len(of_class)), dim=1)
            found[each] = sum(float((part.double() / 127.5).var(0).sum()) for part in parts)
    return found


def variance_ratio(variances: dict[int, float], real: dict[int, float]) -> float | None:
    """Divide the sum of the variances within classes by that of real images, over the classes that have both.

    1 is right. Below it images of a class are too much alike. None where no class has both, or real ones do not vary.
    """
    both = variances.keys() & real.keys()
    real_sum = sum(real[each] for each in both)
    return sum(variances[each] for each in both) / real_sum if real_sum > 0 else None


def share_within(queries: Tensor, references: Tensor) -> float:
    """Compute the share of queries [N, K] that lie as near to a reference [M, K] as that one's third neighbour.

    Kynkäänniemi et al. 2019, eq. 1 and 2: the precision of queries that were made, of real references; the recall, of
    real queries and references that were made.
    """
    k = min(NEIGHBOURS, len(references) - 1)
    of_references = (_distances(part, references) for part in torch.split(references, QUERIES_AT_ONCE))
    radii = torch.cat([each.kthvalue(k + 1, dim=1).values for each in of_references])  # each is its own nearest
    within = [(_distances(part, references) <= radii).any(1) for part in torch.split(queries, QUERIES_AT_ONCE)]
    return float(torch.cat(within).double().mean())


def _distances(queries: Tensor, references: Tensor) -> Tensor:
    return torch.cdist(queries, references, compute_mode="donot_use_mm_for_euclid_dist")  # which would round


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1).double() / 127.5 - 1
