"""A U-Net of diffusers without a scheduler: `UNet2DModel.save_pretrained`, or a repository of which only unet/ came."""

import dataclasses
from pathlib import Path

from tminus.model.files import CheckpointError, read_json
from tminus.model.formats.converted import Converted, numbered
from tminus.model.formats.given import Given
from tminus.model.latent.folder import find_autoencoder
from tminus.model.layout import check_pipeline, find_scheduler
from tminus.model.networks.registry import read_net_config
from tminus.model.unet_config import UNetConfig
from tminus.model.weights import load_state_dict

FORMAT = "diffusers' UNet2DModel without a scheduler"


def is_bare(folder: Path) -> bool:
    """Whether a folder holds a network, and nothing that says how its noise was made."""
    return (_network(folder) / "config.json").is_file() and not find_scheduler(folder).is_file()


def read(folder: Path, given: Given) -> Converted:
    """Read such a folder. Raises CheckpointError, MissingFacts, and FactsError."""
    check_pipeline(folder)
    if find_autoencoder(folder) is not None:
        raise CheckpointError(f"{folder}: a latent model without its scheduler, which is served only with it")
    try:
        config = read_net_config(read_json(_network(folder) / "config.json"))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if not isinstance(config, UNetConfig):
        raise CheckpointError(f"{folder}: a {config.class_name} without its scheduler; convert its file again")
    learned = config.out_channels == 2 * config.in_channels
    needed = given.needed_for_noise(learned=learned) + (["image_size"] if config.size_px is None else [])
    given.check(f"a folder of {FORMAT}", needed, given.taken_for_noise())
    if config.size_px is None:
        config = dataclasses.replace(config, sample_size=given.image_size)
    noise, labels = given.noise(learned=learned), numbered(config.num_class_embeds)
    return Converted(FORMAT, config, load_state_dict(_network(folder)), noise, labels, given.noise_notes(noise))


def _network(folder: Path) -> Path:
    return folder / "unet" if (folder / "unet").is_dir() else folder
