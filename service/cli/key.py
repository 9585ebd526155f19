"""`tminus key`: make an API key. Its secret is shown once; a server keeps its hash."""

import os
from pathlib import Path
from typing import Any

import click

from tminus.service.access.keys import MOST, NAME, ROLES, Key, KeyLimits, digest_of, new_secret, parse_keys, to_line
from tminus.service.cli.output import fail, say

LIMIT = click.IntRange(1, MOST)


@click.command()
@click.argument("name")
@click.option("--role", type=click.Choice(ROLES), default="sample", help="admin may also load and unload models")
@click.option("--row-steps-per-minute", type=LIMIT, show_default="no limit", help="a guided step counts twice")
@click.option("--jobs", type=LIMIT, show_default="no limit", help="that wait or run at once")
@click.option("--connections", type=LIMIT, show_default="no limit", help="requests that are answered at once")
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="add its line to this file of keys")
def key(name: str, role: Any, file: Path | None, **limits: int | None) -> None:
    """Make an API key for NAME, and print its secret.

    With --file its line is added to that file, which a server reads again by itself; without, it is printed below the
    secret. Run it again for the same NAME to replace a key: both are valid until the old line is deleted.
    """
    if not NAME.fullmatch(name):
        fail(f"NAME must be 1 to 64 letters, digits, dots, dashes and underscores, got {name!r}")
    secret = new_secret()
    line = to_line(Key(name, role, digest_of(secret), KeyLimits(**limits)))
    if file is None:
        say(f"{secret}\n{line}")
        return
    try:
        add_line(file, line)
    except ValueError as error:
        fail(f"{file}: {error}")
    except OSError as error:
        fail(f"{file}: {error.strerror}")
    say(secret)


def add_line(file: Path, line: str) -> None:
    """Add a line to a file of keys, in one step, so that a server never reads half of it.

    Raises ValueError for what would be no file of keys, and OSError.
    """
    before = file.read_text("utf-8") if file.exists() else ""
    after = f"{before}\n" if before and not before.endswith("\n") else before
    after += f"{line}\n"
    parse_keys(after)
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        mode = file.stat().st_mode & 0o777 if file.exists() else 0o600
        with os.fdopen(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode), "w", encoding="utf-8") as opened:
            opened.write(after)
            opened.flush()
            os.fsync(opened.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
