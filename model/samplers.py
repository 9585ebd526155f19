"""Samplers as plans. A plan has one line of coefficients per pass, and all plans use the same update:

    x0 = clip(p x + q out)
    (x', h1', ..., h4') = M (x, x0, x0_previous, z, h1, ..., h4)

Only p and q depend on the network's prediction type. Most samplers have no registers h, and their update is x' = a x +
b x0 + c x0_previous + s exp(r v) z. If the variance is learned, v is the second half of the network's output channels;
otherwise exp(r v) is 1.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from tminus.model.catalogue import SAMPLER_FACTS, SAMPLERS
from tminus.model.guidance import Forward, guided
from tminus.model.noise import NoiseConfig, NoiseSchedule
from tminus.model.parametrization import parametrize
from tminus.model.sampler_tables import Table
from tminus.model.solvers import (
    H1,
    LINEAR_SOLVERS,
    X0,
    X0_PREVIOUS,
    Levels,
    X,
    Z,
    ddim,
    ddpm,
    matrices,
    pndm,
)
from tminus.model.timesteps import make_timesteps, middles, timesteps_of_passes
from tminus.model.trajectory import PlanNumbers

NUM_COEFFICIENTS = 8  # columns of Plan.lines: p, q, a, b, c, s, clip, r


@dataclass(frozen=True, slots=True)
class Plan:
    """A sampler compiled to P passes through the network. All tensors are float64.

    timesteps [P]: from noisy to clean, fractional for some samplers.
    lines [P, 8]: the coefficients p, q, a, b, c, s, clip, r.
    alpha_bar [P]: the noise level at each timestep.
    matrices [P, 1 + R, 4 + R]: the matrices M for a sampler with R registers. The first row of M starts with a, b, c,
    s. None if there are no registers.
    inputs [P, 2]: the factor by which x is scaled for the network, and the time passed to the network. None means 1 and
    the timestep.
    """

    timesteps: Tensor
    lines: Tensor
    alpha_bar: Tensor
    matrices: Tensor | None = None
    inputs: Tensor | None = None

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def adds_noise(self) -> bool:
        """True if any pass adds noise z. Most solvers, and ddim with eta 0, add none."""
        return bool((self.lines[:, 5] > 0).any())

    @property
    def known(self) -> Tensor:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) after each pass, float64 [P, 2]. The last row is (1, 0)."""
        reached = torch.cat([self.alpha_bar[1:], torch.ones(1, dtype=torch.float64)])
        return torch.stack([reached.sqrt(), (1 - reached).sqrt()], dim=1)

    def q_sample(self, x_0: Tensor, eps: Tensor) -> Tensor:
        """Draw x_t at the noise level of the first pass (Ho et al. 2020, eq. 4). x_0, eps and x_t are [B, C, H, W]."""
        signal, noise = (
            each.to(x_0.dtype).to(x_0.device) for each in (self.alpha_bar[0].sqrt(), (1 - self.alpha_bar[0]).sqrt())
        )
        return signal * x_0 + noise * eps

    @property
    def num_registers(self) -> int:
        """The number R of registers. An image needs R tensors besides x and x0_previous."""
        return self.matrices.shape[1] - 1 if self.matrices is not None else 0

    def numbers(self) -> PlanNumbers:
        """Return the plan as NumPy arrays."""
        inputs = (
            torch.stack([torch.ones_like(self.timesteps), self.timesteps], 1) if self.inputs is None else self.inputs
        )
        matrices = self.matrices.numpy() if self.matrices is not None else None
        return PlanNumbers(self.timesteps.numpy(), self.lines.numpy(), inputs.numpy(), matrices)


