"""Predicts when each job will end and how many go before it. Pure: no torch, no asyncio, no clock, no lock.

Each model has a fluid model of its own (fluid.py), whose time is that of the model's own ticks. Here they share the
time as the models do (turns.py).
"""

import math
from bisect import bisect_left, insort
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from tminus.service.scheduling.flows import OwnerFlows, Pending
from tminus.service.scheduling.fluid import Fluid
from tminus.service.scheduling.speed import Speed
from tminus.service.scheduling.turns import shares
from tminus.service.work import Outlook

ALIKE = 0.02  # of what a job has left: owners on several models are taken to be level within so much


class Fluids:
    """The jobs of all models, if no other job comes. Owns its state: a time from 0 s on, and the jobs of that time."""

    def __init__(
        self, jobs: Sequence[Pending], speeds: Mapping[int, Speed], had_s: Mapping[str, float] | None = None
    ) -> None:
        """jobs: in order of arrival, each of one of the models in speeds. had_s: what each owner has had."""
        self._speeds, owners_had_s = speeds, dict(had_s or {})
        by_model: dict[int, list[tuple[int, Pending]]] = {}
        for arrival, job in enumerate(jobs):
            by_model.setdefault(job.work.model, []).append((arrival, job))
        self._fluids = {
            model: Fluid(
                [job for _, job in own], speed.sharing, speed.tick_times, [arrival for arrival, _ in own], owners_had_s
            )
            for model, own in by_model.items()
            for speed in (speeds[model],)
        }
        self.now_s = 0.0
        self.tick_end_s = 0.0  # the end of the tick that now_s lies in: the worker sees then what happened in it

    @property
    def jobs(self) -> int:
        """How many jobs there are now."""
        return sum(fluid.jobs for fluid in self._fluids.values())

    @property
    def rows(self) -> Mapping[int, int]:
        """How many rows each model has."""
        return {model: fluid.rows for model, fluid in self._fluids.items()}

    @property
    def ticks_s(self) -> float:
        """How long what is left takes in full ticks."""
        return sum(fluid.places_left * self.place_s(model) for model, fluid in self._fluids.items())

    def jobs_of(self, owner: str) -> list[tuple[int, OwnerFlows]]:
        """The jobs of an owner, by model."""
        return [(model, fluid.owners[owner]) for model, fluid in self._fluids.items() if owner in fluid.owners]

    def place_s(self, model: int) -> float:
        """How long a place of a model takes in a full tick."""
        return self._speeds[model].place_s

    def running(self) -> frozenset[str]:
        """The jobs all of whose rows step now."""
        busy = self._busy()
        turns = _shares(busy) if len(busy) > 1 else busy
        return frozenset[str]().union(*(busy[model].running() for model in turns))

    def step(self) -> list[str]:
        """Go on to the next event; returns the jobs that ended."""
        busy = self._busy()
        if len(busy) > 1:
            return self._step_in_turns([(busy[model], share) for model, share in _shares(busy).items()])
        for fluid in busy.values():
            offset_s = self.now_s - fluid.now_s
            ended = fluid.step()
            self.now_s, self.tick_end_s = offset_s + fluid.now_s, offset_s + fluid.tick_end_s
            return ended
        return []

    def _step_in_turns(self, parts: Sequence[tuple[Fluid, float]]) -> list[str]:
        """Go on to the next event of one or two models that have these shares of the time."""
        seconds = min(fluid.event_s / share for fluid, share in parts)
        if len(parts) == 2:
            seconds = min(seconds, _overtaken_s(*parts))
        elif (ahead_s := self._ahead_s()) > 0:
            fluid, _ = parts[0]
            seconds = min(seconds, max(fluid.longest_tick_s, ALIKE * fluid.next_rank[1], ahead_s))
        self.now_s += seconds
        self.tick_end_s = self.now_s
        ended = []
        for fluid, share in parts:
            if own := fluid.step(until_s=fluid.now_s + share * seconds):
                ended += own
                self.tick_end_s = max(self.tick_end_s, self.now_s + fluid.tick_end_s - fluid.now_s)
        return ended

    def _ahead_s(self) -> float:
        """How much more the owner whose turn it is on another model has had, at the least; 0 where it is the same."""
        had_s = sorted(fluid.next_rank[0] for fluid in self._busy().values())
        return had_s[1] - had_s[0]

    def _busy(self) -> dict[int, Fluid]:
        return {model: fluid for model, fluid in self._fluids.items() if fluid.jobs}


