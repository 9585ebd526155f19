"""Limits the memory that the server uses for the data of its clients: uploads, messages and responses.

One caller may hold at most SHARE of the bytes that other callers leave free, so some bytes are always free for others.
A budget and its holds may be used only in the event loop's thread, so they need no lock.
"""

from collections import Counter
from contextlib import AbstractContextManager

from tminus.service.errors import TooManyBytes

MAX_HELD_BYTES = 256 * 2**20
SMALL_BYTES = 64 * 1024
SHARE = 0.75  # share of the free bytes that one caller may hold (dynamic threshold of Choudhury and Hahne 1998)


class ByteBudget:
    """Counts the bytes of all holds. Only holds change the counts."""

    def __init__(self, limit_bytes: int = MAX_HELD_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self.holders: Counter[int] = Counter()  # number of holds for each shared object, keyed by its id()
        self.owned_bytes: Counter[str] = Counter()  # keyed by caller; excludes shared bytes

    def hold(self, exempt_bytes: int = 0, owner: str | None = None) -> "Hold":
        """Return an empty hold. Adding bytes never fails while the hold has at most `exempt_bytes`.

        owner: the caller whose share limits the hold; with None, only the budget's limit applies.
        """
        return Hold(self, exempt_bytes, owner)


class Hold(AbstractContextManager["Hold"]):
    """Counts the bytes held for one request, connection or task. As a context manager, releases them on exit."""

    def __init__(self, budget: ByteBudget, exempt_bytes: int, owner: str | None) -> None:
        self.budget, self.owner, self._exempt_bytes = budget, owner, exempt_bytes  # assign only while empty
        self._own_bytes = 0
        self._shared: list[bytes] = []
        self._size_bytes = 0  # own and shared bytes

    @property
    def is_small(self) -> bool:
        """Return True if the hold has at most `exempt_bytes`, which are never refused."""
        return self._size_bytes <= self._exempt_bytes

    def add(self, size_bytes: int) -> None:
        """Count more bytes. Raises TooManyBytes over the limit.

        Even after TooManyBytes, the bytes count until `release`.
        """
        self._own_bytes += size_bytes
        self._size_bytes += size_bytes
        self.budget.held_bytes += size_bytes
        if self.owner is not None:
            self.budget.owned_bytes[self.owner] += size_bytes
        self._check()

    def add_shared(self, data: bytes) -> None:
        """Count bytes that other holds may share. The budget counts these bytes once.

        Raises TooManyBytes over the limit.
        """
        self._shared.append(data)
        self._size_bytes += len(data)
        self.budget.holders[id(data)] += 1
        if self.budget.holders[id(data)] == 1:
            self.budget.held_bytes += len(data)
            self._check()

    def _check(self) -> None:
        budget = self.budget
        if self._size_bytes <= self._exempt_bytes:
            return
        if budget.held_bytes > budget.limit_bytes:
            raise TooManyBytes(budget.held_bytes, budget.limit_bytes)
        if self.owner is not None:
            owned_bytes = budget.owned_bytes[self.owner]
            share_bytes = int(SHARE * (budget.limit_bytes - (budget.held_bytes - owned_bytes)))
            if owned_bytes > share_bytes:
                raise TooManyBytes(owned_bytes, share_bytes, of_caller=True)

    def release(self) -> None:
        """Release all bytes. The hold is then empty and can be reused."""
        budget = self.budget
        budget.held_bytes -= self._own_bytes
        if self.owner is not None:
            budget.owned_bytes[self.owner] -= self._own_bytes
        for data in self._shared:
            budget.holders[id(data)] -= 1
            if not budget.holders[id(data)]:
                del budget.holders[id(data)]
                budget.held_bytes -= len(data)
        self._shared.clear()
        self._own_bytes = self._size_bytes = 0

    def __exit__(self, *_error: object) -> None:
        self.release()
