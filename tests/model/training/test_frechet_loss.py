"""The gradient is that of the Fréchet distance, by autograd in float64; what it remembers survives a save."""

import pytest
import torch
from torch import Tensor

from tminus.model.evaluation.distances import Gaussian, fit_gaussian, frechet_distance
from tminus.model.training import frechet_loss
from tminus.model.training.frechet_loss import FrechetLoss

D = 6


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet_loss, "LEAST_ROWS", 1)
    monkeypatch.setattr(frechet_loss, "ALL_ROWS", 1)


def rows(count: int, seed: int) -> Tensor:
    """Rows of a Gaussian of its own for each seed."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=generator, dtype=torch.float64)
    return torch.randn(count, D, generator=generator, dtype=torch.float64) @ mix + torch.randn(D, generator=generator)


def loss_with(reference: Gaussian, kinds: int = 1) -> FrechetLoss:
    loss = FrechetLoss(kinds, D)
    loss.set_reference(reference)
    return loss


def distance(features: Tensor, reference: Gaussian) -> Tensor:
    """The Fréchet distance by the formula, differentiable, with the ridge that the loss adds to both covariances."""
    scale = reference.covariance.trace().sqrt()
    ridge = torch.eye(D, dtype=torch.float64) * frechet_loss.RIDGE
    f = features / scale
    mean, wanted = f.mean(0), reference.mean / scale
    one, other = f.T.cov(correction=0) + ridge, reference.covariance / scale**2 + ridge
    values, vectors = torch.linalg.eigh(other)
    root = (vectors * values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ one @ root).sqrt().sum()
    return (mean - wanted).square().sum() + one.trace() + other.trace() - 2 * cross


def test_gradient_is_that_of_the_distance() -> None:
    reference = fit_gaussian(rows(300, 1))
    features = rows(200, 2).requires_grad_()
    expected = torch.autograd.grad(distance(features, reference), features)[0]
    loss = loss_with(reference)
    found = torch.autograd.grad(loss(features.float(), torch.zeros(200, dtype=torch.long)).mean(), features)[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert float(loss.distance[0]) == pytest.approx(float(distance(features.detach(), reference)), rel=1e-6)


def test_distance_is_the_one_of_evaluate_in_units_of_the_reference() -> None:
    reference, features = fit_gaussian(rows(300, 1)), rows(5000, 2)
    loss = loss_with(reference)
    loss(features.float(), torch.zeros(5000, dtype=torch.long))
    expected = frechet_distance(fit_gaussian(features), reference) / float(reference.covariance.trace())
    assert float(loss.distance[0]) == pytest.approx(expected, rel=0.01)


def test_descent_brings_a_distribution_to_the_reference_in_batches_smaller_than_its_dimension() -> None:
    reference = fit_gaussian(rows(4000, 1))
    loss = loss_with(reference)
    matrix, shift = torch.eye(D, requires_grad=True), torch.zeros(D, requires_grad=True)
    optimizer = torch.optim.Adam([matrix, shift], lr=0.01)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 2000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        features = torch.randn(D - 1, D, generator=generator) @ matrix + shift
        optimizer.zero_grad()
        loss(features, torch.zeros(D - 1, dtype=torch.long)).mean().backward()
        optimizer.step()
        decay.step()
    made = torch.randn(4000, D, generator=generator) @ matrix.detach() + shift.detach()
    total = float(reference.covariance.trace())
    assert frechet_distance(fit_gaussian(torch.randn(4000, D, generator=generator)), reference) > 0.5 * total
    assert frechet_distance(fit_gaussian(made), reference) < 0.02 * total


def test_of_many_directions_those_count_in_which_the_reference_varies_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet_loss, "MOST_DIRECTIONS", 2)
    spread = torch.tensor([3.0, 0.1, 0.1, 2.0, 0.1, 0.1], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    reference = fit_gaussian(torch.randn(400, D, generator=generator, dtype=torch.float64) * spread)
    features = torch.randn(200, D, generator=generator).requires_grad_()
    loss_with(reference)(features, torch.zeros(200, dtype=torch.long)).sum().backward()
    assert features.grad is not None
    each = features.grad.abs().mean(0)
    assert each[[0, 3]].min() > 10 * each[[1, 2, 4, 5]].max()


def test_loss_is_at_rest_where_the_distribution_is_the_reference() -> None:
    """What few rows know of a covariance must not make its images vary more than the reference."""
    size = 40
    spread = torch.linspace(0.5, 2, size, dtype=torch.float64)
    reference = Gaussian(torch.zeros(size, dtype=torch.float64), torch.diag(spread.square()))
    loss = FrechetLoss(1, size)
    loss.set_reference(reference)
    generator, growth = torch.Generator().manual_seed(0), []
    for step in range(600):
        scale = torch.ones((), requires_grad=True)
        features = scale * torch.randn(20, size, generator=generator) * spread.float()
        value = loss(features, torch.zeros(20, dtype=torch.long)).mean()
        if step > 300:
            growth.append(float(torch.autograd.grad(value, scale)[0]))
    # The gradient in the scale of a distribution that is wider by a share s is 2 s: in units of the variance.
    assert abs(sum(growth) / len(growth)) < 2 * 0.03


def test_kinds_are_apart() -> None:
    reference = fit_gaussian(rows(300, 1))
    both, alone = loss_with(reference, 2), loss_with(reference)
    one, other = rows(40, 2).float(), rows(60, 3).float()
    of_both = both(torch.cat([one, other]), torch.tensor([0] * 40 + [1] * 60))
    torch.testing.assert_close(of_both[:40], alone(one, torch.zeros(40, dtype=torch.long)))
    assert int(both.rows[1]) == 60
    assert float(both.distance[0]) != float(both.distance[1])


def test_it_does_not_count_before_it_knows_enough_and_then_more_and_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet_loss, "LEAST_ROWS", 100)
    monkeypatch.setattr(frechet_loss, "ALL_ROWS", 400)
    loss, kind = loss_with(fit_gaussian(rows(300, 1))), torch.zeros(50, dtype=torch.long)
    probe = rows(50, 2).float()
    assert loss(probe, kind).abs().max() == 0
    growing = [float(loss(probe, kind).abs().max()) for _ in range(10)]
    assert growing[0] > 0
    assert growing == sorted(growing)
    assert growing[-1] == pytest.approx(4 * growing[0], rel=1e-3), (
        "of the same rows again and again, four times as much"
    )


def test_what_it_remembers_is_all_in_its_state() -> None:
    reference = fit_gaussian(rows(300, 1))
    loss, again = loss_with(reference), FrechetLoss(1, D)
    kind = torch.zeros(30, dtype=torch.long)
    for seed in range(3):
        loss(rows(30, seed).float(), kind)
    again.load_state_dict(loss.state_dict())
    for seed in range(3, 9):
        probe = rows(30, seed).float()
        assert torch.equal(loss(probe, kind), again(probe, kind))
