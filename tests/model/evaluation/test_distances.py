"""The judge of pixels, held against numpy's decompositions and against sets whose figures are known."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.model.evaluation.toys import CPU, toy_checkpoint, toy_images
from tminus.model.evaluation import distances
from tminus.model.evaluation.distances import (
    COMPONENTS,
    class_variance,
    fit_components,
    fit_gaussian,
    frechet_distance,
    share_within,
    variance_ratio,
)
from tminus.model.evaluation.figures import PixelFigures
from tminus.model.evaluation.judge import Judge

TRAIN, TEST = toy_images(300, 0), toy_images(240, 1)
Floats = npt.NDArray[np.float64]


def flat(images: Tensor) -> Floats:
    return images.flatten(1).numpy() / 127.5 - 1


def frechet(one: Floats, other: Floats) -> float:
    """Heusel et al. 2017, eq. 6, by the eigenvalues of the product of the covariances, which need not be symmetric."""
    cov = [np.cov(each, rowvar=False) for each in (one, other)]
    cross = np.sqrt(np.linalg.eigvals(cov[0] @ cov[1]).real.clip(0)).sum()
    return float(np.square(one.mean(0) - other.mean(0)).sum() + np.trace(cov[0] + cov[1]) - 2 * cross)


def nearest(queries: Floats, references: Floats) -> Floats:
    """The distances of each query to every reference, rising."""
    return np.sort(np.linalg.norm(queries[:, None] - references[None], axis=2), axis=1)


def within(queries: Floats, references: Floats) -> float:
    """The share of queries in a ball about a reference that reaches to its third neighbour."""
    radii = nearest(references, references)[:, 3]
    return float((np.linalg.norm(queries[:, None] - references[None], axis=2) <= radii).any(1).mean())


@pytest.mark.parametrize("count", [300, 40], ids=["more images than pixels", "fewer"])
def test_components_are_the_singular_vectors_of_the_centred_images(count: int) -> None:
    images = TRAIN.images[:count]
    found, values = fit_components(images), flat(images)
    _, _, rows = np.linalg.svd(values - values.mean(0))
    directions = rows[: min(COMPONENTS, count - 1)].T
    np.testing.assert_allclose(found.mean, values.mean(0))
    assert found.directions.shape == directions.shape
    # A direction may point either way.
    np.testing.assert_allclose(np.abs((directions * found.directions.numpy()).sum(0)), 1.0)
    projected = (flat(TEST.images) - found.mean.numpy()) @ found.directions.numpy()
    np.testing.assert_allclose(found.project(TEST.images), projected)


def test_images_that_span_few_directions_have_as_few_components() -> None:
    images = torch.full((20, 1, 8, 8), 100, dtype=torch.uint8)
    images[::2, 0, 0, 0], images[::3, 0, 5, 5] = 200, 10
    assert fit_components(images).directions.shape == (64, 2)


def judged(samples: Tensor) -> PixelFigures:
    return Judge(toy_checkpoint(), TRAIN, TEST, None, CPU).figures(samples, 0, 0.0).pixels


def test_the_figures_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "QUERIES_AT_ONCE", 7)
    monkeypatch.setattr(distances, "VALUES_AT_ONCE", 900)
    samples = toy_images(240, 2).images // 2 + 60
    found = judged(samples)
    _, _, rows = np.linalg.svd(flat(TRAIN.images) - flat(TRAIN.images).mean(0))
    of_samples, of_test = (flat(each) @ rows[:COMPONENTS].T for each in (samples, TEST.images))
    assert found.num_components == COMPONENTS
    assert found.frechet_distance.samples == pytest.approx(frechet(of_samples, of_test), rel=1e-6)
    assert found.precision.samples == within(of_samples, of_test)
    assert found.recall.samples == within(of_test, of_samples)
    by_class = [[np.var(flat(each)[k::3], axis=0, ddof=1).sum() for k in range(3)] for each in (samples, TEST.images)]
    assert found.variance_ratio is not None
    assert found.variance_ratio.samples == pytest.approx(np.sum(by_class[0]) / np.sum(by_class[1]))
    assert found.frechet_distance.real < found.frechet_distance.samples
    assert found.variance_ratio.real == pytest.approx(1, abs=0.05)


def test_known_gaussians_are_as_far_apart_as_the_formula_says() -> None:
    """Of independent pixels with standard deviations s and s' and means m and m': sum of (m - m')^2 + (s - s')^2."""
    generator = torch.Generator().manual_seed(0)
    deviation = torch.tensor([40.0, 25.0, 10.0, 30.0])

    def pixels(scale: float, shift: float) -> Tensor:
        x = 127 + shift + scale * deviation * torch.randn(40_000, 4, generator=generator)
        return x.round().clamp(0, 255).byte().reshape(-1, 1, 2, 2)

    real, other = pixels(1.0, 0.0), pixels(0.5, 20.0)
    components = fit_components(real)
    one, two = (fit_gaussian(components.project(each)) for each in (real, other))
    expected = float((400 + (0.5 * deviation).square()).sum()) / 127.5**2
    assert frechet_distance(one, two) == pytest.approx(expected, rel=0.02)
    ratio = variance_ratio(*(class_variance(each, torch.zeros(len(each)).long()) for each in (other, real)))
    assert ratio == pytest.approx(0.25, rel=0.03)


def test_the_variance_is_that_within_a_class_whatever_lies_between_classes() -> None:
    samples, classes = TEST.images.clone(), torch.arange(240) % 3
    around = samples.double()
    for k in range(3):
        mean = around[classes == k].mean(0)
        around[classes == k] = mean + 0.5 * (around[classes == k] - mean)
    ratio = variance_ratio(class_variance(around.round().byte(), classes), class_variance(TEST.images, classes))
    assert ratio == pytest.approx(0.25, rel=0.01)
    alone = class_variance(TEST.images[:4], torch.tensor([0, 0, 1, 2]))
    assert alone.keys() == {0}, "of one image there is no variance"
    assert variance_ratio({}, alone) is None
    assert variance_ratio({0: 1.0}, {0: 0.0}) is None


def test_copies_are_precise_and_recall_nothing_but_themselves() -> None:
    points = torch.randn(50, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert share_within(points, points) == 1.0
    copies = points[:1].repeat(50, 1)
    assert share_within(copies, points) == 1.0
    assert share_within(points, copies) == 1 / 50
    assert share_within(points + 100, points) == 0.0


def test_samples_of_other_classes_than_the_data_are_judged_as_one_class() -> None:
    checkpoint = toy_checkpoint(class_names=("a", "b", "c"))
    pixels = Judge(checkpoint, TRAIN, TEST, None, CPU).figures(TEST.images, 0, 0.0).pixels
    assert pixels.variance_ratio is not None
    assert pixels.variance_ratio.samples == pytest.approx(1.0)
    assert pixels.frechet_distance.samples == pytest.approx(0, abs=1e-9)


def test_two_samples_have_no_variance_within_a_class_and_all_other_figures() -> None:
    pixels = judged(TEST.images[:2])
    assert pixels.variance_ratio is None
    assert np.isfinite([pixels.frechet_distance.samples, pixels.precision.samples, pixels.recall.samples]).all()
