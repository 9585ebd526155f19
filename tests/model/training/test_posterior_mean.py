import pytest
import torch
from torch import Tensor

from tminus.model.loss import training_target
from tminus.model.noise import NoiseConfig, gather
from tminus.model.pixels import to_model_range
from tminus.model.training.posterior_mean import GROUP, PosteriorMean

SCHEDULE = NoiseConfig().schedule()


def pixels(count: int, size: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 1, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def noised(images: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_0 = to_model_range(images)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2))
    return x_0, eps, SCHEDULE.q_sample(x_0, t, eps)


@pytest.mark.parametrize("t", [100, 500, 700, 999])
@pytest.mark.parametrize("latents", [False, True])
def test_mean_is_that_of_the_images_of_its_class_by_their_densities_in_float64(t: int, latents: bool) -> None:
    images, labels = pixels(40), torch.arange(40) % 3
    of_rows = torch.full((40,), t)
    x_0, _, x_t = noised(images, of_rows)
    mean = PosteriorMean(x_0 if latents else images, labels, SCHEDULE)(x_t, of_rows, torch.arange(40))
    alpha_bar = SCHEDULE.alpha_bar[t]
    for row in range(40):
        members = x_0[labels == labels[row]].double()
        density = torch.distributions.Normal(alpha_bar.sqrt() * members, (1 - alpha_bar).sqrt())
        logits = density.log_prob(x_t[row].double()).sum((1, 2, 3))
        weights = (logits - logits.max()).exp()
        expected = (weights[:, None, None, None] * members).sum(0) / weights.sum()
        torch.testing.assert_close(mean[row].double(), expected, atol=1e-5, rtol=0)


def test_with_little_noise_nothing_changes_to_the_bit() -> None:
    images, t = pixels(30, size=32), torch.arange(30)
    x_0, eps, x_t = noised(images, t)
    mean, its_eps = PosteriorMean(images, None, SCHEDULE).explain(x_t, t, torch.arange(30), x_0, eps)
    assert torch.equal(mean, x_0)
    assert torch.equal(its_eps, eps)


def test_the_mean_and_its_eps_explain_the_same_x_t() -> None:
    images, t = pixels(64), torch.arange(64) * 15 + 30
    x_0, eps, x_t = noised(images, t)
    mean, its_eps = PosteriorMean(images, None, SCHEDULE).explain(x_t, t, torch.arange(64), x_0, eps)
    assert not torch.allclose(mean, x_0, atol=0.1)
    torch.testing.assert_close(SCHEDULE.q_sample(mean, t, its_eps), x_t, atol=2e-5, rtol=0)
    signal, noise = gather(SCHEDULE.alpha_bar.sqrt(), t, x_t), gather((1 - SCHEDULE.alpha_bar).sqrt(), t, x_t)
    torch.testing.assert_close(
        training_target(SCHEDULE, "v_prediction", mean, t, its_eps), (signal * x_t - mean) / noise, atol=2e-4, rtol=0
    )


def test_groups_hold_one_class_each_and_no_more_images_than_allowed() -> None:
    count = 2 * GROUP + 50
    labels = (torch.arange(count) < GROUP + 20).long()
    images = (labels * 255).to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    t = torch.full((count,), 999)
    _, _, x_t = noised(images, t)
    posterior_mean = PosteriorMean(images, labels, SCHEDULE)
    assert sorted(map(len, posterior_mean._groups)) == [128 + 10, 128 + 10, GROUP // 2 + 15, GROUP // 2 + 15]
    torch.testing.assert_close(posterior_mean(x_t, t, torch.arange(count)), to_model_range(images))


def test_target_has_the_mean_of_x_0_given_x_t_and_varies_less() -> None:
    # One pixel of two values: E[x_0 | x_t] is known, and both must have it, and the mean varies less.
    generator = torch.Generator().manual_seed(3)
    images = (torch.rand(20_000, 1, 1, 1, generator=generator) < 0.3).to(torch.uint8) * 255
    t = torch.full((20_000,), 600)
    x_0, eps, x_t = noised(images, t)
    mean, _ = PosteriorMean(images, None, SCHEDULE).explain(x_t, t, torch.arange(20_000), x_0, eps)
    signal, noise = SCHEDULE.alpha_bar[600].sqrt(), (1 - SCHEDULE.alpha_bar[600]).sqrt()
    odds = 0.3 / 0.7 * (2 * signal * x_t.double() / noise**2).exp()
    exact = 2 * odds / (1 + odds) - 1
    assert (mean - exact).mean().abs() < 0.02
    assert (mean - exact).square().mean() < (x_0 - exact).square().mean() / 100
