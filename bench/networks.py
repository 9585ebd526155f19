"""The published configurations of large networks, written as checkpoints with random weights. Nothing is downloaded.

They lie in build/networks/. What a pass costs does not depend on the weights; the images are noise.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from bench.result_file import ROOT
from tminus.model.checkpoint import Labels, save_checkpoint
from tminus.model.files import read_json
from tminus.model.latent.autoencoder import VQ, Autoencoder, AutoencoderConfig
from tminus.model.noise import NoiseConfig
from tminus.model.unet import UNet2D
from tminus.model.unet_config import UNetConfig

FOLDER = ROOT / "build" / "networks"
SEED = 0


@dataclass(frozen=True, slots=True)
class Network:
    """What a checkpoint is made of, beside its weights."""

    unet: UNetConfig
    noise: NoiseConfig
    autoencoder: AutoencoderConfig | None = None


def _of_ho(sample_size: int, widths: tuple[int, ...], attends: int) -> UNetConfig:
    """A network of Ho et al. 2020 as its port to diffusers has it, with attention on one level."""
    down = ["DownBlock2D"] * len(widths)
    down[attends] = "AttnDownBlock2D"
    return UNetConfig(
        sample_size=sample_size,
        block_out_channels=widths,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        attention_head_dim=None,
        downsample_padding=0,
        norm_eps=1e-6,
        freq_shift=1,
        flip_sin_to_cos=False,
    )


_LATENT_NOISE = NoiseConfig(
    beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, clip_sample=False, default_sampler="ddim"
)

PUBLISHED = {
    # google/ddpm-cifar10-32: 35.7 M parameters
    "cifar": Network(_of_ho(32, (128, 256, 256, 256), attends=1), NoiseConfig(variance_type="fixed_large")),
    # google/ddpm-celebahq-256: 113.7 M
    "celebahq": Network(_of_ho(256, (128, 128, 256, 256, 512, 512), attends=4), NoiseConfig()),
    # CompVis/ldm-celebahq-256: 274 M, and a decoder
    "ldm": Network(
        UNetConfig(sample_size=64, attention_head_dim=32),
        _LATENT_NOISE,
        AutoencoderConfig(
            kind=VQ,
            block_out_channels=(128, 256, 512),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=2,
            latent_channels=3,
            sample_size=256,
            num_vq_embeddings=8192,
            scaling_factor=1.0,
        ),
    ),
}
TINY = {  # in which a program that measures can be tried in seconds
    "tiny": Network(_of_ho(16, (32, 32), attends=1), NoiseConfig()),
    "tiny-ldm": Network(
        UNetConfig(
            sample_size=8,
            block_out_channels=(32, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        _LATENT_NOISE,
        AutoencoderConfig(
            kind=VQ,
            block_out_channels=(32, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=3,
            sample_size=16,
            num_vq_embeddings=16,
            scaling_factor=1.0,
        ),
    ),
}
NETWORKS = PUBLISHED | TINY


def folders(text: str) -> dict[str, Path]:
    """Read a list of networks, by name or as folders of checkpoints.

    Raises SystemExit for others, and for two of one name.
    """
    found: dict[str, Path] = {}
    for name in text.split(","):
        if name not in NETWORKS and not Path(name).is_dir():
            raise SystemExit(f"networks must be of {','.join(NETWORKS)}, or folders of checkpoints, got {name!r}")
        folder = write(name) if name in NETWORKS else Path(name).resolve()
        if folder.name in found:
            raise SystemExit(f"networks must have names of their own, got {folder.name!r} twice")
        found[folder.name] = folder
    return found


def write(name: str, parent: Path = FOLDER) -> Path:
    """Return the folder of a network, which is written if it is not there as it is described here."""
    network, folder = NETWORKS[name], parent / name
    config = folder / "unet" / "config.json"
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"  # what is written last
    if weights.is_file() and UNetConfig.from_dict(read_json(config)) == network.unet:
        return folder
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        net = UNet2D(network.unet)
        autoencoder = Autoencoder(network.autoencoder) if network.autoencoder is not None else None
    folder.mkdir(parents=True, exist_ok=True)
    provenance = {"weights": f"random, torch's seed {SEED}"}
    save_checkpoint(
        folder, net.state_dict(), network.unet, network.noise, Labels(), provenance, autoencoder=autoencoder
    )
    return folder
