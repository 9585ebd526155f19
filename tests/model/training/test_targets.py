"""What networks learn to predict: stable targets by their formulas, and guidance that runs of `train` fold in."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.model.training.test_train import CONDITIONAL, CPU, NOISE, RUN, assert_same_run, latent_run, run, toy_images
from tests.tiny import TINY
from tminus.model.catalogue import Recommended
from tminus.model.checkpoint import load_checkpoint
from tminus.model.loss import training_target
from tminus.model.noise import NoiseConfig, gather
from tminus.model.pixels import to_model_range
from tminus.model.training.data import Examples
from tminus.model.training.run import TrainError
from tminus.model.training.targets import Batch, StableTarget
from tminus.model.training.train import train

pytestmark = pytest.mark.slow

SCHEDULE, V = NoiseConfig().schedule(), NoiseConfig(prediction_type="v_prediction")


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What guidance is folded into: a run without any."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    assert run(folder)
    return folder


GUIDED = dataclasses.replace(RUN, guidance=3.0)


def test_run_with_guidance_learns_what_the_weights_it_began_with_predict_with_it(
    straight: Path, tmp_path: Path
) -> None:
    folder, teacher = tmp_path / "guided", load_checkpoint(straight).net
    fast = dataclasses.replace(GUIDED, steps=60, batch_size=16, learning_rate=4e-3, decay_fraction=0.5, ema_decay=0.9)
    config = dataclasses.replace(fast, class_dropout=0.3)
    assert run(folder, config, unet=dataclasses.replace(CONDITIONAL, dropout=0.0), init_from=straight)
    learned = load_checkpoint(folder)
    t, x_0 = torch.arange(64) * 49 // 63, to_model_range(toy_images(64).images)
    x_t = NOISE.schedule().q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0)))
    labels, null = torch.arange(64) % 2, torch.full((64,), 2)
    with torch.no_grad():
        plain, without_class = teacher(x_t, t, labels), teacher(x_t, t, null)
        wanted = without_class + 3 * (plain - without_class)  # Ho & Salimans 2022, eq. 6, w = 2
        error = (learned.net(x_t, t, labels) - wanted).square().mean() / (plain - wanted).square().mean()
        error_of_null = (learned.net(x_t, t, null) - without_class).square().mean() / without_class.square().mean()
    assert error < 0.24
    assert error_of_null < 0.04, "a request may guide it further"
    assert learned.folded_guidance == 3


def test_run_with_guidance_resumes_to_the_bit_without_the_weights_it_began_with(straight: Path, tmp_path: Path) -> None:
    shutil.copytree(straight, tmp_path / "origin")
    assert run(tmp_path / "straight", GUIDED, init_from=tmp_path / "origin")
    run(tmp_path / "stopped", dataclasses.replace(GUIDED, steps=3), init_from=tmp_path / "origin")
    shutil.rmtree(tmp_path / "origin")
    (tmp_path / "stopped" / "tminus.json").unlink()
    assert run(tmp_path / "stopped", GUIDED)
    assert_same_run(tmp_path / "straight", tmp_path / "stopped")
    assert load_checkpoint(tmp_path / "stopped").folded_guidance == 3


@pytest.mark.parametrize(
    "recommended", [{"sampler": "dpmpp_2m", "steps": 20, "guidance": 1.5}, {"sampler": "tuned", "steps": 3}, None]
)
def test_guidance_that_is_folded_is_recommended_no_more(
    straight: Path, tmp_path: Path, recommended: dict[str, object] | None
) -> None:
    shutil.copytree(straight, tmp_path / "origin")
    meta = json.loads((straight / "tminus.json").read_text("utf-8"))
    meta["recommended"] = recommended
    (tmp_path / "origin" / "tminus.json").write_text(json.dumps(meta), "utf-8")
    config = dataclasses.replace(GUIDED, steps=1, guidance=1.5)
    assert run(tmp_path / "run", config, init_from=tmp_path / "origin")
    assert load_checkpoint(tmp_path / "run").recommended == Recommended("dpmpp_2m", 20)
    assert run(tmp_path / "run", dataclasses.replace(config, steps=2))
    assert load_checkpoint(tmp_path / "run").recommended == Recommended("dpmpp_2m", 20), "a resumed run says so too"


def test_guidance_that_cannot_be_folded_is_refused(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(TrainError, match=r"guidance must be 1 \(off\) without --init-from, got 3"):
        run(folder, GUIDED)
    with pytest.raises(TrainError, match="stable_target is for targets from the data, and with guidance they are"):
        run(folder, dataclasses.replace(GUIDED, flip=False, stable_target=True), init_from=straight)
    bare = dataclasses.replace(toy_images(), labels=None, class_names=())
    with pytest.raises(TrainError, match=r"guidance must be 1 \(off\) for data without classes, got 3"):
        train(folder, bare, TINY, NOISE, GUIDED, device=CPU, init_from=straight)
    with pytest.raises(
        TrainError, match="class_dropout must be above 0 with guidance, or the null class is not learned"
    ):
        run(folder, dataclasses.replace(GUIDED, class_dropout=0.0), init_from=straight)
    assert not folder.exists()
    data = toy_images()
    other_heads = dataclasses.replace(CONDITIONAL, attention_head_dim=4)  # no weight would show it
    other_kind = dataclasses.replace(NOISE, prediction_type="v_prediction")
    other_noise = dataclasses.replace(NOISE, beta_end=0.1)
    for named, unet, noise, has, got in (
        (("right", "left"), CONDITIONAL, NOISE, r"class_names \('left', 'right'\)", r"\('right', 'left'\)"),
        (data.class_names, other_heads, NOISE, "attention_head_dim 8", "4"),
        (data.class_names, CONDITIONAL, other_kind, "prediction_type 'epsilon'", "'v_prediction'"),
        (data.class_names, CONDITIONAL, other_noise, "noise schedule .*'beta_end': 0.2.*", ".*'beta_end': 0.1.*"),
    ):
        of_names = dataclasses.replace(data, class_names=named)
        with pytest.raises(
            TrainError, match=f"straight: has {has}, and a run with guidance must have the same, got {got}"
        ):
            train(folder, of_names, unet, noise, GUIDED, device=CPU, init_from=straight)
    shutil.copytree(straight, tmp_path / "all-classes")
    meta = json.loads((straight / "tminus.json").read_text("utf-8"))
    all_classes = {**meta, "class_names": ["left", "right", "middle"], "null_class": None, "recommended": None}
    (tmp_path / "all-classes" / "tminus.json").write_text(json.dumps(all_classes), "utf-8")
    with pytest.raises(TrainError, match="all-classes: has no null class, and a run with guidance needs one"):
        run(folder, GUIDED, init_from=tmp_path / "all-classes")
    for bad in (-1.0, 50.5, float("nan")):
        with pytest.raises(ValueError, match=rf"guidance must be in 0\.\.50, got {bad}"):
            dataclasses.replace(RUN, guidance=bad)


def test_guidance_is_folded_on_the_latents_of_the_same_autoencoder_alone(tmp_path: Path) -> None:
    plain = dataclasses.replace(RUN, flip=False, steps=2)
    other = latent_run(tmp_path / "origin", plain)
    guided = dataclasses.replace(plain, guidance=3.0, precision="bf16")
    latent_run(tmp_path / "guided", guided, init_from=tmp_path / "origin")
    assert load_checkpoint(tmp_path / "guided").folded_guidance == 3
    other.decoder.conv_out.bias.data += 1
    with pytest.raises(
        TrainError, match=r"origin: has autoencoder '.*', and a run with guidance must have the same, got"
    ):
        latent_run(tmp_path / "refused", guided, init_from=tmp_path / "origin", autoencoder=other)


def pixels(count: int, size: int = 4) -> Tensor:
    return torch.randint(0, 256, (count, 1, size, size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def stable(x_0: Tensor, labels: Tensor | None = None) -> StableTarget:
    return StableTarget(Examples(x_0, labels), NoiseConfig(), SCHEDULE)


def noised(images: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x_0 = to_model_range(images)
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(2))
    return x_0, eps, SCHEDULE.q_sample(x_0, t, eps)


@pytest.mark.parametrize("t", [100, 999])
@pytest.mark.parametrize("latents", [False, True])
def test_mean_is_that_of_the_images_of_its_class_by_their_densities_in_float64(t: int, latents: bool) -> None:
    images, labels = pixels(40), torch.arange(40) % 3
    of_rows = torch.full((40,), t)
    x_0, _, x_t = noised(images, of_rows)
    mean = stable(x_0 if latents else images, labels).mean(x_t, of_rows, torch.arange(40))
    alpha_bar = SCHEDULE.alpha_bar[t]
    for row in range(40):
        members = x_0[labels == labels[row]].double()
        density = torch.distributions.Normal(alpha_bar.sqrt() * members, (1 - alpha_bar).sqrt())
        logits = density.log_prob(x_t[row].double()).sum((1, 2, 3))
        weights = (logits - logits.max()).exp()
        expected = (weights[:, None, None, None] * members).sum(0) / weights.sum()
        torch.testing.assert_close(mean[row].double(), expected, atol=1e-5, rtol=0)


def test_the_mean_and_its_eps_explain_the_same_x_t() -> None:
    images, t = pixels(64), torch.arange(64) * 15 + 30
    x_0, eps, x_t = noised(images, t)
    mean, _, its_eps = stable(images).explain(Batch(x_0, t, eps, x_t, None, torch.arange(64)))
    assert not torch.allclose(mean, x_0, atol=0.1)
    torch.testing.assert_close(SCHEDULE.q_sample(mean, t, its_eps), x_t, atol=2e-5, rtol=0)
    signal, noise = gather(SCHEDULE.alpha_bar.sqrt(), t, x_t), gather((1 - SCHEDULE.alpha_bar).sqrt(), t, x_t)
    torch.testing.assert_close(
        training_target(V, SCHEDULE, mean, t, its_eps),
        (signal * x_t - mean) / noise,
        atol=2e-4,
        rtol=0,
    )


def test_target_has_the_mean_of_x_0_given_x_t_and_varies_less() -> None:
    # One pixel of two values: E[x_0 | x_t] is known, and both must have it, and the mean varies less.
    generator = torch.Generator().manual_seed(3)
    images = (torch.rand(20_000, 1, 1, 1, generator=generator) < 0.3).to(torch.uint8) * 255
    t = torch.full((20_000,), 600)
    x_0, eps, x_t = noised(images, t)
    mean, _, _ = stable(images).explain(Batch(x_0, t, eps, x_t, None, torch.arange(20_000)))
    signal, noise = SCHEDULE.alpha_bar[600].sqrt(), (1 - SCHEDULE.alpha_bar[600]).sqrt()
    odds = 0.3 / 0.7 * (2 * signal * x_t.double() / noise**2).exp()
    exact = 2 * odds / (1 + odds) - 1
    assert (mean - exact).mean().abs() < 0.02
    assert (mean - exact).square().mean() < (x_0 - exact).square().mean() / 100
