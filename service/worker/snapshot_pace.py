"""Decide when snapshots are taken: at most every 2 s and for at most 0.5 % of a core.

Pure: no torch, no thread, no clock.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from tminus.service.spec import Snapshot

SHARE = 0.005  # how much of the time snapshots may cost
LEAST_S = 2.0  # between two rounds
READ = Callable[[], Snapshot]  # waits for the copy from a GPU


class Keeper(Protocol):
    """Keeps snapshots of running jobs, and says when to take them. Called in the worker's thread; returns at once."""

    def due(self, now_s: float) -> bool:
        """Whether to take snapshots now."""

    def keep(self, snapshots: Mapping[str, READ], began_s: float, cost_s: float) -> None:
        """Keep a round of snapshots, by job id; cost_s: the seconds that it has cost the worker's thread already."""


class SnapshotPace:
    """Says when the next round of snapshots is due, by what the last one cost.

    `due` and `begun` are for the worker's thread; `ended` is for the thread that ends the round, whichever that is.
    """

    def __init__(self) -> None:
        self._next_s = 0.0
        self._busy = False

    def due(self, now_s: float) -> bool:
        """Whether the next round may begin."""
        return not self._busy and now_s >= self._next_s

    def begun(self) -> None:
        """Note that a round is under way; the next is not due before it is over."""
        self._busy = True

    def ended(self, began_s: float, cost_s: float) -> None:
        """Note that a round is over; cost_s: what it took, in seconds."""
        self._next_s = began_s + max(LEAST_S, cost_s / SHARE)
        self._busy = False  # last: from here on the worker's thread reads the time
