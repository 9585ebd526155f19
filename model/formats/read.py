"""Reads checkpoints of other projects: recognises their format, and converts them."""

import dataclasses
import shutil
from pathlib import Path

from tminus.model.checkpoint import (
    check_channels,
    check_pipeline,
    find_scheduler,
    fitting_network,
    load_checkpoint,
    save_checkpoint,
    unet_folder_of,
)
from tminus.model.files import CheckpointError, first_line, read_json
from tminus.model.formats import ddpm, dome272, lucidrains, openai
from tminus.model.formats.conversion import Converted, FactsError, GivenFacts, MissingFacts, numbered
from tminus.model.latent.autoencoder import find_autoencoder
from tminus.model.networks import read_net_config
from tminus.model.unet_config import UNetConfig
from tminus.model.weights import hash_weights, load_state_dict, read_file, to_float32

BARE = "diffusers' UNet2DModel without a scheduler"
FORMATS = (openai, ddpm, dome272, lucidrains)


def is_bare(folder: Path) -> bool:
    """Return whether a folder has a network but no scheduler."""
    return (unet_folder_of(folder) / "config.json").is_file() and not find_scheduler(folder).is_file()


def read_bare(folder: Path, given: GivenFacts) -> Converted:
    """Read a diffusers U-Net without a scheduler: from `save_pretrained`, or a repository's unet/ folder.

    Raises CheckpointError, MissingFacts, and FactsError.
    """
    check_pipeline(folder)
    if find_autoencoder(folder) is not None:
        raise CheckpointError(f"{folder}: a latent model without its scheduler, which is served only with it")
    try:
        config = read_net_config(read_json(unet_folder_of(folder) / "config.json"))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    if not isinstance(config, UNetConfig):
        raise CheckpointError(f"{folder}: a {config.class_name} without its scheduler; convert its file again")
    learned = config.out_channels == 2 * config.in_channels
    needed = given.needed_for_noise(learned=learned) + (["image_size"] if config.size_px is None else [])
    given.check(f"a folder of {BARE}", needed, given.taken_for_noise())
    if config.size_px is None:
        config = dataclasses.replace(config, sample_size=given.image_size)
    noise, labels = given.noise(learned=learned), numbered(config.num_class_embeds)
    return Converted(BARE, config, load_state_dict(unet_folder_of(folder)), noise, labels, given.noise_notes(noise))


def read_foreign(path: Path, given: GivenFacts) -> Converted:
    """Read a checkpoint that is a single file, or a folder without a scheduler.

    Raises CheckpointError, MissingFacts, and FactsError.
    """
    if path.is_dir() and not is_bare(path):
        raise CheckpointError(f"{path}: a folder that tminus reads as it is, if at all: tminus inspect {path}")
    converted = read_bare(path, given) if path.is_dir() else _read_file(path, given)
    fitting_network(path, converted.state, converted.unet, "its architecture")
    check_channels(path, converted.unet, converted.noise)
    return converted


def _read_file(file: Path, given: GivenFacts) -> Converted:
    state = read_file(file, part_of=lucidrains.weights_of)
    if all(key.startswith("module.") for key in state):  # added by DistributedDataParallel
        state = {key.removeprefix("module."): value for key, value in state.items()}
    found = next((each for each in FORMATS if each.recognises(state)), None)
    if found is None:
        names = ", ".join(each.FORMAT for each in FORMATS)
        raise CheckpointError(f"{file}: of no known format ({names}); its first weight is {min(state)!r:.100}")
    if flat := [key for key, value in state.items() if value.ndim == 0]:
        raise CheckpointError(f"{file}: looks like {found.FORMAT}, but {flat[0]!r:.100} is a single number")
    try:
        converted: Converted = found.convert(state, given)
    except MissingFacts as error:
        raise MissingFacts(f"{file}: {error.what}", error.names) from error
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    except FactsError:
        raise
    except ValueError as error:  # The file and the facts do not make a valid network or schedule.
        raise CheckpointError(f"{file}: looks like {found.FORMAT}, but {first_line(error)}") from error
    except KeyError as error:
        raise CheckpointError(f"{file}: looks like {found.FORMAT}, but {error} is not there") from error
    except (IndexError, TypeError, RuntimeError) as error:
        what = "the shapes of its weights are not those of that format"
        raise CheckpointError(f"{file}: looks like {found.FORMAT}, but {what}") from error
    return converted


def convert(source: Path, folder: Path, given: GivenFacts) -> Converted:
    """Convert a foreign checkpoint, and write it to a new or empty folder that tminus can load.

    Raises CheckpointError if the folder is not empty, and the errors of `read_foreign`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already; name a new folder")
    converted = read_foreign(source, given)
    state = to_float32(source, converted.state)
    origin = {"converted_from": source.resolve().name, "format": converted.format, "weights_hash": hash_weights(state)}
    try:
        save_checkpoint(folder, state, converted.unet, converted.noise, converted.labels, origin)
        load_checkpoint(folder)  # Fail now if the result cannot be loaded.
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return converted
