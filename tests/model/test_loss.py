import dataclasses
import math
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tminus.model.guidance import Forward
from tminus.model.loss import (
    LEVEL_MEAN,
    LEVEL_STD,
    MAX_WEIGHT,
    discretized_log_likelihood,
    draw_timesteps,
    l_simple,
    lognormal_timesteps,
    training_target,
    variational_bound,
    velocity_weights,
)
from tminus.model.noise import NoiseConfig, NoiseSchedule, gather
from tminus.model.parametrization import parametrize
from tminus.model.rng import image_noise
from tminus.model.unet import UNet2D

F64 = torch.float64
PIXELS = torch.arange(256, dtype=F64) / 127.5 - 1
SHORT = NoiseConfig(num_train_timesteps=12, beta_start=0.01, beta_end=0.4)


def images(batch: int = 2, size: int = 8, dtype: torch.dtype = F64) -> Tensor:
    """Random images on the pixel grid, black and white among their values."""
    values = torch.randint(0, 256, (batch, 1, size, size), generator=torch.Generator().manual_seed(5))
    values[:, :, 0, 0], values[:, :, 0, 1] = 0, 255
    return values.to(dtype) / 127.5 - 1


# --- L_simple -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_weighted_error_of_any_prediction_is_that_of_v(prediction_type: str) -> None:
    config = NoiseConfig(prediction_type=prediction_type)
    schedule = config.schedule()
    x_0, eps, wrong = torch.randn(3, 64, 1, 4, 4, dtype=torch.float64)
    t = torch.arange(200, 584, 6)  # where no weight is at its bound
    x_t = schedule.q_sample(x_0, t, eps)
    signal, noise = (gather(table.sqrt(), t, x_0) for table in (schedule.alpha_bar, 1 - schedule.alpha_bar))
    guess = x_0 + wrong
    out = {
        "epsilon": (x_t - signal * guess) / noise,
        "sample": guess,
        "v_prediction": (signal * x_t - guess) / noise,
    }[prediction_type]
    target = training_target(config, schedule, x_0, t, eps)
    weights = velocity_weights(config, schedule)
    v_error = ((signal * x_t - guess) / noise - schedule.velocity(x_0, t, eps)).square().mean()
    assert weights[t].max() < MAX_WEIGHT
    assert l_simple(out.float(), target.float(), weights[t].float()).item() == pytest.approx(v_error.item(), rel=1e-4)


@pytest.mark.parametrize("name", ["flow", "edm", "edm_v_prediction", "score"])
def test_target_of_other_models_is_that_of_their_papers_in_float64(name: str) -> None:
    sampler = "ddpm" if name == "score" else "euler"
    config = NoiseConfig(100, prediction_type=name, default_sampler=sampler, clip_sample=False)
    schedule = config.schedule()
    x_0, eps = torch.randn(2, 100, 1, 4, 4, dtype=F64)
    found = training_target(config, schedule, x_0, torch.arange(100), eps)
    u = torch.linspace(0, 1, 100, dtype=F64)[:, None, None, None]
    sigma = (0.002 ** (1 / 7) + u * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    y, root = x_0 + sigma * eps, (sigma**2 + 0.25).sqrt()
    F_edm = (x_0 - 0.25 / root**2 * y) * root / (sigma * 0.5)  # Karras et al. 2022, eq. 8
    expected = {
        "flow": eps - x_0,  # Lipman et al. 2023
        "edm": F_edm,
        "edm_v_prediction": -F_edm,
        "score": -eps / (sigma_of_ve := 0.002 * (80 / 0.002) ** u),  # of y = y_0 + sigma eps, y_0 in [0, 1]
    }[name]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # The network that predicts just that gives back x_0, whichever kind it is.
    x_t = schedule.q_sample(x_0, torch.arange(100), eps)
    at = parametrize(config, schedule.alpha_bar, torch.arange(100))
    p, q = (each[:, None, None, None] for each in (at.p, at.q))
    torch.testing.assert_close(p * x_t + q * found, x_0, rtol=1e-8, atol=1e-8)
    assert sigma_of_ve[0] == config.sigma_min


# --- Which timesteps are drawn ------------------------------------------------------------------------------------


def test_lognormal_timesteps_are_normal_in_the_logarithm_of_the_noise_level() -> None:
    schedule = NoiseConfig().schedule()
    level = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt().log()
    below = lognormal_timesteps(schedule).cumsum(0)[:-1]  # up to half way to the next level
    expected = [NormalDist(LEVEL_MEAN, LEVEL_STD).cdf((one + other) / 2) for one, other in pairwise(level.tolist())]
    torch.testing.assert_close(below, torch.tensor(expected, dtype=F64))


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize(("timesteps", "zero_snr"), [(1, False), (2, False), (2, True), (1000, False), (1000, True)])
def test_lognormal_timesteps_are_shares_and_a_level_without_signal_has_none(
    beta_schedule: str, timesteps: int, zero_snr: bool
) -> None:
    noise = NoiseConfig(
        num_train_timesteps=timesteps,
        beta_schedule=beta_schedule,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=zero_snr,
    )
    share = lognormal_timesteps(noise.schedule())
    assert share.shape == (timesteps,)
    assert share.sum().item() == pytest.approx(1)
    assert (share >= 0).all()
    if noise.schedule().alpha_bar[-1] == 0:
        assert share[-1] == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda shares: sum(shares) > 0.01), st.integers(1, 64))
