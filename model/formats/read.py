"""Read a checkpoint that is not served as it is: find its format, and bring it into ours."""

import shutil
from pathlib import Path

from tminus.model.checkpoint import check_channels, check_shapes, load_checkpoint, save_checkpoint
from tminus.model.files import CheckpointError, first_line
from tminus.model.formats import bare, ddpm, dome272, lucidrains, openai
from tminus.model.formats.converted import Converted
from tminus.model.formats.given import FactsError, Given, MissingFacts
from tminus.model.weights import hash_weights, read_file, to_float32

FORMATS = (openai, ddpm, dome272, lucidrains)


def read_foreign(path: Path, given: Given) -> Converted:
    """Read a checkpoint that is one file, or a folder without a scheduler.

    Raises CheckpointError, MissingFacts, and FactsError for what was given.
    """
    if path.is_dir() and not bare.is_bare(path):
        raise CheckpointError(f"{path}: a folder that tminus reads as it is, if at all: tminus inspect {path}")
    converted = bare.read(path, given) if path.is_dir() else _read_file(path, given)
    check_shapes(path, converted.state, converted.unet, "its architecture")
    check_channels(path, converted.unet, converted.noise)
    return converted


def _read_file(file: Path, given: Given) -> Converted:
    state = read_file(file, part_of=lucidrains.weights_of)
    if all(key.startswith("module.") for key in state):  # as DistributedDataParallel writes it
        state = {key.removeprefix("module."): value for key, value in state.items()}
    found = next((each for each in FORMATS if each.recognises(state)), None)
    if found is None:
        names = ", ".join(each.FORMAT for each in FORMATS)
        raise CheckpointError(f"{file}: of no format that is known ({names}); its first weight is {min(state)!r:.100}")
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
    except ValueError as error:  # of a config: what the file and the facts make is no network, or no noise
        raise CheckpointError(f"{file}: looks like {found.FORMAT}, but {first_line(error)}") from error
    except (KeyError, IndexError, TypeError, RuntimeError) as error:  # its weights are not as its format has them
        what = f"{error} is not there" if isinstance(error, KeyError) else first_line(error)
        raise CheckpointError(f"{file}: looks like {found.FORMAT}, but {what}") from error
    return converted


def convert(source: Path, folder: Path, given: Given) -> Converted:
    """Write a foreign checkpoint as a folder of ours, which must be new or empty. Raises as `read_foreign` does."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists already; name a new folder")
    converted = read_foreign(source, given)
    state = to_float32(source, converted.state)
    origin = {"converted_from": source.resolve().name, "format": converted.format, "weights_hash": hash_weights(state)}
    try:
        save_checkpoint(folder, state, converted.unet, converted.noise, converted.labels, origin)
        load_checkpoint(folder)  # whatever cannot be served is told now
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return converted
