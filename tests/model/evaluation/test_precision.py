"""The criterion by which a lower precision is approved, and the images that it compares."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.model.evaluation.toys import CPU, toy_checkpoint
from tminus.model.catalogue import Recommended
from tminus.model.checkpoint import Checkpoint
from tminus.model.evaluation import precision
from tminus.model.evaluation.precision import Comparison, Difference, compared_points, measure_difference
from tminus.model.evaluation.samples import Point
from tminus.model.guidance import Forward
from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.noise import NoiseConfig
from tminus.model.rng import image_noise

POINT = Point("dpmpp_2m", 20)
SPREAD = 0.5  # standard deviation of the images of the network that is known


def images(scale: float, seed: int) -> Tensor:
    """Noise of 16 images in three channels."""
    return scale * torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def compare(change: Callable[[Tensor], object]) -> Difference:
    """Compare images whose truncation is 4 levels with others that differ by 1, and are changed."""
    exact = images(60, 0)
    lower = exact + images(1, 1)
    change(lower)
    return measure_difference(POINT, exact, lower, exact + images(4, 2))


def test_figures_are_those_of_numpy() -> None:
    exact, lower, solution = images(50, 0), images(51, 1), images(48, 2)
    found = measure_difference(POINT, exact, lower, solution)
    difference, truncation = (lower - exact).double().numpy(), (exact - solution).double().numpy()
    assert found.rms == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-5)
    assert found.worst == pytest.approx(np.sqrt((difference**2).mean(axis=(1, 2, 3))).max(), rel=1e-5)
    assert found.truncation_rms == pytest.approx(np.sqrt((truncation**2).mean()), rel=1e-5)
    assert found.truncation_worst == pytest.approx(np.sqrt((truncation**2).mean(axis=(1, 2, 3))).max(), rel=1e-5)
    shifts = difference.mean(axis=(2, 3))  # [N, C]
    errors = shifts.std(axis=0, ddof=1) / 4
    channel = list(np.abs(shifts.mean(axis=0))).index(pytest.approx(abs(found.drift), rel=1e-4))
    assert found.drift_error == pytest.approx(errors[channel], rel=1e-4)


def one_broken(lower: Tensor) -> None:
    """Change one image of sixteen by 7 levels, which is less than half of the truncation over all images."""
    lower[3] += 7 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(9)).sign()


def brighter(lower: Tensor) -> None:
    """Make one channel of every image 1.5 levels brighter, which is less than the truncation."""
    lower[:, 1] += 1.5


def brighter_or_darker(lower: Tensor) -> None:
    """Shift the images by as much, in turn up and down."""
    lower[::2, 1] += 1.5
    lower[1::2, 1] -= 1.5


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        (lambda lower: None, True),
        (brighter_or_darker, True),
        (brighter, False),
        (one_broken, False),
        (lambda lower: lower.add_(images(3, 7)), False),
        (lambda lower: lower[0].fill_(torch.nan), False),
    ],
    ids=["alike", "in turn brighter", "all brighter", "one is broken", "all are noisy", "not finite"],
)
def test_images_are_as_good_where_all_and_the_worst_differ_by_less_than_truncation(
    change: Callable[[Tensor], object], ok: bool
) -> None:
    found = compare(change)
    assert found.ok is ok, str(found)
    assert "dpmpp_2m, 20 steps: differs by" in str(found)


@pytest.mark.parametrize(
    ("recommended", "points"),
    [
        (None, [("dpmpp_2m", 20, 1.0), ("ddim", 50, 1.0)]),
        (Recommended("tuned", 8, 1.5), [("dpmpp_2m", 20, 1.5), ("tuned", 8, 1.5)]),
        (Recommended("dpmpp_2m", 20, 2.0), [("dpmpp_2m", 20, 2.0)]),
        (Recommended("ddpm", 1000), [("dpmpp_2m", 20, 1.0), ("ddim", 50, 1.0)]),
        (Recommended("dpmpp_2m_sde", 40), [("dpmpp_2m", 20, 1.0)]),
        (Recommended("unipc", 40), [("dpmpp_2m", 20, 1.0), ("unipc", 20, 1.0)]),
        (Recommended("tuned", 60), [("dpmpp_2m", 20, 1.0), ("tuned", 60, 1.0)]),
    ],
)
def test_what_is_recommended_is_compared_without_its_noise_beside_the_sampler_of_little_truncation(
    recommended: Recommended | None, points: list[tuple[str, int, float]]
) -> None:
    assert compared_points(recommended) == tuple(Point(*each) for each in points)


# --- a network whose images are known: those of a normal distribution ---


@pytest.fixture
def checkpoint() -> Checkpoint:
    noise = NoiseConfig(clip_sample=False)
    return replace(toy_checkpoint(class_names=(), null_class=None), noise=noise)


def network(alpha_bar: Tensor, factor: float = 1.0) -> Forward:
    """The best prediction of eps for images drawn from N(0, SPREAD^2), times a factor."""

    def predict(x: Tensor, t: Tensor, _labels: Tensor | None) -> Tensor:
        a = alpha_bar[t.long()].reshape(-1, 1, 1, 1).float()
        return factor * (1 - a).sqrt() * x / (a * SPREAD**2 + 1 - a)

    return predict


def run(checkpoint: Checkpoint, exact: Forward, lower: Forward, num_images: int = 5) -> Comparison:
    comparison = Comparison(checkpoint)
    for _ in comparison.run(exact, lower, CPU, num_images, batch_size=2):
        pass
    return comparison


def test_the_truncation_is_how_far_images_are_from_the_exact_solution(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "REFERENCE", Point("dpmpp_2m", 400))  # which is exact
    alpha_bar = checkpoint.noise.schedule().alpha_bar
    comparison = run(checkpoint, network(alpha_bar), network(alpha_bar))
    # All of it is linear, so an image is x_T times a number. Exactly: s / sqrt(abar_T s^2 + 1 - abar_T).
    last = float(alpha_bar[-1])
    exactly = SPREAD / (last * SPREAD**2 + 1 - last) ** 0.5
    by_ddim, levels = 1.0, [float(alpha_bar[t]) for t in range(980, -1, -20)]
    for a, a_next in itertools.pairwise([*levels, 1.0]):  # Song et al. 2021, eq. 12
        eps = (1 - a) ** 0.5 / (a * SPREAD**2 + 1 - a) * by_ddim
        by_ddim = a_next**0.5 * (by_ddim - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - a_next) ** 0.5 * eps
    x_T = image_noise(0, range(5), 0, (1, 8, 8), CPU)
    error = 127.5 * ((by_ddim * x_T).clamp(-1, 1) - (exactly * x_T).clamp(-1, 1))
    ddim = comparison.differences[1]
    assert ddim.point.sampler == "ddim"
    assert ddim.truncation_rms == pytest.approx(float(error.square().mean().sqrt()), rel=0.03)
    for difference in comparison.differences:
        assert (difference.rms, difference.worst, difference.drift) == (0, 0, 0), "both are the same network"
        assert difference.ok


def test_a_network_that_is_off_by_a_tenth_is_refused(checkpoint: Checkpoint) -> None:
    alpha_bar = checkpoint.noise.schedule().alpha_bar
    assert run(checkpoint, network(alpha_bar), network(alpha_bar, 1.0001)).ok
    assert not run(checkpoint, network(alpha_bar), network(alpha_bar, 1.1)).ok


def test_it_goes_on_by_one_pass_at_a_time_and_makes_as_many_as_it_says(checkpoint: Checkpoint) -> None:
    calls: list[str] = []

    def counted(name: str) -> Forward:
        def forward(x: Tensor, _t: Tensor, _labels: Tensor | None) -> Tensor:
            calls.append(name)
            return torch.zeros_like(x)

        return forward

    comparison = Comparison(checkpoint)
    for number, _ in enumerate(comparison.run(counted("exact"), counted("lower"), CPU, 5, batch_size=2), 1):
        assert len(calls) == number
    assert (calls.count("exact"), calls.count("lower")) == tuple(3 * passes for passes in comparison.passes)
    assert comparison.passes == (40 + 20 + 50, 20 + 50)


def test_recommended_guidance_takes_two_places_and_changes_the_images() -> None:
    checkpoint = replace(toy_checkpoint(), noise=NoiseConfig(), recommended=Recommended("dpmpp_2m", 20, 2.0))
    rows: set[int] = set()

    def forward(x: Tensor, _t: Tensor, labels: Tensor | None) -> Tensor:
        assert labels is not None
        rows.add(len(x))
        return 0.1 * x * labels.reshape(-1, 1, 1, 1)

    assert run(checkpoint, forward, forward, num_images=4).places == 2
    assert rows == {4}


def test_latents_are_compared_as_they_are_and_pixels_clipped(checkpoint: Checkpoint) -> None:
    def far(x: Tensor, _t: Tensor, _labels: Tensor | None) -> Tensor:
        return torch.full_like(x, -1000.0)

    def further(x: Tensor, _t: Tensor, _labels: Tensor | None) -> Tensor:
        return torch.full_like(x, -2000.0)

    assert run(checkpoint, far, further).differences[0].rms == 0, "both are white"
    latent = replace(checkpoint, autoencoder=cast(Autoencoder, SimpleNamespace(config=SimpleNamespace(factor=1))))
    assert run(latent, far, further).differences[0].rms > 1000


def test_what_has_no_truncation_is_refused_with_the_command_that_can_judge_it(checkpoint: Checkpoint) -> None:
    judged = "; tminus evaluate --approve judges it by data"
    with pytest.raises(ValueError, match=f"tables alone, whose truncation cannot be measured{judged}"):
        Comparison(replace(checkpoint, student={"kind": "student"}))
    with pytest.raises(ValueError, match=f"measured with 50 steps, and there are 49 timesteps{judged}"):
        Comparison(replace(checkpoint, noise=NoiseConfig(num_train_timesteps=49)))
    assert Comparison(replace(checkpoint, noise=NoiseConfig(num_train_timesteps=50))).passes == (110, 70)
