"""When jobs must be done: the next one first, however many there are. Pure: no clock."""

import heapq
from collections.abc import Collection


class Deadlines:
    """Owns the times. Of a job that is gone nobody need tell it."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, str]] = []

    def add(self, when_s: float, job_id: str, alive: Collection[str]) -> None:
        """Note a job's; alive are the jobs that there are."""
        if len(self._heap) > 2 * len(alive):  # most are of jobs that are done
            self._heap = [entry for entry in self._heap if entry[1] in alive]
            heapq.heapify(self._heap)
        heapq.heappush(self._heap, (when_s, job_id))

    def passed(self, now_s: float) -> list[str]:
        """The jobs whose time is over, once each; some may be gone."""
        passed = []
        while self._heap and self._heap[0][0] <= now_s:
            passed.append(heapq.heappop(self._heap)[1])
        return passed
