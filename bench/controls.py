"""`tminus serve` with one rule of its scheduler left out: a control that differs from tminus in one thing only.

python -m bench.controls in-order serve ...    jobs in order of arrival, instead of the shortest first
python -m bench.controls one-job serve ...     the rows of one job in each tick, instead of those of many
"""

import math
import sys
from bisect import insort

from tminus.service.cli.main import main
from tminus.service.scheduling import scheduler
from tminus.service.scheduling.scheduler import RESERVED_SHARE


class InOrder(scheduler.OwnerQueue):
    """A queue in which the oldest job goes first, and no job is held back for a shorter one."""

    def put_back(self, job: scheduler.QueuedJob) -> None:
        """Put a job into the queue, by its arrival."""
        if job.singles or job.doubles:
            job.key = (0, -job.arrival, job.id)
            insort(self._queue, job.key)

    @property
    def much_longer(self) -> float:
        """Infinite: no job counts as much longer than another."""
        return math.inf


class OneJob(scheduler.OwnerQueue):
    """A queue that fills a tick from one job: the shortest one, and every fourth time the oldest one."""

    def fill(self, pick: scheduler._Pick, places: int, _much_longer: float = math.inf) -> None:
        """Add rows of one job to a batch."""
        is_reserved = self.ticks * RESERVED_SHARE % 1 < RESERVED_SHARE and self.oldest.places_now
        pick.take(self.oldest if is_reserved else self.next, places)


CONTROLS = {"in-order": InOrder, "one-job": OneJob}

if __name__ == "__main__":
    scheduler.OwnerQueue = CONTROLS[sys.argv.pop(1)]  # type: ignore[misc]
    main()
