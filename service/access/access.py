"""Identifies the caller of a request by its secret, and tracks each caller's usage."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cachetools import TTLCache

from tminus.service.access.keys import KeyLimits, KeyRing, Role
from tminus.service.errors import AdminOff, Forbidden, QuotaExceeded, TooManyLogins, Unauthorized

ANYBODY = ""  # name of callers without a key
WINDOW_S = 60
PIXELS_PER_ROW_STEP = 2**20  # decoding this many pixels of an upload costs one row-step; each scan of an image counts
# After this many wrong keys from one address, /login refuses the address for WINDOW_S seconds. Wrong keys in headers
# are not limited, because one program with a wrong key would lock out all clients at its address.
MOST_WRONG_LOGINS = 10
MOST_ADDRESSES = 4096  # addresses whose wrong logins are remembered
AT_ONCE = 4  # concurrent requests for job images per name; further requests wait


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a name's row-step quota at one moment."""

    quota: int
    left: int
    full_in_s: int  # seconds until the quota is full again if nothing more is used


@dataclass(slots=True)
class Usage:
    """Usage under one API key name. An empty bucket of row-steps refills evenly within a minute."""

    at_s: float
    row_steps: float = 0.0  # missing from the bucket at `at_s`; may exceed a full bucket after one large job
    connections: int = 0
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))  # limits requests for images


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request, and the caller's limits. Used only in the event loop's thread."""

    name: str
    role: Role
    limits: KeyLimits
    usage: Usage  # shared by all callers with this name
    clock: Callable[[], float]

    @property
    def sees(self) -> str | None:
        """Owner whose jobs the caller may see: the caller's own name, or None for every owner."""
        return None if self.role == "admin" else self.name

    @property
    def allowance(self) -> Allowance | None:
        """Row-steps that are left now, or None if there is no limit."""
        if (quota := self.limits.row_steps_per_minute) is None:
            return None
        used = self._used(quota)
        return Allowance(quota, max(0, math.floor(quota - used)), math.ceil(used / quota * WINDOW_S))

    @contextmanager
    def charged(self, row_steps: int, jobs: int) -> Iterator[None]:
        """Charge a job's row-steps. Refund them if the `with` block raises. Raises QuotaExceeded.

        jobs: number of unfinished jobs under this name. A job that costs more than the whole quota needs a full bucket,
        and leaves the bucket in debt. Every job can thus start, and the average usage stays within the quota.
        """
        self.check(row_steps, jobs)
        if self.limits.row_steps_per_minute is None:
            yield
            return
        self.usage.row_steps += row_steps
        try:
            yield
        except BaseException:
            self.usage.row_steps = max(0.0, self.usage.row_steps - row_steps)
            raise

    def pay_for_decoding(self, pixels: int) -> None:
        """Charge row-steps for decoding an upload, even if the decoding fails. Raises QuotaExceeded.

        pixels: the pixels of all images, times the scans of each.
        """
        with self.charged(math.ceil(pixels / PIXELS_PER_ROW_STEP), 0):
            pass

    def check(self, row_steps: int, jobs: int) -> None:
        """Raise QuotaExceeded if `charged` would raise it. Charge nothing."""
        if (most := self.limits.jobs) is not None and jobs >= most:
            raise QuotaExceeded("jobs", f"at most {most} jobs that have not ended", jobs, 1)
        if (quota := self.limits.row_steps_per_minute) is None:
            return
        used = self._used(quota)
        missing = used + min(row_steps, quota) - quota
        if missing > 0:
            bound = f"at most {quota} row-steps a minute, of which {max(0, math.floor(quota - used))} are left"
            raise QuotaExceeded("row_steps", bound, row_steps, math.ceil(missing / quota * WINDOW_S))

    @contextmanager
    def connected(self) -> Iterator[None]:
        """Count a connection for the duration of the `with` block. Raises QuotaExceeded."""
        usage, most = self.usage, self.limits.connections
        if most is not None and usage.connections >= most:
            raise QuotaExceeded("connections", f"at most {most} connections at once", usage.connections + 1, 1)
        usage.connections += 1
        try:
            yield
        finally:
            usage.connections -= 1

    def _used(self, quota: int) -> float:
        """Refill the bucket up to the current time. Return how many row-steps it lacks."""
        usage, now_s = self.usage, self.clock()
        usage.row_steps = max(0.0, usage.row_steps - max(0.0, now_s - usage.at_s) * quota / WINDOW_S)
        usage.at_s = now_s
        return usage.row_steps


class Access:
    """Owns the usage of each name, and the addresses that sent wrong keys. Used only in the event loop's thread."""

    def __init__(
        self, keys: KeyRing | None = None, *, is_open: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """is_open: give callers without a key the role `sample`."""
        self._keys, self.is_open, self._clock = keys or KeyRing(), is_open, clock
        self._usage: dict[str, Usage] = {}
        self._wrong_logins: TTLCache[str, int] = TTLCache(MOST_ADDRESSES, WINDOW_S, clock)  # keyed by address

    @property
    def keys_up(self) -> bool:
        """False while the key file is unreadable or invalid."""
        return self._keys.up

    @property
    def has_keys(self) -> bool:
        """True if the server has keys. Without keys, the server ignores credentials in requests."""
        return bool(self._keys.keys)

    def with_secret(self, secret: str) -> Caller:
        """Return the caller who has this secret. Raises Unauthorized if no key matches."""
        if (key := self._keys.find(secret)) is None:
            raise Unauthorized("the server does not know this key")
        return self._caller(key.name, key.role, key.limits)

    def login(self, secret: str, address: str) -> Caller:
        """Return the caller whose secret was entered on the login page. Raises Unauthorized and TooManyLogins."""
        wrong = self._wrong_logins.get(address, 0)
        if wrong >= MOST_WRONG_LOGINS:
            raise TooManyLogins(MOST_WRONG_LOGINS, WINDOW_S)
        try:
            return self.with_secret(secret)
        except Unauthorized:
            self._wrong_logins[address] = wrong + 1
            raise

    def without_secret(self) -> Caller:
        """Return the caller of a request without a key. Raises Unauthorized if a key is required."""
        if not self.is_open:
            raise Unauthorized
        return self._caller(ANYBODY, "sample", KeyLimits())

    def check_admin(self, caller: Caller) -> None:
        """Raise AdminOff, Unauthorized or Forbidden if the caller may not change the server."""
        if caller.role == "admin":
            return
        if all(key.role != "admin" for key in self._keys.keys):
            raise AdminOff
        raise Unauthorized("this needs a key of the role admin") if caller.name == ANYBODY else Forbidden(caller.name)

    def _caller(self, name: str, role: Role, limits: KeyLimits) -> Caller:
        usage = self._usage.setdefault(name, Usage(self._clock()))
        return Caller(name, role, limits, usage, self._clock)
