import dataclasses

import pytest
import torch
from diffusers import LCMScheduler
from torch import Tensor

from tests.tiny import TINY, randomize
from tminus.model.guidance import Forward
from tminus.model.noise import NoiseConfig, gather
from tminus.model.samplers import compile_plan, denoise, sample, solve, table_plan
from tminus.model.training.student import (
    consistency_plan,
    consistency_table,
    predict_x0,
    pseudo_huber,
    student_noise,
    student_points,
)
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig

NOISE = NoiseConfig(clip_sample=False)
SCHEDULE = NOISE.schedule()
SIGMA_DATA = 0.5
SHAPE = (6, 1, 4, 4)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_normal_data(x: Tensor, t: Tensor, _labels: Tensor | None = None) -> Tensor:
    """The best possible eps where the data are N(0, SIGMA_DATA^2): sigma_t x / (the variance of x_t)."""
    alpha_bar = gather(SCHEDULE.alpha_bar, t.long(), x)
    return (1 - alpha_bar).sqrt() * x / (alpha_bar * SIGMA_DATA**2 + 1 - alpha_bar)


def end_of(x: Tensor, alpha_bar: Tensor) -> Tensor:
    """Where the probability flow of such data leads, in closed form: x scaled to the spread of the data."""
    return x * SIGMA_DATA / (alpha_bar * SIGMA_DATA**2 + 1 - alpha_bar).sqrt()


def perfect(x: Tensor, t: Tensor, _labels: Tensor | None = None) -> Tensor:
    """The v of a student that knows every end: v = (sqrt(alpha_bar) x - x0) / sqrt(1 - alpha_bar)."""
    alpha_bar = gather(SCHEDULE.alpha_bar, t.long(), x)
    return (alpha_bar.sqrt() * x - end_of(x, alpha_bar)) / (1 - alpha_bar).sqrt()


