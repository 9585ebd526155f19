"""API keys: the format of a key file, and the keys in force.

    NAME ROLE sha256:HEX [row-steps-per-minute=N] [jobs=N] [connections=N]

A line holds only the hash of a secret. A secret has 256 random bits, so it cannot be guessed, and its SHA-256 hash does
not reveal it. Only passwords chosen by people need a salt and a slow hash. Changes to a key file take effect within a
second.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tminus.service.errors import short

log = logging.getLogger(__name__)

Role = Literal["sample", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
HASH = re.compile(r"sha256:([0-9a-f]{64})")
MOST_KEYS, MOST_BYTES = 1000, 2**20  # limits on a key file: every request compares its secret with all keys
MOST = 10**12  # upper bound of each limit in a key
LOOK_S = 1.0  # seconds between checks of the key file for changes
PREFIX = "tm_"  # prefix of every secret, so that scanners for leaked secrets can recognize it


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Limits of one API key name, the same for all its keys. None means no limit."""

    row_steps_per_minute: int | None = None  # a guided step counts twice
    jobs: int | None = None  # accepted jobs that have not ended
    connections: int | None = None  # requests in progress; a stream counts only while it has a job


@dataclass(frozen=True, slots=True)
class Key:
    """One line of a key file. Keys may share a name, so that a secret can be replaced without downtime."""

    name: str
    role: Role
    digest: bytes  # SHA-256 of the secret
    limits: KeyLimits = KeyLimits()


def new_secret() -> str:
    """Return a new random secret."""
    return PREFIX + secrets.token_urlsafe(32)


def digest_of(secret: str) -> bytes:
    """Return the hash that is stored for a secret. Accepts any text, even an invalid secret."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def to_line(key: Key) -> str:
    """Return the line of a key file for a key."""
    limits = [
        f"{field.replace('_', '-')}={value}"
        for field in KeyLimits.__dataclass_fields__
        if (value := getattr(key.limits, field)) is not None
    ]
    return " ".join((key.name, key.role, f"sha256:{key.digest.hex()}", *limits))


def parse_keys(text: str) -> tuple[Key, ...]:
    """Parse keys, one per line. Ignore empty lines and text after #.

    Raises ValueError, with the line number if a single line is malformed. The message never contains text that may be
    a secret.
    """
    if len(text.encode("utf-8", "replace")) > MOST_BYTES:
        raise ValueError(f"keys may take at most {MOST_BYTES} bytes")
    keys: list[Key] = []
    for number, line in enumerate(text.splitlines(), 1):
        if words := line.partition("#")[0].split():
            try:
                keys.append(_parse(words))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
    _check_together(keys)
    return tuple(keys)


def _parse(words: list[str]) -> Key:
    if len(words) < 3:
        raise ValueError(f"a key is NAME ROLE sha256:HEX and its limits, got {len(words)} words")
    name, role, digest, *limits = words
    if not NAME.fullmatch(name):
        raise ValueError("a name has 1 to 64 letters, digits, dots, dashes and underscores")
    known = next((each for each in ROLES if each == role), None)
    if known is None:
        raise ValueError(f"the role of {name} must be {' or '.join(ROLES)}, got {short(role, 20)!r}")
    if (hashed := HASH.fullmatch(digest)) is None:
        raise ValueError(f"the hash of {name} must be sha256: and 64 hexadecimal digits; `tminus key` makes one")
    return Key(name, known, bytes.fromhex(hashed[1]), _parse_limits(name, limits))


def _parse_limits(name: str, words: list[str]) -> KeyLimits:
    limits: dict[str, int] = {}
    names = {field.replace("_", "-"): field for field in KeyLimits.__dataclass_fields__}
    for word in words:
        limit, equals, value = word.partition("=")
        if not equals or limit not in names:
            raise ValueError(f"{name} has no limit {short(limit, 40)!r}; known: {', '.join(names)}, each with =N")
        if names[limit] in limits:
            raise ValueError(f"{limit} of {name} is given twice")
        if not (value.isascii() and value.isdecimal() and len(value) <= 13 and 1 <= int(value) <= MOST):
            raise ValueError(f"{limit} of {name} must be an integer in 1..{MOST}, got {short(value, 40)!r}")
        limits[names[limit]] = int(value)
    return KeyLimits(**limits)


def _check_together(keys: list[Key]) -> None:
    if not keys:
        raise ValueError("there is no key in it")
    if len(keys) > MOST_KEYS:
        raise ValueError(f"at most {MOST_KEYS} keys, got {len(keys)}")
    first: dict[str, Key] = {}
    names: dict[bytes, str] = {}
    for key in keys:
        before = first.setdefault(key.name, key)
        if (before.role, before.limits) != (key.role, key.limits):
            raise ValueError(f"two lines of {key.name} differ in role or limits")
        if names.setdefault(key.digest, key.name) != key.name:
            raise ValueError(f"{key.name} has the secret of {names[key.digest]}")


class KeyRing:
    """Owns the keys in force. Used only in the event loop's thread, except for `up`."""

    def __init__(
        self, text: str | None = None, file: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """text: keys that never change. file: a key file that may change. Give at most one. Raises ValueError."""
        assert text is None or file is None
        self._file, self._clock = file, clock
        self._keys = parse_keys(text) if text is not None else ()
        self._seen: tuple[int, int, int] | None = None  # mtime, size and inode of the file
        self._looked_s = clock()
        self._up = True
        if file is not None:
            self._read(file)

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys in force. The file is read again if it has changed."""
        self._look()
        return self._keys

    @property
    def up(self) -> bool:
        """False while the key file is unreadable or invalid. The earlier keys stay in force. Thread-safe."""
        self._look()
        return self._up

    def find(self, secret: str) -> Key | None:
        """Return the key with this secret, or None. The time taken does not depend on whether a key matches."""
        digest, found = digest_of(secret), None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _look(self) -> None:
        if self._file is None or self._clock() - self._looked_s < LOOK_S:
            return
        self._looked_s, was_up = self._clock(), self._up
        try:
            has_changed = self._read(self._file)
        except ValueError as error:
            self._up = False
            if was_up:
                log.error("the keys stay as they were: %s", error)
        else:
            self._up = True
            if has_changed or not was_up:
                log.info("%s has %d keys now", self._file, len(self._keys))

    def _read(self, file: Path) -> bool:
        """Read the file if it has changed, and return whether it has.

        On failure, keep the keys and raise ValueError.
        """
        try:
            state = os.stat(file)  # before the read, so that the next check notices a change during the read
            seen = state.st_mtime_ns, state.st_size, state.st_ino
            if seen == self._seen:
                return False
            with file.open("rb") as opened:
                data = opened.read(MOST_BYTES + 1)
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from None
        try:
            self._keys = parse_keys(data.decode())
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        self._seen = seen
        return True
