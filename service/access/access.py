"""Who asks, and what they may: a name with a role and limits, by the secret that came with a request."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tminus.service.access.keyring import KeyRing
from tminus.service.access.keys import KeyLimits, Role
from tminus.service.access.usage import Allowance, Usage
from tminus.service.errors import AdminOff, Forbidden, Unauthorized

ANYBODY = ""  # the name of whoever comes without a key


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever a request is answered for."""

    name: str
    role: Role
    limits: KeyLimits
    usage: Usage
    clock: Callable[[], float]

    @property
    def sees(self) -> str | None:
        """Return the owner whose jobs it may see: its own name, or None for the jobs of all."""
        return None if self.role == "admin" else self.name

    def charged(self, row_steps: int, jobs: int) -> AbstractContextManager[None]:
        """See Usage.charged."""
        return self.usage.charged(self.limits, row_steps, jobs, self.clock())

    def connected(self) -> AbstractContextManager[None]:
        """See Usage.connected."""
        return self.usage.connected(self.limits)

    @property
    def allowance(self) -> Allowance | None:
        """How many row-steps are left now; None without a limit."""
        return self.usage.allowance(self.limits, self.clock())


class Access:
    """Owns what each name has used. In the event loop's thread only."""

    def __init__(
        self, keys: KeyRing | None = None, *, is_open: bool = True, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """is_open: whoever has no key may sample."""
        self._keys, self.is_open, self._clock = keys or KeyRing(), is_open, clock
        self._usage: dict[str, Usage] = {}

    @property
    def keys_up(self) -> bool:
        """Whether the keys in force are what their file says."""
        return self._keys.up

    @property
    def has_keys(self) -> bool:
        """Whether there are any; else credentials in requests are somebody else's business."""
        return bool(self._keys.keys)

    def with_secret(self, secret: str) -> Caller:
        """Whoever has this secret. Raises Unauthorized."""
        if (key := self._keys.find(secret)) is None:
            raise Unauthorized("this key is not known here")
        return self._caller(key.name, key.role, key.limits)

    def without_secret(self) -> Caller:
        """Whoever comes without a key. Raises Unauthorized where that is not enough."""
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
