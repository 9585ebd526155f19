"""Fair shares where jobs of several owners wait: whoever has had less goes first. Pure: no torch, no clock.

An owner is the name of an API key, or nobody's. What it has had is counted in seconds of the machine, and a place goes
to the owner that has had least, so that all who ask for more than they get have the same (the max-min fair shares of
fair queueing: Demers, Keshav and Shenker 1989). Who asked for little of late is behind the others by up to BURST_S, and
goes before them until it has caught up.
"""

import heapq
import threading
from collections.abc import Iterable, Mapping

BURST_S = 10.0  # how far an owner may be behind the one that has had most


class OwnerTimes:
    """Owns how much time of the machine each owner of jobs has had.

    The worker's thread changes it; any thread may read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._had_s: dict[str, float] = {}  # of those who left, too, until all have left
        self._jobs: dict[str, int] = {}

    def join(self, owner: str) -> None:
        """Note that an owner has one more job."""
        with self._lock:
            if owner not in self._jobs:
                had_s = self._on_joining(owner)
                if not self._jobs:
                    self._had_s.clear()
                self._had_s[owner], self._jobs[owner] = had_s, 0
            self._jobs[owner] += 1

    def leave(self, owner: str) -> None:
        """Note that a job of an owner has ended."""
        with self._lock:
            self._jobs[owner] -= 1
            if not self._jobs[owner]:
                del self._jobs[owner]

    def stepped(self, seconds: Mapping[str, float]) -> None:
        """Note what the rows of each owner in a tick have taken."""
        with self._lock:
            for owner, taken_s in seconds.items():
                self._had_s[owner] = self._had_s.get(owner, 0.0) + taken_s
            if len(self._jobs) > 1:
                least_s = max(map(self._had_s.__getitem__, self._jobs)) - BURST_S
                for owner in self._jobs:
                    if self._had_s[owner] < least_s:
                        self._had_s[owner] = least_s

    def had_s(self, owner: str) -> float:
        """How much an owner has had, from a moment on that is the same for all who have jobs."""
        return self._had_s.get(owner, 0.0)

    def of(self, owners: Iterable[str]) -> dict[str, float]:
        """Return what each owner has had, or will have had once it has a job."""
        with self._lock:
            return {owner: self._on_joining(owner) for owner in owners}

    @property
    def owners(self) -> tuple[str, ...]:
        """The owners that have jobs."""
        with self._lock:
            return tuple(self._jobs)

    @property
    def one_alone(self) -> bool:
        """Whether all jobs are of one owner."""
        return len(self._jobs) == 1

    def _on_joining(self, owner: str) -> float:
        if owner in self._jobs:
            return self._had_s[owner]
        if not self._jobs:
            return 0.0
        most_s = max(map(self._had_s.__getitem__, self._jobs))
        return min(max(self._had_s.get(owner, 0.0), most_s - BURST_S), most_s + BURST_S)


def allot(places: int, place_s: float, wants: Mapping[str, int], had_s: Mapping[str, float]) -> dict[str, int]:
    """Share the places of a tick out, each to the owner that has had least. wants: how many each can use."""
    heap = [(had_s[owner], turn, owner) for turn, owner in enumerate(wants)]
    heapq.heapify(heap)
    allotted = dict.fromkeys(wants, 0)
    while places and heap:
        had, turn, owner = heapq.heappop(heap)
        ahead_s = heap[0][0] - had if heap else float("inf")
        left = min(wants[owner] - allotted[owner], places)
        # All at once that it gets before another's turn comes.
        count = left if ahead_s >= left * place_s else min(left, int(ahead_s / place_s) + 1)
        allotted[owner] += count
        places -= count
        if allotted[owner] < wants[owner]:
            heapq.heappush(heap, (had + count * place_s, turn, owner))
    return allotted
