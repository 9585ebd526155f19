"""Sampling loops of diffusers, in its own coordinates, with noise that the tests name: what ours are compared with."""

from typing import Any

import pytest
import torch
from diffusers import ScoreSdeVeScheduler, UNet2DModel
from torch import Tensor

from tminus.model.noise import NoiseConfig
from tminus.model.samplers import Plan


def noise_of(shape: tuple[int, ...], k: int) -> Tensor:
    """Draw k: x_T is draw 0, and the z of step k draw k + 1."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(k))


def loop_of_diffusers(
    net: UNet2DModel,
    scheduler: Any,
    x: Tensor,
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
    labels: Tensor | None = None,
) -> Tensor:
    """Run diffusers' loop from its own x."""
    draws = iter(range(1, 10_000))
    draw = lambda *_a, **_k: noise_of(tuple(x.shape), next(draws))  # noqa: E731
    monkeypatch.setattr(f"{type(scheduler).__module__}.randn_tensor", draw, raising=False)
    scheduler.set_timesteps(steps)
    if isinstance(scheduler, ScoreSdeVeScheduler):
        scheduler.set_sigmas(steps)
        mean = x
        for sigma, t in zip(scheduler.sigmas, scheduler.timesteps, strict=True):
            out = net(x, sigma.expand(len(x)), labels).sample
            x, mean = scheduler.step_pred(out, t, x, return_dict=False)
        return mean
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(net(scaled, t, labels).sample, t, x, return_dict=False)[0]
    return x


def to_theirs(noise: NoiseConfig, x: Tensor, plan: Plan) -> Tensor:
    """What diffusers has for x where ours is x, before the first pass."""
    alpha_bar = plan.alpha_bar[0].item()
    signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if noise.prediction_type == "flow":
        return x / (signal + sigma)
    if noise.prediction_type == "score":  # of images in [0, 1]
        return (x / signal + 1) / 2
    return x / signal if noise.family == "edm" or noise.default_sampler in ("euler", "heun") else x
