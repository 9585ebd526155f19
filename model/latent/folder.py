"""Read and write the folder of an autoencoder, in diffusers' layout: config.json and its weights."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tminus.model.files import WEIGHTS_NAME, CheckpointError, first_line, read_json, write_atomically, write_json
from tminus.model.latent.autoencoder import Autoencoder, AutoencoderConfig
from tminus.model.weights import hash_weights, load_state_dict, misfit, to_float32

FOLDERS = ("vqvae", "vae")  # in a checkpoint: LDMPipeline's name for it, whatever its class, and that of others


def find_autoencoder(folder: Path) -> Path | None:
    """Where a checkpoint's autoencoder is; None where it has none, as a pixel model."""
    return next((folder / name for name in FOLDERS if (folder / name).is_dir()), None)


def check_place(folder: Path, autoencoder: Autoencoder | None) -> None:
    """Raise CheckpointError where a model of pixels would lie beside an autoencoder, with which it would be served."""
    if autoencoder is None and (found := find_autoencoder(folder)) is not None:
        why = f"has an autoencoder in {found.name}/, and this model is one of pixels"
        raise CheckpointError(f"{folder}: {why}; remove it or choose another folder")


def load_autoencoder(folder: Path) -> Autoencoder:
    """Load an autoencoder in float32 on the CPU, in eval mode. Raises CheckpointError."""
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
    return autoencoder.requires_grad_(False).eval()


def with_autoencoder(weights_hash: str, autoencoder: Autoencoder | None) -> str:
    """The hash of all weights of a checkpoint: a network's, and those of its autoencoder where it has one."""
    if autoencoder is None:
        return weights_hash
    return hashlib.sha256(f"{weights_hash} {hash_autoencoder(autoencoder)}".encode()).hexdigest()


def hash_autoencoder(autoencoder: Autoencoder) -> str:
    """Hash its weights and its config, of which the scale of the latents is as much a part of it."""
    parts = hash_weights(autoencoder.state_dict()), json.dumps(autoencoder.config.to_dict(), sort_keys=True)
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def save_autoencoder(folder: Path, config: AutoencoderConfig, state: Mapping[str, Tensor]) -> None:
    """Write a folder that tminus and diffusers load. Each file appears whole or not."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().to("cpu", torch.float32).contiguous() for key, value in state.items()}
    weights = folder / f"{WEIGHTS_NAME}.safetensors"
    write_atomically(weights, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    write_json(folder / "config.json", config.to_dict())  # last: where it is, the folder is whole
