"""The keys in force. Those of a file follow it: what is added or removed there holds within a second."""

import hmac
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from tminus.service.access.keys import MOST_BYTES, Key, digest_of, parse_keys

log = logging.getLogger(__name__)

LOOK_S = 1.0  # how often it is looked whether the file has changed


class KeyRing:
    """Owns the keys, in the event loop's thread; any may ask `up`. Raises ValueError for a bad file at the start."""

    def __init__(
        self, text: str | None = None, file: Path | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """text: keys that never change. file: keys that may. Neither: there are none."""
        self._fixed = parse_keys(text) if text is not None else ()
        self._file, self._clock = file, clock
        self._from_file: tuple[Key, ...] = ()
        self._seen: tuple[int, int, int] | None = None  # what tells one state of the file from another
        self._looked_s = clock()
        self._up = True
        if file is not None:
            self._read(file)

    @property
    def keys(self) -> tuple[Key, ...]:
        """Return all keys as they are now."""
        self._look()
        return self._fixed + self._from_file

    @property
    def up(self) -> bool:
        """False while the file cannot be read, or has a mistake, and what it said before holds. Any thread may ask."""
        self._look()
        return self._up

    def find(self, secret: str) -> Key | None:
        """The key of a secret. It takes the same time whichever it is, and whatever is wrong with it."""
        digest, found = digest_of(secret), None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _look(self) -> None:
        if self._file is None or self._clock() - self._looked_s < LOOK_S:
            return
        self._looked_s = self._clock()
        try:
            changed = _state(self._file) != self._seen
            if not changed and self._up:
                return
            self._read(self._file)
        except ValueError as error:
            if self._up:
                log.error("the keys stay as they were: %s", error)
            self._up = False
        else:
            self._up = True
            log.info("%s has %d keys now", self._file, len(self._from_file))

    def _read(self, file: Path) -> None:
        """Read the file. Raises ValueError, and then nothing has changed."""
        try:
            seen = _state(file)  # before its bytes: a change between the two is seen at the next look
            with file.open("rb") as opened:
                data = opened.read(MOST_BYTES + 1)
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror}") from None
        try:
            self._from_file = parse_keys(data.decode())
        except UnicodeDecodeError:
            raise ValueError(f"{file} is not UTF-8") from None
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        self._seen = seen


def _state(file: Path) -> tuple[int, int, int]:
    try:
        found = os.stat(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    return found.st_mtime_ns, found.st_size, found.st_ino
