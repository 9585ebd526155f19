"""Whether a job may enter: its cost is known on arrival, so the answer is a yes or a refusal with a time. No torch.

The one piece of state that two threads touch: the edge adds, the worker takes off. Every access holds the lock.
"""

import math
import threading

from service.errors import Overloaded
from service.job import Limits, SampleSpec

LEARNING_RATE = 0.02  # a slow average: one tick says little


class Admission:
    """Owns the ledger of accepted work, in forward passes of one place, and how long one of those takes."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._jobs = 0
        self._rows = 0
        self._work = 0
        self._seconds_per_place = 0.0  # until the first tick is measured nothing is refused for time

    def enter(self, spec: SampleSpec) -> None:
        """Accept a job and count it, or raise Overloaded. An idle server takes any job that is within the bounds."""
        with self._lock:
            limits, backlog_s = self._limits, self._work * self._seconds_per_place
            cost_s = spec.work * self._seconds_per_place
            over_s = backlog_s + cost_s - limits.max_backlog_s
            if self._jobs and over_s > 0:
                wait_s = max(1, math.ceil(min(over_s, backlog_s)))
                raise Overloaded(
                    f"{backlog_s:.1f} s of work is waiting and this job adds {cost_s:.1f} s; "
                    f"the limit is {limits.max_backlog_s:g} s. Try again in {wait_s} s",
                    retry_after_s=wait_s,
                    field="backlog_s",
                    value=round(backlog_s + cost_s, 1),
                    bound=f"at most {limits.max_backlog_s:g}",
                )
            for field, count, limit in (
                ("jobs", self._jobs + 1, limits.max_jobs),
                ("rows", self._rows + spec.n, limits.max_rows),
            ):
                if count > limit:
                    wait_s = max(1, math.ceil(backlog_s * (count - limit) / limit))
                    raise Overloaded(
                        f"{count} {field} would be held at once; the limit is {limit}. Try again in {wait_s} s",
                        retry_after_s=wait_s,
                        field=field,
                        value=count,
                        bound=f"at most {limit}",
                    )
            self._jobs += 1
            self._rows += spec.n
            self._work += spec.work

    def stepped(self, places: int, seconds: float) -> None:
        """Take a tick's work off the ledger, and learn from a full one how long a place takes."""
        with self._lock:
            self._work -= places
            # A tick of few rows costs more a place, and says nothing of how fast a queue drains.
            if places >= self._limits.max_batch - 1:
                self._seconds_per_place += LEARNING_RATE * (seconds / places - self._seconds_per_place)

    def leave(self, spec: SampleSpec, work_left: int = 0) -> None:
        """Take a job off that is done, or was given up with work left."""
        with self._lock:
            self._jobs -= 1
            self._rows -= spec.n
            self._work -= work_left

    def calibrate(self, seconds_per_place: float) -> None:
        """Set the cost of one place from the warm-up's measurement."""
        with self._lock:
            self._seconds_per_place = seconds_per_place

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of accepted work that is not done."""
        with self._lock:
            return self._work * self._seconds_per_place

    @property
    def rows(self) -> int:
        """Rows accepted and not yet delivered."""
        with self._lock:
            return self._rows
