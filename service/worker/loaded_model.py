"""A model in memory, with its engine, its scheduler, its Keeper of snapshots and the watch over its ticks."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from tminus.service.engine.protocol import RowEngine
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import Scheduler, TickTimes
from tminus.service.spec import Snapshot, trial_spec
from tminus.service.work import Batch

log = logging.getLogger(__name__)

WATCHED_S = 60.0  # ticks are compared after this much time in them
FAR_OFF = 3.0  # ticks that are this many times slower or faster than at the start make its measurements doubtful

ReadSnapshot = Callable[[], Snapshot]  # may block until the GPU has copied the data to the host


class Keeper(Protocol):
    """Decides when to take snapshots of running jobs, and stores them.

    The worker's thread calls these methods, so they must not block.
    """

    def due(self, now_s: float) -> bool:
        """Return True if it is time to take snapshots."""

    def keep(self, snapshots: Mapping[str, ReadSnapshot], began_s: float, cost_s: float) -> None:
        """Store snapshots, keyed by job id. cost_s: how long the worker's thread took to make them."""


@dataclass(slots=True, eq=False)
class TickWatch:
    """Compares the ticks of a model with the durations that its start measured.

    A large difference means that other programs used the cores at the start, or use them now. The watch then has the
    next start on an idle machine measure again, once.
    """

    times: TickTimes
    measure_again: Callable[[], None]
    _real_s: float = 0.0
    _predicted_s: float = 0.0
    _is_told: bool = False

    def ticked(self, model: str, places: int, seconds: float, *, overlaps: bool) -> None:
        """Add a tick of some places. Each WATCHED_S seconds of ticks are compared as a whole."""
        self._real_s += seconds
        self._predicted_s += self.times.seconds(places) * ((self.times.overlapped or 1.0) if overlaps else 1.0)
        if self._is_told or self._real_s < WATCHED_S or self._predicted_s <= 0:
            return
        ratio, self._real_s, self._predicted_s = self._real_s / self._predicted_s, 0.0, 0.0
        if 1 / FAR_OFF < ratio < FAR_OFF:
            return
        self._is_told = True
        log.warning(
            "%s: for a minute ticks have taken %.2f times as long as at the start. A start on an idle machine measures "
            "again", model, ratio,
        )  # fmt: skip
        self.measure_again()


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in memory.

    `number` identifies the model within this process and is never reused. An isolated job gets its own copy of this
    object, with a separate scheduler.
    """

    number: int
    engine: RowEngine
    scheduler: Scheduler
    keeper: Keeper | None = None  # stores snapshots of this model's durable jobs
    spare_work: Iterator[None] | None = None
    """Work for an idle worker, in items that take at most as long as a batch."""
    watch: TickWatch | None = None

    @property
    def info(self) -> ModelInfo:
        return self.engine.info

    def warm_up(self) -> None:
        """Run a job of one step. One-time initialization then does not delay the first request."""
        rows = self.engine.add(trial_spec(self.info, n=1, steps=1))
        self.engine.step(Batch(rows, (0,), ()))
        self.engine.wait()
        self.engine.images(rows)
        self.engine.remove(rows)
