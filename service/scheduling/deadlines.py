"""Which deadlines have passed, found without a look at all jobs. Pure: no clock."""

import heapq
from collections.abc import Collection


class Deadlines:
    """Owns the deadlines, in a heap. Entries of finished jobs are dropped when they come up, or when they are most."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def add(self, when_s: float, job_id: str, alive: Collection[str]) -> None:
        """Note the deadline of a job; alive: the ids of the jobs that have not ended."""
        if len(self._heap) > 2 * len(alive):
            self._heap = [entry for entry in self._heap if entry[1] in alive]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (when_s, job_id))

    def passed(self, now_s: float) -> list[str]:
        """Take out the ids of the jobs whose deadline has passed; some of them may have ended."""
        passed = []
        while self._heap and self._heap[0][0] <= now_s:
            passed.append(heapq.heappop(self._heap)[1])
        return passed
