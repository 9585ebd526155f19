"""Which model has the next tick. Pure: no torch, no asyncio, no clock.

A tick is of one model. The policy is that of the rows of one model, in seconds: the job with the shortest remaining
work goes first, whichever model it is of, and a share of the time is kept for the model of the oldest job. Before that,
the owner goes first that has had least.
"""

from typing import Generic, TypeVar

from tminus.service.scheduling.scheduler import RESERVED_SHARE, Scheduler

Key = TypeVar("Key")
LEVEL_S = 0.5  # owners of several models that have had as much, but for so much, are taken to be level


class Turns(Generic[Key]):
    """Owns how much time the model of each owner's oldest job is owed. Each model has a scheduler of its own.

    A job that is to step alone counts as a model here.
    """

    def __init__(self) -> None:
        self._schedulers: dict[Key, Scheduler] = {}
        self._tick_s: dict[Key, float] = {}  # how long the last tick of each model took
        self._owed_s: dict[tuple[str, Key], float] = {}  # by owner, and model of its oldest job
        self._owed: tuple[str, Key] | None = None  # which of these the tick that was chosen last counts for

    def put(self, model: Key, scheduler: Scheduler, tick_s: float = 0.0) -> None:
        """Take on a model. tick_s: how long a tick of it is taken to be until one has stepped."""
        assert model not in self._schedulers
        self._schedulers[model], self._tick_s[model] = scheduler, tick_s

    def remove(self, model: Key) -> None:
        """Forget a model, which has no jobs any more."""
        assert not self._schedulers[model].has_work
        del self._schedulers[model]
        self._tick_s.pop(model, None)
        self._owed = None  # or it would hold the model, which holds its engine's memory
        self._forget_settled()

    @property
    def has_work(self) -> bool:
        """Whether a model has a next tick."""
        return any(scheduler.has_work for scheduler in self._schedulers.values())

    def shares(self) -> list[Key]:
        """The models that have a share of the time now: that of the job that goes first, and that of the oldest job."""
        busy = {model: scheduler for model, scheduler in self._schedulers.items() if scheduler.has_work}
        if len(busy) < 2:
            return list(busy)
        ranks = {model: scheduler.next_rank for model, scheduler in busy.items()}
        first = min(ranks, key=ranks.__getitem__)
        owners = busy[first].owners
        # Not those of an owner that has had more, or has no job of the first model: its turn is yet to come.
        level = [
            model
            for model, scheduler in busy.items()
            if scheduler.owners[0] in owners and ranks[model][0] <= ranks[first][0] + LEVEL_S
        ]
        oldest = min(level, key=lambda model: busy[model].oldest)
        reserves = any(scheduler.reserves for scheduler in busy.values())
        return [first, oldest] if reserves and first != oldest else [first]

    def next(self) -> Key | None:
        """The model of the next tick; None when there is nothing to do."""
        self._owed = None
        if len(self._schedulers) == 1:  # nearly always
            ((model, scheduler),) = self._schedulers.items()
            return model if scheduler.has_work else None
        models = self.shares()
        if len(models) < 2:
            return models[0] if models else None
        first, oldest = models
        self._owed = self._schedulers[oldest].owners[0], oldest
        owed_s = self._owed_s.setdefault(self._owed, 0.0)
        return first if owed_s <= 0 or owed_s < self._tick_s[oldest] else oldest

    def stepped(self, model: Key, seconds: float) -> None:
        """Note how long the tick took that a model has had."""
        self._tick_s[model] = seconds
        if self._owed is not None:
            owed_s = self._owed_s.get(self._owed, 0.0)
            if model == self._owed[1]:
                self._owed_s[self._owed] = max(0.0, owed_s - seconds)
            else:
                self._owed_s[self._owed] = owed_s + seconds * RESERVED_SHARE / (1 - RESERVED_SHARE)
        if self._owed_s:
            self._forget_settled()

    def _forget_settled(self) -> None:
        """Forget what was owed to owners that have no job there any more."""
        for owner, model in list(self._owed_s):
            if model not in self._schedulers or not self._schedulers[model].has_jobs_of(owner):
                del self._owed_s[owner, model]