def compile_plan(
    noise: NoiseConfig,
    schedule: NoiseSchedule,
    sampler: str,
    steps: int,
    *,
    eta: float = 0.0,
    clip: bool | None = None,
    spacing: str | None = None,
    start: int = 0,
    fractional: bool = False,
) -> Plan:
    """Compile a sampler for a model. The coefficients come from model/solvers.py.

    Each step ends at the noise level where the next step starts. The last step adds no noise. It ends at alpha_bar = 1,
    or at alpha_bar_0 (see SamplerFacts.may_end_at_alpha_bar_0).

    clip: None uses the checkpoint's clip_sample.
    spacing: None uses the checkpoint's default for this sampler.
    start: the number of steps to skip. The first remaining step has no earlier prediction.
    fractional: True if the network accepts fractional timesteps.

    Raises ValueError for an unknown sampler or spacing, for an invalid number of steps, and for settings that the noise
    schedule does not allow.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be among {', '.join(SAMPLERS)}, got {sampler!r}")
    facts = SAMPLER_FACTS[sampler]
    spacing = spacing or noise.default_spacing(sampler)
    log_sigmas, offset = schedule.log_sigmas, noise.steps_offset
    of_steps = make_timesteps(
        sampler,
        spacing,
        steps,
        schedule.num_timesteps,
        offset,
        log_sigmas,
        fractional=fractional,
        continuous=noise.is_continuous,
    )[start:]
    assert len(of_steps) > 0
    one = torch.ones(1, dtype=torch.float64)
    alpha_bar = schedule.alpha_bar_at(of_steps)
    last = schedule.alpha_bar[:1] if facts.may_end_at_alpha_bar_0 and not noise.set_alpha_to_one else one
    levels = Levels(alpha_bar, torch.cat([alpha_bar[1:], last]))
    if facts.needs_signal and alpha_bar[0] <= 0:
        elsewhere = "timestep_spacing leading, or a strength below 1, may start elsewhere"
        raise ValueError(f"{sampler} cannot start from alpha_bar = 0, where its step is not defined; {elsewhere}")
    r = torch.zeros(1, dtype=torch.float64)
    if sampler == "ddpm":
        M, r = ddpm(levels, noise.variance_type)
    elif sampler == "ddim":
        M = ddim(levels, eta)
    elif sampler == "pndm":
        M = pndm(levels, schedule.alpha_bar_at(middles(of_steps)))
    else:
        M = LINEAR_SOLVERS[sampler](levels)
    return make_plan(noise, schedule, timesteps_of_passes(sampler, of_steps), M, r=r, clip=clip)


def table_plan(noise: NoiseConfig, schedule: NoiseSchedule, table: Table, *, clip: bool | None, start: int = 0) -> Plan:
    """Compile a table to a plan that skips the first `start` steps."""
    lines = torch.tensor(table.started(start), dtype=torch.float64)
    a, b, c, d, s = lines.unbind(1)
    registers = 1 if bool(d.any()) else 0
    M = matrices(len(lines), registers)
    M[:, 0, X], M[:, 0, X0], M[:, 0, X0_PREVIOUS], M[:, 0, Z] = a, b, c, s
    if registers:
        M[:, 0, H1], M[:, 1, X0_PREVIOUS] = d, 1
    return make_plan(noise, schedule, table.timesteps[start:], M, clip=clip)


def make_plan(
    noise: NoiseConfig,
    schedule: NoiseSchedule,
    timesteps: Sequence[float],
    M: Tensor,
    *,
    r: Tensor | None = None,
    clip: bool | None = None,
) -> Plan:
    """Create a plan from timesteps [P] and matrices [P, 1 + R, 4 + R]."""
    alpha_bar, t = schedule.alpha_bar_at(timesteps), torch.tensor(timesteps, dtype=torch.float64)
    at = parametrize(noise, alpha_bar, t)
    inputs = torch.stack([at.scale, at.time], dim=1) if noise.is_continuous else None
    clips = noise.clip_sample if clip is None else clip
    bound = torch.full_like(at.p, noise.clip_sample_range if clips else torch.inf)
    r = torch.zeros_like(at.p) if r is None else r.expand(len(at.p))
    lines = torch.stack([at.p, at.q, *M[:, 0, :4].unbind(1), bound, r], dim=1)
    more = M if M.shape[1] > 1 else None
    return Plan(t, lines, alpha_bar, more, inputs)


def keep_known(x: Tensor, new: Tensor, x_0: Tensor, eps: Tensor, known: Tensor) -> Tensor:
    """Overwrite the known pixels of x with x_0, noised to the level of x (Lugmayr et al. 2022, eq. 8).

    x, x_0, eps [B, C, H, W].
    new [B, 1, H, W] bool: True for pixels to generate, which keep their values in x.
    known [B, 2]: a row of Plan.known for each image.
    """
    signal, noise = known.reshape(len(known), 2, 1, 1, 1).unbind(1)
    return torch.where(new, x, signal * x_0 + noise * eps)


class Denoised(NamedTuple):
    """The result of a pass: x at the next timestep, and the predicted x_0. Both are [B, C, H, W]."""

    x: Tensor
    x0: Tensor


def denoise(x: Tensor, out: Tensor, x0_previous: Tensor, z: Tensor, lines: Tensor) -> Denoised:
    """Compute the update of a sampler without registers.

    lines is [B, 8], with one line per image. The other tensors are [B, C, H, W], except that `out` is [B, 2C, H, W] if
    it includes the v of a learned variance. For a sampler with registers, only x0 of the result is valid.
    """
    p, q, a, b, c, s, clip, r = lines.reshape(len(lines), NUM_COEFFICIENTS, 1, 1, 1).unbind(1)
    channels = x.shape[1]
    if out.shape[1] != channels:
        out, v = out[:, :channels], out[:, channels:]
        s = s * torch.exp(r * v)
    x0 = (p * x + q * out).clamp(-clip, clip)
    return Denoised(a * x + b * x0 + c * x0_previous + s * z, x0)


def combine(matrices: Tensor, state: Sequence[Tensor]) -> Tensor:
    """Multiply the state of each image by its matrix M.

    matrices is [B, 1 + R, 4 + R]. The state is a sequence of 4 + R tensors [B, C, H, W]: x, x0, x0_previous, z and the
    registers. Returns [B, 1 + R, C, H, W]. Terms are added in this order, one at a time, so an image's result does not
    depend on the rest of the batch, not even in the last bit.
    """
    M = matrices.reshape(*matrices.shape, 1, 1, 1)
    total = M[:, :, 0] * state[0][:, None]
    for column in range(1, len(state)):
        total = total + M[:, :, column] * state[column][:, None]
    return total


class Guided(TypedDict, total=False):
    """The guidance arguments of `sample_passes`."""

    class_labels: Tensor | None
    null_class: int | None
    guidance: float
    guidance_interval: tuple[int, int] | None
    guidance_rescale: float


def sample(net: Forward, plan: Plan, x_T: Tensor, z_of: Callable[[int], Tensor], **guidance: Unpack[Guided]) -> Tensor:
    """Run a plan on a batch and return x_0. See `sample_passes` for the arguments."""
    return deque(sample_passes(net, plan, x_T, z_of, **guidance), maxlen=1).pop()


@torch.inference_mode()
def sample_passes(
    net: Forward,
    plan: Plan,
    x_T: Tensor,
    z_of: Callable[[int], Tensor],
    *,
    class_labels: Tensor | None = None,
    null_class: int | None = None,
    guidance: float = 1.0,
    guidance_interval: tuple[int, int] | None = None,
    guidance_rescale: float = 0.0,
) -> Iterator[Tensor]:
    """Run a plan on a batch, and yield x [B, C, H, W] after each pass. The last x is x_0.

    Training and evaluation use this function; the server has a loop of its own.

    z_of: returns the noise for pass k.
    guidance_interval: apply guidance only at timesteps lo <= t <= hi (Kynkäänniemi et al. 2024). None means at all
    timesteps.
    guidance_rescale: the `share` of `rescale`.
    """
    x, x0, registers = x_T, torch.zeros_like(x_T), [torch.zeros_like(x_T)] * plan.num_registers
    lines = plan.lines.to(device=x.device, dtype=x.dtype)
    matrices = plan.matrices.to(device=x.device, dtype=x.dtype) if plan.matrices is not None else None
    for k, t in enumerate(plan.timesteps.tolist()):
        seen, ts = x, torch.full((len(x),), t, device=x.device)
        if plan.inputs is not None:
            scale, time = plan.inputs[k].tolist()
            seen, ts = scale * x, torch.full_like(ts, time)
        inside = guidance_interval is None or guidance_interval[0] <= t <= guidance_interval[1]
        out = guided(net, seen, ts, class_labels, null_class, guidance if inside else 1.0, guidance_rescale)
        z, x0_previous = z_of(k), x0
        new, x0 = denoise(x, out, x0_previous, z, lines[k : k + 1].expand(len(x), -1))
        if matrices is not None:
            at = matrices[k : k + 1].expand(len(x), -1, -1)
            new, *registers = combine(at, (x, x0, x0_previous, z, *registers)).unbind(1)
        x = new
        yield x


def solve(
    net: Forward,
    plan: Plan,
    x_T: Tensor,
    class_labels: Tensor | None = None,
    null_class: int | None = None,
    guidance: float = 1.0,
) -> Tensor:
    """Run a plan from x_T [N, C, H, W] to x_0, and return x before each pass, and x_0: [P + 1, N, C, H, W].

    The plan must not add noise, so that each x determines x_0.
    """
    zero = torch.zeros_like(x_T)
    passes = sample_passes(
        net, plan, x_T, lambda _k: zero, class_labels=class_labels, null_class=null_class, guidance=guidance
    )
    return torch.stack([x_T, *passes])
