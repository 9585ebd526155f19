"""Replicas that share durable jobs: whether they have room for one more, and which jobs a replica takes on. Pure."""

import math
from bisect import bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass

from tminus.service.model_info import Limits
from tminus.service.scheduling.room import ROUNDING, Overload
from tminus.service.work import Work


@dataclass(frozen=True, slots=True)
class ClusterLoad:
    """The work of all replicas of a model, as their last renewals reported it."""

    replicas: int = 0  # that live
    places_per_s: float = 0.0  # of all replicas
    held_s: float = 0.0  # seconds of work that a replica holds, on average
    jobs: int = 0  # that no replica holds
    places: float = 0.0  # of those jobs
    least_s: float = math.inf  # seconds of work of the least loaded other replica

    @property
    def backlog_s(self) -> float:
        """Seconds until all work is done, if it is shared evenly."""
        return self.held_s + (self.places / self.places_per_s if self.places_per_s else 0.0)

    @property
    def waiting_s(self) -> float:
        """Seconds that one replica takes for the jobs that no replica holds."""
        return self.places * self.replicas / self.places_per_s if self.places_per_s else 0.0

    def overload(self, work: Work, limits: Limits) -> Overload | None:
        """Return the first limit that one more job would exceed. Each live replica adds the limits of one server."""
        if not self.jobs and not self.held_s:
            return None
        own_s = work.places / self.places_per_s if self.places_per_s else 0.0
        if (backlog_s := self.backlog_s + own_s) > limits.max_backlog_s * (1 + ROUNDING):
            return Overload("backlog_s", backlog_s, limits.max_backlog_s)
        if self.jobs + 1 > (most := limits.max_jobs * max(1, self.replicas)):
            return Overload("jobs", self.jobs + 1, most)
        return None

    def room_elsewhere_in_s(self, work: Work, max_backlog_s: float) -> float:
        """Return the seconds until another replica has room for a job that was refused here; infinite without one.

        max_backlog_s: 0 if another limit was reached; then only an idle replica is known to have room.
        """
        own_s = work.places * self.replicas / self.places_per_s if self.places_per_s else 0.0
        return max(0.0, min(self.least_s, self.least_s + own_s - max_backlog_s))  # with no work it takes any job

    def room_in_s(self, overload: Overload) -> float:
        """Return the seconds until there is room, if no other job comes."""
        if overload.field == "backlog_s":
            return overload.value - overload.limit
        return self.backlog_s / (self.jobs + 1)


class Intake:
    """Room for jobs, by the work that goes before each of them. Work is counted in places.

    The shortest goes first, so a short job is taken on however much long work is held.
    """

    def __init__(self, room: float, held: Iterable[float] = (), *, oldest_us: int | None = None) -> None:
        """room: the work that may go before a job. held: the work left of each job. oldest_us: when the first came."""
        self._room, self._held, self._oldest_us = room, sorted(held), oldest_us
        self.refused = math.inf  # the shortest job that was offered and not taken

    def has_room(self, places: float) -> bool:
        """Whether a job can be taken on. A job of any length can, if no work goes before it."""
        return sum(self._held[: bisect_right(self._held, places)]) < self._room

    def add(self, places: float) -> None:
        """Take on a job."""
        insort(self._held, places)

    def offer(self, places: float) -> bool:
        """Take on a job if there is room, and return whether there was."""
        if self.has_room(places):
            self.add(places)
            return True
        self.refused = min(self.refused, places)
        return False

    def offer_oldest(self, places: float, created_us: int) -> bool:
        """Take on the oldest waiting job if there is room, or if it is older than the jobs here.

        The oldest job of a server has a share of each tick, so it ends however many shorter ones come.
        """
        if not self._held or (self._oldest_us is not None and created_us < self._oldest_us):
            self.add(places)
            return True
        return self.offer(places)
