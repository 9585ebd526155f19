"""When running jobs are snapshotted: as often as costs next to nothing. Pure: no torch, no thread, no clock."""

from collections.abc import Callable, Mapping
from typing import Protocol

from service.spec import Snapshot

SHARE = 0.005  # of the time, that taking and keeping snapshots may cost
LEAST_S = 2.0  # between two rounds: what a crash may cost at least
READ = Callable[[], Snapshot]  # waits for the copy from a GPU


class Keeper(Protocol):
    """Who takes snapshots of the worker, and says when. Called in the worker's thread; must return at once."""

    def due(self, now_s: float) -> bool:
        """Whether to take them now."""

    def keep(self, snapshots: Mapping[str, READ], began_s: float, cost_s: float) -> None:
        """Take a round of them, by job; cost_s is what reading them has cost the worker already."""


class Pace:
    """Spaces rounds by what the last ones cost."""

    def __init__(self) -> None:
        self._next_s = 0.0
        self._busy = False

    def due(self, now_s: float) -> bool:
        """Whether the next round may begin."""
        return not self._busy and now_s >= self._next_s

    def begun(self) -> None:
        """A round is under way; the next is not due before it is over."""
        self._busy = True

    def ended(self, began_s: float, cost_s: float) -> None:
        """A round is over that cost so many seconds of a core."""
        self._busy = False
        self._next_s = began_s + max(LEAST_S, cost_s / SHARE)
