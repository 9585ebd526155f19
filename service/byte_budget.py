"""How many bytes clients may have the server hold at once, in all: of what they send, and of what they are sent.

One caller may hold SHARE of what the others leave, so that there is always some room for others. A budget and its holds
belong to one thread, the event loop's, and take no lock.
"""

from collections import Counter
from contextlib import AbstractContextManager

from tminus.service.errors import TooManyBytes

MAX_HELD_BYTES = 256 * 2**20
SMALL_BYTES = 64 * 1024
SHARE = 0.75  # of what the others leave, that one may hold (the dynamic threshold of Choudhury and Hahne 1998)


class ByteBudget:
    """Counts the bytes of all its holds."""

    def __init__(self, limit_bytes: int = MAX_HELD_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0  # changed by holds only
        self.holders: Counter[int] = Counter()  # of shared bytes, by their identity: how many holds; likewise
        self.owned_bytes: Counter[str] = Counter()  # by caller, without what is shared; likewise

    def hold(self, exempt_bytes: int = 0, owner: str | None = None) -> "Hold":
        """Open an empty hold. It is never refused while it has at most `exempt_bytes`.

        owner: the caller whose share bounds it; None: it is in no share.
        """
        return Hold(self, exempt_bytes, owner)


class Hold(AbstractContextManager["Hold"]):
    """What one request, connection or task holds of a budget. As a context manager it releases its bytes at the end."""

    def __init__(self, budget: ByteBudget, exempt_bytes: int, owner: str | None) -> None:
        self.budget, self.owner, self._exempt_bytes = budget, owner, exempt_bytes  # the owner is set while it is empty
        self._own_bytes = 0
        self._shared: list[bytes] = []
        self._size_bytes = 0  # of both

    @property
    def is_small(self) -> bool:
        """Whether it has no more than is never refused."""
        return self._size_bytes <= self._exempt_bytes

    def add(self, size_bytes: int) -> None:
        """Hold so many bytes more. Raises TooManyBytes over the limit; they stay counted until the release."""
        self._own_bytes += size_bytes
        self._size_bytes += size_bytes
        self.budget.held_bytes += size_bytes
        if self.owner is not None:
            self.budget.owned_bytes[self.owner] += size_bytes
        self._check()

    def add_shared(self, data: bytes) -> None:
        """Hold bytes that other holds may have too: in all of them together they count once. Raises as `add` does."""
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
        """Give all of it back. The hold is empty then, and may be used again."""
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
