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

    @property
    def backlog_s(self) -> float:
        """How long all of it takes, if it is shared evenly."""
        return self.held_s + (self.places / self.places_per_s if self.places_per_s else 0.0)

    @property
    def waiting_s(self) -> float:
        """How long the jobs that nobody holds take on one of them."""
        return self.places * self.replicas / self.places_per_s if self.places_per_s else 0.0

    def excess(self, work: Work, limits: Limits) -> Excess | None:
        """The first limit that one more job would pass: those of one server, for each replica that lives."""
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
        return self.backlog_s / (self.jobs + 1)


class Intake:
    """Room for jobs, by how much work goes before each: only what is shorter, since the shortest goes first.

    So a short job is taken on however much long work is held. Work is counted in places.
    """

    def __init__(self, room: float, held: Iterable[float] = (), *, oldest_us: int | None = None) -> None:
        """room: how much work may go before a job. held: what is left of each job. oldest_us: when the first came."""
        self._room, self._held, self._oldest_us = room, sorted(held), oldest_us
        self.refused = math.inf  # the shortest job that was offered and not taken

    def has_room(self, places: float) -> bool:
        """Whether a job can be taken on. One can, however long it is, where nothing goes before it."""
        return sum(self._held[: bisect_right(self._held, places)]) < self._room

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
        """Take on the oldest of the jobs if there is room, or where it is older than those here.

        A share of each tick is kept for the oldest job of a server, so that it ends however many shorter ones come.
        """
        if not self._held or (self._oldest_us is not None and created_us < self._oldest_us):
            self.add(places)
            return True
        return self.offer(places)
