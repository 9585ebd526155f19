"""How many bytes clients may have the server hold at once, in all. No asyncio, no threads of its own.

A budget and its holds belong to one thread, the event loop's, and take no lock.
"""

from types import TracebackType
from typing import Self

from tminus.service.errors import TooManyBytes

MAX_HELD_BYTES = 256 * 2**20
SMALL_BYTES = 64 * 1024


class ByteBudget:
    """Counts what all its holds hold together."""

    def __init__(self, limit_bytes: int = MAX_HELD_BYTES) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0  # changed by holds only

    def hold(self, exempt_bytes: int = 0) -> "Hold":
        """Open an empty hold. It is never refused while it has at most `exempt_bytes`."""
        return Hold(self, exempt_bytes)


class Hold:
    """What one request, connection or task holds of a budget. As a context manager it releases its bytes at the end."""

    def __init__(self, budget: ByteBudget, exempt_bytes: int) -> None:
        self._budget, self._exempt_bytes = budget, exempt_bytes
        self._held_bytes = 0

    def add(self, size_bytes: int) -> None:
        """Hold so many bytes more. Raises TooManyBytes over the limit; they stay counted until the release."""
        self._held_bytes += size_bytes
        self._budget.held_bytes += size_bytes
        if self._held_bytes > self._exempt_bytes and self._budget.held_bytes > self._budget.limit_bytes:
            raise TooManyBytes(self._budget.held_bytes, self._budget.limit_bytes)

    def release(self) -> None:
        """Give all of it back. The hold is empty then, and may be used again."""
        self._budget.held_bytes -= self._held_bytes
        self._held_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
