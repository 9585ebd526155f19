"""The latents of a data set."""

import torch
from torch import Tensor
from tqdm import tqdm

from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.pixels import to_model_range

BATCH = 64


@torch.no_grad()
def latents_of(autoencoder: Autoencoder, images: Tensor, device: torch.device) -> Tensor:
    """Encode images uint8 [N, C, H, W]: scaled latents float32 [N, c, h, w], on the device."""
    autoencoder = autoencoder.to(device)
    parts = tqdm(torch.split(images, BATCH), unit="batch", desc="latents", disable=None)
    return torch.cat([autoencoder.encode(to_model_range(part.to(device))) for part in parts])
