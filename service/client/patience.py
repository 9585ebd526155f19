"""Pauses before retries, and between polls of a job. No I/O except the clock."""

import math
import random
import time
from collections.abc import Callable

from .errors import ClientError, Problem, Unreachable
from .results import JobState

RESTART_S = 60.0  # time that a server may need to restart
FIRST_S, LONGEST_S = 0.25, 4.0  # first and longest pause between attempts to connect
SHORTEST_POLL_S, LONGEST_POLL_S = 0.05, 2.0
LAST_LOOK_S = 1.0
WORTH_WAITING = (429, 503, 507)


class Patience:
    """Decides after each failure of a call when to retry, or raises the error.

    patience_s: total seconds of retries, counted from the first failure. once: the call is not safe to repeat, so do
    not retry if the server may have received the request. durable: the call's object survives the server's process, so
    wait for a restart. known: the server has been reached before, so a first failure to connect may be a restart.
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
        """Reset the start time and the pause, after progress."""
        self._began: float | None = None
        self._next_s = self.first_s

    def pause_s(self, error: ClientError) -> float:
        """Return the seconds until the next attempt. Raises the error if there must be no further attempt."""
        limit_s, now_s = self._patience_s, self._clock()
        self._began = now_s if self._began is None else self._began
        if isinstance(error, Problem) and error.status in WORTH_WAITING and error.retry_after_s is not None:
            wait_s = error.retry_after_s  # the server sends different values to different clients
        elif isinstance(error, Unreachable) and not (self._once and error.reached):
            self._known |= error.reached
            wait_s = self._next_s * random.uniform(0.75, 1)  # noqa: S311  clients must not retry at the same moment
            self._next_s = min(2 * self._next_s, LONGEST_S)
            if self._durable and self._known:
                limit_s = max(limit_s, RESTART_S)
        else:
            raise error
        if now_s - self._began + wait_s > limit_s:
            raise error
        return wait_s


class Polling:
    """Decides when to poll a running job: at its expected end, but not later than timeout_s after the start."""

    def __init__(self, job_id: str, timeout_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._job_id, self._timeout_s, self._clock, self._began = job_id, timeout_s, clock, clock()

    def look_s(self, longest_s: float) -> float:
        """Return the timeout of the next request in seconds. After timeout_s, a last request gets LAST_LOOK_S."""
        return longest_s if self._timeout_s is None else min(longest_s, max(self._left_s(), LAST_LOOK_S))

    def pause_s(self, job: JobState) -> float:
        """Return the seconds until the next request. Raises TimeoutError."""
        pause_s = min(max(job.eta_s or 0, SHORTEST_POLL_S), LONGEST_POLL_S)
        return self._cut(pause_s, f"is {job.state}")

    def pause_after_s(self, error: ClientError, patience: Patience) -> float:
        """Return the seconds until the next request after a failure. Raises TimeoutError, or `error` if it is final."""
        return self._cut(patience.pause_s(error), f"could not be looked at ({error})")

    def _cut(self, pause_s: float, known: str) -> float:
        left_s = self._left_s()
        if left_s <= 0:
            raise TimeoutError(f"job {self._job_id} {known} after {self._timeout_s:g} s")
        return min(pause_s, left_s)

    def _left_s(self) -> float:
        return math.inf if self._timeout_s is None else self._began + self._timeout_s - self._clock()
