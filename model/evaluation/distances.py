"""Distances between sets of images: Fréchet's between Gaussians, and from each image to the nearest of others."""

from typing import NamedTuple

import torch
from torch import Tensor

REFERENCES_AT_ONCE, QUERIES_AT_ONCE = 8192, 1024  # at most: 32 MiB of distances
VALUES_AT_ONCE = 2**24  # of either, at most: 64 MiB in float32, so that large images come few at a time


class Gaussian(NamedTuple):
    """mean [D] and covariance [D, D], float64."""

    mean: Tensor
    covariance: Tensor


def fit_gaussian(features: Tensor, weights: Tensor | None = None) -> Gaussian:
    """Fit a Gaussian to features [N, D], N >= 2, in float64. weights: how much each counts, float64 [N]."""
    if len(features) < 2:
        raise ValueError(f"a covariance needs 2 images or more, got {len(features)}")
    features = features.to(torch.float64)
    mean = features.mean(0) if weights is None else weights @ features / weights.sum()
    return Gaussian(mean, features.T.cov(aweights=weights))


def frechet_distance(one: Gaussian, other: Gaussian) -> float:
    """The squared 2-Wasserstein distance of two Gaussians (Dowson & Landau 1982).

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1^1/2 S2 S1^1/2)^1/2). The product is symmetric, so eigenvalues give its root; those
    that rounding made negative count as zero. Singular covariances (fewer images than features) are allowed.
    """
    values, vectors = torch.linalg.eigh(one.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ other.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * cross
    return max(0.0, float(distance))


@torch.inference_mode()
def nearest_distances(queries: Tensor, references: Tensor) -> Tensor:
    """Measure each query's distance to its nearest reference, float64 [N]; both uint8 [N, C, H, W] on one device.

    It is the root mean square over pixels in the model's range: 0 for a copy, 2 for black against white.
    """
    flat_queries, flat_references = queries.flatten(1), references.flatten(1)
    values = flat_queries.shape[1]
    some, many = (max(1, min(n, VALUES_AT_ONCE // values)) for n in (QUERIES_AT_ONCE, REFERENCES_AT_ONCE))
    parts = [slice(first, first + some) for first in range(0, len(queries), some)]
    best = torch.full((len(queries),), torch.inf, device=queries.device)
    index = torch.zeros(len(queries), dtype=torch.int64, device=queries.device)
    for start in range(0, len(references), many):
        b = flat_references[start : start + many].to(torch.float32)
        length = torch.linalg.vecdot(b, b)  # which needs no second b for its squares
        for part in parts:
            a = flat_queries[part].to(torch.float32)
            # |a - b|^2 without |a|^2, which changes nothing about which b is nearest.
            distance, nearest = (length - 2 * (a @ b.T)).min(1)
            closer = distance < best[part]
            best[part] = torch.where(closer, distance, best[part])
            index[part] = torch.where(closer, nearest + start, index[part])
    # That expansion rounds; the distance itself is computed exactly, so that a copy is at 0.
    square = torch.empty(len(queries), dtype=torch.float64, device=queries.device)
    for part in parts:
        difference = flat_queries[part].to(torch.float64).sub_(flat_references[index[part]])
        square[part] = torch.linalg.vecdot(difference, difference)
    return (square / values).sqrt() / 127.5
