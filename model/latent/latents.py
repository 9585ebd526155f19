"""Many images to latents and back, in batches that fit the memory; and roughly what latents look like, for previews."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.pixels import to_model_range

BATCH_PIXELS = 2**18  # 64 images of 64x64, or 4 of 256x256
IMAGES, CELLS, LATENTS = 32, 4, 8  # images of each kind, of CELLS x CELLS patches, LATENTS latents a side
TINT = 0.25  # of greys, at most
RIDGE = 1e-3  # keeps the fit finite where a channel of the latents says nothing about colours


@torch.no_grad()
def latents_of(autoencoder: Autoencoder, images: Tensor, device: torch.device) -> Tensor:
    """Encode images uint8 [N, C, H, W]: scaled latents float32 [N, c, h, w] on the device. It moves the autoencoder."""
    autoencoder = autoencoder.to(device)
    parts = list(_batches(images, images.shape[2] * images.shape[3]))
    progress = tqdm(parts, unit="batch", desc="latents", disable=None if len(parts) > 100 else True)
    return torch.cat([autoencoder.encode(to_model_range(part.to(device))) for part in progress])


@torch.no_grad()
def images_of(autoencoder: Autoencoder, latents: Tensor) -> Tensor:
    """Decode scaled latents [N, c, h, w]: images [N, C, H, W] in about [-1, 1], where the latents are."""
    autoencoder = autoencoder.to(latents.device)
    pixels = latents.shape[2] * latents.shape[3] * autoencoder.config.factor**2
    return torch.cat([autoencoder.decode(part) for part in _batches(latents, pixels)])


def _batches(values: Tensor, pixels: int) -> Iterator[Tensor]:
    yield from torch.split(values, max(1, BATCH_PIXELS // pixels))


@torch.no_grad()
def fit_colours(autoencoder: Autoencoder) -> Tensor:
    """Fit the mean colour of a latent's square of pixels to the latent: [C, c + 1], the last column the constant.

    No data is needed: the images are patches of random colours, of greys with a tint, and of black and white, always
    the same ones. On avatars-64 the mean error of a colour is then 0.150 of a range of 2, as with the best linear map
    of its own images; colours alone give 0.19, and smooth ones 0.22.
    """
    config, generator = autoencoder.config, torch.Generator().manual_seed(0)

    def draw(channels: int, side: int = CELLS) -> Tensor:
        return torch.rand(IMAGES, channels, side, side, generator=generator) * 2 - 1

    colours, greys, tints = draw(config.in_channels), draw(1), TINT * draw(config.in_channels, 1)
    black_and_white = draw(1).sign().expand_as(colours)
    patches = torch.cat([colours, (greys + tints).clamp(-1, 1), black_and_white])
    images = F.interpolate(patches, size=LATENTS * config.factor, mode="nearest")
    latents = autoencoder.encode(images).movedim(1, -1).flatten(0, -2).double()  # [N, c]
    wanted = F.avg_pool2d(images, config.factor).movedim(1, -1).flatten(0, -2).double()  # [N, C]
    known = F.pad(latents, (0, 1), value=1.0)
    square = known.T @ known + RIDGE * torch.eye(known.shape[1], dtype=torch.float64)
    fitted: Tensor = torch.linalg.solve(square, known.T @ wanted).T.float()
    return fitted


def colours_of(latents: Tensor, fitted: Tensor, factor: int) -> Tensor:
    """Latents [B, c, h, w] as pictures [B, C, h factor, w factor] in about [-1, 1], each a square of one colour."""
    flat = F.conv2d(latents, fitted[:, :-1, None, None], fitted[:, -1])
    return F.interpolate(flat, scale_factor=float(factor), mode="nearest")
