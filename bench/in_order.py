"""`tminus serve` with its jobs in order of arrival, for a comparison with shortest first.

python -m bench.in_order serve ...
"""

import math
from bisect import insort

from tminus.service.cli.main import main
from tminus.service.scheduling import scheduler


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


if __name__ == "__main__":
    scheduler.OwnerQueue = InOrder  # type: ignore[misc]
    main()
