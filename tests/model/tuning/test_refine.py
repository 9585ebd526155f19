"""The gradient through all passes is right, and the best is kept."""

import dataclasses
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.model.tuning.nets import EDM, NOISE, fitter_of
from tminus.model.checkpoint import load_checkpoint
from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.noise import NoiseConfig
from tminus.model.sampler_tables import Table
from tminus.model.samplers import sample, table_plan
from tminus.model.tuning.refine import Refiner

pytestmark = pytest.mark.slow


def test_the_gradient_of_the_distance_is_that_of_finite_differences(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint)
    fit = fitter.fit((49.0, 25.0, 8.0))
    refiner = Refiner(checkpoint, fit.timesteps, 1.0, fitter.rows, fitter.images, held_out=4)
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
    done = refiner.run(fit.lines, 30, 6, lambda _iteration, _distance: None)
    assert done.iterations == 30
    assert done.distance <= done.fitted
    assert refiner.judge(torch.tensor(done.lines)) == pytest.approx(done.distance, rel=1e-6)


@pytest.mark.parametrize("noise", [dataclasses.replace(NOISE, clip_sample=False), EDM], ids=["eps", "edm"])
@pytest.mark.parametrize("latent", [False, True])
def test_what_is_refined_is_what_a_request_gets(folder: Path, latent: bool, noise: NoiseConfig) -> None:
    """Latents have no bounds, and images are rounded to their range."""
    checkpoint = dataclasses.replace(load_checkpoint(folder), noise=noise)
    fitter = fitter_of(checkpoint)
    fit = fitter.fit((49.0, 25.0, 8.0))
    if latent:
        checkpoint = dataclasses.replace(checkpoint, autoencoder=cast(Autoencoder, object()))
    refiner = Refiner(checkpoint, fit.timesteps, 1.0, fitter.rows, fitter.images, held_out=4)
    table = Table("tuned", 3, 1.0, fit.timesteps, tuple((*line[:4], 0.0) for line in fit.lines))
    plan = table_plan(checkpoint.noise, fitter.schedule, table, clip=None)
    x_T, labels = fitter.rows.noise, fitter.rows.class_labels
    wanted = sample(checkpoint.net, plan, x_T, lambda _k: torch.zeros_like(x_T), class_labels=labels)
    assert wanted.abs().max() > 1.5
    with torch.no_grad():
        images = refiner.images(torch.tensor([line[:4] for line in fit.lines]), torch.arange(len(wanted)))
    torch.testing.assert_close(images, wanted if latent else wanted.clamp(-1, 1), rtol=1e-4, atol=1e-4)
