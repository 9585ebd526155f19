"""Mean, s and log p in float64: against formulas written out, and torch's normal distribution."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.test_samplers import seeded
from tminus.model.noise import NoiseConfig
from tminus.model.sampler_tables import Table
from tminus.model.samplers import Plan, compile_plan, table_plan
from tminus.model.trajectory import Selection, Trajectory, Transitions, transitions

F64 = torch.float64
SHAPE = (2, 1, 3, 3)
NUM_VALUES = 9  # of an image


LOOKS_BACK_TWICE = Table(
    "tuned", 4, 1.0, (49.0, 30.0, 12.0, 3.0),
    ((0.9, 0.1, 0, 0, 0.3), (0.8, 0.3, -0.1, 0, 0), (0.4, 0.9, -0.3, 0.05, 0.2), (0.1, 1.3, -0.5, 0.1, 0)),
)  # fmt: skip


def drawn(plan: Plan, seed: int = 0) -> Trajectory:
    """A trajectory of any numbers: what a pass drew from is a function of them, whoever made them."""
    generator = torch.Generator().manual_seed(seed)
    x_t, x_0 = (torch.randn(len(plan) + more, *SHAPE, generator=generator) for more in (1, 0))
    v = torch.rand(len(plan), *SHAPE, generator=generator) * 2 - 1
    return Trajectory(plan.numbers(), x_t.numpy(), x_0.clamp(-1, 1).numpy(), v.numpy())


def exact(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values)).to(F64)


def by_torch(trajectory: Trajectory, k: int, mean: Tensor, s: Tensor | float) -> Tensor:
    """log p of pass k by torch's own normal distribution."""
    normal = torch.distributions.Normal(mean, torch.as_tensor(s, dtype=F64).expand_as(mean))
    return normal.log_prob(exact(trajectory.x_t[k + 1])).sum((1, 2, 3))


def assert_passes(
    trajectory: Trajectory, of_pass: Callable[[int], tuple[Tensor, Tensor | float]], passes: list[int]
) -> Transitions:
    """Compare every pass that adds noise with another's mean and s."""
    found = transitions(trajectory)
    assert found.passes.tolist() == passes
    assert len(found.mean) == len(found.s) == len(found.log_p) == len(passes)
    for at, k in enumerate(passes):
        mean, s = of_pass(k)
        torch.testing.assert_close(exact(found.mean[at]), mean, rtol=1e-6, atol=1e-6)
        s = torch.as_tensor(s, dtype=F64)
        torch.testing.assert_close(exact(found.s[at]).expand_as(mean), s.expand_as(mean), rtol=1e-6, atol=0)
        torch.testing.assert_close(exact(found.log_p[at]), by_torch(trajectory, k, mean, s), rtol=1e-9, atol=1e-9)
    return found


# --- against formulas -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("steps", [2, 50])
def test_ddpm_draws_from_the_posterior(steps: int, variance_type: str) -> None:
    """Ho et al. 2020, eq. 6 and 7, and Nichol & Dhariwal 2021, eq. 15, for a respaced chain, in plain floats."""
    noise = NoiseConfig(variance_type=variance_type)
    plan = compile_plan(noise, noise.schedule(), "ddpm", steps)
    trajectory, alpha_bars = drawn(plan), plan.alpha_bar.tolist()
    assert trajectory.v is not None

    def of_pass(k: int) -> tuple[Tensor, Tensor | float]:
        abar, abar_next = alpha_bars[k], alpha_bars[k + 1]
        alpha = abar / abar_next
        of_x0 = math.sqrt(abar_next) * (1 - alpha) / (1 - abar)
        of_x = math.sqrt(alpha) * (1 - abar_next) / (1 - abar)
        mean = of_x0 * exact(trajectory.x_0[k]) + of_x * exact(trajectory.x_t[k])
        small, large = (1 - alpha) * (1 - abar_next) / (1 - abar), 1 - alpha
        if variance_type == "learned_range":
            share = (exact(trajectory.v[k]) + 1) / 2  # type: ignore[index]
            return mean, (share * math.log(large) + (1 - share) * math.log(small)).exp().sqrt()
        return mean, math.sqrt(small if variance_type == "fixed_small" else large)

    found = assert_passes(trajectory, of_pass, list(range(steps - 1)))
    assert found.s.shape == ((steps - 1, *SHAPE) if variance_type == "learned_range" else (steps - 1, 1, 1, 1, 1))


def test_a_table_that_looks_back_twice_draws_around_all_that_it_looks_at() -> None:
    """Its register is what x0 was two passes ago; only noise of its own is in its steps."""
    noise = NoiseConfig(num_train_timesteps=50)
    trajectory = drawn(table_plan(noise, noise.schedule(), LOOKS_BACK_TWICE, clip=None))
    assert trajectory.plan.matrices is not None
    x_t, x_0 = exact(trajectory.x_t), exact(trajectory.x_0)
    means = {0: 0.9 * x_t[0] + 0.1 * x_0[0], 2: 0.4 * x_t[2] + 0.9 * x_0[2] - 0.3 * x_0[1] + 0.05 * x_0[0]}
    assert_passes(trajectory, lambda k: (means[k], LOOKS_BACK_TWICE.lines[k][4]), [0, 2])


# --- only some passes -------------------------------------------------------------------------------------------------


def cut(whole: Trajectory, selection: Selection) -> Trajectory:
    """What a whole trajectory has of some passes."""
    assert whole.v is not None
    points, predictions = list(selection.points), list(selection.predictions)
    return Trajectory(whole.plan, whole.x_t[points], whole.x_0[predictions], whole.v[predictions], selection)


