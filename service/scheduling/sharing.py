"""How the places of a tick are shared out. Frozen values; pure."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

Policy = Literal["srpt", "fcfs"]  # shortest remaining work first with a reserve for the oldest; order of arrival

RESERVED_SHARE = 0.25  # of the places, for the oldest job
LEAD_TICKS = 2.0  # an owner that is more full ticks behind the next one goes before it
MUCH_LONGER = 8  # a job is much longer than another if its total work is so many times as much


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the places of a tick are shared out. The oldest job gets its reserve first, whatever short_batch is."""

    max_batch: int  # places in a tick, at least 2, as a guided row takes two
    short_batch: int  # in a tick with a short job, those that are held back fill up only to a multiple of this
    reserved: int  # places kept for the oldest job
    policy: Policy
    place_s: float = 1.0  # what a place of a full tick takes, by which jobs of several models are compared

    @classmethod
    def of(
        cls, max_batch: int, policy: Policy = "srpt", short_batch: int | None = None, place_s: float = 1.0
    ) -> "Sharing":
        """Reserve a share for the oldest job, at least two places: with one, a guided job could never use it."""
        assert max_batch >= 2
        assert policy in ("srpt", "fcfs")
        reserved = max(2, int(max_batch * RESERVED_SHARE)) if policy == "srpt" else 0
        return cls(max_batch, min(short_batch or max_batch, max_batch), reserved, policy, place_s)

    def much_longer(self, works: Collection[int]) -> float:
        """The total work, in places, from which a job is much longer than the shortest. works: the total of every job.

        Infinite where there are more jobs than places: then all of them wait for throughput, which full ticks give.
        The total work of a job never changes, so the answer changes only when a job comes or goes.
        """
        if self.policy == "fcfs" or not self.has_short_ticks or len(works) > self.max_batch:
            return math.inf
        return MUCH_LONGER * min(works, default=0)

    @property
    def has_short_ticks(self) -> bool:
        """Whether a tick of fewer places ends much sooner."""
        return self.short_batch < self.max_batch

    def others_wait(self, ahead_s: float, jobs: int) -> bool:
        """Whether the first owner's jobs have short ticks, in which other owners' jobs are held back.

        ahead_s: how much more the next owner has had.
        """
        return self.has_short_ticks and jobs <= self.max_batch and ahead_s > self.lead_s

    @property
    def lead_s(self) -> float:
        """By how much owners who take turns are never apart."""
        return LEAD_TICKS * self.tick_s

    @property
    def tick_s(self) -> float:
        """What the places of a full tick take."""
        return self.max_batch * self.place_s

    def reserve(self, places: int, needed: int, turn: int) -> int:
        """How many of an owner's places in a tick are kept for the oldest of its jobs.

        needed: what a row of that takes. turn: counts the ticks. Of a few places it has enough in some of the ticks.
        """
        if places >= self.max_batch or not self.reserved:
            return self.reserved
        kept = places * self.reserved / self.max_batch
        if kept >= needed:
            return int(kept)
        share = kept / needed
        return needed if turn * share % 1 < share and needed <= places else 0

    def room(self, free: float, *, held_back: bool) -> float:
        """How many of the free places a job may take; a job that is held back fills up to a multiple of short_batch."""
        if not held_back:
            return free
        used = self.max_batch - free
        return min(max(1, math.ceil(used / self.short_batch)) * self.short_batch, self.max_batch) - used
