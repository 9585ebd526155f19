"""Latent checkpoints: read as diffusers wrote them, written as it reads them, and refused where they are damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, LDMPipeline, VQModel

from tests.model.latent.folders import make_autoencoder, save_latent_pipeline
from tests.tiny import TINY
from tminus.model.checkpoint import Labels, load_checkpoint, save_checkpoint
from tminus.model.files import CheckpointError
from tminus.model.formats.conversion import GivenFacts
from tminus.model.formats.read import read_foreign
from tminus.model.latent.autoencoder import load_autoencoder, save_autoencoder
from tminus.model.noise import NoiseConfig
from tminus.model.weights import hash_weights

Damage = Callable[[Path], object]


@pytest.mark.parametrize("kind", ["vq", "kl"])
def test_a_pipeline_of_diffusers_is_read_whole(tmp_path: Path, kind: str) -> None:
    pipeline = save_latent_pipeline(tmp_path, kind, scaling_factor=0.5)
    found = load_checkpoint(tmp_path)
    assert (found.image_shape, found.row_shape, found.size_px) == ((3, 16, 16), (3, 8, 8), (16, 16))
    assert found.autoencoder is not None
    assert found.autoencoder.config.scaling_factor == 0.5
    assert not found.noise.clip_sample
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(found.net(x, t), pipeline.unet(x, t).sample, rtol=1e-5, atol=1e-5)
        theirs = pipeline.vqvae.decode(x / 0.5).sample
        torch.testing.assert_close(found.autoencoder.decode(x), theirs, rtol=1e-5, atol=1e-5)


def test_what_is_written_diffusers_reads(tmp_path: Path) -> None:
    save_latent_pipeline(tmp_path / "theirs", "kl")
    found = load_checkpoint(tmp_path / "theirs")
    save_checkpoint(
        tmp_path / "ours",
        found.net.state_dict(),
        found.net.config,
        found.noise,
        found.labels,
        {},
        autoencoder=found.autoencoder,
    )
    again = load_checkpoint(tmp_path / "ours")
    assert again.weights_hash == found.weights_hash
    theirs = LDMPipeline.from_pretrained(tmp_path / "ours")
    assert type(theirs.vqvae) is AutoencoderKL
    z = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        wanted = theirs.vqvae.decode(z / theirs.vqvae.config.scaling_factor).sample
        torch.testing.assert_close(found.autoencoder.decode(z), wanted, rtol=1e-5, atol=1e-5)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["vqvae", "vae"])
def test_a_model_of_pixels_is_not_written_beside_an_autoencoder(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=f"has an autoencoder in {name}/"):
        save_checkpoint(tmp_path, {}, TINY, NoiseConfig(), Labels(), {})
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_an_autoencoder_alone_is_a_folder_of_diffusers(tmp_path: Path) -> None:
    make_autoencoder("vq").save_pretrained(tmp_path / "theirs")  # type: ignore[operator]
    autoencoder = load_autoencoder(tmp_path / "theirs")
    save_autoencoder(tmp_path / "ours", autoencoder.config, autoencoder.state_dict())
    assert hash_weights(load_autoencoder(tmp_path / "ours").state_dict()) == hash_weights(autoencoder.state_dict())
    assert VQModel.from_pretrained(tmp_path / "ours").config.num_vq_embeddings == autoencoder.config.num_vq_embeddings


def test_the_weights_and_the_scale_of_the_autoencoder_count(tmp_path: Path) -> None:
    hashes = []
    for kind, scale in (("vq", 1.0), ("vq", 2.0), ("kl", 1.0)):
        save_latent_pipeline(tmp_path / f"{kind}{scale}", kind, scaling_factor=scale)
        hashes.append(load_checkpoint(tmp_path / f"{kind}{scale}").weights_hash)
    assert len(set(hashes)) == 3


def edit(file: Path, **fields: object) -> None:
    """Set fields of a JSON file; None takes one out."""
    values = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def config(**fields: object) -> Damage:
    return lambda folder: edit(folder / "vqvae/config.json", **fields)


DAMAGED: dict[str, tuple[Damage, str]] = {
    "no autoencoder": (lambda f: shutil.rmtree(f / "vqvae"), "LDMPipeline without its autoencoder"),
    "another network": (config(_class_name="AutoencoderTiny"), "_class_name must be VQModel or AutoencoderKL"),
    "other widths": (config(block_out_channels=[8, 32]), "wrong shape of"),
    "one width": (config(block_out_channels=16), "block_out_channels must be a list"),
    "a scale of 400 digits": (config(scaling_factor=10**400), "scaling_factor must be"),
    "groups that do not divide": (config(norm_num_groups=3), r"multiples of norm_num_groups \(3\)"),
    "blocks of another kind": (
        config(down_block_types=["DownBlock2D"] * 2),
        "down_block_types must be a list of 2 names",
    ),
    "spatial norms": (config(norm_type="spatial"), "norm_type='spatial' is not served"),
    "a field nobody knows": (config(wavelets=True), "wavelets=True is not served"),
    "a U-Net of other channels": (
        lambda f: edit(f / "vqvae/config.json", vq_embed_dim=5),
        "wrong shape of|only 5 channels in",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_one_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    save_latent_pipeline(tmp_path)
    act, says = DAMAGED[damage]
    act(tmp_path)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_latent_model_without_its_scheduler_is_not_made_one_of_pixels(tmp_path: Path) -> None:
    save_latent_pipeline(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    given = GivenFacts(timesteps=1000, beta_schedule="linear", prediction="epsilon", variance="fixed_small")
    with pytest.raises(CheckpointError, match="a latent model without its scheduler"):
        read_foreign(tmp_path, given)
