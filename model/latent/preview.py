"""What latents look like, roughly: a linear map to colours, for previews. The true picture takes the decoder."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tminus.model.latent.autoencoder import Autoencoder

IMAGES, CELLS, LATENTS = 32, 4, 8  # images of CELLS x CELLS colours that run into each other, LATENTS latents a side
RIDGE = 1e-3  # keeps the fit finite where a channel of the latents says nothing about colours


@torch.no_grad()
def fit_colours(autoencoder: Autoencoder) -> Tensor:
    """Fit the mean colour of a latent's square of pixels to the latent: [C, c + 1], the last column the constant.

    No data is needed: the images are smooth patches of random colours, always the same ones.
    """
    config, generator = autoencoder.config, torch.Generator().manual_seed(0)
    patches = torch.rand(IMAGES, config.in_channels, CELLS, CELLS, generator=generator) * 2 - 1
    images = F.interpolate(patches, size=LATENTS * config.factor, mode="bilinear")
    latents = autoencoder.encode(images).movedim(1, -1).flatten(0, -2).double()  # [N, c]
    colours = F.avg_pool2d(images, config.factor).movedim(1, -1).flatten(0, -2).double()  # [N, C]
    known = F.pad(latents, (0, 1), value=1.0)
    square = known.T @ known + RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
    fitted: Tensor = torch.linalg.solve(square, known.T @ colours).T.float()
    return fitted


def colours_of(latents: Tensor, fitted: Tensor, factor: int) -> Tensor:
    """Latents [B, c, h, w] as pictures [B, C, h factor, w factor] in about [-1, 1], each a square of one colour."""
    flat = F.conv2d(latents, fitted[:, :-1, None, None], fitted[:, -1])
    return F.interpolate(flat, scale_factor=float(factor), mode="nearest")