def _shares(busy: Mapping[int, Fluid]) -> Mapping[int, float]:
    return shares(
        {model: fluid.next_rank for model, fluid in busy.items()},
        {model: fluid.oldest for model, fluid in busy.items()},
        {model: [fluid.first_owner, *fluid.owners] for model, fluid in busy.items()},
        reserve=any(fluid.reserves for fluid in busy.values()),
    )


def _overtaken_s(first: tuple[Fluid, float], oldest: tuple[Fluid, float]) -> float:
    """How long it is until the next job of the oldest job's model has less left than that of the first model."""
    (fluid, share), (other, other_share) = first, oldest
    faster = other.next_pace * other_share - fluid.next_pace * share
    if not faster > 0:
        return math.inf
    return max(fluid.longest_tick_s, (other.next_rank[1] - fluid.next_rank[1]) / faster)


def forecast(
    jobs: Sequence[Pending],
    speeds: Mapping[int, Speed],
    until: str | None = None,
    had_s: Mapping[str, float] | None = None,
) -> dict[str, Outlook]:
    """Predict each job's outlook, by its id, if no other job comes.

    jobs: in order of arrival. until: a job; only it and those that end before it are predicted. had_s: what each owner
    has had, as `Served` tells it.
    """
    fluids = Fluids(jobs, speeds, had_s)
    outlooks = {job.job_id: Outlook(0, 0.0) for job in jobs if job.places_left <= 0}  # they wait for delivery only
    srpt = any(speed.sharing.policy == "srpt" for speed in speeds.values())
    in_turn = sorted(jobs, key=lambda job: job.places_left * speeds[job.work.model].sharing.place_s) if srpt else jobs
    ranks = {job.job_id: rank for rank, job in enumerate(in_turn)}
    running = fluids.running()
    ended_ranks: list[int] = []
    while fluids.jobs and until not in outlooks:
        ended = fluids.step()
        for job_id in ended:
            insort(ended_ranks, ranks[job_id])
        for job_id in ended:
            position = 0 if job_id in running else bisect_left(ended_ranks, ranks[job_id])
            outlooks[job_id] = Outlook(position, fluids.tick_end_s)
    return _with_beside(outlooks, jobs)


def _with_beside(outlooks: dict[str, Outlook], jobs: Sequence[Pending]) -> dict[str, Outlook]:
    """Add what comes beside the ticks: one job at a time, as their ticks end, of the owner that has had least of it."""
    beside = [job for job in jobs if job.beside_s and job.job_id in outlooks]
    coming = deque(sorted(beside, key=lambda job: outlooks[job.job_id].eta_s))
    waiting: defaultdict[str, deque[Pending]] = defaultdict(deque)
    had_s: Counter[str] = Counter()
    free_s = 0.0
    while coming or waiting:
        if not waiting:
            free_s = max(free_s, outlooks[coming[0].job_id].eta_s)
        while coming and outlooks[coming[0].job_id].eta_s <= free_s:
            waiting[coming[0].owner].append(coming.popleft())
        owner = min(waiting, key=had_s.__getitem__)
        job = waiting[owner].popleft()
        if not waiting[owner]:
            del waiting[owner]
        free_s += job.beside_s
        had_s[owner] += job.beside_s  # type: ignore[assignment]
        outlooks[job.job_id] = replace(outlooks[job.job_id], eta_s=free_s)
    return outlooks
