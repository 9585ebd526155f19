"""A model in memory: its engine and its scheduler, which the worker's thread uses."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from tminus.service.engine.protocol import RowEngine
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.spec import Snapshot, trial_spec
from tminus.service.work import Batch

ReadSnapshot = Callable[[], Snapshot]  # may wait for a copy from the GPU


class Keeper(Protocol):
    """Decides when to take snapshots of running jobs, and stores them. The worker's thread calls it; it never waits."""

    def due(self, now_s: float) -> bool:
        """Whether to take snapshots now."""

    def keep(self, snapshots: Mapping[str, ReadSnapshot], began_s: float, cost_s: float) -> None:
        """Store snapshots, by job id. cost_s: the seconds of the worker's thread that taking them cost."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A model in memory. Its number identifies it in this process and is never reused.

    An isolated job has a copy with a scheduler of its own.
    """

    number: int
    engine: RowEngine
    scheduler: Scheduler
    keeper: Keeper | None = None  # takes the snapshots of its durable jobs
    spare_work: Iterator[None] | None = None
    """Work for an idle worker, in items that take at most as long as a batch."""

    @property
    def info(self) -> ModelInfo:
        """Facts of the loaded checkpoint."""
        return self.engine.info

    def warm_up(self) -> None:
        """Run a job of one step, so that the first request finds warm code."""
        rows = self.engine.add(trial_spec(self.info, n=1, steps=1))
        self.engine.step(Batch(rows, (0,), ()))
        self.engine.wait()
        self.engine.images(rows)
        self.engine.remove(rows)
