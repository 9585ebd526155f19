"""Training an autoencoder: it learns, it resumes to the bit, and diffusers loads the run."""

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel

from tests.model.training.test_train import assert_same_bits, state_of, toy_images
from tminus.model.latent.autoencoder import VQ, Autoencoder, AutoencoderConfig, load_autoencoder
from tminus.model.pixels import to_model_range
from tminus.model.training.autoencoder import reconstruction_loss, train_autoencoder
from tminus.model.training.config import AutoencoderTrainConfig
from tminus.model.training.data import ImageSet

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MODEL = AutoencoderConfig(
    in_channels=1,
    out_channels=1,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    block_out_channels=(8, 8),
    norm_num_groups=4,
    latent_channels=2,
    sample_size=8,
    scaling_factor=1.0,
    num_vq_embeddings=16,
)
MODELS = {"kl": MODEL, "vq": dataclasses.replace(MODEL, kind=VQ)}
RUN = AutoencoderTrainConfig(steps=6, batch_size=4, learning_rate=2e-3, warmup_steps=2, precision="fp32", save_every=2)


def run(folder: Path, config: AutoencoderTrainConfig = RUN, model: AutoencoderConfig = MODEL, **kwargs: Any) -> bool:
    data: ImageSet = kwargs.pop("data", toy_images())
    return train_autoencoder(folder, data, model, config, device=CPU, **kwargs)


@pytest.mark.long
@pytest.mark.parametrize("kind", MODELS)
def test_it_learns(tmp_path: Path, kind: str) -> None:
    data, model = toy_images(24), MODELS[kind]
    x = to_model_range(data.images)
    run(tmp_path / "short", dataclasses.replace(RUN, steps=1), model, data=data)
    run(tmp_path / "long", dataclasses.replace(RUN, steps=150, batch_size=12, ema_decay=0.9), model, data=data)
    with torch.no_grad():
        before, after = (
            float((net.decode(net.encode(x)) - x).abs().mean())
            for net in (load_autoencoder(tmp_path / name) for name in ("short", "long"))
        )
    assert after < 0.5 * before


@pytest.mark.parametrize("kind", MODELS)
def test_an_interrupted_run_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    run(tmp_path / "whole", model=MODELS[kind])

    def stop(_: Autoencoder, step: int) -> None:
        signal.raise_signal(signal.SIGTERM)

    stopping = dataclasses.replace(RUN, sheet_every=3)
    assert not run(tmp_path / "stopped", stopping, MODELS[kind], on_sheet=stop)
    assert state_of(tmp_path / "stopped")["step"] == 3
    assert run(tmp_path / "stopped", model=MODELS[kind])
    for part in ("net", "ema", "optimizer", "step"):
        assert_same_bits(state_of(tmp_path / "whole")[part], state_of(tmp_path / "stopped")[part], part)


@pytest.mark.parametrize(("kind", "theirs"), [("kl", AutoencoderKL), ("vq", VQModel)])
def test_the_folder_of_a_run_is_one_of_diffusers(tmp_path: Path, kind: str, theirs: type[Any]) -> None:
    run(tmp_path, model=MODELS[kind])
    ours, loaded = load_autoencoder(tmp_path), theirs.from_pretrained(tmp_path)
    z = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = loaded.decode(z / loaded.config.scaling_factor).sample
        torch.testing.assert_close(ours.decode(z), wanted, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_formula() -> None:
    """float64: mean |x - x'| and KL(N(m, s^2) || N(0, 1)) by torch.distributions; for codes the two distances."""
    torch.manual_seed(0)
    net, x = Autoencoder(MODEL).double(), torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2 - 1
    mean, logvar = net.moments(x)
    assert logvar is not None
    of = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    kl = torch.distributions.kl_divergence(of, torch.distributions.Normal(torch.zeros_like(mean), 1.0)).mean()
    torch.manual_seed(1)
    loss = reconstruction_loss(net, x, 0.3)
    torch.manual_seed(1)
    decoded = net.decode_codes(mean + of.stddev * torch.randn_like(mean))
    torch.testing.assert_close(loss, (decoded.float() - x).abs().mean() + 0.3 * kl)

    quantised = Autoencoder(MODELS["vq"]).double()
    z, _ = quantised.moments(x)
    codes, numbers = quantised.quantize(z)  # type: ignore[misc]
    assert numbers.shape == (3, 4, 4)
    error = (quantised.decode_codes(codes).float() - x).abs().mean()
    torch.testing.assert_close(reconstruction_loss(quantised, x, 0.3), error + 1.25 * (codes - z).square().mean())
    reconstruction_loss(quantised, x, 0.0).backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in quantised.encoder.parameters())
