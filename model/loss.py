"""The training objective L_simple, and the variational bound."""

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

HALF_BIN = 1 / 255  # half the distance between neighbouring pixel values on [-1, 1]
EDGE = 0.999  # beyond this value a pixel is 0 or 255, and its bin is unbounded
MIN_PROBABILITY = 1e-12
MAX_WEIGHT = 200.0
LEVEL_MEAN, LEVEL_STD = 0.0, 1.7  # mean and deviation of ln(sigma / alpha), see lognormal_timesteps
_PICK = 1  # last word of philox's counter for drawing timesteps; row_noise uses 0, so draws differ


def training_target(noise: NoiseConfig, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Return the target of the network's output.

    epsilon: eps (Ho et al. 2020).
    sample: x_0.
    v_prediction: v (Salimans & Ho 2022, sec. 4).
    Others: the out that solves x_0 = p x_t + q out. This is eps - x_0 for flow matching (Lipman et al. 2023), and the
    target in eq. 8 of Karras et al. 2022 for EDM.

    Raises ValueError for a consistency model, which has no such target.
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
    """Return L_simple, the mean squared error of the output [B, C, H, W] (Ho et al. 2020, eq. 14), in float32.

    weights [B]: the weight of each row; None gives all rows the same weight.
    """
    if weights is None:
        return F.mse_loss(out.to(torch.float32), target)
    return (weights * (out.to(torch.float32) - target).square().flatten(1).mean(1)).mean()


def velocity_weights(noise: NoiseConfig, schedule: NoiseSchedule) -> Tensor:
    """Return weights that turn an error of the output into an error of v: float64 [T], at most MAX_WEIGHT.

    This is the SNR + 1 weighting of Salimans & Ho 2022, sec. 4. An error of eps is 1 / alpha_bar times as large in v.
    Timesteps near T decide the brightness and shapes of an image, but hardly reduce an unweighted L_simple.
    """
    alpha_bar = schedule.alpha_bar
    # q turns an error of the output into an error of x_0. For v the factor is sqrt(1 - alpha_bar).
    q = parametrize(noise, alpha_bar, torch.arange(len(alpha_bar))).q
    return (q**2 / (1 - alpha_bar)).clamp(max=MAX_WEIGHT)


def lognormal_timesteps(schedule: NoiseSchedule) -> Tensor:
    """Return probabilities of t that make ln(sigma / alpha) normal: float64 [T], with sum 1.

    The mean is LEVEL_MEAN and the standard deviation LEVEL_STD. Karras et al. 2022, table 1 and sec. 5, use -1.2 and
    1.2 for images of standard deviation 0.5. In half of a linear schedule's timesteps the noise is over three times as
    large as the image, and gradients are noisiest. Timesteps without signal have probability 0.
    """
    level = ((1 - schedule.alpha_bar) / schedule.alpha_bar).log() / 2
    edges = (level[1:] + level[:-1]) / 2  # borders half way between neighbouring timesteps
    below = torch.special.ndtr((edges - LEVEL_MEAN) / LEVEL_STD)
    return torch.cat([below.new_zeros(1), below, below.new_ones(1)]).diff()


def draw_timesteps(share: Tensor, count: int) -> Tensor:
    """Draw `count` timesteps with probabilities `share` [T]: int64 [count], on the same device.

    One random offset spreads the timesteps evenly over the cumulative probability (Kingma et al. 2021, appendix I.1).
    Their order is random.
    """
    device = share.device
    spread = (torch.randperm(count, device=device) + torch.rand((), device=device)).to(share) / count
    return torch.searchsorted(share.cumsum(0), spread, right=True).clamp(max=len(share) - 1)


@dataclass(frozen=True, slots=True)
class VariationalBound:
    """The terms of -log p(x_0) <= L_T + sum of L_{t-1} + L_0 (Ho et al. 2020, eq. 5), in bits per dimension.

    The tensors are float64 [B] unless another shape is given.
    """

    L_T: Tensor
    """D_KL(q(x_T|x_0) || N(0, I)), the distance of x_T from the prior. Does not depend on the network."""
    L_steps: Tensor
    """The sum over t > 1 of L_{t-1} = D_KL(q(x_{t-1}|x_t, x_0) || p(x_{t-1}|x_t))."""
    L_0: Tensor
    """-log p(x_0|x_1), the discretised decoder."""
    runs: tuple[tuple[int, int], ...]
    """The S runs low <= t < high of the terms L_1..L_{T-1}. L_t is the term of the step from t, counted from 0."""
    L_drawn: Tensor
    """The term drawn from each run, [S, B]. L_steps is the sum of each run's length times this term."""

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

    timesteps=None evaluates every L_{t-1} and takes T passes. timesteps=S takes S + 1 passes: the T - 1 terms are
    divided into S runs, and each image draws one term from each run uniformly. The drawn term is multiplied by the
    run's length, so the mean over seeds is the full sum. A run's length is roughly proportional to its timestep t,
    because the terms fall roughly as 1 / t. With T = 1000 and 100 runs, the first 29 runs contain one term each.

    An image's randomness depends only on (seed, its index, t): the noise of x_t is draw t of `row_noise`. The network
    runs in the dtype of x_0, everything else in float64. Raises ValueError unless 1 <= timesteps <= T - 1, and for a
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
        # Both means contain the same coef_xt x_t, so only the predictions of x_0 differ.
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
    """Return L_T = D_KL(q(x_T|x_0) || N(0, I)) [B] in bits per dimension, for x_0 [B, C, H, W] in [-1, 1]."""
    alpha_bar = schedule.alpha_bar[-1]
    mean = alpha_bar.sqrt().item() * x_0.to(torch.float64)
    one = torch.ones((), dtype=torch.float64, device=x_0.device)
    return _bits_per_dim(gaussian_kl(mean, one * (1 - alpha_bar).item(), one))


def model_variance(noise: NoiseConfig, schedule: NoiseSchedule) -> Tensor:
    """Return sigma_t^2 of p(x_{t-1}|x_t), float64 [T]: beta~_t (fixed_small), beta_t (fixed_large), or the VE variance.

    At t = 0 the variance is beta~ at t = 1, as in the code of Ho et al. 2020: beta~ at t = 0 is zero, and beta decodes
    worse. Raises ValueError for learned_range.
    """
    if noise.variance_type == "learned_range":
        raise ValueError("the bound is that of a fixed variance, and this network learned its own")
    posterior_variance = schedule.posterior()[2]
    others = {"fixed_large": schedule.betas, "reverse_diffusion": schedule.betas / schedule.alphas}
    variance = others.get(noise.variance_type, posterior_variance).clone()
    variance[0] = posterior_variance[1] if len(variance) > 1 else schedule.betas[0]
    return variance


def gaussian_kl(mean_difference: Tensor, variance_q: Tensor, variance_p: Tensor) -> Tensor:
    """Return D_KL(N(m + d, v_q) || N(m, v_p)) elementwise, in nats."""
    ratio = variance_q / variance_p
    return 0.5 * (ratio - 1 - ratio.log() + mean_difference**2 / variance_p)


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the log probability of each pixel value's bin under N(mean, variance) (Ho et al. 2020, eq. 13), in nats.

    x_0 [B, C, H, W] is float64, with values k / 127.5 - 1 for k in 0..255. The outermost bins are unbounded.
    """
    std = variance.sqrt()
    below = torch.special.ndtr((x_0 - HALF_BIN - mean) / std).masked_fill(x_0 < -EDGE, 0.0)
    up_to = torch.special.ndtr((x_0 + HALF_BIN - mean) / std).masked_fill(x_0 > EDGE, 1.0)
    log_probability: Tensor = (up_to - below).clamp(min=MIN_PROBABILITY).log()
    return log_probability


def _runs(last: int, count: int) -> list[tuple[int, int]]:
    """Divide the timesteps 1..last into `count` half-open runs, with ratios high / low as equal as possible.

    With runs of equal length the first timesteps are rarely drawn, although they make up most of the bound. On 100
    images, with a network that predicts eps and 100 runs, the standard error of L_steps is 0.105 with equal runs and
    0.048 with these. Most of the rest is the difference between images.
    """
    runs, low = [], 1
    for left in range(min(count, last), 0, -1):
        high = round(low * ((last + 1) / low) ** (1 / left))
        high = min(max(high, low + 1), last + 2 - left)  # leave one timestep for each later run
        runs.append((low, high))
        low = high
    return runs


def _bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
