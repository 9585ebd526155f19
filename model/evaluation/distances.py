"""Distances between sets of images: Fréchet distances, pixel distances, and nearest neighbours.

The Fréchet distance in the classifier's features may favour this project's samples, because the project also trained
the classifier. Therefore sets are also compared by the principal components of real images' pixels. These components
need no training, and neither `train` nor `tune` uses them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

REFERENCES_AT_ONCE, QUERIES_AT_ONCE = 8192, 1024  # batch sizes: a batch has 32 MiB of distances
VALUES_AT_ONCE = 2**24  # limit on pixel values per batch: 64 MiB in float32
COMPONENTS = 48
FITTED_VALUES = 2**25  # limit on pixel values for fitting: 256 MiB in float64
NEIGHBOURS = 3  # k in Kynkäänniemi et al. 2019
LEAST_SHARE = 1e-12  # Variances below this share of the largest are rounding errors.


class Gaussian(NamedTuple):
    """A Gaussian distribution in float64: mean [D] and covariance [D, D]."""

    mean: Tensor
    covariance: Tensor


def fit_gaussian(features: Tensor, weights: Tensor | None = None) -> Gaussian:
    """Fit a Gaussian to features [N, D], optionally weighted by float64 [N]. Raises ValueError if N < 2."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs 2 images or more, got {len(features)}")
    features = features.to(torch.float64)
    mean = features.mean(0) if weights is None else weights @ features / weights.sum()
    return Gaussian(mean, features.T.cov(aweights=weights))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Return the squared 2-Wasserstein distance between two Gaussians (Dowson & Landau 1982).

    The distance is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2). The product S1^1/2 S2 S1^1/2 is symmetric, so
    the trace of its root follows from its eigenvalues. Negative eigenvalues are rounding errors, and count as zero. The
    covariances may be singular, as they are with fewer images than features.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ other.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


@torch.inference_mode()
def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Return the distance from each query to its nearest reference, float64 [N].

    Queries and references are uint8 [N, C, H, W] on one device. The distance is the root mean square difference of
    pixels in [-1, 1]: 0 between copies, 2 between black and white.
    """
    flat_queries, flat_references = queries.flatten(1), references.flatten(1)
    values = flat_queries.shape[1]
    some, many = (max(1, min(n, VALUES_AT_ONCE // values)) for n in (QUERIES_AT_ONCE, REFERENCES_AT_ONCE))
    parts = [slice(first, first + some) for first in range(0, len(queries), some)]
    best = torch.full((len(queries),), torch.inf, device=queries.device)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(references), many):
        b = flat_references[start : start + many].to(torch.float32)
        length = torch.linalg.vecdot(b, b)  # without a temporary tensor of squares
        for part in parts:
            a = flat_queries[part].to(torch.float32)
            # |a - b|^2 without the term |a|^2, which does not affect which b is nearest
            distance, nearest = (length - 2 * (a @ b.T)).min(1)
            closer = distance < best[part]
            best[part] = torch.where(closer, distance, best[part])
            index[part] = torch.where(closer, nearest + start, index[part])
    # The distances above have rounding errors. Recompute the smallest one exactly, so that a copy has distance 0.
    square = torch.empty(len(queries), dtype=torch.float64, device=queries.device)
    for part in parts:
        difference = flat_queries[part].to(torch.float64).sub_(flat_references[index[part]])
        square[part] = torch.linalg.vecdot(difference, difference)
    return (square / values).sqrt() / 127.5


class Components(NamedTuple):
    """Principal components of images, float64: the mean [D] and the directions of largest variance [D, K]."""

    mean: Tensor
    directions: Tensor

    def project(self, images: Tensor) -> Tensor:
        """Return the coordinates of images along the directions: uint8 [N, C, H, W] -> float64 [N, K]."""
        at_once = max(1, VALUES_AT_ONCE // len(self.mean))
        parts = [(_flat(part) - self.mean) @ self.directions for part in torch.split(images, at_once)]
        return torch.cat(parts)


def fit_components(images: Tensor) -> Components:
    """Fit principal components to images, uint8 [N, C, H, W] with N >= 2.

    Returns COMPONENTS components, or fewer if the images have no variance in further directions.
    """
    flat = _flat(images)
    mean = flat.mean(0)
    flat -= mean
    by_image = len(flat) < flat.shape[1]  # Use the smaller matrix. The nonzero eigenvalues are the same.
    values, vectors = torch.linalg.eigh(flat @ flat.T if by_image else flat.T @ flat)
    kept = int((values[-COMPONENTS:] > LEAST_SHARE * values[-1]).sum())
    values, vectors = values[len(values) - kept :].flip(0), vectors[:, len(vectors) - kept :].flip(1)
    return Components(mean, flat.T @ vectors / values.sqrt() if by_image else vectors)


def class_variance(images: Tensor, classes: Tensor) -> dict[int, float]:
    """Return the variance of each class, summed over pixels: images uint8 [N, C, H, W], classes int64 [N].

    Pixels are in [-1, 1]. Variances are unbiased (divided by N - 1), so that sets of different sizes can be compared.
    Classes with a single image are left out.
    """
    found: dict[int, float] = {}
    for each in sorted(set(classes.tolist())):
        of_class = images[classes == each].flatten(1)
        if len(of_class) >= 2:
            parts = torch.split(of_class, max(1, VALUES_AT_ONCE // len(of_class)), dim=1)
            found[each] = sum(float((part.double() / 127.5).var(0).sum()) for part in parts)
    return found


def variance_ratio(variances: dict[int, float], real: dict[int, float]) -> float | None:
    """Return the ratio of variances within classes to those of real images, over the common classes.

    The ideal is 1. A lower ratio means that the images of a class are too similar. Returns None if there is no common
    class, or if the real images do not vary.
    """
    both = variances.keys() & real.keys()
    real_sum = sum(real[each] for each in both)
    return sum(variances[each] for each in both) / real_sum if real_sum > 0 else None


def share_within(queries: Tensor, references: Tensor) -> float:
    """Return the share of queries [N, K] that are close to at least one reference [M, K].

    Close means no further from the reference than the reference's third-nearest neighbour. If queries are samples and
    references are real images, the share is the precision. With the roles swapped, it is the recall (Kynkäänniemi et
    al. 2019, eq. 1 and 2).
    """
    k = min(NEIGHBOURS, len(references) - 1)
    of_references = (_distances(part, references) for part in torch.split(references, QUERIES_AT_ONCE))
    # k + 1, because the nearest neighbour of each point is the point itself
    radii = torch.cat([each.kthvalue(k + 1, dim=1).values for each in of_references])
    within = [(_distances(part, references) <= radii).any(1) for part in torch.split(queries, QUERIES_AT_ONCE)]
    return float(torch.cat(within).double().mean())


def _distances(queries: Tensor, references: Tensor) -> Tensor:
    return torch.cdist(queries, references, compute_mode="donot_use_mm_for_euclid_dist")  # matmul is less exact


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1).double() / 127.5 - 1
