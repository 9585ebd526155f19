"""`tminus key`: makes an API key. The secret is printed once; the keys file contains only its hash."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from tminus.service.access.keys import MOST, NAME, ROLES, Key, KeyLimits, digest_of, new_secret, parse_keys, to_line
from tminus.service.cli.output import fail, say

LIMIT = click.IntRange(1, MOST)


@click.command(short_help="Make an API key.")
@click.argument("name")
@click.option(
    "--role",
    type=click.Choice(ROLES),
    show_default="sample",
    help="What the key may do: sample, or admin, which may also load and unload models",
)
@click.option(
    "--row-steps-per-minute",
    type=LIMIT,
    show_default="no limit",
    help="Row-steps that may start in a minute; a step with guidance counts twice",
)
@click.option("--jobs", type=LIMIT, show_default="no limit", help="Jobs that may wait or run at once")
@click.option("--connections", type=LIMIT, show_default="no limit", help="Requests that may be answered at once")
@click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File of keys, to which the line of the new key is added",
)
def key(name: str, role: Any, file: Path | None, **limits: int | None) -> None:
    """Make an API key for NAME, and print its secret.

    \b
      tminus key studio --row-steps-per-minute 60000 --file keys
      tminus key ops --role admin --file keys
      tminus serve --keys-file keys

    The file has one line for each key, with a hash instead of the secret. The secret is printed only once: give it to
    the client. Without --file, the line is printed below the secret. A running server reads a changed file by itself.

    Each server counts the limits separately: with several servers behind a proxy, each allows a key its full limits.

    To replace a key, run the command again for the same NAME and --file, without other options: the new key gets the
    role and the limits of the earlier key. Both keys are valid until you delete the earlier line.
    """
    if not NAME.fullmatch(name):
        fail(f"NAME must be 1 to 64 letters, digits, dots, dashes and underscores, got {name!r}")
    secret = new_secret()
    made = Key(name, role or "sample", digest_of(secret), KeyLimits(**limits))
    if file is None:
        say(f"{secret}\n{to_line(made)}")
        return
    is_bare = role is None and made.limits == KeyLimits()
    try:
        add(file.resolve(), made, like_the_earlier=is_bare)
    except ValueError as error:
        fail(f"{file}: {error}")
    except OSError as error:
        fail(f"{file}: {error.strerror}")
    say(secret)


def add(file: Path, key: Key, *, like_the_earlier: bool) -> None:
    """Add a key to a file. The file is replaced atomically, so a server never reads half of it.

    A lock makes other commands wait. like_the_earlier: copy the role and limits of the earlier key with the same name.
    Raises OSError, or ValueError if the file would be invalid.
    """
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = file.read_text("utf-8") if file.exists() else ""
        if like_the_earlier and before.strip():
            earlier = next((each for each in parse_keys(before) if each.name == key.name), key)
            key = Key(key.name, earlier.role, key.digest, earlier.limits)
        after = f"{before}\n" if before and not before.endswith("\n") else before
        after += f"{to_line(key)}\n"
        parse_keys(after)
        _replace(file, after)
    finally:
        os.close(folder)


def _replace(file: Path, text: str) -> None:
    """Replace a file atomically, and keep its owner and permissions. Only the owner can read a new file."""
    before = file.stat() if file.exists() else None
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with os.fdopen(os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            if before is not None:
                os.fchmod(opened.fileno(), before.st_mode & 0o777)
                with suppress(PermissionError):  # only root may change the owner
                    os.fchown(opened.fileno(), before.st_uid, before.st_gid)
            os.fsync(opened.fileno())
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)
