"""Callers of the server: finds the caller of a request by its secret, and counts the caller's usage."""

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
PIXELS_PER_ROW_STEP = 2**20  # pixels of a decoded upload per row-step
# After this number of wrong keys from one address, /login refuses the address for WINDOW_S. Wrong keys in headers are
# not limited: one program with a wrong key would lock out all clients of its address.
MOST_WRONG_LOGINS = 10
MOST_ADDRESSES = 4096  # remembered addresses with wrong logins
AT_ONCE = 4  # requests for job images at once per name; further requests wait


@dataclass(frozen=True, slots=True)
class Allowance:
    """The remaining row-steps of a quota, row_steps_per_minute, at one moment."""

    quota: int
    left: int
    full_in_s: int  # seconds until the quota is full again without further usage


@dataclass(slots=True)
class Usage:
    """The usage of one name. Row-steps come from a bucket that refills evenly within a minute."""

    at_s: float
    row_steps: float = 0.0  # missing in the bucket at `at_s`; more than a full bucket after one large job
    connections: int = 0
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))  # bounds requests for images


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request and the caller's limits. Used in the event loop's thread only."""

    name: str
    role: Role
    limits: KeyLimits
    usage: Usage  # shared by all callers of this name
    clock: Callable[[], float]

    @property
    def sees(self) -> str | None:
        """The owner whose jobs the caller may see: the caller's name, or None for the jobs of all owners."""
        return None if self.role == "admin" else self.name

    @property
    def allowance(self) -> Allowance | None:
        """The row-steps that are left now; None without a limit."""
        if (quota := self.limits.row_steps_per_minute) is None:
            return None
        used = self._used(quota)
        return Allowance(quota, max(0, math.floor(quota - used)), math.ceil(used / quota * WINDOW_S))

    @contextmanager
    def charged(self, row_steps: int, jobs: int) -> Iterator[None]:
        """Charge the row-steps of a job. An exception in the block undoes the charge. Raises QuotaExceeded.

        jobs: number of unfinished jobs of this name. A job above the quota needs a full bucket, and the excess is
        a debt. So every job can start, and the average usage stays within the quota.
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
        """Charge the decoding of an upload as row-steps, even if decoding fails. Raises QuotaExceeded."""
        with self.charged(math.ceil(pixels / PIXELS_PER_ROW_STEP), 0):
            pass

    def check(self, row_steps: int, jobs: int) -> None:
        """Raise QuotaExceeded if `charged` would."""
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
        """Count a connection during the block. Raises QuotaExceeded."""
        usage, most = self.usage, self.limits.connections
        if most is not None and usage.connections >= most:
            raise QuotaExceeded("connections", f"at most {most} connections at once", usage.connections + 1, 1)
        usage.connections += 1
        try:
            yield
        finally:
            usage.connections -= 1

    def _used(self, quota: int) -> float:
        """Refill the bucket up to now. Return the row-steps that are missing in the bucket."""
        usage, now_s = self.usage, self.clock()
        usage.row_steps = max(0.0, usage.row_steps - max(0.0, now_s - usage.at_s) * quota / WINDOW_S)
        usage.at_s = now_s
        return usage.row_steps


class Access:
    """Owns the usage of each name and the addresses that tried wrong keys. Used in the event loop's thread only."""

    def __init__(
        self, keys: KeyRing | None = None, *, is_open: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """is_open: allow callers without a key to sample."""
        self._keys, self.is_open, self._clock = keys or KeyRing(), is_open, clock
        self._usage: dict[str, Usage] = {}
        self._wrong_logins: TTLCache[str, int] = TTLCache(MOST_ADDRESSES, WINDOW_S, clock)  # counts by address

    @property
    def keys_up(self) -> bool:
        """True if the keys in force match their file."""
        return self._keys.up

    @property
    def has_keys(self) -> bool:
        """True if the server has keys. Without keys, the server ignores credentials in requests."""
        return bool(self._keys.keys)

    def with_secret(self, secret: str) -> Caller:
        """Return the caller with this secret. Raises Unauthorized."""
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
