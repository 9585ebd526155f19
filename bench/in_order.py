"""`tminus serve` with its jobs in order of arrival, to compare the order of the scheduler with.

python -m bench.in_order serve ...
"""

import math
from bisect import insort

from tminus.service.cli.main import main
from tminus.service.scheduling import scheduler


class InOrder(scheduler.OwnerQueue):
    """The oldest job goes first, whatever it has left, and no job is held back for a shorter one."""

    def put_back(self, job: scheduler.QueuedJob) -> None:
        """Put a job into the queue, by its arrival."""
        if job.singles or job.doubles:
            job.key = (0, -job.arrival, job.id)
            insort(self._queue, job.key)

    @property
    def much_longer(self) -> float:
        """No job is."""
        return math.inf


if __name__ == "__main__":
    scheduler.OwnerQueue = InOrder  # type: ignore[misc]
    main()
