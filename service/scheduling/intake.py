"""What one server takes on of the durable jobs that any of several may run. Pure: no torch, no asyncio, no clock."""

import math
from bisect import bisect_right, insort
from collections.abc import Iterable


class Intake:
    """Room for jobs, by how much work goes before each: where the shortest goes first, only what is shorter.

    So a short job is taken on however much long work is held, before which it goes. Work is counted in places.
    """

    def __init__(
        self,
        room: float,
        held: Iterable[float] = (),
        *,
        shortest_first: bool = True,
        oldest_us: int | None = None,
    ) -> None:
        """room: how much work may go before a job. held: what is left of each job. oldest_us: when the first came."""
        self._room, self._held, self._shortest_first = room, sorted(held), shortest_first
        self._oldest_us = oldest_us
        self.refused = math.inf  # the shortest job that was offered and not taken

    def has_room(self, places: float) -> bool:
        """Whether a job can be taken on. One can, however long it is, where nothing goes before it."""
        before = bisect_right(self._held, places) if self._shortest_first else len(self._held)
        return sum(self._held[:before]) < self._room

    def add(self, places: float) -> None:
        """Take on a job."""
        insort(self._held, places)

    def offer(self, places: float) -> bool:
        """Take on a job if there is room; says whether it was."""
        if self.has_room(places):
            self.add(places)
            return True
        self.refused = min(self.refused, places)
        return False

    def offer_oldest(self, places: float, created_us: int) -> bool:
        """Take on the oldest of all jobs if there is room, or where it is older than what is held.

        A share of each tick is kept for the oldest job of a server, so that it ends however many shorter ones come.
        """
        if not self._held or (self._oldest_us is not None and created_us < self._oldest_us):
            self.add(places)
            return True
        return self.offer(places)
