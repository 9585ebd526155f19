"""The coefficients of each sampler, as a small matrix M for each pass.

    (x', h1', ..., h4') = M (x, x0, x0_previous, z, h1, ..., h4)

x0 is the network's prediction in the current pass, x0_previous the prediction in the previous pass, and z fresh noise.
A solver that needs more state keeps it in registers h. Without registers, M has a single row: a, b, c, s.

All tensors are float64. Noise levels have one entry per step, and matrices one per pass. alpha = sqrt(alpha_bar), sigma
= sqrt(1 - alpha_bar) and lambda = log(alpha / sigma). A prime marks values at the end of a step.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tminus.model.noise import posterior_between

X, X0, X0_PREVIOUS, Z, H1, H2, H3, H4 = range(8)  # columns of M; row 0 is x', rows 1 to 4 are the registers
NUM_INPUTS, MAX_REGISTERS = 8, 4


@dataclass(frozen=True, slots=True)
class Levels:
    """The noise levels at the start and the end of S steps, from noisy to clean. Both are float64 [S]."""

    alpha_bar: Tensor
    alpha_bar_next: Tensor

    @property
    def alpha(self) -> Tensor:
        return self.alpha_bar.sqrt()

    @property
    def alpha_next(self) -> Tensor:
        return self.alpha_bar_next.sqrt()

    @property
    def sigma(self) -> Tensor:
        return (1 - self.alpha_bar).sqrt()

    @property
    def sigma_next(self) -> Tensor:
        return (1 - self.alpha_bar_next).sqrt()

    @property
    def h(self) -> Tensor:
        """The length of each step, measured in lambda.

        A step that starts without signal or ends without noise has infinite length.
        """
        return (self.alpha_next / self.sigma_next).log() - (self.alpha / self.sigma).log()

    def before(self, values: Tensor, by: int = 1) -> Tensor:
        """Shift the values so that each step gets the value from `by` steps earlier.

        The first steps, which have no such predecessor, get infinity.
        """
        return torch.cat([torch.full((min(by, len(values)),), torch.inf, dtype=values.dtype), values[:-by]])


def matrices(num_passes: int, registers: int = 0) -> Tensor:
    """Create a zero matrix M for each pass: [num_passes, 1 + registers, 4 + registers]."""
    return torch.zeros(num_passes, 1 + registers, 4 + registers, dtype=torch.float64)


def towards(levels: Levels) -> tuple[Tensor, Tensor]:
    """Return a and b of the first-order step x' = a x + b x0.

    a = sigma'/sigma and b = alpha' (1 - e^-h). This is the DDIM step (Song et al. 2021, eq. 12), written so that it
    also holds for alpha = 0, where h is infinite.
    """
    a = levels.sigma_next / levels.sigma
    return a, levels.alpha_next - a * levels.alpha


def ddpm(levels: Levels, variance_type: str) -> tuple[Tensor, Tensor]:
    """Ancestral sampling (Ho et al. 2020, eq. 7 and algorithm 2).

    Returns M and r. A learned variance has the standard deviation s exp(r v); for the other variances, r is 0.

    fixed_small: the variance is that of the posterior, beta~.
    fixed_large: the variance is beta.
    learned_range: log variance = (1 + v)/2 log beta + (1 - v)/2 log beta~ (Nichol & Dhariwal 2021, eq. 15).
    reverse_diffusion: for VE models, x' / alpha' has the variance (sigma/alpha)^2 - (sigma'/alpha')^2 (Song et al.
    2021, SDE, eq. 46).
    """
    M = matrices(len(levels.alpha_bar))
    M[:, 0, X0], M[:, 0, X], variance = posterior_between(levels.alpha_bar, levels.alpha_bar_next)
    beta = 1 - levels.alpha_bar / levels.alpha_bar_next
    r = torch.zeros_like(beta)
    if variance_type == "fixed_small":
        s = variance.sqrt()
    elif variance_type == "fixed_large":
        s = beta.sqrt()
    elif variance_type == "reverse_diffusion":
        s = levels.alpha_next * (1 / levels.alpha_bar - 1 / levels.alpha_bar_next).sqrt()
    else:
        s = (beta * variance) ** 0.25
        r = (beta.log() - variance.log()) / 4
    s[-1] = r[-1] = 0
    M[:, 0, Z] = s
    return M, r


def ddim(levels: Levels, eta: float = 0.0) -> Tensor:
    """DDIM (Song et al. 2021, eq. 12 and 16). eta scales the noise."""
    alpha_bar, alpha_bar_next = levels.alpha_bar, levels.alpha_bar_next
    M = matrices(len(alpha_bar))
    s = eta * ((1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)).sqrt()
    s[-1] = 0
    # This is the coefficient of eps, where eps = (x - sqrt(alpha_bar) x0) / sqrt(1 - alpha_bar).
    towards_x_t = (1 - alpha_bar_next - s**2).clamp(min=0).sqrt()
    a = towards_x_t / levels.sigma
    M[:, 0, X], M[:, 0, X0], M[:, 0, Z] = a, alpha_bar_next.sqrt() - a * levels.alpha, s
    return M


def extrapolation(levels: Levels) -> Tensor:
    """Return 1 / (2 r), the factor for extrapolating x0 to the middle of a step. r = h_previous / h.

    The factor is 0 for the first step, which has no earlier x0, for the last step, where h is infinite, and after a
    step from alpha_bar = 0, where h_previous is infinite.
    """
    w = levels.h / (2 * levels.before(levels.h))
    w[0] = w[-1] = 0
    return w


def dpmpp_2m(levels: Levels) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2).

    x' = (sigma'/sigma) x - alpha' (e^-h - 1) D, where D = x0 + (x0 - x0_previous) / (2 r) is x0 extrapolated to the
    middle of the step.
    """
    M = matrices(len(levels.alpha_bar))
    (a, b), w = towards(levels), extrapolation(levels)
    M[:, 0, X], M[:, 0, X0], M[:, 0, X0_PREVIOUS] = a, b * (1 + w), -b * w
    return M


