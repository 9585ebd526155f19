"""Shares time fairly among the owners of jobs. Pure: no torch, no clock.

An owner is the name of an API key, or the empty string. An owner's service time is the machine time, in seconds, that
its jobs have used. Each place of a tick goes to the owner with the least service time. This gives max-min fair shares
(fair queueing: Demers, Keshav and Shenker 1989). While an owner is idle, its service time falls behind that of the
others by at most BURST_S seconds. Afterwards this owner goes first until it has caught up.
"""

import heapq
import threading
from collections.abc import Iterable, Mapping

BURST_S = 10.0  # an owner's service time is at most this many seconds below the largest service time


class OwnerTimes:
    """The service time of each owner. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._service_time_s: dict[str, float] = {}  # includes owners without jobs, until no owner has a job
        self._jobs: dict[str, int] = {}

    def join(self, owner: str) -> None:
        """Add one job of an owner."""
        with self._lock:
            if owner not in self._jobs:
                service_time_s = self._on_joining(owner)
                if not self._jobs:
                    self._service_time_s.clear()
                self._service_time_s[owner], self._jobs[owner] = service_time_s, 0
            self._jobs[owner] += 1

    def leave(self, owner: str) -> None:
        """Remove one job of an owner."""
        with self._lock:
            self._jobs[owner] -= 1
            if not self._jobs[owner]:
                del self._jobs[owner]

    def stepped(self, seconds: Mapping[str, float], ticks: int = 1) -> None:
        """Add to the service time of owners. seconds: the time to add per tick, keyed by owner."""
        with self._lock:
            for owner, charged_s in seconds.items():
                self._service_time_s[owner] = self._service_time_s.get(owner, 0.0) + ticks * charged_s
            if len(self._jobs) > 1:
                least_s = max(map(self._service_time_s.__getitem__, self._jobs)) - BURST_S
                for owner in self._jobs:
                    if self._service_time_s[owner] < least_s:
                        self._service_time_s[owner] = least_s

    def service_time_s(self, owner: str) -> float:
        """Return an owner's service time in seconds. Only differences between owners have a meaning."""
        return self._service_time_s.get(owner, 0.0)

    def of(self, owners: Iterable[str]) -> dict[str, float]:
        """Return each owner's service time. For an owner without jobs, it is the time that `join` would set."""
        with self._lock:
            return {owner: self._on_joining(owner) for owner in owners}

    @property
    def owners(self) -> tuple[str, ...]:
        """Owners with jobs."""
        with self._lock:
            return tuple(self._jobs)

    @property
    def has_one_owner(self) -> bool:
        return len(self._jobs) == 1

    def _on_joining(self, owner: str) -> float:
        if owner in self._jobs:
            return self._service_time_s[owner]
        if not self._jobs:
            return 0.0
        most_s = max(map(self._service_time_s.__getitem__, self._jobs))
        return min(max(self._service_time_s.get(owner, 0.0), most_s - BURST_S), most_s + BURST_S)


def allot(places: int, place_s: float, wants: Mapping[str, int], service_time_s: Mapping[str, float]) -> dict[str, int]:
    """Divide the places of a tick. Each place goes to the owner with the least service time at that point.

    wants: the number of places that each owner can use.
    """
    heap = [(service_time_s[owner], turn, owner) for turn, owner in enumerate(wants)]
    heapq.heapify(heap)
    allotted = dict.fromkeys(wants, 0)
    while places and heap:
        had, turn, owner = heapq.heappop(heap)
        ahead_s = heap[0][0] - had if heap else float("inf")
        left = min(wants[owner] - allotted[owner], places)
        # Skip ahead: allot all places that this owner gets before it is the next owner's turn.
        count = left if ahead_s >= left * place_s else min(left, int(ahead_s / place_s) + 1)
        allotted[owner] += count
        places -= count
        if allotted[owner] < wants[owner]:
            heapq.heappush(heap, (had + count * place_s, turn, owner))
    return allotted
