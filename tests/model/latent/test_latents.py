"""Previews of latents: a linear map whose colours are near the true ones."""

import torch

from tests.model.latent.folders import make_autoencoder
from tminus.model.latent.autoencoder import Autoencoder, AutoencoderConfig, colours_of, fit_colours


def autoencoder() -> Autoencoder:
    theirs = make_autoencoder("kl")
    made = Autoencoder(AutoencoderConfig.from_dict(dict(theirs.config) | {"_class_name": "AutoencoderKL"}))  # type: ignore[call-overload]
    made.load_state_dict(theirs.state_dict())
    return made.eval()


def test_the_map_is_found_again_where_the_encoder_is_linear() -> None:
    """With an encoder that takes means of pixels times a matrix, the map is the inverse."""
    made, matrix = autoencoder(), torch.tensor([[2.0, 0, 0], [0, 0.5, 0.5], [1, 0, -1]])

    def encode(images: torch.Tensor) -> torch.Tensor:
        return torch.einsum("ij,bjhw->bihw", matrix, torch.nn.functional.avg_pool2d(images, 2)) + 0.25

    made.encode = encode  # type: ignore[method-assign]
    images = torch.rand(1, 3, 1, 1).expand(1, 3, 16, 16).contiguous() * 2 - 1
    torch.testing.assert_close(colours_of(encode(images), fit_colours(made), 2), images, atol=2e-3, rtol=0)
