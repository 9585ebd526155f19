"""What is fitted is what the formulas say, on a tiny net."""

import dataclasses
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.tuning.nets import CONFIG, EDM, NOISE, fitter_of
from tminus.model.checkpoint import load_checkpoint
from tminus.model.noise import NoiseConfig
from tminus.model.sampler_tables import Table
from tminus.model.samplers import sample, table_plan
from tminus.model.tuning.fit import Fit, least_squares, search_timesteps

pytestmark = pytest.mark.slow


def test_least_squares_are_numpys() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 40, 1, 4, 4, generator=generator)
    target = 0.5 * inputs[0] - 2 * inputs[2] + 0.1 * torch.randn(40, 1, 4, 4, generator=generator)
    expected = np.linalg.lstsq(inputs.flatten(1).double().numpy().T, target.flatten().double().numpy(), rcond=None)[0]
    np.testing.assert_allclose(least_squares(inputs, target).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_the_teachers_way_is_its_sampler(folder: Path, guidance: float) -> None:
    """DPM-Solver++(2M) by the plain loop, of which the engine's own tests hold every step to diffusers."""
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint, guidance=guidance)
    plan = checkpoint.plan("dpmpp_2m", 25, spacing="trailing")
    assert plan.timesteps.tolist() == list(range(49, -1, -2))
    zero = torch.zeros_like(fitter.rows.noise)
    expected = sample(
        checkpoint.net, plan, fitter.rows.noise, lambda _k: zero, class_labels=fitter.rows.class_labels, null_class=3,
        guidance=guidance,
    )  # fmt: skip
    torch.testing.assert_close(fitter.images, expected, rtol=0, atol=2e-3)  # it is kept in float16


def test_a_fitted_table_is_nearer_to_the_teacher_than_untuned_solvers_on_rows_it_has_not_seen(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint, dataclasses.replace(CONFIG, rows=32, held_out=16))
    fit = fitter.fit((49.0, 30.0, 15.0, 5.0))
    untuned = [fitter.error(checkpoint.plan(name, 4, spacing="trailing")) for name in ("ddim", "dpmpp_2m", "unipc")]
    assert fit.held_out < min(untuned)
    assert fit.lines[0][2:] == (0.0, 0.0, 0.0), "nothing is before the first step"
    assert fit.lines[1][3:] == (0.0, 0.0)


@pytest.mark.parametrize("noise", [NOISE, EDM], ids=["eps", "edm"])
def test_a_table_gives_in_the_engines_rule_what_its_fit_says(folder: Path, noise: NoiseConfig) -> None:
    checkpoint = dataclasses.replace(load_checkpoint(folder), noise=noise)
    fitter = fitter_of(checkpoint)
    fit = fitter.fit((49.0, 30.5, 15.0, 5.0))
    table = Table("tuned", 4, 1.0, fit.timesteps, fit.lines)
    assert fitter.error(table_plan(noise, noise.schedule(), table, clip=None)) == pytest.approx(fit.held_out, rel=1e-4)


@pytest.mark.parametrize(
    ("timesteps", "passes"),
    [
        ((49.0, 30.0, 12.0, 5.0), 2),
        ((49.0, 30.0, 15.0, 4.0), 1),
        ((48.0, 30.0, 15.0, 5.0), 4),
        ((49.0, 30.0, 15.0, 5.0), 0),
    ],
)
def test_a_fit_that_begins_like_another_is_the_same_as_from_the_start(
    folder: Path, timesteps: tuple[float, ...], passes: int
) -> None:
    checkpoint = load_checkpoint(folder)
    seen: list[float] = []

    def counted(x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        seen.extend(t.tolist())
        out: Tensor = checkpoint.net(x, t, labels)
        return out

    fitter, fresh = fitter_of(checkpoint, forward=counted), fitter_of(checkpoint)
    like = fitter.fit((49.0, 30.0, 15.0, 5.0))
    seen.clear()
    again = fitter.fit(timesteps, like)
    assert len(seen) == passes * 16, "what is known is not run again"
    assert again == fresh.fit(timesteps)
    assert again.passes[-1].x0.equal(fresh.fit(timesteps).passes[-1].x0)


def test_the_search_only_ever_gets_nearer_and_ends(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    fitter = fitter_of(checkpoint)
    begun = fitter.fit((49.0, 46.0, 43.0))
    rounds: list[Fit] = []
    found, _ = search_timesteps(fitter, begun, tuple, lambda _number, best: rounds.append(best))
    errors = [each.held_out for each in (begun, *rounds)]
    assert errors == sorted(errors, reverse=True)
    assert found.held_out < begun.held_out
    assert found.timesteps[0] == 49
    assert all(now > then for now, then in pairwise(found.timesteps))
