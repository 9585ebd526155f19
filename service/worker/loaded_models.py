"""The models that the worker's thread steps, each with its engine and its scheduler, and whose tick is next."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from tminus.service.engine.protocol import RowEngine
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.scheduling.turns import Turns
from tminus.service.spec import Snapshot, trial_spec
from tminus.service.work import Batch

log = logging.getLogger(__name__)

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

    @property
    def info(self) -> ModelInfo:
        """What is loaded."""
        return self.engine.info


class LoadedModels:
    """Owns which models there are. Only the worker's thread may call."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._models: dict[int, LoadedModel] = {}
        self._turns: Turns[LoadedModel] = Turns()
        self.ever_latent = False  # whether a latent model was among them: something may be encoded or decoded

    def __iter__(self) -> Iterator[LoadedModel]:
        return iter(self._models.values())

    @property
    def has_ticks(self) -> bool:
        """Whether there is a next tick."""
        return self._turns.has_work

    def put(self, model: LoadedModel) -> None:
        """Take on a model, after one job of one step, so that its first request finds warm code."""
        engine = model.engine
        rows = engine.add(trial_spec(model.info, n=1, steps=1))
        started_s = self._clock()
        engine.step(Batch(rows, (0,), ()))
        engine.wait()
        engine.images(rows)
        engine.remove(rows)
        log.info("%s is ready: a tick of one row takes %.1f ms", model.info.name, 1e3 * (self._clock() - started_s))
        self._models[model.number] = model
        self.ever_latent |= model.info.latent is not None
        self._turns.put(model, model.scheduler)

    def put_apart(self, model: LoadedModel) -> LoadedModel:
        """Have a model once more, for one job: its ticks are between those of the others."""
        apart = replace(model, scheduler=model.scheduler.beside())
        self._turns.put(apart, apart.scheduler)
        return apart

    def next(self) -> LoadedModel | None:
        """The model of the next tick."""
        return self._turns.next()

    def stepped(self, model: LoadedModel, seconds: float) -> None:
        """Note how long the tick took that a model has had."""
        self._turns.stepped(model, seconds)

    def remove(self, number: int) -> None:
        """Forget a model that has no jobs any more."""
        self._turns.remove(self._models[number])
        del self._models[number]

    def remove_apart(self, model: LoadedModel) -> None:
        """Forget what was put apart for a job that has left its scheduler. Nothing happens to other models."""
        if model is not self._models[model.number]:
            self._turns.remove(model)
