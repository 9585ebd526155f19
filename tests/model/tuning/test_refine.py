"""The gradient through all passes is right, and the best is kept."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model.tuning.nets import fitter_of
from tminus.model.checkpoint import load_checkpoint
from tminus.model.tuning.refine import Refiner

pytestmark = pytest.mark.slow


def test_the_gradient_of_the_distance_is_that_of_finite_differences(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint)
    fit = fitter.fit((49.0, 25.0, 8.0))
    refiner = Refiner(checkpoint, fit.timesteps, 1.0, fitter.rows, fitter.images, held_out=4, bfloat16=False)
    picked, C = torch.arange(6), torch.tensor([list(line[:4]) for line in fit.lines], requires_grad=True)

    def distance(C: Tensor) -> Tensor:
        return refiner.distance(refiner.images(C, picked), picked, torch.Generator().manual_seed(0))

    (gradient,) = torch.autograd.grad(distance(C), C)
    for at in [(0, 0), (1, 1), (2, 1), (2, 2)]:
        step = torch.zeros_like(C)
        step[at] = 2e-3
        with torch.no_grad():
            slope = (distance(C + step) - distance(C - step)) / 4e-3
        assert gradient[at].item() == pytest.approx(slope.item(), rel=0.1, abs=1e-4)


def test_refining_keeps_the_best_that_unseen_rows_have_found(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint)
    fit = fitter.fit((49.0, 25.0, 8.0))
    refiner = Refiner(checkpoint, fit.timesteps, 1.0, fitter.rows, fitter.images, held_out=4)
    begun = refiner.begin(fit.lines)
    done = refiner.run(begun, 30, 6, lambda _state: None)
    assert done.iteration == 30
    assert done.distance <= begun.distance
    assert refiner.judge(done.best) == pytest.approx(done.distance, rel=1e-6)