# --- trajectories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "steps", "within"), [("ddim", 500, 0.02), ("dpmpp_2m", 100, 0.01)])
def test_trajectories_of_normal_data_end_where_the_closed_form_says(sampler: str, steps: int, within: float) -> None:
    plan = compile_plan(NOISE, SCHEDULE, sampler, steps)
    points = solve(of_normal_data, plan, normal(*SHAPE))
    assert points.shape == (steps + 1, *SHAPE)
    for k in (0, steps // 2, steps - 1):
        assert torch.allclose(end_of(points[k], plan.alpha_bar[k]), points[-1], rtol=within, atol=1e-3)


def test_trajectory_is_what_the_sampler_makes_and_goes_on_from_each_of_its_points() -> None:
    net = UNet2D(UNetConfig(**{**dataclasses.asdict(TINY), "num_class_embeds": 4})).eval()
    randomize(net)
    noise = NoiseConfig(num_train_timesteps=20, beta_end=0.3)
    plan = compile_plan(noise, noise.schedule(), "ddim", 5)
    x_T, labels = normal(3, 1, 8, 8).float(), torch.tensor([0, 2, 3])
    points = solve(net, plan, x_T, labels, 3, 2.0)
    zero = torch.zeros_like(x_T)
    for start in range(5):
        rest = compile_plan(noise, noise.schedule(), "ddim", 5, start=start)
        end = sample(net, rest, points[start], lambda _k: zero, class_labels=labels, null_class=3, guidance=2.0)
        assert torch.equal(end, points[-1])


# --- the loss -----------------------------------------------------------------------------------------------------


def test_student_that_knows_every_end_is_consistent_along_a_trajectory_and_another_is_not() -> None:
    plan = consistency_plan(student_noise(NOISE), list(range(999, -1, -111)))
    k = torch.arange(len(plan)).repeat_interleave(SHAPE[0])
    end = normal(*SHAPE, seed=2)
    alpha_bar = gather(plan.alpha_bar, k, end.repeat(len(plan), 1, 1, 1))
    x_t = end.repeat(len(plan), 1, 1, 1) * (alpha_bar * SIGMA_DATA**2 + 1 - alpha_bar).sqrt() / SIGMA_DATA

    def loss(student: Forward) -> float:
        x0 = predict_x0(plan, k, x_t, student(x_t, plan.timesteps[k], None))
        later = x0.roll(-SHAPE[0], 0)
        return float(pseudo_huber(x0[: -SHAPE[0]], later[: -SHAPE[0]]))

    assert loss(perfect) < 1e-12
    assert loss(lambda x, t, labels: perfect(x, t) + 0.1) > 1e-3


@pytest.mark.parametrize("t", [0, 500, 999])
def test_x0_is_read_from_v(t: int) -> None:
    x_0, eps = normal(*SHAPE), normal(*SHAPE, seed=1)
    plan = consistency_plan(student_noise(NOISE), [999, 500, 0])
    at = torch.full((SHAPE[0],), t)
    k = torch.full((SHAPE[0],), [999, 500, 0].index(t))
    x0 = predict_x0(plan, k, SCHEDULE.q_sample(x_0, at, eps), SCHEDULE.velocity(x_0, at, eps))
    assert torch.allclose(x0, x_0, atol=1e-12)


def test_loss_counts_far_errors_by_their_size_and_near_ones_by_their_square() -> None:
    one = torch.ones(2, 1, 4, 4, dtype=torch.float64)
    assert float(pseudo_huber(100 * one, 0 * one)) == pytest.approx(100, rel=1e-3)
    ratio = float(pseudo_huber(2e-4 * one, 0 * one)) / float(pseudo_huber(1e-4 * one, 0 * one))
    assert ratio == pytest.approx(4, rel=1e-3)


# --- tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timesteps", [[999], [999, 547], [999, 769, 450, 172]])
def test_step_is_that_of_diffusers(timesteps: list[int]) -> None:
    theirs = LCMScheduler(
        num_train_timesteps=1000,
        beta_start=NOISE.beta_start,
        beta_end=NOISE.beta_end,
        beta_schedule="linear",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_scaling=1e9,  # its own scaling towards the input at t = 0 is then off
    )
    theirs.set_timesteps(timesteps=timesteps)
    theirs.alphas_cumprod = SCHEDULE.alpha_bar  # in float64, so that formulas are compared and not rounding
    plan = consistency_plan(student_noise(NoiseConfig()), timesteps)
    x = normal(*SHAPE)
    for k, t in enumerate(timesteps):
        out = normal(*SHAPE, seed=10 + k)
        z = torch.randn(SHAPE, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        expected = theirs.step(out, torch.tensor(t), x, generator=torch.Generator().manual_seed(k))
        x, x0 = denoise(x, out, torch.zeros_like(x), z, plan.lines[k : k + 1].expand(SHAPE[0], -1))
        assert torch.allclose(x0, expected.denoised, atol=1e-9)
        assert torch.allclose(x, expected.prev_sample, atol=1e-9)


def test_table_is_plain_numbers_and_ends_without_noise() -> None:
    table = consistency_table(NOISE, [999, 450], {"guidance": 1.5})
    assert (table.sampler, table.steps, table.guidance, table.timesteps) == ("consistency", 2, 1.0, (999, 450))
    signal, sigma = SCHEDULE.alpha_bar[450].sqrt().item(), (1 - SCHEDULE.alpha_bar[450]).sqrt().item()
    assert table.lines == ((0.0, signal, 0.0, 0.0, sigma), (0.0, 1.0, 0.0, 0.0, 0.0))
    plan = table_plan(student_noise(NOISE), SCHEDULE, table, clip=None)
    assert torch.allclose(plan.known[0], torch.tensor([signal, sigma], dtype=torch.float64))


def test_student_of_any_teacher_predicts_v_and_keeps_its_betas() -> None:
    noise = student_noise(NoiseConfig(beta_end=0.01, default_sampler="ddim"))
    assert noise.prediction_type == "v_prediction"
    assert noise.beta_end == 0.01


def test_points_of_few_steps_are_among_those_of_more_and_begin_at_pure_noise() -> None:
    alpha_bar = compile_plan(NOISE, SCHEDULE, "dpmpp_2m", 20).alpha_bar
    points = [student_points(alpha_bar, steps) for steps in (1, 2, 3, 4)]
    assert points == [[0], [0, 16], [0, 14, 16], [0, 14, 16, 17]]
    assert [round(float(alpha_bar[k]), 2) for k in points[-1]] == [0.0, 0.05, 0.34, 0.73]


def test_points_of_a_teacher_of_few_steps_are_all_different() -> None:
    assert student_points(torch.tensor([1e-5, 1e-4, 1e-3, 1e-2]), 4) == [0, 1, 2, 3]
