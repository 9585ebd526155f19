"""Autoencoders against diffusers': the same weights, the same latents, the same images."""

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from tests.model.latent.folders import make_autoencoder
from tminus.model.latent.autoencoder import Autoencoder, AutoencoderConfig, colours_of, fit_colours

KINDS = {
    "kl": lambda: AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 24),
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.7,
        shift_factor=0.2,
    ),
    "kl without the small convolutions": lambda: AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        in_channels=1,
        out_channels=1,
    ),
    "vq": lambda: VQModel(
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(8, 16),
        norm_num_groups=8,
        latent_channels=3,
        num_vq_embeddings=64,
        vq_embed_dim=2,
        scaling_factor=1.3,
        act_fn="silu",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_encodes_and_decodes_as_diffusers_does(kind: str) -> None:
    torch.manual_seed(1)
    theirs = KINDS[kind]().eval()
    for parameter in theirs.parameters():  # codes lie near zero at first, and all convolutions alike
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    config = AutoencoderConfig.from_dict(dict(theirs.config) | {"_class_name": type(theirs).__name__})
    ours = Autoencoder(config).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.rand(3, config.in_channels, 32, 32) * 2 - 1
    with torch.no_grad():
        encoded = theirs.encode(images)
        z = encoded.latents if kind == "vq" else encoded.latent_dist.mean
        shift = config.shift_factor
        latents = (z - shift) * config.scaling_factor
        decoded = theirs.decode(latents / config.scaling_factor + shift).sample
        assert ours.encode(images).shape == (3, config.channels, 32 // config.factor, 32 // config.factor)
        assert off(ours.encode(images), latents) < 1e-5
        assert off(ours.decode(latents), decoded) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_that_is_written_is_read_by_diffusers(kind: str) -> None:
    theirs = KINDS[kind]()
    config = AutoencoderConfig.from_dict(dict(theirs.config) | {"_class_name": type(theirs).__name__})
    again = type(theirs).from_config(config.to_dict())
    assert AutoencoderConfig.from_dict(dict(again.config) | {"_class_name": type(theirs).__name__}) == config


def off(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the scale."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def test_the_map_is_found_again_where_the_encoder_is_linear() -> None:
    """With an encoder that takes means of pixels times a matrix, the map is the inverse."""
    theirs, matrix = make_autoencoder("kl"), torch.tensor([[2.0, 0, 0], [0, 0.5, 0.5], [1, 0, -1]])
    made = Autoencoder(AutoencoderConfig.from_dict(dict(theirs.config) | {"_class_name": "AutoencoderKL"}))  # type: ignore[call-overload]

    def encode(images: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,bjhw->bihw", matrix, torch.nn.functional.avg_pool2d(images, 2)) + 0.25

    made.encode = encode  # type: ignore[method-assign]
    images = torch.rand(1, 3, 1, 1).expand(1, 3, 16, 16).contiguous() * 2 - 1
    torch.testing.assert_close(colours_of(encode(images), fit_colours(made), 2), images, atol=2e-3, rtol=0)
