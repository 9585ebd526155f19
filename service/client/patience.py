"""How long a call goes on trying, and when it looks again. No I/O but a clock."""

import math
import random
import time
from collections.abc import Callable

from .errors import ClientError, Problem, Unreachable
from .results import JobState

RESTART_S = 60.0  # a server that stopped answering may be starting again
FIRST_S, LONGEST_S = 0.25, 4.0  # between two attempts to connect
SHORTEST_POLL_S, LONGEST_POLL_S = 0.05, 2.0
LAST_LOOK_S = 1.0
WORTH_WAITING = (429, 503, 507)


class Patience:
    """The patience of one call: told each failure, it says how long to wait, or raises.

    patience_s: how long in all, from the first failure on; this holds for broken connections too, since a call is safe
    to repeat. once: not this one, so that what the server may have got is not sent again. durable: what is asked for
    outlasts the server's process, so that a restart is waited for; known: the server is known to exist, so that a first
    failure to connect may be a restart.
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
            wait_s = error.retry_after_s  # the server tells each client another time
        elif isinstance(error, Unreachable) and not (self._once and error.reached):
            self._known |= error.reached
            wait_s = self._next_s * random.uniform(0.75, 1)  # noqa: S311  so that clients do not return all at once
            self._next_s = min(2 * self._next_s, LONGEST_S)
            if self._durable and self._known:
                limit_s = max(limit_s, RESTART_S)
        else:
            raise error
        if now_s - self._began + wait_s > limit_s:
            raise error
        return wait_s


class Polling:
    """When to look at a job again that has not ended: when it should have, at most timeout_s from now on."""

    def __init__(self, job_id: str, timeout_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._job_id, self._timeout_s, self._clock, self._began = job_id, timeout_s, clock, clock()

    def look_s(self, longest_s: float) -> float:
        """How long the next look may take, the last one a little even where the time is up."""
        return longest_s if self._timeout_s is None else min(longest_s, max(self._left_s(), LAST_LOOK_S))

    def pause_s(self, job: JobState) -> float:
        """Seconds until the next look. Raises TimeoutError."""
        pause_s = min(max(job.eta_s or 0, SHORTEST_POLL_S), LONGEST_POLL_S)
        return self._cut(pause_s, f"is {job.state}")

    def pause_after_s(self, error: ClientError, patience: Patience) -> float:
        """Seconds until the next look after one that failed. Raises TimeoutError, or the error as `patience` does."""
        return self._cut(patience.pause_s(error), f"could not be looked at ({error})")

    def _cut(self, pause_s: float, known: str) -> float:
        left_s = self._left_s()
        if left_s <= 0:
            raise TimeoutError(f"job {self._job_id} {known} after {self._timeout_s:g} s")
        return min(pause_s, left_s)

    def _left_s(self) -> float:
        return math.inf if self._timeout_s is None else self._began + self._timeout_s - self._clock()
