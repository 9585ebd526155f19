import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import TINY, randomize
from tminus.model.catalogue import SAMPLER_FACTS, SAMPLERS
from tminus.model.noise import NoiseConfig, NoiseSchedule
from tminus.model.samplers import Plan, combine, compile_plan, denoise, sample, solve
from tminus.model.timesteps import SPACINGS, make_timesteps
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig

pytestmark = pytest.mark.slow

F64 = torch.float64
SHAPE = (2, 1, 3, 3)
PREDICTIONS = ("epsilon", "sample", "v_prediction")
STEPS = (1, 7, 50, 333, 1000)  # 7 and 333 do not divide T


def seeded(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=F64)


def walk(plan: Plan, x: Tensor, out_of: Callable[[int, Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Run a plan by the update rule in float64; out_of(k, x) is the network. Yields (x, x0) after each step."""
    x0, registers, states = torch.zeros_like(x), [torch.zeros_like(x)] * plan.num_registers, []
    for k in range(len(plan)):
        previous, z = x0, seeded(10_000 + k)
        new, x0 = denoise(x, out_of(k, x), previous, z, plan.lines[k : k + 1].expand(len(x), -1))
        if plan.matrices is not None:
            M = plan.matrices[k : k + 1].expand(len(x), -1, -1)
            new, *registers = combine(M, (x, x0, previous, z, *registers)).unbind(1)
        x = new
        states.append((x, x0))
    return states


def in_float64(scheduler: Any, schedule: NoiseSchedule) -> Any:
    """Give a diffusers scheduler float64 tables, so that it and the plan are compared by formula, not by rounding."""
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), schedule.alpha_bar, rtol=0, atol=2e-6)
    scheduler.betas, scheduler.alphas, scheduler.alphas_cumprod = schedule.betas, schedule.alphas, schedule.alpha_bar
    scheduler.one = torch.tensor(1.0, dtype=F64)
    if isinstance(scheduler, DDIMScheduler):
        first = schedule.alpha_bar[0]
        scheduler.final_alpha_cumprod = scheduler.one if scheduler.config.set_alpha_to_one else first
    return scheduler


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def with_spacing(spacing: str, **fields: Any) -> NoiseConfig:
    """A config that says this spacing, or for karras, which is no field's value of diffusers, its default."""
    return NoiseConfig(**fields) if spacing == "karras" else NoiseConfig(**fields, timestep_spacing=spacing)


# --- against diffusers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddpm_equals_diffusers_step_by_step(spacing: str, variance_type: str, steps: int) -> None:
    noise = with_spacing(spacing, variance_type=variance_type)
    plan = compile_plan(noise, noise.schedule(), "ddpm", steps, spacing=spacing)
    theirs = in_float64(DDPMScheduler.from_config(noise.to_dict()), noise.schedule())
    if spacing == "karras":  # which DDPMScheduler has not
        theirs.set_timesteps(timesteps=plan.timesteps.tolist())
    else:
        theirs.set_timesteps(steps)
        assert plan.timesteps.tolist() == theirs.timesteps.tolist()

    def out_of(k: int) -> Tensor:
        v = seeded(20_000 + k).clamp(-1.2, 1.2)
        return torch.cat([seeded(k + 1), v], dim=1) if variance_type == "learned_range" else seeded(k + 1)

    x = seeded(0)
    ours = walk(plan, x, lambda k, _x: out_of(k))
    for k, t in enumerate(theirs.timesteps):
        stepped = theirs.step(out_of(k), t, x, generator=torch.Generator().manual_seed(10_000 + k))
        x = stepped.prev_sample
        if k == steps - 1 and t > 0:
            # diffusers asks for t > 0, not for the last step, and so leaves noise in the image it gives away. The
            # mean of the last step, to alpha_bar = 1, is x_0.
            x = stepped.pred_original_sample
        assert_close(ours[k][1], stepped.pred_original_sample)
        assert_close(ours[k][0], x)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_ddim_of_every_prediction_type_equals_diffusers(prediction_type: str, clip: bool, eta: float) -> None:
    noise = NoiseConfig(default_sampler="ddim", prediction_type=prediction_type, clip_sample=clip)
    schedule, steps = noise.schedule(), 30
    theirs = in_float64(DDIMScheduler.from_config(noise.to_dict()), schedule)
    theirs.set_timesteps(steps)
    plan = compile_plan(noise, schedule, "ddim", steps, eta=eta)
    assert plan.timesteps.tolist() == theirs.timesteps.tolist()
    x = seeded(0)
    ours = walk(plan, x, lambda k, _x: seeded(k + 1))
    for k, t in enumerate(theirs.timesteps):
        # The network's eps no longer agrees with a clipped x0; tminus always takes it from x0, as Glide does.
        stepped = theirs.step(
            seeded(k + 1), t, x, eta=eta, use_clipped_model_output=True, variance_noise=seeded(10_000 + k)
        )
        x = stepped.prev_sample
        assert_close(ours[k][1], stepped.pred_original_sample)
        assert_close(ours[k][0], x)


class InFloat64(Tensor):
    """A float64 tensor that `to(float32)` leaves as it is: DPMSolverMultistepScheduler.step rounds its sample so."""

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        return self


SOLVERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dpmpp_2m": (DPMSolverMultistepScheduler, {}),
    "dpmpp_3m": (DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpmpp_2m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": (UniPCMultistepScheduler, {"solver_order": 2}),
    "deis": (DEISMultistepScheduler, {"solver_order": 2}),
    "plms": (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": True}),
    "pndm": (PNDMScheduler, {"set_alpha_to_one": True}),
    "euler": (EulerDiscreteScheduler, {}),
    "heun": (HeunDiscreteScheduler, {}),
}
IN_SIGMA = ("euler", "heun")  # these move x / sqrt(alpha_bar), and know no clip
PNDM = ("plms", "pndm")
# Below 15 diffusers has another rule for the last steps.
SOLVER_STEPS = ((True, 1), (False, 2), (True, 4), (False, 14), (True, 15), (False, 50))


def assert_solver_equals_diffusers(sampler: str, noise: NoiseConfig, steps: int, spacing: str) -> None:
    """The full loop, step by step, in float64, from the same noise and through the same outputs of a network."""
    cls, settings = SOLVERS[sampler]
    schedule = noise.schedule()
    plan = compile_plan(noise, schedule, sampler, steps, spacing=spacing, fractional=True)
    settings = settings | {"timestep_spacing": "leading" if spacing == "karras" else spacing}
    settings |= {"beta_start": noise.beta_start, "beta_end": noise.beta_end}
    if noise.clip_sample:
        settings |= {"thresholding": True, "sample_max_value": 1.0}
    theirs = in_float64(
        cls(prediction_type=noise.prediction_type, beta_schedule=noise.beta_schedule, **settings), schedule
    )
    theirs.set_timesteps(steps)
    if spacing == "karras" or sampler in IN_SIGMA:  # the timesteps have tests of their own
        theirs.timesteps = plan.timesteps if sampler in IN_SIGMA else plan.timesteps.long()
    assert theirs.timesteps.tolist() == plan.timesteps.tolist()
    alpha_bar = schedule.alpha_bar_at(plan.timesteps.tolist())
    sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    if sampler in PNDM:
        theirs.final_alpha_cumprod = torch.tensor(1.0, dtype=F64) if noise.set_alpha_to_one else schedule.alpha_bar[0]
    else:  # DEIS takes the logarithm of the last
        theirs.sigmas = torch.cat([sigmas, torch.full((1,), 1e-12 if sampler == "deis" else 0.0, dtype=F64)])
    noise_of = {"variance_noise"} if sampler == "dpmpp_2m_sde" else set()
    scale = (1 + sigmas**2).sqrt() if sampler in IN_SIGMA else torch.ones_like(sigmas)
    ours = walk(plan, seeded(0), lambda k, _x: seeded(k + 1))
    x = scale[0] * seeded(0)
    theirs.is_scale_input_called = True
    for k, t in enumerate(theirs.timesteps):
        extra = {name: seeded(10_000 + k).as_subclass(InFloat64) for name in noise_of}
        stepped = theirs.step(seeded(k + 1).as_subclass(InFloat64), t, x.as_subclass(InFloat64), **extra)
        x, last = stepped.prev_sample.as_subclass(Tensor), k + 1 == len(plan)
        if sampler == "deis" and last and steps >= 15:
            # diffusers integrates on to log 0 there, where the polynomial means nothing. Ours ends in x_0.
            x = ours[k][1]
        torch.testing.assert_close(ours[k][0], x / (1 if last else scale[k + 1]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("clip", "steps"), SOLVER_STEPS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SOLVERS)
def test_solver_equals_diffusers_step_by_step(sampler: str, spacing: str, clip: bool, steps: int) -> None:
    if sampler == "pndm" and (steps < 4 or 1000 // steps % 2):
        return  # diffusers has no such plan, or goes to a middle for which the network is told another timestep
    if sampler in PNDM:
        if spacing not in ("leading", "trailing") or (spacing == "trailing" and 1000 % steps):
            return  # diffusers goes to t - T // S, which is no timestep of its plan
        if steps == 1 and spacing == "trailing":
            return
    if clip and sampler in (*IN_SIGMA, *PNDM):
        return  # diffusers' have no clip
    assert_solver_equals_diffusers(sampler, NoiseConfig(clip_sample=clip), steps, spacing)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
@pytest.mark.parametrize("sampler", SOLVERS)
def test_solver_of_every_prediction_type_and_another_schedule_equals_diffusers(
    sampler: str, prediction_type: str
) -> None:
    if sampler in PNDM and prediction_type != "epsilon":
        return  # diffusers extrapolates the network's outputs, tminus always eps
    if sampler in IN_SIGMA and prediction_type == "sample":
        return  # not in diffusers
    noise = NoiseConfig(prediction_type=prediction_type, clip_sample=False, beta_schedule="scaled_linear")
    assert_solver_equals_diffusers(sampler, noise, 10, "leading")


LEARNED = NoiseConfig(variance_type="learned_range")


# --- against the papers' formulas ---------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [7, 333])
def test_ddim_is_equation_12_of_its_paper(steps: int, spacing: str, set_alpha_to_one: bool, eta: float) -> None:
    noise = NoiseConfig(set_alpha_to_one=set_alpha_to_one, steps_offset=1)
    schedule = noise.schedule()
    plan = compile_plan(noise, schedule, "ddim", steps, eta=eta, spacing=spacing)
    alpha_bar, t = schedule.alpha_bar, plan.timesteps.long().tolist()
    x = seeded(0)
    ours = walk(plan, x, lambda k, _x: seeded(k + 1))
    for k in range(steps):
        now = alpha_bar[t[k]]
        last = k == steps - 1
        then = (torch.tensor(1.0, dtype=F64) if set_alpha_to_one else alpha_bar[0]) if last else alpha_bar[t[k + 1]]
        x0 = ((x - (1 - now).sqrt() * seeded(k + 1)) / now.sqrt()).clamp(-1, 1)
        eps = (x - now.sqrt() * x0) / (1 - now).sqrt()
        sigma = eta * ((1 - then) / (1 - now)).sqrt() * (1 - now / then).sqrt()
        if last:
            sigma = sigma * 0  # the last step adds no noise
        x = then.sqrt() * x0 + (1 - then - sigma**2).sqrt() * eps + sigma * seeded(10_000 + k)
        assert_close(ours[k][0], x)


def test_full_chain_equals_the_textbook_loop_through_a_real_network(tiny_net: UNet2D) -> None:
    """Ho et al. 2020, algorithm 2, as it is printed: eps, sigma_t^2 = beta_t, no clipping, all T steps."""
    net, T = tiny_net.double(), 100
    noise = NoiseConfig(T, beta_end=0.2, variance_type="fixed_large", clip_sample=False)
    schedule = noise.schedule()
    plan = compile_plan(noise, schedule, "ddpm", T)
    x_T = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    z = torch.randn(T, 1, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=F64)

    beta = torch.linspace(1e-4, 0.2, T, dtype=F64)
    alpha = 1 - beta
    alpha_bar = alpha.cumprod(0)
    x = x_T
    with torch.inference_mode():
        for t in reversed(range(T)):
            eps = net(x, torch.tensor([t]))
            x = 1 / alpha[t].sqrt() * (x - (1 - alpha[t]) / (1 - alpha_bar[t]).sqrt() * eps)
            if t > 0:
                x = x + beta[t].sqrt() * z[T - 1 - t]

    ours = sample(net, plan, x_T, lambda k: z[k])
    assert x.std() > 0.1
    torch.testing.assert_close(ours, x, rtol=1e-7, atol=1e-7 * x.abs().max().item())


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras"])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
def test_dpm_solver_from_no_signal_at_all_is_the_limit_of_ever_less(prediction_type: str, spacing: str) -> None:
    noise = NoiseConfig(rescale_betas_zero_snr=True, prediction_type=prediction_type)
    schedule = noise.schedule()
    plan = compile_plan(noise, schedule, "dpmpp_2m", 10, spacing=spacing)
    assert schedule.alpha_bar[int(plan.timesteps[0])] == 0
    assert bool(torch.isfinite(plan.lines[:, [0, 1, 2, 3, 4, 5, 7]]).all())
    then = schedule.alpha_bar[int(plan.timesteps[1])]
    torch.testing.assert_close(plan.lines[0, 2:5], torch.stack([(1 - then).sqrt(), then.sqrt(), then * 0]))
    assert plan.lines[1, 4] == 0  # a step of infinite length teaches nothing of the next
    assert plan.lines[2, 4] < 0
    errors = []
    for tiny in (1e-20, 1e-80, 1e-300):
        less = noise.schedule()
        less.alpha_bar[-1] = tiny
        lines = compile_plan(noise, less, "dpmpp_2m", 10, spacing=spacing).lines
        errors.append((lines[:, :6] - plan.lines[:, :6]).abs().max().item())
    assert errors[0] > errors[1] > errors[2]  # like 1 / lambda, that is slowly
    assert errors[2] < 5e-3


def test_a_step_of_pndms_start_is_runge_kuttas_of_fourth_order() -> None:
    """Liu et al. 2022, eq. 13, as it is printed, through a network that is not linear in x."""
    noise = NoiseConfig(clip_sample=False)
    schedule = noise.schedule()
    plan, t = compile_plan(noise, schedule, "pndm", 10), (900, 800, 700, 600)
    signal, noisy = schedule.alpha_bar.sqrt(), (1 - schedule.alpha_bar).sqrt()

    def eps(x: Tensor, t: int) -> Tensor:
        return (x + t / 1000).sin()

    def phi(x: Tensor, eps: Tensor, t: int, to: int) -> Tensor:
        return signal[to] / signal[t] * x + (noisy[to] - signal[to] / signal[t] * noisy[t]) * eps

    ours = walk(plan, seeded(0), lambda k, x: eps(x, int(plan.timesteps[k])))
    x = seeded(0)
    for k, (now, then) in enumerate(pairwise(t)):
        e_1 = eps(x, now)
        e_2 = eps(phi(x, e_1, now, now - 50), now - 50)
        e_3 = eps(phi(x, e_2, now, now - 50), now - 50)
        e_4 = eps(phi(x, e_3, now, then), then)
        x = phi(x, (e_1 + 2 * e_2 + 2 * e_3 + e_4) / 6, now, then)
        assert_close(ours[4 * k + 3][0], x)


# --- plans --------------------------------------------------------------------------------------------------------

CONFIGS = st.builds(
    NoiseConfig,
    num_train_timesteps=st.just(80),
    beta_end=st.just(0.25),
    variance_type=st.sampled_from(("fixed_small", "fixed_large", "learned_range")),
    prediction_type=st.sampled_from(PREDICTIONS),
    steps_offset=st.integers(0, 3),
)
ANY_SPACING = st.sampled_from(SPACINGS)


@given(
    CONFIGS,
    st.sampled_from(SAMPLERS),
    st.integers(1, 80),
    ANY_SPACING,
    st.floats(0, 1),
    st.sampled_from((True, False, None)),
)
def test_plan_has_a_line_a_step_all_finite_and_ends_without_noise(
    noise: NoiseConfig, sampler: str, steps: int, spacing: str, eta: float, clip: bool | None
) -> None:
    steps = min(steps, SAMPLER_FACTS[sampler].max_steps(80))
    plan = compile_plan(noise, noise.schedule(), sampler, steps, eta=eta, clip=clip, spacing=spacing)
    passes = SAMPLER_FACTS[sampler].num_passes(steps)
    assert len(plan) == passes
    assert plan.lines.shape == (passes, 8)
    if plan.matrices is not None:
        R = plan.num_registers
        assert plan.matrices.shape == (passes, 1 + R, 4 + R)
        assert bool(torch.isfinite(plan.matrices).all())
        assert torch.equal(plan.matrices[:, 0, :4], plan.lines[:, 2:6])
    assert plan.lines.dtype == F64
    assert bool(torch.isfinite(plan.lines[:, [0, 1, 2, 3, 4, 5, 7]]).all())
    assert plan.lines[-1, [5, 7]].tolist() == [0, 0]
    assert (plan.lines[:, 5] >= 0).all()
    assert plan.adds_noise == bool(plan.lines[:, 5].any())
    assert plan.lines[:, 6].tolist() == [torch.inf if clip is False else 1.0] * passes


@given(CONFIGS, st.sampled_from(SAMPLERS), st.integers(1, 80), ANY_SPACING, st.floats(0, 1), st.integers(0, 2**32))
def test_perfect_network_ends_in_x_0_by_every_sampler(
    noise: NoiseConfig, sampler: str, steps: int, spacing: str, eta: float, seed: int
) -> None:
    schedule = noise.schedule()
    steps = min(steps, SAMPLER_FACTS[sampler].max_steps(80))
    plan = compile_plan(noise, schedule, sampler, steps, eta=eta, spacing=spacing)
    x_0 = seeded(seed).clamp(-1, 1)

    def perfect(k: int, x: Tensor) -> Tensor:
        alpha_bar = schedule.alpha_bar[int(plan.timesteps[k])]
        eps = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        v = alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
        return {"epsilon": eps, "sample": x_0, "v_prediction": v}[noise.prediction_type]

    x, x0 = walk(plan, seeded(seed + 1), perfect)[-1]
    torch.testing.assert_close(x, x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(x0, x_0, rtol=0, atol=1e-9)


def test_clip_is_the_checkpoints_own_unless_it_is_given() -> None:
    unclipped = NoiseConfig(clip_sample=False, clip_sample_range=2.0)
    cases = ((unclipped, None, torch.inf), (unclipped, True, 2.0), (NoiseConfig(), None, 1.0))
    for noise, clip, bound in (*cases, (NoiseConfig(), False, torch.inf)):
        assert compile_plan(noise, noise.schedule(), "ddpm", 1, clip=clip).lines[0, 6] == bound


# --- the update rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance_type", ["fixed_small", "learned_range"])
def test_rows_with_mixed_lines_equal_each_row_alone(variance_type: str) -> None:
    lines = []
    for sampler, prediction_type, steps, clip in [
        ("ddpm", "epsilon", 1000, True),
        ("ddim", "v_prediction", 20, False),
        ("ddpm", "sample", 3, True),
        ("dpmpp_2m", "epsilon", 50, True),
    ]:
        noise = NoiseConfig(prediction_type=prediction_type, variance_type=variance_type)
        plan = compile_plan(noise, noise.schedule(), sampler, steps, eta=0.7, clip=clip)
        lines.append(plan.lines[steps // 2])
    mixed = torch.stack(lines).float()
    x, out, x0_previous, z = torch.randn(4, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    if variance_type == "learned_range":
        out = torch.cat([out, out.flip(0).sin()], dim=1)
    together = denoise(x, out, x0_previous, z, mixed)
    for i in range(4):
        row = slice(i, i + 1)
        alone = denoise(x[row], out[row], x0_previous[row], z[row], mixed[row])
        assert torch.equal(together.x[row], alone.x)
        assert torch.equal(together.x0[row], alone.x0)


# --- the plain loop -----------------------------------------------------------------------------------------------


@pytest.fixture
def conditional_net() -> UNet2D:
    """Three classes, of which the last is null."""
    net = UNet2D(UNetConfig(**{**dataclasses.asdict(TINY), "num_class_embeds": 3}))
    randomize(net)
    return net.eval()


@torch.no_grad()
def test_guidance_is_on_only_inside_its_interval(conditional_net: UNet2D) -> None:
    noise = NoiseConfig()
    plan = compile_plan(noise, noise.schedule(), "ddim", 10)
    x_T, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    widths: list[tuple[int, int]] = []

    def counted(x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        widths.append((int(t[0]), len(x)))
        out: Tensor = conditional_net(x, t, class_labels)
        return out

    def loop(guidance: float, interval: tuple[int, int] | None) -> Tensor:
        zero = torch.zeros_like(x_T)
        return sample(
            counted,
            plan,
            x_T,
            lambda _k: zero,
            class_labels=labels,
            null_class=2,
            guidance=guidance,
            guidance_interval=interval,
        )

    loop(3.0, (200, 500))
    assert widths == [(t, 4 if 200 <= t <= 500 else 2) for t in range(900, -1, -100)]
    assert torch.equal(loop(3.0, (0, 999)), loop(3.0, None))
    assert torch.equal(loop(3.0, (901, 999)), loop(1.0, None))


@torch.no_grad()
def test_loop_runs_a_guided_net_of_learned_variance() -> None:
    net = UNet2D(UNetConfig(**{**dataclasses.asdict(TINY), "out_channels": 2, "num_class_embeds": 3}))
    randomize(net)
    plan = compile_plan(LEARNED, LEARNED.schedule(), "ddpm", 2)
    x_T, z, labels = torch.randn(2, 1, 8, 8), torch.randn(2, 2, 1, 8, 8), torch.tensor([0, 1])
    ours = sample(net.eval(), plan, x_T, lambda k: z[k], class_labels=labels, null_class=2, guidance=2.0)
    x, x0 = x_T, torch.zeros_like(x_T)
    for k, t in enumerate(plan.timesteps):
        out_c, out_u = net(x, t.expand(2), labels), net(x, t.expand(2), torch.tensor([2, 2]))
        out = torch.cat([2 * out_c[:, :1] - out_u[:, :1], out_c[:, 1:]], dim=1)
        x, x0 = denoise(x, out, x0, z[k], plan.lines[k : k + 1].float().expand(2, -1))
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


# --- plans of the last steps, and what is known ---


@pytest.mark.parametrize("start", [1, 9])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_plan_that_starts_later_is_the_end_of_the_whole_one_but_for_a_first_step_of_first_order(
    sampler: str, start: int
) -> None:
    noise = NoiseConfig()
    whole, tail = (compile_plan(noise, noise.schedule(), sampler, 10, start=k) for k in (0, start))
    facts = SAMPLER_FACTS[sampler]
    assert len(tail) == facts.num_passes(10 - start)
    spacing, log_sigmas = noise.default_spacing(sampler), noise.schedule().log_sigmas
    assert tail.timesteps[0] == make_timesteps(sampler, spacing, 10, 1000, log_sigmas=log_sigmas)[start]
    assert tail.timesteps[-1] == whole.timesteps[-1]
    assert torch.equal(tail.known[-1], whole.known[-1])
    if sampler in ("dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "deis"):
        _, _, a, b, c, *_ = tail.lines[0]
        abar, after = tail.alpha_bar[0], tail.known[0, 0] ** 2
        assert (c, tail.num_registers) == (0, whole.num_registers)
    if sampler == "dpmpp_2m":
        assert torch.isclose(a, ((1 - after) / (1 - abar)).sqrt())  # the first-order step is DDIM's
        assert torch.isclose(b, after.sqrt() - a * abar.sqrt())
        assert (tail.lines[1:-1, 4] != 0).all()
        assert torch.equal(tail.lines[1:], whole.lines[start + 1 :])
    elif sampler in ("ddpm", "ddim", "euler"):  # which look at no earlier step
        assert torch.equal(tail.lines, whole.lines[start:])
    if tail.matrices is not None:  # what a register held before its first pass is never read
        assert not tail.matrices[0, 0, 4:].any()


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_known_levels_are_those_of_the_next_timesteps_and_nothing_at_the_end(
    sampler: str, set_alpha_to_one: bool
) -> None:
    noise = NoiseConfig(set_alpha_to_one=set_alpha_to_one)
    plan = compile_plan(noise, noise.schedule(), sampler, 7)
    alpha_bar = noise.schedule().alpha_bar[plan.timesteps[1:].long()]
    assert torch.equal(plan.known[:-1], torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], 1))
    assert plan.known[-1].tolist() == [1, 0]


def test_solve_keeps_x_itself_where_the_network_gets_it_scaled() -> None:
    """A network of zeros gives D = c_skip x, and the ODE's solution is x_T sqrt((s^2 + d^2) / (s_T^2 + d^2)). d is
    sigma_data (Karras et al. 2022, equations 1 and 7).
    """
    noise = NoiseConfig(100, prediction_type="edm", default_sampler="euler", clip_sample=False)
    plan = compile_plan(noise, noise.schedule(), "dpmpp_2m", 100)
    alpha_bar = plan.alpha_bar.double()
    x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = solve(lambda x, _t, _labels: torch.zeros_like(x), plan, x_T)[:-1]
    spread = ((1 - alpha_bar) / alpha_bar + noise.sigma_data**2).sqrt() * alpha_bar.sqrt()  # of alpha x
    expected = x_T.double() * (spread / spread[0]).reshape(-1, 1, 1, 1, 1)
    torch.testing.assert_close(x.double(), expected, rtol=0.01, atol=1e-4)
