"""How the places of a tick are shared out. Frozen values; pure."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from tminus.service.scheduling.owners import BURST_S
from tminus.service.scheduling.tick_times import TickTimes

Policy = Literal["srpt", "fcfs"]  # shortest remaining work first with a reserve for the oldest; order of arrival

RESERVED_SHARE = 0.25  # of the places, for the oldest job
UNKNOWN = TickTimes()
LEAD_TICKS, MOST_LEAD_S = 2.0, BURST_S / 2  # an owner that is more full ticks behind the next one leads, or so long
LONGER = 1.25  # how much longer a tick of the owner that leads may become by other owners' rows
MUCH_LONGER = 8  # a job is much longer than another if its total work is so many times as much


@dataclass(frozen=True, slots=True)
class Sharing:
    """How the places of a tick are shared out. The oldest job gets its reserve first, whatever short_batch is."""

    max_batch: int  # places in a tick, at least 2, as a guided row takes two
    short_batch: int  # in a tick with a short job, much longer jobs fill up only to a multiple of this
    reserved: int  # places kept for the oldest job
    policy: Policy
    place_s: float = 1.0  # what a place of a full tick takes, by which jobs of several models are compared
    times: TickTimes = UNKNOWN  # as they were measured at the start

    @classmethod
    def of(
        cls,
        max_batch: int,
        policy: Policy = "srpt",
        short_batch: int | None = None,
        place_s: float = 1.0,
        times: TickTimes = UNKNOWN,
    ) -> "Sharing":
        """Reserve a share for the oldest job, at least two places: with one, a guided job could never use it."""
        assert max_batch >= 2
        assert policy in ("srpt", "fcfs")
        reserved = max(2, int(max_batch * RESERVED_SHARE)) if policy == "srpt" else 0
        return cls(max_batch, min(short_batch or max_batch, max_batch), reserved, policy, place_s, times)

    def much_longer(self, works: Collection[int]) -> float:
        """The total work, in places, from which a job is much longer than the shortest. works: the total of every job.

        Infinite where there are more jobs than places: then all of them wait for throughput, which full ticks give.
        The total work of a job never changes, so the answer changes only when a job comes or goes.
        """
        if self.policy == "fcfs" or self.short_batch == self.max_batch or len(works) > self.max_batch:
            return math.inf
        return MUCH_LONGER * min(works, default=0)

    def leads(self, ahead_s: float) -> bool:
        """Whether the owner that has had least goes before the next one, which has had so much more.

        Its ticks are then not to become much longer by others' rows.
        """
        return ahead_s > min(LEAD_TICKS * self.max_batch * self.place_s, MOST_LEAD_S)

    def beside(self, places: int) -> int:
        """How many places others may have in a tick of the owner that leads, which has so many."""
        return _beside(self.times, self.max_batch, places)

    def seconds(self, places: Mapping[str, int], leader: str | None = None, *, alone: bool = False) -> dict[str, float]:
        """What each owner pays for its places in a tick, in seconds of the machine.

        The one that leads pays for what others could not have, too. alone: nobody else has a job, so that only what
        is more than half of the machine counts against it when somebody comes.
        """
        total = sum(places.values())
        tick_s = self.times.seconds(total) or total * self.place_s
        if alone:
            return {owner: max(0.0, count * self.place_s - tick_s / 2) for owner, count in places.items()}
        if leader is not None and leader in places:
            taken_s = {owner: count * self.place_s for owner, count in places.items()}
            taken_s[leader] += max(0.0, tick_s - sum(taken_s.values()))
            return taken_s
        return {owner: count / total * tick_s for owner, count in places.items()}

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

    def short_room(self, free: int) -> int:
        """How many of the free places a job may take that is held back: it fills up to a multiple of short_batch."""
        used = self.max_batch - free
        return min(max(1, math.ceil(used / self.short_batch)) * self.short_batch, self.max_batch) - used


@lru_cache(maxsize=4096)
def _beside(times: TickTimes, max_batch: int, places: int) -> int:
    most_s, total = LONGER * times.seconds(places), places
    while total < max_batch and times.seconds(total + 1) <= most_s:
        total += 1
    return max(0, total - places)
