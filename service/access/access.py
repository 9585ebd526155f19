"""Who asks, by the secret that came with a request: a name with a role, its limits, and what it has used of them."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from cachetools import TTLCache

from tminus.service.access.keys import KeyLimits, KeyRing, Role
from tminus.service.errors import AdminOff, Forbidden, QuotaExceeded, TooManyLogins, Unauthorized

ANYBODY = ""  # the name of callers without a key
WINDOW_S = 60
PIXELS_PER_ROW_STEP = 2**20  # of an upload that is decoded
# From one address; after them /login refuses it until a window has passed. Keys in headers are not bounded: one program
# with a wrong key would lock out all clients of its address.
MOST_WRONG_LOGINS = 10
MOST_ADDRESSES = 4096  # with wrong logins that are remembered
AT_ONCE = 4  # requests for job images that run at once for one name; further ones wait


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a quota, row_steps_per_minute, at one moment."""

    quota: int
    left: int
    full_in_s: int  # until all of it is there again, if nothing is used


@dataclass(slots=True)
class Usage:
    """Usage of one name: its bucket of row-steps, which refills evenly in a minute, its connections and its turns."""

    at_s: float
    row_steps: float = 0.0  # missing in a full bucket at that time; more than it holds after one large job
    connections: int = 0
    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))  # at the images of jobs


@dataclass(frozen=True, slots=True)
class Caller:
    """The caller of a request, with its limits. In the event loop's thread only."""

    name: str
    role: Role
    limits: KeyLimits
    usage: Usage  # shared by all callers of this name
    clock: Callable[[], float]

    @property
    def sees(self) -> str | None:
        """Return the owner whose jobs it may see: its own name, or None for the jobs of all."""
        return None if self.role == "admin" else self.name

    @property
    def allowance(self) -> Allowance | None:
        """How many row-steps are left now; None without a limit."""
        if (quota := self.limits.row_steps_per_minute) is None:
            return None
        used = self._used(quota)
        return Allowance(quota, max(0, math.floor(quota - used)), math.ceil(used / quota * WINDOW_S))

    @contextmanager
    def charged(self, row_steps: int, jobs: int) -> Iterator[None]:
        """Charge the row-steps of a job; an exception in the block takes them back. Raises QuotaExceeded.

        jobs: of this name, that have not ended. A job of more than a minute's quota begins once all of that is there,
        and what is over is owed: nothing is too large for ever, and in the long run the quota holds.
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
        """Raise QuotaExceeded where `charged` would."""
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
        """Count a connection while it is used. Raises QuotaExceeded."""
        usage, most = self.usage, self.limits.connections
        if most is not None and usage.connections >= most:
            raise QuotaExceeded("connections", f"at most {most} connections at once", usage.connections + 1, 1)
        usage.connections += 1
        try:
            yield
        finally:
            usage.connections -= 1

    def _used(self, quota: int) -> float:
        """Fill the bucket up to now; return what is missing in it."""
        usage, now_s = self.usage, self.clock()
        usage.row_steps = max(0.0, usage.row_steps - max(0.0, now_s - usage.at_s) * quota / WINDOW_S)
        usage.at_s = now_s
        return usage.row_steps


class Access:
    """Owns what each name has used, and which addresses tried wrong keys. In the event loop's thread only."""

    def __init__(
        self, keys: KeyRing | None = None, *, is_open: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """is_open: callers without a key may sample."""
        self._keys, self.is_open, self._clock = keys or KeyRing(), is_open, clock
        self._usage: dict[str, Usage] = {}
        self._wrong_logins: TTLCache[str, int] = TTLCache(MOST_ADDRESSES, WINDOW_S, clock)  # how many, by address

    @property
    def keys_up(self) -> bool:
        """Whether the keys in force are what their file says."""
        return self._keys.up

    @property
    def has_keys(self) -> bool:
        """Whether there are any; else credentials in requests are somebody else's business."""
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
        """Return whoever comes without a key. Raises Unauthorized where that is not enough."""
        if not self.is_open:
            raise Unauthorized
        return self._caller(ANYBODY, "sample", KeyLimits())

    def check_admin(self, caller: Caller) -> None:
        """Raise AdminOff, Unauthorized or Forbidden for whoever may not change the server."""
        if caller.role == "admin":
            return
        if all(key.role != "admin" for key in self._keys.keys):
            raise AdminOff
        raise Unauthorized("this needs a key of the role admin") if caller.name == ANYBODY else Forbidden(caller.name)

    def _caller(self, name: str, role: Role, limits: KeyLimits) -> Caller:
        usage = self._usage.setdefault(name, Usage(self._clock()))
        return Caller(name, role, limits, usage, self._clock)
