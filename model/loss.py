"""The training objective L_simple and the variational bound."""

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

HALF_BIN = 1 / 255  # half the spacing of pixel values in [-1, 1]
EDGE = 0.999  # larger magnitudes are pixel values 0 and 255, whose bins are unbounded
MIN_PROBABILITY = 1e-12
MAX_WEIGHT = 200.0
LEVEL_MEAN, LEVEL_STD = 0.0, 1.7  # of ln(sigma / alpha), see lognormal_timesteps
_PICK = 1  # last counter word for drawing timesteps; row_noise uses 0, so random numbers are never shared


def training_target(noise: NoiseConfig, schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """Return the value that the network's output should have.

    epsilon: eps (Ho et al. 2020).
    sample: x_0.
    v_prediction: v (Salimans & Ho 2022, sec. 4).
    Other types: the solution `out` of x_0 = p x_t + q out. For flow matching this is eps - x_0 (Lipman et al. 2023),
    and for EDM the target in eq. 8 of Karras et al. 2022.

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
    """Return L_simple, the mean squared error of the output (Ho et al. 2020, eq. 14).

    out and target are [B, C, H, W]. The error is computed in float32.

    weights [B]: a weight for each image; None weights all images equally.
    """
    if weights is None:
        return F.mse_loss(out.to(torch.float32), target)
    return (weights * (out.to(torch.float32) - target).square().flatten(1).mean(1)).mean()


def velocity_weights(noise: NoiseConfig, schedule: NoiseSchedule) -> Tensor:
    """Return loss weights that turn the squared error of the output into that of v.

    The result is float64 [T], at most MAX_WEIGHT. This is the SNR + 1 weighting of Salimans & Ho 2022, sec. 4: a
    squared error in eps is 1 / alpha_bar times as large in v. Timesteps near T decide the brightness and the shapes of
    an image, but hardly affect an unweighted L_simple.
    """
    alpha_bar = schedule.alpha_bar
    # An error in x_0 is q times the error in the output, and sqrt(1 - alpha_bar) times the error in v.
    q = parametrize(noise, alpha_bar, torch.arange(len(alpha_bar))).q
    return (q**2 / (1 - alpha_bar)).clamp(max=MAX_WEIGHT)


def lognormal_timesteps(schedule: NoiseSchedule) -> Tensor:
    """Return timestep probabilities for which ln(sigma / alpha) is normally distributed.

    The result is float64 [T] with sum 1. The mean is LEVEL_MEAN and the standard deviation LEVEL_STD. Karras et al.
    2022 (table 1 and sec. 5) use -1.2 and 1.2 for images with a standard deviation of 0.5. Timesteps without signal
    have probability 0.

    With uniform probabilities and a linear schedule, half of the timesteps would have noise more than three times as
    strong as the image. Gradients are noisiest there.
    """
    level = ((1 - schedule.alpha_bar) / schedule.alpha_bar).log() / 2
    edges = (level[1:] + level[:-1]) / 2  # midpoints between neighbouring timesteps
    below = torch.special.ndtr((edges - LEVEL_MEAN) / LEVEL_STD)
    return torch.cat([below.new_zeros(1), below, below.new_ones(1)]).diff()


def draw_timesteps(share: Tensor, count: int) -> Tensor:
    """Draw `count` timesteps with probabilities `share` [T]. Returns int64 [count].

    The draws are evenly spaced in cumulative probability, with a common random offset (Kingma et al. 2021, appendix
    I.1). Their order is random.
    """
    device = share.device
    spread = (torch.randperm(count, device=device) + torch.rand((), device=device)).to(share) / count
    return torch.searchsorted(share.cumsum(0), spread, right=True).clamp(max=len(share) - 1)


@dataclass(frozen=True, slots=True)
class VariationalBound:
    """The terms of the variational bound in bits per dimension (Ho et al. 2020, eq. 5).

    -log p(x_0) <= L_T + sum of L_{t-1} + L_0. Tensors are float64 [B] unless stated otherwise.
    """

    L_T: Tensor
    """D_KL(q(x_T|x_0) || N(0, I)), the distance of x_T from the prior. It does not depend on the network."""
    L_steps: Tensor
    """The sum of L_{t-1} = D_KL(q(x_{t-1}|x_t, x_0) || p(x_{t-1}|x_t)) over t > 1."""
    L_0: Tensor
    """-log p(x_0|x_1), the discretised decoder."""
    runs: tuple[tuple[int, int], ...]
    """S runs (low, high). A run covers the terms of the steps that start at timesteps low <= t < high."""
    L_drawn: Tensor
    """The term drawn from each run, [S, B]. L_steps is the sum of these terms, each times the length of its run."""

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
    """Estimate the variational bound for x_0 [B, C, H, W] in [-1, 1].

    Each term is estimated from one sample of x_t. timesteps=None evaluates all terms in T passes. timesteps=S takes S +
    1 passes: the T - 1 terms L_{t-1} are divided into S runs, and each image draws one term of each run at random. The
    drawn term is multiplied by the length of its run, so the expected value is the full sum. The terms fall roughly as
    1 / t, so the length of a run is roughly proportional to t. With T = 1000 and 100 runs, each of the first 29 runs
    contains a single term.

    An image's random numbers depend only on the seed, the image's index and t: the noise of x_t is draw t of
    `row_noise`. The network runs in the dtype of x_0, and everything else in float64.

    Raises ValueError for a network with learned variance, and unless 1 <= timesteps <= T - 1.
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
        # Both means contain the same term coef_xt x_t, so they differ only in x_0: one uses the true x_0, the other the
        # prediction.
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
    """Return L_T = D_KL(q(x_T|x_0) || N(0, I)), [B] in bits per dimension. x_0 is [B, C, H, W] in [-1, 1]."""
    alpha_bar = schedule.alpha_bar[-1]
    mean = alpha_bar.sqrt().item() * x_0.to(torch.float64)
    one = torch.ones((), dtype=torch.float64, device=x_0.device)
    return _bits_per_dim(gaussian_kl(mean, one * (1 - alpha_bar).item(), one))


def model_variance(noise: NoiseConfig, schedule: NoiseSchedule) -> Tensor:
    """Return sigma_t^2, the variance of p(x_{t-1}|x_t), as float64 [T].

    fixed_small: beta~_t.
    fixed_large: beta_t.
    reverse_diffusion (VE models): beta_t / alpha_t.

    At t = 0, the value is beta~ at t = 1, as in the code of Ho et al. 2020, because beta~ is zero at t = 0 and beta
    gives a worse bound. Raises ValueError for learned_range.
    """
    if noise.variance_type == "learned_range":
        raise ValueError("the bound is that of a fixed variance, and this network learned its own")
    posterior_variance = schedule.posterior()[2]
    others = {"fixed_large": schedule.betas, "reverse_diffusion": schedule.betas / schedule.alphas}
    variance = others.get(noise.variance_type, posterior_variance).clone()
    variance[0] = posterior_variance[1] if len(variance) > 1 else schedule.betas[0]
    return variance


def gaussian_kl(mean_difference: Tensor, variance_q: Tensor, variance_p: Tensor) -> Tensor:
    """Return D_KL(N(m + d, v_q) || N(m, v_p)) in nats, elementwise. mean_difference is d."""
    ratio = variance_q / variance_p
    return 0.5 * (ratio - 1 - ratio.log() + mean_difference**2 / variance_p)


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the log probability of each pixel value under N(mean, variance), in nats.

    A pixel value's probability is the integral of the density over its bin (Ho et al. 2020, eq. 13). The outermost bins
    are unbounded. x_0 [B, C, H, W] is float64, with values k / 127.5 - 1 for k in 0..255.
    """
    std = variance.sqrt()
    below = torch.special.ndtr((x_0 - HALF_BIN - mean) / std).masked_fill(x_0 < -EDGE, 0.0)
    up_to = torch.special.ndtr((x_0 + HALF_BIN - mean) / std).masked_fill(x_0 > EDGE, 1.0)
    log_probability: Tensor = (up_to - below).clamp(min=MIN_PROBABILITY).log()
    return log_probability


def _runs(last: int, count: int) -> list[tuple[int, int]]:
    """Divide the timesteps 1..last into `count` runs (low, high), where high is exclusive.

    The ratios high / low are as equal as possible. With runs of equal length, the first timesteps would rarely be
    drawn, although they contribute most of the bound. In a test with 100 images, 100 runs and a network that predicts
    eps, the standard error of L_steps was 0.105 with equal lengths and 0.048 with equal ratios. Most of the remaining
    error comes from differences between images.
    """
    runs, low = [], 1
    for left in range(min(count, last), 0, -1):
        high = round(low * ((last + 1) / low) ** (1 / left))
        high = min(max(high, low + 1), last + 2 - left)  # leave at least one timestep for each later run
        runs.append((low, high))
        low = high
    return runs


def _bits_per_dim(nats: Tensor) -> Tensor:
    return nats.flatten(1).mean(1) / math.log(2)
