"""How commands end and write: a failure is one clear line on stderr and exit code 1, never a traceback.

What a server or a file says is shown with its control characters escaped, so that none of them reaches the terminal.
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
    """Print lines to stdout."""
    click.echo("\n".join(map(printable, text.split("\n"))))


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lay rows out as the lines of a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, each, widths)).rstrip() for each in rows)


def say_json(document: dict[str, Any]) -> None:
    """Print a document for programs, on one line, in printable ASCII alone. Raises ValueError for NaN and infinity."""
    click.echo(json.dumps(document, allow_nan=False).replace("\x7f", "\\u007f"))


def fail(message: str) -> NoReturn:
    """Print one line to stderr and exit with 1."""
    click.echo(f"tminus: {printable(message)}", err=True)
    sys.exit(1)


@contextmanager
def failing_in_one_line(where: str = "") -> Iterator[None]:
    """End in one line where the block raises what a user can bring about: a bad file or value, a full disk or GPU.

    where: what stands before the message, as the flag or the file that it is about.
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
    """Fail where the name of a file to be written says that it is something else than a PNG."""
    if file.suffix.lower() in NO_PICTURES:
        fail(f"{option}: what is written is PNG, so give a name that ends in .png{otherwise}")


def make_folder(option: str, folder: Path) -> None:
    """Make a folder and its parents; `option` names the flag in the line of a failure."""
    with failing_in_one_line(option):
        folder.mkdir(parents=True, exist_ok=True)


def write_file(option: str, file: Path, data: bytes) -> None:
    """Write a file; `option` names the flag in the line of a failure."""
    with failing_in_one_line(option):
        file.write_bytes(data)