def dpmpp_2m_sde(levels: Levels) -> Tensor:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, eq. 19), a DPM-Solver++(2M) that adds noise in each step but the last."""
    M = matrices(len(levels.alpha_bar))
    w = extrapolation(levels)
    decay = levels.alpha * levels.sigma_next / (levels.alpha_next * levels.sigma)  # e^-h
    b = levels.alpha_next * (1 - decay**2)
    M[:, 0, X] = levels.sigma_next / levels.sigma * decay
    M[:, 0, X0], M[:, 0, X0_PREVIOUS] = b * (1 + w), -b * w
    M[:, 0, Z] = levels.sigma_next * (1 - decay**2).sqrt()
    return M


def dpmpp_3m(levels: Levels) -> Tensor:
    """DPM-Solver++(3M) (Lu et al. 2022, appendix B). h1 holds the x0 of two passes ago.

    As in diffusers, the first step has order 1, the second has order 2, and with fewer than 15 steps the last but one
    has order 2. The last step has order 1.
    """
    S = len(levels.alpha_bar)
    M = F.pad(dpmpp_2m(levels), (0, 1, 0, 1))
    M[:, 1, X0_PREVIOUS] = 1
    third = slice(2, max(2, S - 1 if S >= 15 else S - 2))
    h, h_1, h_2 = (each[third] for each in (levels.h, levels.before(levels.h), levels.before(levels.h, 2)))
    b, alpha_next = towards(levels)[1][third], levels.alpha_next[third]
    # x' = a x + b x0 + c_1 D_1 + c_2 D_2, where the differences D_1 and D_2 are combinations of (x0 - x0_previous) h /
    # h_1 and (x0_previous - h1) h / h_2.
    c_1 = alpha_next - b / h
    c_2 = alpha_next / 2 - c_1 / h
    share, curve = h_1 / (h_1 + h_2), h / (h_1 + h_2)
    near = (c_1 * (1 + share) + c_2 * curve) * h / h_1
    far = -(c_1 * share + c_2 * curve) * h / h_2
    M[third, 0, X0], M[third, 0, X0_PREVIOUS], M[third, 0, H1] = b + near, far - near, -far
    return M


def unipc(levels: Levels) -> Tensor:
    """UniPC of order 2 with corrector and B(h) = e^h - 1 (Zhao et al. 2023, algorithms 1 and 2), in x0.

    The predictor is DPM-Solver++(2M). When x0 at the end of a step is known, the corrector repeats the step with it. h1
    sums up the contributions of earlier passes, so the corrected x is h1 + correct x0.
    """
    S = len(levels.alpha_bar)
    M, (a, b), w = matrices(S, registers=1), towards(levels), extrapolation(levels)
    h, ratio = -levels.h, levels.h / levels.before(levels.h)
    # Corrector of the step that starts at this pass: x' = a x + b (x0 + g (x0 - x0_previous) + e (x0_end - x0)).
    B_1 = (h.expm1() / h - 1) / h.expm1()
    B_2 = 2 * ((h.expm1() / h - 1) / h - 1 / 2) / h.expm1()
    share = (B_1 - B_2) / (1 + 1 / ratio)
    g, e = share * ratio, B_1 - share
    g[0], e[0] = 0, 1 / 2  # order 1: there is no x0_previous yet
    g[-1], e[-1] = 0, 0  # the last step is not corrected
    correct = levels.before(b * e)
    correct[0] = 0
    M[:, 0, H1], M[:, 0, X0], M[:, 0, X0_PREVIOUS] = a, a * correct + b * (1 + w), -b * w
    M[:, 1, H1], M[:, 1, X0], M[:, 1, X0_PREVIOUS] = a, a * correct + b * (1 + g - e), -b * g
    M[0, :, X], M[0, :, H1] = a[0], 0  # nothing to correct in the first pass
    return M


def deis(levels: Levels) -> Tensor:
    """DEIS of order 2 (Zhang & Chen 2023, tAB-DEIS in log rho).

    With rho = sigma / alpha and eps = (x - alpha x0) / sigma, x'/alpha' is x/alpha plus an integral over rho. The
    integrand is a line in log rho through the last two eps. h1 holds the previous eps. The first and the last step have
    order 1. The second step also has order 1 if the first starts without signal.
    """
    M, (of_x, of_x0) = matrices(len(levels.alpha_bar), registers=1), _eps(levels)
    M[:, 0, X], M[:, 0, X0] = towards(levels)
    M[:, 1, X], M[:, 1, X0] = of_x, of_x0
    rho, u = levels.sigma / levels.alpha, (levels.sigma / levels.alpha).log()
    inner = slice(1 if rho[0] < math.inf else 2, -1)
    rho_next, u_next = (each[inner.start + 1 :] for each in (rho, u))
    rho, u, u_before = rho[inner], u[inner], levels.before(u)[inner]
    # Integrals over rho of 1 and of log rho, whose antiderivative is (log rho - 1) rho.
    of_1, of_u = rho_next - rho, (u_next - 1) * rho_next - (u - 1) * rho
    near, far = (of_u - u_before * of_1) / (u - u_before), (of_u - u * of_1) / (u_before - u)
    alpha, alpha_next = levels.alpha[inner], levels.alpha_next[inner]
    M[inner, 0, X] = alpha_next / alpha + alpha_next * near * of_x[inner]
    M[inner, 0, X0], M[inner, 0, H1] = alpha_next * near * of_x0[inner], alpha_next * far
    return M


def _eps(levels: Levels) -> tuple[Tensor, Tensor]:
    """Return the coefficients of x and of x0 in eps = (x - alpha x0) / sigma."""
    return 1 / levels.sigma, -levels.alpha / levels.sigma


# Indexed by the number of earlier eps that are available.
ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def plms(levels: Levels) -> Tensor:
    """PNDM without Runge-Kutta steps (Liu et al. 2022, eq. 9 and 12): order-4 Adams-Bashforth in eps.

    h1, h2 and h3 hold earlier eps. The second pass repeats the first step, using the mean of eps at the start and at
    the end of the step.
    """
    steps = len(levels.alpha_bar)
    (gain, move), (of_x, of_x0) = _transfer(levels), _eps(levels)
    M = matrices(steps + 1 if steps > 1 else 1, registers=3)
    for row, start, weight in ((0, gain[0], move[0]), (1, 0.0, 1.0), (2, gain[0], move[0] / 2)):
        M[0, row, X], M[0, row, X0] = start + weight * of_x[0], weight * of_x0[0]
    if steps == 1:
        return M
    # In the second pass, h2 is the result of the first step with only half of its eps. Add the other half.
    M[1, 0, X], M[1, 0, X0] = move[0] / 2 * of_x[1], move[0] / 2 * of_x0[1]
    M[1, 0, H2] = M[1, 1, H1] = 1
    M[2:] = _adams_bashforth(levels, 1)  # pass k + 1 computes step k
    return M


def pndm(levels: Levels, alpha_bar_middle: Tensor) -> Tensor:
    """PNDM (Liu et al. 2022, algorithm 2): Runge-Kutta steps (eq. 13), then order-4 Adams-Bashforth.

    Both methods work in eps.

    alpha_bar_middle [K]: the noise level in the middle of each Runge-Kutta step. K is 3 or 0, see `middles`.

    h1, h2 and h3 hold the eps at the start of earlier steps, the latest first. h4 holds the x at the start of a
    Runge-Kutta step. After the third pass of the step, h4 holds the step's result without the contribution of the
    fourth eps.
    """
    K = len(alpha_bar_middle)
    to_middle = Levels(levels.alpha_bar[:K], alpha_bar_middle)
    from_middle = Levels(alpha_bar_middle, levels.alpha_bar_next[:K])
    (gain, move), (half_gain, half_move) = _transfer(levels), _transfer(to_middle)
    # Each row has the coefficients of x and of x0 in eps.
    at_step, at_middle = torch.stack(_eps(levels), dim=1), torch.stack(_eps(from_middle), dim=1)
    x, x0, _, _, h1, h2, h3, h4 = torch.eye(NUM_INPUTS, dtype=torch.float64)  # unit vectors: sums of them are rows of M
    passes: list[Tensor] = []
    for k in range(K):
        eps_1, eps_3, eps_4 = (of_x * x + of_x0 * x0 for of_x, of_x0 in (at_step[k], at_middle[k], at_step[k + 1]))
        eps_2 = eps_3  # the same formula as eps_3, one pass earlier
        passes.append(torch.stack([half_gain[k] * x + half_move[k] * eps_1, eps_1, h1, h2, x]))
        passes.append(torch.stack([half_gain[k] * h4 + half_move[k] * eps_2, h1, h2, h3, h4]))
        eps_2 = (x - half_gain[k] * h4) / half_move[k]
        whole = gain[k] * h4 + move[k] / 6 * (h1 + 2 * eps_2 + 2 * eps_3)
        passes.append(torch.stack([gain[k] * h4 + move[k] * eps_3, h1, h2, h3, whole]))
        passes.append(torch.stack([h4 + move[k] / 6 * eps_4, h1, h2, h3, 0 * h4]))
    rest = F.pad(_adams_bashforth(levels, K), (0, 1, 0, 1))
    return torch.cat([torch.stack(passes), rest]) if passes else rest


def _transfer(levels: Levels) -> tuple[Tensor, Tensor]:
    """Return gain and move of the DDIM step x' = gain x + move eps (Liu et al. 2022, eq. 11)."""
    gain = levels.alpha_next / levels.alpha
    return gain, levels.sigma_next - gain * levels.sigma


