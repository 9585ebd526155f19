"""What one name has used of its limits. No clock of its own, no HTTP."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tminus.service.access.keys import KeyLimits
from tminus.service.errors import QuotaExceeded

WINDOW_S = 60


@dataclass(frozen=True, slots=True)
class Allowance:
    """How much of row_steps_per_minute is there at a time."""

    quota: int
    left: int
    full_in_s: int  # until all of it is there again, if nothing is used


class Usage:
    """A bucket that holds a minute's row-steps and fills evenly, and what is connected. In the event loop's thread."""

    def __init__(self, now_s: float) -> None:
        self._used = 0.0  # row-steps that are missing in a full bucket; more than it holds after one large job
        self._at_s = now_s
        self._connections = 0

    def allowance(self, limits: KeyLimits, now_s: float) -> Allowance | None:
        """What is left; None without a limit."""
        if (quota := limits.row_steps_per_minute) is None:
            return None
        self._refill(quota, now_s)
        return Allowance(quota, max(0, math.floor(quota - self._used)), math.ceil(self._used / quota * WINDOW_S))

    @contextmanager
    def charged(self, limits: KeyLimits, row_steps: int, jobs: int, now_s: float) -> Iterator[None]:
        """Count a job of so many row-steps; what the block raises makes it uncounted. Raises QuotaExceeded.

        jobs: of this name, that have not ended. A job of more than a minute's quota begins once all of that is there,
        and what is over is owed: nothing is too large for ever, and in the long run the quota holds.
        """
        if limits.jobs is not None and jobs >= limits.jobs:
            raise QuotaExceeded("jobs", f"at most {limits.jobs} jobs that have not ended", jobs, 1)
        if (quota := limits.row_steps_per_minute) is None:
            yield
            return
        self._refill(quota, now_s)
        missing = self._used + min(row_steps, quota) - quota
        if missing > 0:
            bound = f"at most {quota} row-steps a minute, of which {max(0, math.floor(quota - self._used))} are left"
            raise QuotaExceeded("row_steps", bound, row_steps, math.ceil(missing / quota * WINDOW_S))
        self._used += row_steps
        try:
            yield
        except BaseException:
            self._used = max(0.0, self._used - row_steps)
            raise

    @contextmanager
    def connected(self, limits: KeyLimits) -> Iterator[None]:
        """Count a connection while it is used. Raises QuotaExceeded."""
        if limits.connections is not None and self._connections >= limits.connections:
            bound = f"at most {limits.connections} connections at once"
            raise QuotaExceeded("connections", bound, self._connections + 1, 1)
        self._connections += 1
        try:
            yield
        finally:
            self._connections -= 1

    def _refill(self, quota: int, now_s: float) -> None:
        self._used = max(0.0, self._used - max(0.0, now_s - self._at_s) * quota / WINDOW_S)
        self._at_s = now_s
