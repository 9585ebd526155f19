"""Replicas that share their durable jobs: whether they have room for one more, and what each takes on. Pure."""

import math
from bisect import bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass

from tminus.service.model_info import Limits
from tminus.service.scheduling.room import ROUNDING, Excess
from tminus.service.work import Work


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """What the replicas of one model have to do, as they told their store at their last renewals."""

    replicas: int = 0  # that live
    places_per_s: float = 0.0  # of all of them
    held_s: float = 0.0  # seconds of work that each holds, on average
    jobs: int = 0  # that nobody holds
    places: float = 0.0  # of those jobs
    least_s: float = math.inf  # seconds of work of that one, of the others, which has the least by now
    # The same of background jobs, which are in none of the above.
    background_held_s: float = 0.0
    background_jobs: int = 0
    background_places: float = 0.0

    @property
    def backlog_s(self) -> float:
        """How long all of it takes, if it is shared evenly."""
        return self.held_s + (self.places / self.places_per_s if self.places_per_s else 0.0)

    def before(self, work: Work) -> tuple[int, float]:
        """Return how many jobs that nobody holds go before a job, and how many seconds all takes that does."""
        if not work.background:
            return self.jobs, self.backlog_s
        waiting_s = self.background_places / self.places_per_s if self.places_per_s else 0.0
        return self.jobs + self.background_jobs, self.backlog_s + self.background_held_s + waiting_s

    @property
    def waiting_s(self) -> float:
        """How long the jobs that nobody holds take on one of them."""
        return self.places * self.replicas / self.places_per_s if self.places_per_s else 0.0

    def excess(self, work: Work, limits: Limits) -> Excess | None:
        """The first limit that one more job would pass: those of one server, for each replica that lives."""
        if work.background:
            jobs, most = self.background_jobs + 1, limits.max_background_jobs * max(1, self.replicas)
            return Excess("jobs", jobs, most, background=True) if jobs > most else None
        if not self.jobs and not self.held_s:
            return None
        own_s = work.places / self.places_per_s if self.places_per_s else 0.0
        if (backlog_s := self.backlog_s + own_s) > limits.max_backlog_s * (1 + ROUNDING):
            return Excess("backlog_s", backlog_s, limits.max_backlog_s)
        if self.jobs + 1 > (most := limits.max_jobs * max(1, self.replicas)):
            return Excess("jobs", self.jobs + 1, most)
        return None

    def room_elsewhere_in_s(self, work: Work, max_backlog_s: float) -> float:
        """Return the seconds until another replica has room for a job that was refused here; infinite if there is none.

        max_backlog_s: 0 where another limit was reached, of which nothing is known but that an idle one has room.
        """
        own_s = work.places * self.replicas / self.places_per_s if self.places_per_s else 0.0
        return max(0.0, min(self.least_s, self.least_s + own_s - max_backlog_s))  # with no work it takes any job

    def room_in_s(self, excess: Excess) -> float:
        """Return the seconds until there is room, if nobody else comes."""
        if excess.field == "backlog_s":
            return excess.value - excess.limit
        if excess.background:
            waiting_s = self.background_places / self.places_per_s if self.places_per_s else 0.0
            return (self.background_held_s + waiting_s) / (self.background_jobs + 1)
        return self.backlog_s / (self.jobs + 1)


Length = tuple[bool, float]  # whether a job is held back, and its places: in this order the shortest go first
NONE_REFUSED: Length = (True, math.inf)


class Intake:
    """Room for jobs, by how much work goes before each: where the shortest goes first, only what is shorter.

    So a short job is taken on however much long work is held, before which it goes; and any job goes before those that
    are held back. Work is counted in places.
    """

    def __init__(
        self,
        room: float,
        held: Iterable[Length] = (),
        *,
        shortest_first: bool = True,
        oldest_us: int | None = None,
        held_back_after_us: int = 0,
        takes_background: bool = True,
    ) -> None:
        """room: how much work may go before a job. held: what is left of each job.

        oldest_us: when the first of those came that are not held back. held_back_after_us: background jobs that came
        after this are held back, and those before no more. takes_background: whether there are slots for any of them.
        """
        self._room, self._held, self._shortest_first = room, sorted(held), shortest_first
        self._oldest_us = oldest_us
        self.held_back_after_us, self.takes_background = held_back_after_us, takes_background
        self.refused = NONE_REFUSED  # the shortest job that was offered and not taken

    def has_room(self, places: float, *, held_back: bool = False) -> bool:
        """Whether a job can be taken on. One can, however long it is, where nothing goes before it."""
        before = bisect_right(self._held, (held_back, places if self._shortest_first else math.inf))
        return sum(held for _, held in self._held[:before]) < self._room

    def add(self, places: float, *, held_back: bool = False) -> None:
        """Take on a job."""
        insort(self._held, (held_back, places))

    def offer(self, places: float, *, held_back: bool = False) -> bool:
        """Take on a job if there is room; says whether it was."""
        if self.has_room(places, held_back=held_back):
            self.add(places, held_back=held_back)
            return True
        self.refused = min(self.refused, (held_back, places))
        return False

    def offer_oldest(self, places: float, created_us: int) -> bool:
        """Take on the oldest of the jobs that are not held back if there is room, or where it is older than those here.

        A share of each tick is kept for the oldest job of a server, so that it ends however many shorter ones come.
        """
        nothing_here = not self._held or self._held[0][0]
        if nothing_here or (self._oldest_us is not None and created_us < self._oldest_us):
            self.add(places)
            return True
        return self.offer(places)