def _adams_bashforth(levels: Levels, start: int) -> Tensor:
    """Return M for the steps from `start` on. h1, h2 and h3 hold the eps of earlier steps, if any."""
    steps = len(levels.alpha_bar)
    M = matrices(steps - start, registers=3)
    weights = [(*ADAMS_BASHFORTH[min(k, 3)], 0, 0, 0)[:4] for k in range(start, steps)]
    (gain, move), (of_x, of_x0) = _transfer(levels), _eps(levels)
    near, *far = move[start:, None].mul(torch.tensor(weights, dtype=torch.float64)).T
    M[:, 0, X], M[:, 0, X0] = gain[start:] + near * of_x[start:], near * of_x0[start:]
    M[:, 0, H1:] = torch.stack(far, dim=1)
    M[:, 1, X], M[:, 1, X0] = of_x[start:], of_x0[start:]
    M[:, 2, H1] = M[:, 3, H2] = 1
    return M


def heun(levels: Levels) -> Tensor:
    """Heun's method (Karras et al. 2022, algorithm 1), with two passes per step.

    The variables are x / alpha and rho = sigma / alpha. The first pass makes an Euler step. It also stores in h1 the
    result of the step with half the slope. The second pass, at the end of the step, adds the other half with the slope
    found there. The last step ends without noise and is a plain Euler step.
    """
    steps = len(levels.alpha_bar)
    M, (a, b) = matrices(2 * steps - 1, registers=1), towards(levels)
    M[0::2, 0, X], M[0::2, 0, X0] = a, b
    rho, alpha_next = (levels.sigma / levels.alpha), levels.alpha_next[:-1]
    half = (rho[1:] - rho[:-1]) / 2  # multiplies the slope (x / alpha - x0) / rho
    M[0:-1:2, 1, X] = alpha_next / levels.alpha[:-1] * (1 + half / rho[:-1])
    M[0:-1:2, 1, X0] = -alpha_next * half / rho[:-1]
    M[1::2, 0, X], M[1::2, 0, X0], M[1::2, 0, H1] = half / rho[1:], -alpha_next * half / rho[1:], 1
    return M


LINEAR_SOLVERS: Mapping[str, Callable[[Levels], Tensor]] = {
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
    "deis": deis,
    "plms": plms,
    "euler": ddim,
    "heun": heun,
}
