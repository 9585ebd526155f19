"""A model in memory, with its engine, its scheduler and its Keeper of snapshots."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from tminus.service.engine.protocol import RowEngine
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.spec import Snapshot, trial_spec
from tminus.service.work import Batch

ReadSnapshot = Callable[[], Snapshot]  # may block until the GPU has copied the data to the host


class Keeper(Protocol):
    """Decides when to take snapshots of running jobs, and stores them.

    The worker's thread calls these methods, so they must not block.
    """

    def due(self, now_s: float) -> bool:
        """Return True if it is time to take snapshots."""

    def keep(self, snapshots: Mapping[str, ReadSnapshot], began_s: float, cost_s: float) -> None:
        """Store snapshots, keyed by job id. cost_s: how long the worker's thread took to make them."""


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
