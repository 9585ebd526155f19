"""The training objective L_simple, and the variational bound from which L_simple is derived."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tminus.model.guidance import Forward
from tminus.model.noise import NoiseConfig, NoiseSchedule, gather
from tminus.model.parametrization import as_ours, parametrize
from tminus.model.rng import philox, row_noise, split_seed

HALF_BIN = 1 / 255  # neighbouring pixel values differ by 2/255 on [-1, 1]
EDGE = 0.999  # pixels beyond EDGE are 0 or 255, and their bins are unbounded
MIN_PROBABILITY = 1e-12
MAX_WEIGHT = 200.0
LEVEL_MEAN, LEVEL_STD = 0.0, 1.7  # mean and deviation of ln(sigma / alpha) for timesteps drawn by noise level
_PICK = 1  # philox's last counter word for drawing timesteps; row_noise uses 0, so the two never coincide


def training_target(noise: NoiseConfig, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Return the target: eps (Ho et al. 2020), x_0, v (Salimans & Ho 2022, sec. 4), or out in x_0 = p x_t + q out.

    The last case gives eps - x_0 for flow matching (Lipman et al. 2023), and the target of Karras et al. 2022, eq. 8,
    for EDM. Raises ValueError for a consistency model, which has no such target.
    """
    if noise.is_consistency:
        raise ValueError("prediction_type must not be consistency: its target is a trajectory's end")
    if noise.prediction_type == "epsilon":
        return eps
    if noise.prediction_type == "sample":
        return x_0
    if noise.prediction_type == "v_prediction":
        return schedule.velocity(x_0, t, eps)
    alpha_bar = schedule.alpha_bar[t]
    at, rows = parametrize(noise, alpha_bar, t), torch.arange(len(t), device=t.device)
    of_x_0, of_eps = (1 - at.p * alpha_bar.sqrt()) / at.q, -at.p * (1 - alpha_bar).sqrt() / at.q
    return gather(of_x_0, rows, x_0) * x_0 + gather(of_eps, rows, x_0) * eps


