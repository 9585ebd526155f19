"""A model that the worker's thread steps, with its engine and its scheduler."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from tminus.service.engine.protocol import RowEngine
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.spec import Snapshot, trial_spec
from tminus.service.work import Batch

ReadSnapshot = Callable[[], Snapshot]  # waits for the copy from a GPU


class Keeper(Protocol):
    """Keeps snapshots of running jobs, and says when to take them. Called in the worker's thread; returns at once."""

    def due(self, now_s: float) -> bool:
        """Whether to take snapshots now."""

    def keep(self, snapshots: Mapping[str, ReadSnapshot], began_s: float, cost_s: float) -> None:
        """Keep a round of snapshots, by job id; cost_s: the seconds that it has cost the worker's thread already."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """One model. Its number names it in this process, and is never given again.

    A job that steps in ticks of its own has the model once more, with a scheduler of its own.
    """

    number: int
    engine: RowEngine
    scheduler: Scheduler
    keeper: Keeper | None = None  # takes the snapshots of its durable jobs
    spare_work: Iterator[None] | None = None
    """Done a portion at a time, of one batch at most, while the worker has nothing else to do."""

    @property
    def info(self) -> ModelInfo:
        """What is loaded."""
        return self.engine.info

    def warm_up(self) -> None:
        """Run one job of one step, so that the first request finds warm code."""
        rows = self.engine.add(trial_spec(self.info, n=1, steps=1))
        self.engine.step(Batch(rows, (0,), ()))
        self.engine.wait()
        self.engine.images(rows)
        self.engine.remove(rows)