def test_as_many_timesteps_are_drawn_of_any_range_as_its_share_to_within_one(shares: list[float], count: int) -> None:
    share = torch.tensor(shares, dtype=F64) / sum(shares)
    drawn = draw_timesteps(share, count)
    assert drawn.shape == (count,)
    assert drawn.dtype == torch.int64
    assert (share[drawn] > 0).all()
    below = torch.bincount(drawn, minlength=len(share)).cumsum(0)
    assert ((below - count * share.cumsum(0)).abs() <= 1 + 1e-4).all()


# --- the pieces of the bound --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("mean", [-1.3, 0.0, 0.7321])
def test_decoder_probabilities_of_the_256_pixel_values_sum_to_one(mean: float, variance: float) -> None:
    values = PIXELS.reshape(256, 1, 1, 1)
    log_likelihood = discretized_log_likelihood(
        values, torch.tensor(mean, dtype=F64), torch.tensor(variance, dtype=F64)
    )
    assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=256e-12)


# --- the whole bound ----------------------------------------------------------------------------------------------


def bound_by_numpy(
    net: UNet2D, noise: NoiseConfig, x_0: Tensor, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eq. 5 written out with distributions rather than their reduced forms; every timestep, one at a time."""
    betas = np.linspace(noise.beta_start, noise.beta_end, noise.num_train_timesteps)
    alpha_bar = np.cumprod(1 - betas)
    T, batch = len(betas), len(x_0)
    x = x_0.numpy()

    def kl(m1: np.ndarray, v1: float, m2: np.ndarray | float, v2: float) -> np.ndarray:
        nats = kl_divergence(
            Normal(torch.as_tensor(m1), math.sqrt(v1)), Normal(torch.as_tensor(m2).expand(m1.shape), math.sqrt(v2))
        )
        return nats.reshape(batch, -1).mean(1).numpy() / math.log(2)

    def look(t: int) -> tuple[np.ndarray, np.ndarray]:
        eps = image_noise(seed, range(batch), t, x.shape[1:], torch.device("cpu")).double().numpy()
        x_t = np.sqrt(alpha_bar[t]) * x + np.sqrt(1 - alpha_bar[t]) * eps
        out = net(torch.from_numpy(x_t), torch.full((batch,), t)).numpy()
        signal, sigma = np.sqrt(alpha_bar[t]), np.sqrt(1 - alpha_bar[t])
        guess = {"epsilon": (x_t - sigma * out) / signal, "sample": out, "v_prediction": signal * x_t - sigma * out}
        x0 = guess[noise.prediction_type]
        return x_t, np.clip(x0, -1, 1) if noise.clip_sample else x0

    def beta_tilde(t: int) -> float:
        return float(betas[t] * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t]))

    L_T = kl(np.sqrt(alpha_bar[-1]) * x, 1 - alpha_bar[-1], torch.zeros(()), 1.0)
    L_steps = np.zeros(batch)
    for t in range(1, T):
        x_t, guess = look(t)
        a = np.sqrt(alpha_bar[t - 1]) * betas[t] / (1 - alpha_bar[t])
        b = np.sqrt(1 - betas[t]) * (1 - alpha_bar[t - 1]) / (1 - alpha_bar[t])
        sigma2 = betas[t] if noise.variance_type == "fixed_large" else beta_tilde(t)
        L_steps += kl(a * x + b * x_t, beta_tilde(t), a * guess + b * x_t, sigma2)
    decoder = Normal(torch.from_numpy(look(0)[1]), math.sqrt(beta_tilde(1)))
    upper = torch.where(x_0 > 0.999, 1.0, decoder.cdf(x_0 + 1 / 255))
    lower = torch.where(x_0 < -0.999, 0.0, decoder.cdf(x_0 - 1 / 255))
    L_0 = -np.log(np.maximum((upper - lower).numpy(), 1e-12)).reshape(batch, -1).mean(1) / math.log(2)
    return L_T, L_steps, L_0


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("clip", [True, False])
def test_bound_equals_an_independent_one(
    tiny_net: UNet2D, prediction_type: str, variance_type: str, clip: bool
) -> None:
    noise = dataclasses.replace(SHORT, prediction_type=prediction_type, variance_type=variance_type, clip_sample=clip)
    net, x_0 = tiny_net.double(), images()
    bound = variational_bound(net, noise, noise.schedule(), x_0, seed=9)
    expected = bound_by_numpy(net, noise, x_0, seed=9)
    for ours, theirs in zip((bound.L_T, bound.L_steps, bound.L_0), expected, strict=True):
        assert ours.dtype == F64
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-8)
    np.testing.assert_allclose(bound.total.numpy(), sum(expected), rtol=1e-8)


def perfect(schedule: NoiseSchedule, x_0: Tensor) -> Forward:
    """An epsilon predictor that knows x_0."""

    def net(x_t: Tensor, t: Tensor, _labels: Tensor | None) -> Tensor:
        alpha_bar = schedule.alpha_bar[t].reshape(-1, 1, 1, 1)
        return (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()

    return net


@pytest.mark.parametrize("timesteps", [1, 4, 10])
def test_mean_of_the_subset_estimate_is_the_full_sum(timesteps: int) -> None:
    schedule = SHORT.schedule()
    count = 4000  # the same image many times over: each draws its own terms and noise
    x_0 = images(1, size=2).expand(count, -1, -1, -1)

    def net(x_t: Tensor, t: Tensor, _labels: Tensor | None) -> Tensor:
        return 0.5 * x_t

    full = variational_bound(net, SHORT, schedule, x_0)
    part = variational_bound(net, SHORT, schedule, x_0, seed=1, timesteps=timesteps)
    error = ((full.L_steps.var() + part.L_steps.var()) / count) ** 0.5
    assert abs(part.L_steps.mean() - full.L_steps.mean()) < 4 * error
    assert error < 0.05 * full.L_steps.mean()
    assert torch.equal(part.L_T, full.L_T)


def test_each_term_is_that_of_its_timestep(tiny_net: UNet2D) -> None:
    net, schedule, x_0 = tiny_net.double(), SHORT.schedule(), images()
    bound = variational_bound(net, SHORT, schedule, x_0, seed=9)
    assert bound.runs == tuple((t, t + 1) for t in range(1, 12))
    # Of a predictor that is right but at one timestep, only the term of this timestep is not zero.
    for wrong in (1, 6, 11):

        def almost(x_t: Tensor, t: Tensor, labels: Tensor | None, wrong: int = wrong) -> Tensor:
            out: Tensor = net(x_t, t, labels) if int(t[0]) == wrong else perfect(schedule, x_0)(x_t, t, labels)
            return out

        one = variational_bound(almost, SHORT, schedule, x_0, seed=9).L_drawn
        torch.testing.assert_close(one[wrong - 1], bound.L_drawn[wrong - 1], rtol=1e-12, atol=0)
        others = torch.cat([one[: wrong - 1], one[wrong:]])
        assert others.abs().max() < 1e-12


def test_bound_of_an_image_alone_is_its_bound_in_a_batch(tiny_net: UNet2D) -> None:
    net, schedule, x_0 = tiny_net.double(), SHORT.schedule(), images(3)
    together = variational_bound(net, SHORT, schedule, x_0, indices=[4, 7, 9], timesteps=4)
    alone = variational_bound(net, SHORT, schedule, x_0[1:2], indices=[7], timesteps=4)
    torch.testing.assert_close(together.total[1:2], alone.total, rtol=1e-10, atol=0)
    elsewhere = variational_bound(net, SHORT, schedule, x_0[1:2], indices=[8], timesteps=4)
    assert elsewhere.total.item() != pytest.approx(alone.total.item(), rel=1e-6)
