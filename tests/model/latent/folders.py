"""Folders of latent models as diffusers writes them, small and of random weights."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

from tests.tiny import randomize

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}


def make_autoencoder(kind: str = "vq", **fields: Any) -> torch.nn.Module:
    """A VQModel (vq) or an AutoencoderKL (kl): images of 16x16, latents of 8x8."""
    torch.manual_seed(3)
    made = {"vq": VQModel, "kl": AutoencoderKL}[kind](**BLOCKS | {"latent_channels": 3, "sample_size": 16} | fields)
    randomize(made, 1)
    if kind == "vq":  # spread like latents, so that which code is nearest does not hang on a bit
        made.quantize.embedding.weight.data.normal_()
    return made.eval()


def save_latent_pipeline(
    folder: Path, kind: str = "vq", *, classes: int | None = None, scheduler: Any = None, **fields: Any
) -> LDMPipeline:
    """An LDMPipeline of random weights, saved."""
    autoencoder = make_autoencoder(kind, **fields)
    channels = autoencoder.config.latent_channels
    unet = UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        num_class_embeds=classes,
    )
    randomize(unet, 2)
    scheduler = scheduler or DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False)
    pipeline = LDMPipeline(vqvae=autoencoder, unet=unet.eval(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(folder)
    return pipeline
