"""Distances between sets of images: Fréchet distances between Gaussians, pixel distances, and nearest neighbours.

This project trained the classifier, so the classifier's features may favour the project's own samples. Sets are
therefore also compared in the principal components of the real images' pixels. These components need no training, and
neither `tune` nor `train` uses them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

REFERENCES_AT_ONCE, QUERIES_AT_ONCE = 8192, 1024  # largest batches; 32 MiB of distances
VALUES_AT_ONCE = 2**24  # pixel values in a batch at most: 64 MiB in float32, so batches of large images are small
COMPONENTS = 48
FITTED_VALUES = 2**25  # pixel values for fitting components at most: 256 MiB in float64
NEIGHBOURS = 3  # k of Kynkäänniemi et al. 2019
LEAST_SHARE = 1e-12  # share of the largest component's variance; smaller variances are rounding errors


class Gaussian(NamedTuple):
    """A Gaussian: mean [D] and covariance [D, D], float64."""

    mean: Tensor
    covariance: Tensor


def fit_gaussian(features: Tensor, weights: Tensor | None = None) -> Gaussian:
    """Fit a Gaussian in float64 to features [N, D], with image weights float64 [N]. Raises ValueError if N < 2."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs 2 images or more, got {len(features)}")
    features = features.to(torch.float64)
    mean = features.mean(0) if weights is None else weights @ features / weights.sum()
    return Gaussian(mean, features.T.cov(aweights=weights))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """Return the squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982).

    The distance is |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2). The product S1^1/2 S2 S1^1/2 is symmetric, so
    its eigenvalues give its root. Eigenvalues that rounding made negative count as zero. Singular covariances (fewer
    images than features) are allowed.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ other.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


@torch.inference_mode()
def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Return each query's distance to its nearest reference, float64 [N]. Both are uint8 [N, C, H, W] on one device.

    The distance is the root mean square over pixels in [-1, 1]: 0 for a copy, 2 for black against white.
    """
    flat_queries, flat_references = queries.flatten(1), references.flatten(1)
    values = flat_queries.shape[1]
    some, many = (max(1, min(n, VALUES_AT_ONCE // values)) for n in (QUERIES_AT_ONCE, REFERENCES_AT_ONCE))
    parts = [slice(first, first + some) for first in range(0, len(queries), some)]
    best = torch.full((len(queries),), torch.inf, device=queries.device)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(references), many):
        b = flat_references[start : start + many].to(torch.float32)
        length = torch.linalg.vecdot(b, b)  # vecdot avoids a temporary tensor for the squares
        for part in parts:
            a = flat_queries[part].to(torch.float32)
            # |a - b|^2 without |a|^2, which does not change the nearest b.
            distance, nearest = (length - 2 * (a @ b.T)).min(1)
            closer = distance < best[part]
            best[part] = torch.where(closer, distance, best[part])
            index[part] = torch.where(closer, nearest + start, index[part])
    # This expansion has rounding errors. Compute the nearest distance exactly, so that a copy has distance 0.
    square = torch.empty(len(queries), dtype=torch.float64, device=queries.device)
    for part in parts:
        difference = flat_queries[part].to(torch.float64).sub_(flat_references[index[part]])
        square[part] = torch.linalg.vecdot(difference, difference)
    return (square / values).sqrt() / 127.5


class Components(NamedTuple):
    """The mean pixels [D] and the directions [D, K] in which images vary most, float64."""

    mean: Tensor
    directions: Tensor

    def project(self, images: Tensor) -> Tensor:
        """Project images onto the directions, with pixels in [-1, 1]: uint8 [N, C, H, W] -> float64 [N, K]."""
        at_once = max(1, VALUES_AT_ONCE // len(self.mean))
        parts = [(_flat(part) - self.mean) @ self.directions for part in torch.split(images, at_once)]
        return torch.cat(parts)


def fit_components(images: Tensor) -> Components:
    """Fit up to COMPONENTS components to images uint8 [N, C, H, W], N >= 2: fewer if the images span fewer."""
    flat = _flat(images)
    mean = flat.mean(0)
    flat -= mean
    by_image = len(flat) < flat.shape[1]  # Then the matrix over images is smaller, with the same nonzero eigenvalues.
    values, vectors = torch.linalg.eigh(flat @ flat.T if by_image else flat.T @ flat)
    kept = int((values[-COMPONENTS:] > LEAST_SHARE * values[-1]).sum())
    values, vectors = values[len(values) - kept :].flip(0), vectors[:, len(vectors) - kept :].flip(1)
    return Components(mean, flat.T @ vectors / values.sqrt() if by_image else vectors)


def class_variance(images: Tensor, classes: Tensor) -> dict[int, float]:
    """Return each class's variance, summed over pixels in [-1, 1]: images uint8 [N, C, H, W], classes int64 [N].

    Variances are unbiased (N - 1), so sets of different sizes can be compared. Classes with a single image are absent.
    """
    found: dict[int, float] = {}
    for each in sorted(set(classes.tolist())):
        of_class = images[classes == each].flatten(1)
        if len(of_class) >= 2:
            parts = torch.split(of_class, max(1, VALUES_AT_ONCE // len(of_class)), dim=1)
            found[each] = sum(float((part.double() / 127.5).var(0).sum()) for part in parts)
    return found


def variance_ratio(variances: dict[int, float], real: dict[int, float]) -> float | None:
    """Divide the variances within classes by those of real images, both summed over the classes that they share.

    1 is ideal; below 1 the images of a class are too similar. None if no class is shared or real images do not vary.
    """
    both = variances.keys() & real.keys()
    real_sum = sum(real[each] for each in both)
    return sum(variances[each] for each in both) / real_sum if real_sum > 0 else None


def share_within(queries: Tensor, references: Tensor) -> float:
    """Return the share of queries [N, K] within the third-neighbour radius of at least one reference [M, K].

    See Kynkäänniemi et al. 2019, eq. 1 and 2. With samples as queries and real images as references, the share is the
    precision. With the roles swapped, it is the recall.
    """
    k = min(NEIGHBOURS, len(references) - 1)
    of_references = (_distances(part, references) for part in torch.split(references, QUERIES_AT_ONCE))
    # Use k + 1, because each point is its own nearest neighbour.
    radii = torch.cat([each.kthvalue(k + 1, dim=1).values for each in of_references])
    within = [(_distances(part, references) <= radii).any(1) for part in torch.split(queries, QUERIES_AT_ONCE)]
    return float(torch.cat(within).double().mean())


def _distances(queries: Tensor, references: Tensor) -> Tensor:
    return torch.cdist(queries, references, compute_mode="donot_use_mm_for_euclid_dist")  # matmul loses precision


def _flat(images: Tensor) -> Tensor:
    return images.flatten(1).double() / 127.5 - 1
