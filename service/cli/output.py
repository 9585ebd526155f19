"""How commands end and write: a failure is one clear line on stderr and exit code 1, never a traceback."""

import sys
from pathlib import Path
from typing import NoReturn

import click


def fail(message: str) -> NoReturn:
    """Print one line to stderr and exit with 1."""
    click.echo(f"tminus: {message}", err=True)
    sys.exit(1)


def make_folder(option: str, folder: Path) -> None:
    """Make a folder and its parents; `option` names the flag in the line of a failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"{option}: {error}")


def write_file(option: str, file: Path, data: bytes) -> None:
    """Write a file; `option` names the flag in the line of a failure."""
    try:
        file.write_bytes(data)
    except OSError as error:
        fail(f"{option}: {error}")