def l_simple(out: Tensor, target: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return L_simple, the squared error of the prediction [B, C, H, W] (Ho et al. 2020, eq. 14), in float32.

    weights [B]: the weight of each row; None means equal weights.
    """
    if weights is None:
        return F.mse_loss(out.to(torch.float32), target)
    return (weights * (out.to(torch.float32) - target).square().flatten(1).mean(1)).mean()


def velocity_weights(noise: NoiseConfig, schedule: NoiseSchedule) -> Tensor:
    """Return weights that turn an error of the prediction into an error of v: float64 [T], at most MAX_WEIGHT.

    Source: Salimans & Ho 2022, sec. 4, SNR + 1 weighting. An error of eps is 1 / alpha_bar times as large in v.
    Brightness and shape are decided near t = T, where L_simple changes little.
    """
    alpha_bar = schedule.alpha_bar
    # q is the factor from the output to x_0. The factor from v to x_0 is sqrt(1 - alpha_bar).
    q = parametrize(noise, alpha_bar, torch.arange(len(alpha_bar))).q
    return (q**2 / (1 - alpha_bar)).clamp(max=MAX_WEIGHT)


def lognormal_timesteps(schedule: NoiseSchedule) -> Tensor:
    """Return the probability of each t if ln(sigma / alpha) is N(LEVEL_MEAN, LEVEL_STD^2): float64 [T], sum 1.

    Source: Karras et al. 2022, table 1 and sec. 5, with -1.2 and 1.2 for images of standard deviation 0.5. In half of a
    linear schedule's timesteps, noise is over three times as large as the image, and gradients are noisiest. A level
    without signal has probability 0.
    """
    level = ((1 - schedule.alpha_bar) / schedule.alpha_bar).log() / 2
    edges = (level[1:] + level[:-1]) / 2  # each t covers the levels halfway to its neighbours
    below = torch.special.ndtr((edges - LEVEL_MEAN) / LEVEL_STD)
    return torch.cat([below.new_zeros(1), below, below.new_ones(1)]).diff()


def draw_timesteps(share: Tensor, count: int) -> Tensor:
    """Draw `count` timesteps with the probabilities `share` [T]: int64 [count], on the same device.

    One random offset spreads the timesteps evenly over the cumulative probability (Kingma et al. 2021, appendix I.1).
    Their order is random.
    """
    device = share.device
    spread = (torch.randperm(count, device=device) + torch.rand((), device=device)).to(share) / count
    return torch.searchsorted(share.cumsum(0), spread, right=True).clamp(max=len(share) - 1)


@dataclass(frozen=True, slots=True)
class VariationalBound:
    """-log p(x_0) <= L_T + sum of L_{t-1} + L_0 (Ho et al. 2020, eq. 5): each [B] float64, in bits per dimension."""

    L_T: Tensor
    """The distance of x_T from the prior: D_KL(q(x_T|x_0) || N(0, I)). It has no parameters."""
    L_steps: Tensor
    """The sum over t > 1 of L_{t-1} = D_KL(q(x_{t-1}|x_t, x_0) || p(x_{t-1}|x_t))."""
    L_0: Tensor
    """-log p(x_0|x_1), the discretised decoder."""
    runs: tuple[tuple[int, int], ...]
    """The S runs low <= t < high of the terms L_1..L_{T-1}; L_t belongs to the step from t, counted from 0."""
    L_drawn: Tensor
    """The term drawn from each run [S, B]. L_steps sums each run's length times its term."""

    @property
    def total(self) -> Tensor:
        return self.L_T + self.L_steps + self.L_0


@torch.no_grad()
def variational_bound(
    net: Forward,
    noise: NoiseConfig,
    schedule: NoiseSchedule,
    x_0: Tensor,
    class_labels: Tensor | None = None,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    timesteps: int | None = None,
) -> VariationalBound:
    """Estimate the bound for x_0 [B, C, H, W] in [-1, 1], with one sample of x_t for each term.

    timesteps=None computes every L_{t-1} in T passes. timesteps=S takes S + 1 passes: the T - 1 terms are divided into
    S runs. One term is drawn uniformly from each run and multiplied by the run's length, so the mean over seeds is the
    full sum. Each image draws its own terms. A run's length is roughly proportional to its timestep, because terms
    decrease about that fast. With 100 runs on the bundled checkpoint, the first 29 terms are all computed.

    All randomness of an image is a function of (seed, its index, t): x_t's noise is draw t of `row_noise`. The network
    runs in x_0's dtype, everything else in float64. Raises ValueError unless 1 <= timesteps <= T - 1, and for a
    learned variance.
    """
    device, last = x_0.device, schedule.num_timesteps - 1
    if timesteps is not None and not 1 <= timesteps <= last:
        raise ValueError(f"timesteps must be 1..{last}, got {timesteps}")
    variance = model_variance(noise, schedule)
    index = torch.tensor(range(len(x_0)) if indices is None else indices, dtype=torch.int64, device=device)
    seed_words = torch.tensor(split_seed(seed), device=device).expand(len(x_0), 2)

    x_0_exact = x_0.to(torch.float64)
    at = parametrize(noise, schedule.alpha_bar, torch.arange(schedule.num_timesteps))
    ours = as_ours(net, noise, schedule)
    bound = noise.clip_sample_range if noise.clip_sample else math.inf

    def predict_x0(t: Tensor) -> Tensor:
        eps = row_noise(seed_words, index, t, x_0.shape[1:]).to(torch.float64)
        x_t = schedule.q_sample(x_0_exact, t, eps).to(x_0.dtype)
        out = ours(x_t, t, class_labels).to(torch.float64)
        x_t = x_t.to(torch.float64)
        return (gather(at.p, t, x_t) * x_t + gather(at.q, t, x_t) * out).clamp(-bound, bound)

    coef_x0, _, posterior_variance = schedule.posterior()

    def step_kl(t: Tensor) -> Tensor:
        # Both means contain the same coef_xt x_t, so they differ only by the predictions of x_0.
        difference = gather(coef_x0, t, x_0_exact) * (x_0_exact - predict_x0(t))
        kl = gaussian_kl(difference, gather(posterior_variance, t, difference), gather(variance, t, difference))
        return _bits_per_dim(kl)

    steps = torch.zeros(len(x_0), dtype=torch.float64, device=device)
    runs = _runs(last, timesteps or last)
    drawn = steps.expand(len(runs), -1).clone()
    for number, (low, high) in enumerate(runs):
        t = torch.full_like(index, low)
        if high - low > 1:
            word = philox((t, torch.zeros_like(t), index, torch.full_like(t, _PICK)), seed_words.unbind(1))[0]
            t = low + (word * (high - low) >> 32)
        drawn[number] = step_kl(t)
        steps += (high - low) * drawn[number]

    first = torch.zeros_like(index)
    decoder = -discretized_log_likelihood(x_0_exact, predict_x0(first), gather(variance, first, x_0_exact))
    return VariationalBound(prior_kl(schedule, x_0), steps, _bits_per_dim(decoder), tuple(runs), drawn)


def prior_kl(schedule: NoiseSchedule, x_0: Tensor) -> Tensor:
    """Return L_T = D_KL(q(x_T|x_0) || N(0, I)) [B] in bits/dim, for x_0 [B, C, H, W] in [-1, 1]."""
    alpha_bar = schedule.alpha_bar[-1]
    mean = alpha_bar.sqrt().item() * x_0.to(torch.float64)
    one = torch.ones((), dtype=torch.float64, device=x_0.device)
    return _bits_per_dim(gaussian_kl(mean, one * (1 - alpha_bar).item(), one))


def model_variance(noise: NoiseConfig, schedule: NoiseSchedule) -> Tensor:
    """Return sigma_t^2 of p(x_{t-1}|x_t), float64 [T]: beta~_t (fixed_small), beta_t (fixed_large), or the VE variance.

    At t = 0 both fixed variances use beta~ at t = 1, as in Ho et al.'s own code: beta~ at t = 0 is zero, and beta
    decodes worse. Raises ValueError for learned_range.
    """
    if noise.variance_type == "learned_range":
        raise ValueError("the bound is that of a fixed variance, and this network learned its own")
    posterior_variance = schedule.posterior()[2]
    others = {"fixed_large": schedule.betas, "reverse_diffusion": schedule.betas / schedule.alphas}
    variance = others.get(noise.variance_type, posterior_variance).clone()
    variance[0] = posterior_variance[1] if len(variance) > 1 else schedule.betas[0]
    return variance


def gaussian_kl(mean_difference: Tensor, variance_q: Tensor, variance_p: Tensor) -> Tensor:
    """Return D_KL(N(m + d, v_q) || N(m, v_p)) of each element, in nats."""
    ratio = variance_q / variance_p
    return 0.5 * (ratio - 1 - ratio.log() + mean_difference**2 / variance_p)


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the log of N(mean, variance)'s mass in each pixel value's bin (Ho et al. 2020, eq. 13), in nats.

    x_0 [B, C, H, W] float64: each value is one of the 256 values k / 127.5 - 1. The outermost bins are unbounded.
    """
    std = variance.sqrt()
    below = torch.special.ndtr((x_0 - HALF_BIN - mean) / std).masked_fill(x_0 < -EDGE, 0.0)
    up_to = torch.special.ndtr((x_0 + HALF_BIN - mean) / std).masked_fill(x_0 > EDGE, 1.0)
    log_probability: Tensor = (up_to - below).clamp(min=MIN_PROBABILITY).log()
    return log_probability


def _runs(last: int, count: int) -> list[tuple[int, int]]:
    """Divide the timesteps 1..last into `count` half-open runs, with ratios high / low as equal as possible.

    Runs of equal length rarely draw the first timesteps, which make up most of the bound. On 100 images, with a
    network that predicts eps and 100 runs, the standard error of L_steps is 0.105 with equal runs and 0.048 with
    these runs. Most of the remaining error is the difference between images.
    """
    runs, low = [], 1
    for left in range(min(count, last), 0, -1):
        high = round(low * ((last + 1) / low) ** (1 / left))
        high = min(max(high, low + 1), last + 2 - left)  # each later run needs one timestep
        runs.append((low, high))
        low = high
    return runs


def _bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
