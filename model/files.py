"""Read size-limited JSON files and write files atomically. Any file in a checkpoint folder may be damaged."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

WEIGHTS_NAME = "diffusion_pytorch_model"  # diffusers' file name for weights, without suffix
AUTOENCODERS = ("vqvae", "vae")  # folder names: vqvae in LDMPipeline, vae in other pipelines
MAX_MESSAGE = 1000  # in characters
MAX_JSON_BYTES = 8 * 2**20


class CheckpointError(Exception):
    """A checkpoint folder is invalid or not supported. The message names the file and the problem.

    Long messages are truncated, because they may quote a file of several megabytes.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…")


def read_json(file: Path, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError if the file is missing, too large or not a JSON object."""
    if not file.is_file():
        raise CheckpointError(f"{file}: missing")
    if file.stat().st_size > most_bytes:
        raise CheckpointError(f"{file}: larger than {most_bytes} bytes")
    try:
        value = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file}: not JSON ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{file}: not JSON that can be read, it is nested too deeply") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: must hold a JSON object")
    return value


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, cut to 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def write_atomically(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file by writing to a temporary file, syncing it and renaming it.

    Readers see either the old content or the new content, even after a crash.
    """
    temporary = file.with_name(f".{file.name}.part")  # fixed name: the next write replaces a leftover file
    try:
        write(temporary)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(file: Path, data: bytes) -> None:
    """Write bytes to a file atomically."""
    write_atomically(file, lambda path: path.write_bytes(data))


def write_text(file: Path, text: str) -> None:
    """Write text to a file atomically, encoded as UTF-8."""
    write_bytes(file, text.encode("utf-8", errors="replace"))


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object to a file atomically."""
    write_text(file, json.dumps(value, indent=2) + "\n")
