"""Read and write the folder of an autoencoder, in diffusers' layout: config.json and its weights."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tminus.model.files import CheckpointError, first_line, read_json, write_atomically, write_json
from tminus.model.latent.autoencoder import Autoencoder
from tminus.model.latent.config import AutoencoderConfig
from tminus.model.weights import WEIGHTS_NAME, hash_weights, load_state_dict, misfit, to_float32

FOLDERS = ("vqvae", "vae")  # in a checkpoint: LDMPipeline's name for it, whatever its class, and that of others


def load_autoencoder(folder: Path) -> tuple[Autoencoder, str]:
    """Load an autoencoder in float32 on the CPU, in eval mode, and the hash of its weights. Raises CheckpointError."""
    try:
        config = AutoencoderConfig.from_dict(read_json(folder / "config.json"))
        with torch.device("meta"):
            autoencoder = Autoencoder(config)
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: {first_line(error)}") from error
    state = load_state_dict(folder)
    if wrong := misfit(state, autoencoder):
        raise CheckpointError(f"{folder}: {wrong}")
    state = to_float32(folder, state)
    autoencoder.load_state_dict(state, assign=True)
    return autoencoder.requires_grad_(False).eval(), hash_weights(state)


def save_autoencoder(folder: Path, config: AutoencoderConfig, state: Mapping[str, Tensor]) -> None:
    """Write a folder that tminus and diffusers load. Each file appears whole or not."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}
    write_json(folder / "config.json", config.to_dict())
    weights = folder / f"{WEIGHTS_NAME}.safetensors"
    write_atomically(weights, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
