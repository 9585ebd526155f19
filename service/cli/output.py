"""Output of commands. On an error, a command prints one line to stderr and exits with 1.

Control characters are escaped, because text from a server or a file must not control the terminal.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import click

from tminus.service.startup.logs import printable

NO_PICTURES = frozenset(
    {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".zip", ".tar", ".gz", ".npy"}
)


def say(text: str) -> None:
    """Print lines to stdout. Control characters other than line ends are escaped."""
    click.echo("\n".join(map(printable, text.split("\n"))))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Return the lines of a table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, each, widths)).rstrip() for each in rows)


def say_json(document: dict[str, Any]) -> None:
    """Print a JSON document as one line of printable ASCII. Raises ValueError for NaN and infinity."""
    click.echo(json.dumps(document, allow_nan=False).replace("\x7f", "\\u007f"))


def fail(message: str) -> NoReturn:
    """Print one line to stderr and exit with 1."""
    click.echo(f"tminus: {printable(message)}", err=True)
    sys.exit(1)


@contextmanager
def failing_in_one_line(where: str = "") -> Iterator[None]:
    """Turn errors that a user can cause, such as a bad file or a full disk, into one line and exit with 1.

    where: the flag or file to name at the start of the line.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (OSError, ValueError)):
            import torch

            from tminus.model.files import CheckpointError
            from tminus.service.errors import ServiceError

            if not isinstance(error, (CheckpointError, ServiceError, torch.OutOfMemoryError)):
                raise
        fail(f"{where}: {error}" if where else str(error))


def check_png(option: str, file: Path, otherwise: str = "") -> None:
    """Fail if the name of an output file ends in the suffix of a format other than PNG."""
    if file.suffix.lower() in NO_PICTURES:
        fail(f"{option}: the file is a PNG, so give a name that ends in .png{otherwise}")


def make_folder(option: str, folder: Path) -> None:
    """Make a folder and its parents. option: the flag to name in the error message."""
    with failing_in_one_line(option):
        folder.mkdir(parents=True, exist_ok=True)


def write_file(option: str, file: Path, data: bytes) -> None:
    """Write a file. option: the flag to name in the error message."""
    with failing_in_one_line(option):
        file.write_bytes(data)
