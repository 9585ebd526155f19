"""Shares time fairly among the owners of jobs: the owner with the least service goes first. Pure: no torch, no clock.

An owner is the name of an API key, or empty. Its service time is counted in seconds of the machine. Each place goes to
the owner with the least service, which levels out all owners that want more than they get (the max-min fair shares of
fair queueing: Demers, Keshav and Shenker 1989). An idle owner falls behind the others by up to BURST_S, and then goes
first until it has caught up.
"""

import heapq
import threading
from collections.abc import Iterable, Mapping

BURST_S = 10.0  # the most that an owner may be behind the owner with the most service


class OwnerTimes:
    """Owns the service time of each owner. The worker's thread changes it; any thread may read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._service_time_s: dict[str, float] = {}  # includes owners without jobs, until no owner has one
        self._jobs: dict[str, int] = {}

    def join(self, owner: str) -> None:
        """Count one more job of an owner."""
        with self._lock:
            if owner not in self._jobs:
                service_time_s = self._on_joining(owner)
                if not self._jobs:
                    self._service_time_s.clear()
                self._service_time_s[owner], self._jobs[owner] = service_time_s, 0
            self._jobs[owner] += 1

    def leave(self, owner: str) -> None:
        """Count one job of an owner less."""
        with self._lock:
            self._jobs[owner] -= 1
            if not self._jobs[owner]:
                del self._jobs[owner]

    def stepped(self, seconds: Mapping[str, float], ticks: int = 1) -> None:
        """Charge each owner its seconds of a tick, or of each of several ticks."""
        with self._lock:
            for owner, charged_s in seconds.items():
                self._service_time_s[owner] = self._service_time_s.get(owner, 0.0) + ticks * charged_s
            if len(self._jobs) > 1:
                least_s = max(map(self._service_time_s.__getitem__, self._jobs)) - BURST_S
                for owner in self._jobs:
                    if self._service_time_s[owner] < least_s:
                        self._service_time_s[owner] = least_s

    def service_time_s(self, owner: str) -> float:
        """Return an owner's service time, counted from one moment for all owners with jobs."""
        return self._service_time_s.get(owner, 0.0)

    def of(self, owners: Iterable[str]) -> dict[str, float]:
        """Return each owner's service time, or the time that it starts with once it has a job."""
        with self._lock:
            return {owner: self._on_joining(owner) for owner in owners}

    @property
    def owners(self) -> tuple[str, ...]:
        """The owners that have jobs."""
        with self._lock:
            return tuple(self._jobs)

    @property
    def has_one_owner(self) -> bool:
        """Whether all jobs belong to one owner."""
        return len(self._jobs) == 1

    def _on_joining(self, owner: str) -> float:
        if owner in self._jobs:
            return self._service_time_s[owner]
        if not self._jobs:
            return 0.0
        most_s = max(map(self._service_time_s.__getitem__, self._jobs))
        return min(max(self._service_time_s.get(owner, 0.0), most_s - BURST_S), most_s + BURST_S)


def allot(places: int, place_s: float, wants: Mapping[str, int], service_time_s: Mapping[str, float]) -> dict[str, int]:
    """Give each place of a tick to the owner with the least service. wants: how many places each owner can use."""
    heap = [(service_time_s[owner], turn, owner) for turn, owner in enumerate(wants)]
    heapq.heapify(heap)
    allotted = dict.fromkeys(wants, 0)
    while places and heap:
        had, turn, owner = heapq.heappop(heap)
        ahead_s = heap[0][0] - had if heap else float("inf")
        left = min(wants[owner] - allotted[owner], places)
        # The owner gets all places before the next owner's turn at once.
        count = left if ahead_s >= left * place_s else min(left, int(ahead_s / place_s) + 1)
        allotted[owner] += count
        places -= count
        if allotted[owner] < wants[owner]:
            heapq.heappush(heap, (had + count * place_s, turn, owner))
    return allotted
