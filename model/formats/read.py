"""Read a file of another project: find its format, and bring it into ours."""

import shutil
from pathlib import Path

from tminus.model.checkpoint import check_channels, check_shapes, load_checkpoint, save_checkpoint
from tminus.model.files import CheckpointError
from tminus.model.formats import ddpm, dome272, lucidrains, openai
from tminus.model.formats.converted import Converted
from tminus.model.formats.given import Given
from tminus.model.weights import hash_weights, read_file, to_float32

FORMATS = (openai, ddpm, dome272, lucidrains)


def read_foreign(file: Path, given: Given) -> Converted:
    """Read a checkpoint that is one file. Raises CheckpointError, MissingFacts, and ValueError for what was given."""
    state = read_file(file, part_of=lucidrains.weights_of)
    if all(key.startswith("module.") for key in state):  # as DistributedDataParallel writes it
        state = {key.removeprefix("module."): value for key, value in state.items()}
    found = next((each for each in FORMATS if each.recognises(state)), None)
    if found is None:
        names = ", ".join(each.FORMAT for each in FORMATS)
        raise CheckpointError(f"{file}: of no format that is known ({names}); its first weight is {min(state)!r:.100}")
    try:
        converted: Converted = found.convert(state, given)
    except (KeyError, IndexError) as error:  # the rest of the file is not as its format has it
        raise CheckpointError(f"{file}: looks like {found.FORMAT}, but {error} is not there") from error
    check_shapes(file, converted.state, converted.unet)
    check_channels(file, converted.unet, converted.noise)
    return converted


def convert_file(file: Path, folder: Path, given: Given) -> Converted:
    """Write a foreign file as a checkpoint folder, which must be new or empty. Raises as `read_foreign` does."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already; name a new folder")
    converted = read_foreign(file, given)
    state = to_float32(file, converted.state)
    origin = {"converted_from": file.name, "format": converted.format, "weights_hash": hash_weights(state)}
    try:
        save_checkpoint(folder, state, converted.unet, converted.noise, converted.labels, origin)
        load_checkpoint(folder)  # whatever cannot be served is told now
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return converted
