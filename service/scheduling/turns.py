"""Which model has the next tick. Pure: no torch, no asyncio, no clock.

A tick is of one model. The policy is that of the rows of one model, in seconds: the job with the shortest remaining
work goes first, whichever model it is of, and a share of the time is kept for the model of the oldest job. Before that,
the owner goes first that has had least.
"""

from collections.abc import Mapping
from typing import TypeVar

from tminus.service.scheduling.scheduler import Rank, Scheduler
from tminus.service.scheduling.sharing import RESERVED_SHARE

Key = TypeVar("Key")


def shares(ranks: Mapping[Key, Rank], oldest: Mapping[Key, int], *, reserve: bool = True) -> dict[Key, float]:
    """What share of the time each model has now; models that have none are left out.

    ranks: of each model that has work, that of its next job. oldest: the number of the oldest job of the same owner.
    """
    first = min(ranks, key=lambda each: ranks[each])
    same_owner = [model for model in ranks if ranks[model][0] == ranks[first][0]]
    oldest_model = min(same_owner, key=lambda each: oldest[each])
    if first == oldest_model or not reserve:
        return {first: 1.0}
    return {first: 1 - RESERVED_SHARE, oldest_model: RESERVED_SHARE}


class Turns:
    """Owns how much time the model of the oldest job is owed. Each model's rows are in a scheduler of its own."""

    def __init__(self) -> None:
        self._schedulers: dict[int, Scheduler] = {}
        self._tick_s: dict[int, float] = {}  # how long the last tick of each model took
        self._oldest: int | None = None  # the model that is owed
        self._owed_s = 0.0

    def put(self, model: int, scheduler: Scheduler) -> None:
        """Take on a model."""
        assert model not in self._schedulers
        self._schedulers[model] = scheduler

    def remove(self, model: int) -> None:
        """Forget a model, which has no jobs any more."""
        assert not self._schedulers[model].has_work
        del self._schedulers[model]
        self._tick_s.pop(model, None)

    @property
    def has_work(self) -> bool:
        """Whether a model has a next tick."""
        return any(scheduler.has_work for scheduler in self._schedulers.values())

    def next(self) -> int | None:
        """The model of the next tick; None when there is nothing to do."""
        busy = {model: scheduler for model, scheduler in self._schedulers.items() if scheduler.has_work}
        if len(busy) < 2:  # nearly always
            self._oldest, self._owed_s = None, 0.0
            return next(iter(busy), None)
        ranks = {model: scheduler.next_rank for model, scheduler in busy.items()}
        first, *others = shares(
            ranks,
            {model: scheduler.oldest for model, scheduler in busy.items()},
            reserve=any(scheduler.reserves for scheduler in busy.values()),
        )
        oldest = others[0] if others else None
        if oldest != self._oldest:
            self._oldest, self._owed_s = oldest, 0.0
        if oldest is None or self._owed_s <= 0 or self._owed_s < self._tick_s.get(oldest, 0.0):
            return first
        return oldest

    def stepped(self, model: int, seconds: float) -> None:
        """Note how long the tick took that a model has had."""
        self._tick_s[model] = seconds
        if model == self._oldest:
            self._owed_s = max(0.0, self._owed_s - seconds)
        elif self._oldest is not None:
            self._owed_s += seconds * RESERVED_SHARE / (1 - RESERVED_SHARE)
