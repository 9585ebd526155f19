"""Many images to latents and back, in batches that fit the memory."""

from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.pixels import to_model_range

BATCH_PIXELS = 2**18  # 64 images of 64x64, or 4 of 256x256


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