@pytest.mark.parametrize(
    ("sampler", "variance_type", "looks_back"),
    [("ddpm", "fixed_small", 0), ("ddpm", "learned_range", 0), ("dpmpp_2m_sde", "fixed_small", 1), (None, "", 2)],
)
def test_of_some_passes_all_is_the_slices_of_the_whole(
    sampler: str | None, variance_type: str, looks_back: int
) -> None:
    if sampler is None:
        noise = NoiseConfig(num_train_timesteps=50)
        plan = table_plan(noise, noise.schedule(), LOOKS_BACK_TWICE, clip=None)
    else:
        noise = NoiseConfig(variance_type=variance_type)
        plan = compile_plan(noise, noise.schedule(), sampler, 12)
    whole, rng = drawn(plan), np.random.default_rng(0)
    found = transitions(whole)
    for count in range(1, len(plan) + 1):
        keep = sorted(rng.choice(len(plan), count, replace=False).tolist())
        selection = Selection.of(keep, len(plan), looks_back)
        part, slices = transitions(cut(whole, selection)), np.isin(found.passes, keep)
        assert part.passes.tolist() == found.passes[slices].tolist()
        for name in ("mean", "s", "log_p"):
            np.testing.assert_array_equal(getattr(part, name), getattr(found, name)[slices], name)


def test_a_selection_has_both_ends_of_its_passes_and_what_their_means_look_back_to() -> None:
    assert Selection.of([0, 3, 4], 10, 0) == Selection((0, 3, 4), (0, 1, 3, 4, 5), (0, 3, 4))
    assert Selection.of([0, 3, 4], 10, 2).predictions == (0, 1, 2, 3, 4)
    assert Selection.whole(3) == Selection((0, 1, 2), (0, 1, 2, 3), (0, 1, 2))
    for keep in ([], [-1], [10], [0, 0], [3, 1], [0, 10]):
        with pytest.raises(ValueError, match=r"numbers of passes in 0\.\.9, each greater than the one before"):
            Selection.of(keep, 10, 0)


def test_log_p_in_float16_is_of_what_was_rounded() -> None:
    noise = NoiseConfig()
    plan = compile_plan(noise, noise.schedule(), "dpmpp_2m_sde", 6)
    exact_one = drawn(plan)
    trajectory = Trajectory(plan.numbers(), exact_one.x_t.astype(np.float16), exact_one.x_0.astype(np.float16))
    a, b, c, s = plan.numbers().lines[:, 2:6].T
    x_t, x_0 = exact(trajectory.x_t), exact(trajectory.x_0)
    found = transitions(trajectory)
    assert (found.mean.dtype, found.log_p.dtype) == (np.float16, np.float64)
    for at, k in enumerate(found.passes):
        mean = a[k] * x_t[k] + b[k] * x_0[k] + c[k] * (x_0[k - 1] if k else 0)
        torch.testing.assert_close(exact(found.log_p[at]), by_torch(trajectory, k, mean, s[k]), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(exact(found.mean[at]), mean, rtol=2**-11, atol=2**-24)


# --- what is stated ---------------------------------------------------------------------------------------------------


def rolled_out(plan: Plan) -> Trajectory:
    """A trajectory whose noise is really drawn, stepped in float32 as the engine does it."""
    x, x_0 = seeded(0).float(), torch.zeros(SHAPE)
    lines, states, predictions = plan.lines.float(), [x], []
    for k in range(len(plan)):
        _, _, a, b, c, s, _, _ = lines[k]
        before, x_0 = x_0, seeded(k + 1).float().clamp(-1, 1)
        x = a * x + b * x_0 + c * before + s * seeded(10_000 + k).float()
        states.append(x)
        predictions.append(x_0)
    return Trajectory(plan.numbers(), torch.stack(states).numpy(), torch.stack(predictions).numpy())


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 20), ("ddpm", 1000), ("ddim", 50), ("dpmpp_2m_sde", 30)])
def test_log_p_is_that_of_the_noise_and_of_the_files_own_mean_within_1e_5_a_value(sampler: str, steps: int) -> None:
    noise = NoiseConfig()
    plan = compile_plan(noise, noise.schedule(), sampler, steps, eta=0.7 if sampler == "ddim" else 0.0)
    trajectory = rolled_out(plan)
    found = transitions(trajectory)
    assert len(found.passes) == steps - 1
    for at, k in enumerate(found.passes):
        z, s = seeded(10_000 + int(k)), float(plan.lines[k, 5])
        of_noise = (-(z**2) / 2 - math.log(s) - math.log(2 * math.pi) / 2).sum((1, 2, 3))
        assert (exact(found.log_p[at]) - of_noise).abs().max() < 1e-5 * NUM_VALUES
        of_file = by_torch(trajectory, int(k), exact(found.mean[at]), exact(found.s[at]))
        assert (exact(found.log_p[at]) - of_file).abs().max() < 1e-5 * NUM_VALUES


@pytest.mark.parametrize("sampler", ["ddim", "unipc", "ddpm"])
def test_a_pass_without_noise_has_no_density(sampler: str) -> None:
    noise = NoiseConfig()
    plan = compile_plan(noise, noise.schedule(), sampler, 1 if sampler == "ddpm" else 5)
    found = transitions(drawn(plan))
    assert len(found.passes) == len(found.mean) == len(found.s) == len(found.log_p) == 0
    assert found.mean.shape[1:] == SHAPE
