"""The jobs of one owner in the fluid model of a scheduler. Pure: no torch, no asyncio, no clock, no lock."""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter

from tminus.service.scheduling.sharing import Sharing
from tminus.service.work import Work

LOOK_PAST = 8  # how many guided jobs the model looks past for one that fits a last single place
LEAST = 1e-9  # of a place: less is none


@dataclass(frozen=True, slots=True)
class Pending:
    """A job as the forecast needs it. Its rows are taken to be level, as the scheduler keeps them."""

    job_id: str
    work: Work
    places_left: float  # of all its rows
    beside_s: float = 0.0  # of a latent model, what is left to encode and decode, in seconds
    owner: str = ""


class Flow:
    """A job in the model, as stretches of steps that cost the same; the current stretch is kept apart."""

    __slots__ = ("arrival", "id", "left", "owner", "places", "rows", "steps", "stretches", "waits", "whole")

    def __init__(self, job: Pending, arrival: int) -> None:
        self.id, self.owner, self.arrival, self.rows = job.job_id, job.owner, arrival, job.work.rows
        self.whole, self.left = job.work.places, job.places_left
        self.waits = True  # never had a place yet
        self.stretches = _stretches(job.work, job.places_left / job.work.rows)
        self.steps, self.places = self.stretches.pop()  # in this stretch: the steps each row has left, the cost of one


def _stretches(work: Work, left: float) -> list[tuple[float, int]]:
    """The stretches that one row has left, as (steps, places a step), the last one first."""
    guided = work.guided
    stretches: list[tuple[float, int]] = []
    if not guided:
        return [(left, 1)]
    for steps, places in ((work.steps - guided.stop, 1), (len(guided), 2), (guided.start, 1)):
        if steps and left > 0:
            stretches.append((min(steps, left / places), places))
            left -= steps * places
    return stretches


_SHORTEST_FIRST: Callable[[Flow], tuple[float, int]] = attrgetter("left", "arrival")
_IN_ORDER: Callable[[Flow], tuple[float, int]] = attrgetter("arrival", "arrival")


class OwnerFlows:
    """Owns the jobs of one owner that have not ended."""

    def __init__(self, sharing: Sharing) -> None:
        self._sharing = sharing
        self._rank = _SHORTEST_FIRST if sharing.policy == "srpt" else _IN_ORDER
        self._jobs: OrderedDict[int, Flow] = OrderedDict()  # by arrival, in its order
        self._waiting: list[Flow] = []  # those that never had a place, the next one first
        self._active: list[Flow] = []  # the others
        self.rows, self.places_left = 0, 0.0  # of all of them

    def __len__(self) -> int:
        return len(self._jobs)

    def put_all(self, flows: list[Flow]) -> None:
        """Take on the jobs, in order of arrival."""
        self._jobs = OrderedDict((flow.arrival, flow) for flow in flows)
        self._waiting = sorted(flows, key=self._rank)
        self.rows = sum(flow.rows for flow in flows)
        self.places_left = sum(flow.left for flow in flows)

    def end(self, flow: Flow) -> None:
        """Forget a job that has had places."""
        del self._jobs[flow.arrival]
        self._active.remove(flow)
        self.rows -= flow.rows

    @property
    def oldest(self) -> Flow:
        """The job that came first."""
        return next(iter(self._jobs.values()))

    @property
    def next(self) -> Flow:
        """The job that goes first."""
        return min((*self._active, *self._waiting[:1]), key=self._rank)

    @property
    def much_longer(self) -> float:
        """The total work, in places, from which a job is much longer than the shortest."""
        return self._sharing.much_longer([job.whole for job in self._jobs.values()])

    @property
    def places_now(self) -> int:
        """What a step of all rows takes, or as much as a tick has."""
        places = 0
        for job in self._jobs.values():
            places += job.rows * job.places
            if places >= self._sharing.max_batch:
                return self._sharing.max_batch
        return places

    def share_out(self, places: float, free: float, longer: float) -> Iterator[tuple[Flow, float]]:
        """How many rows of each job are in a tick, if the owner gets so many places of those that are free.

        longer: the total work from which a job is held back. As the scheduler does: the reserve to the oldest job, then
        to all in turn. A part of a place is one that the owner has in some ticks only.
        """
        if places <= LEAST:
            return
        sharing, oldest = self._sharing, self.oldest
        reserve = self._reserve_for(oldest, places)
        left = places - reserve
        whole = places >= sharing.max_batch
        looked_past = 0
        for job in self._in_turn() if left > LEAST else ():
            mine, reserve = (reserve, 0.0) if job is oldest else (0.0, reserve)
            held_back = job.whole >= longer
            used = places - left
            room = min(left, sharing.room(free - used, held_back=held_back))
            rows = min(job.rows, (mine + room) // job.places if whole else (mine + room) / job.places)
            left += mine - rows * job.places
            if rows > LEAST:
                yield job, rows
            elif not held_back:
                looked_past += 1
            if left <= LEAST or looked_past == LOOK_PAST:
                break
        if reserve > LEAST:
            yield oldest, reserve / oldest.places

    def _reserve_for(self, oldest: Flow, places: float) -> float:
        """How many of the reserved places the oldest job can use."""
        reserved, max_batch = self._sharing.reserved, self._sharing.max_batch
        if not reserved:
            return 0.0
        if oldest.waits:
            del self._waiting[bisect_left(self._waiting, self._rank(oldest), key=self._rank)]
            self._activate(oldest, 0)
        if places >= max_batch:
            return min(oldest.rows, reserved // oldest.places) * oldest.places
        return min(oldest.rows * oldest.places, reserved * places / max_batch)

    def _in_turn(self) -> Iterator[Flow]:
        """The jobs by rank. A job that is reached becomes active."""
        active, waiting, rank = self._active, self._waiting, self._rank
        active.sort(key=rank)
        at = 0
        while waiting:
            turn = bisect_left(active, rank(waiting[0]), at, key=rank)
            yield from active[at:turn]
            self._activate(waiting.pop(0), turn)
            yield active[turn]
            at = turn + 1
        yield from active[at:]

    def _activate(self, job: Flow, at: int) -> None:
        job.waits = False
        self._active.insert(at, job)
