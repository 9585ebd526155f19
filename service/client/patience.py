"""When a call is tried again, and when a job is polled again. No I/O but a clock."""

import math
import random
import time
from collections.abc import Callable

from .errors import ClientError, Problem, Unreachable
from .results import JobState

RESTART_S = 60.0  # a server that stopped answering may be starting again
FIRST_S, LONGEST_S = 0.25, 4.0  # pauses between attempts to connect
SHORTEST_POLL_S, LONGEST_POLL_S = 0.05, 2.0
LAST_LOOK_S = 1.0
WORTH_WAITING = (429, 503, 507)


class Patience:
    """Decides after each failure of a call how long to wait before the next attempt, or raises.

    patience_s: seconds in all, from the first failure on; also for broken connections, since a call is safe to repeat.
    once: the call is not, so it is not sent again if the server may have got it. durable: the call's object outlasts
    the server's process, so a restart is waited for. known: the server exists, so a first failure to connect may be a
    restart.
    """

    def __init__(
        self,
        patience_s: float,
        *,
        once: bool = False,
        durable: bool = False,
        known: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._patience_s, self._once, self._durable, self._known = patience_s, once, durable, known
        self._clock = clock
        self.first_s = FIRST_S
        self.renew()

    def renew(self) -> None:
        """Start over, after progress."""
        self._began: float | None = None
        self._next_s = self.first_s

    def pause_s(self, error: ClientError) -> float:
        """Seconds until the next attempt. Raises the error if there should be none."""
        limit_s, now_s = self._patience_s, self._clock()
        self._began = now_s if self._began is None else self._began
        if isinstance(error, Problem) and error.status in WORTH_WAITING and error.retry_after_s is not None:
            wait_s = error.retry_after_s  # the server spreads these over clients
        elif isinstance(error, Unreachable) and not (self._once and error.reached):
            self._known |= error.reached
            wait_s = self._next_s * random.uniform(0.75, 1)  # noqa: S311  clients do not come back at the same moment
            self._next_s = min(2 * self._next_s, LONGEST_S)
            if self._durable and self._known:
                limit_s = max(limit_s, RESTART_S)
        else:
            raise error
        if now_s - self._began + wait_s > limit_s:
            raise error
        return wait_s


class Polling:
    """Decides when a running job is read again: at its expected end, and at most timeout_s after the start."""

    def __init__(self, job_id: str, timeout_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._job_id, self._timeout_s, self._clock, self._began = job_id, timeout_s, clock, clock()

    def look_s(self, longest_s: float) -> float:
        """Seconds that the next request may take. When the time is up, a last one gets LAST_LOOK_S."""
        return longest_s if self._timeout_s is None else min(longest_s, max(self._left_s(), LAST_LOOK_S))

    def pause_s(self, job: JobState) -> float:
        """Seconds until the next request. Raises TimeoutError."""
        pause_s = min(max(job.eta_s or 0, SHORTEST_POLL_S), LONGEST_POLL_S)
        return self._cut(pause_s, f"is {job.state}")

    def pause_after_s(self, error: ClientError, patience: Patience) -> float:
        """Seconds until the next request after a failure. Raises TimeoutError, or the error as `patience` does."""
        return self._cut(patience.pause_s(error), f"could not be looked at ({error})")

    def _cut(self, pause_s: float, known: str) -> float:
        left_s = self._left_s()
        if left_s <= 0:
            raise TimeoutError(f"job {self._job_id} {known} after {self._timeout_s:g} s")
        return min(pause_s, left_s)

    def _left_s(self) -> float:
        return math.inf if self._timeout_s is None else self._began + self._timeout_s - self._clock()
