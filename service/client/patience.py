"""Pauses before retries, and pauses between polls of a job. No I/O except the clock."""

import math
import random
import time
from collections.abc import Callable

from .errors import ClientError, Problem, Unreachable
from .results import JobState

RESTART_S = 60.0  # how long a server may take to restart
FIRST_S, LONGEST_S = 0.25, 4.0  # first and longest pause between attempts to connect
SHORTEST_POLL_S, LONGEST_POLL_S = 0.05, 2.0
LAST_LOOK_S = 1.0
WORTH_WAITING = (429, 503, 507)


class Patience:
    """Decides when to retry a failed call, and when to give up.

    patience_s: total time for retries, in seconds since the first failure.
    once: the call is not safe to repeat. It is not retried if the server may have received the request.
    durable: the object of the call survives a restart of the server, so wait for a restart.
    known: the server has been reached before, so it may be restarting even if the first attempt cannot connect.
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
        """Start anew after progress: forget the first failure and the last pause."""
        self._began: float | None = None
        self._next_s = self.first_s

    def pause_s(self, error: ClientError) -> float:
        """Return how many seconds to wait before the next attempt. Raises the error if it is time to give up."""
        limit_s, now_s = self._patience_s, self._clock()
        self._began = now_s if self._began is None else self._began
        if isinstance(error, Problem) and error.status in WORTH_WAITING and error.retry_after_s is not None:
            wait_s = error.retry_after_s  # an overloaded server already spreads these times over its clients
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
    """Decides when to poll a job: at its expected end, but at most timeout_s seconds after the start."""

    def __init__(self, job_id: str, timeout_s: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._job_id, self._timeout_s, self._clock, self._began = job_id, timeout_s, clock, clock()

    def look_s(self, longest_s: float) -> float:
        """Return the timeout for the next request. If timeout_s is over, one last request gets LAST_LOOK_S."""
        return longest_s if self._timeout_s is None else min(longest_s, max(self._left_s(), LAST_LOOK_S))

    def pause_s(self, job: JobState) -> float:
        """Return how many seconds to wait before the next request. Raises TimeoutError."""
        pause_s = min(max(job.eta_s or 0, SHORTEST_POLL_S), LONGEST_POLL_S)
        return self._cut(pause_s, f"is {job.state}")

    def pause_after_s(self, error: ClientError, patience: Patience) -> float:
        """Return how many seconds to wait after a failed request. Raises TimeoutError, or a final `error`."""
        return self._cut(patience.pause_s(error), f"could not be looked at ({error})")

    def _cut(self, pause_s: float, known: str) -> float:
        left_s = self._left_s()
        if left_s <= 0:
            raise TimeoutError(f"job {self._job_id} {known} after {self._timeout_s:g} s")
        return min(pause_s, left_s)

    def _left_s(self) -> float:
        return math.inf if self._timeout_s is None else self._began + self._timeout_s - self._clock()
