"""What all models of a server share, and how a model joins it and leaves it. In the event loop's thread only."""

import asyncio
import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from tminus.service.api.caching import ResultCache
from tminus.service.api.models import Models
from tminus.service.api.origin import Doors
from tminus.service.api.services import Services
from tminus.service.api.stream_limits import Streams
from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import ServiceError, StorageFailed
from tminus.service.images.decoder import Decoder
from tminus.service.images.encoder import Encoder
from tminus.service.jobs.async_store import AsyncStore
from tminus.service.jobs.jobs import Jobs
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.snapshot_keeper import SnapshotKeeper
from tminus.service.jobs.standings import Standings
from tminus.service.jobs.store import OUTCOMES, JobStore
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.scheduling.speed import Speed
from tminus.service.worker.loaded_models import LoadedModel
from tminus.service.worker.recording import RecordingRoom
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

LOOK_S = 0.05  # how often it is looked whether a model is still used
KEPT_S = 10.0  # and whether jobs of a model that left are still kept


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is ready to be served."""

    engine: RowEngine
    limits: Limits  # of its requests
    speed: Speed
    release: Callable[[], object] = gc.collect  # called when nobody has the engine any more


@dataclass(slots=True)
class _Part:
    """What one model has for itself."""

    services: Services
    engine: RowEngine | None  # None once it has left
    lifecycle: Lifecycle
    keeper: SnapshotKeeper
    release: Callable[[], object]


class Parts:
    """Owns the parts, and the models that are loaded or whose jobs are still kept."""

    def __init__(
        self, first: list[Prepared], limits: Limits, open_store: Callable[[str], JobStore], doors: Doors
    ) -> None:
        """first: the models that it begins with, the default one first. open_store: for the hash of weights."""
        self.metrics, self.models, self.doors = Metrics(), Models(), doors
        self._limits, self._open_store = limits, open_store
        self._numbers, self._arrivals = count(), count()
        self._stores: dict[str, AsyncStore] = {}  # by the hash of the weights
        self._parts: dict[int, _Part] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._noise_turn = asyncio.Lock()
        self.admission = Admission(limits)
        self.cache = ResultCache(limits.result_cache_bytes)
        self.streams = Streams(limits.max_streams, limits.max_streams_per_address)
        self.decoder, self.encoder, self.recordings = Decoder(), Encoder(self.metrics.encoded), RecordingRoom()
        loaded = [self._loaded(prepared) for prepared in first]
        self.worker = Worker(loaded, self.admission, self.metrics)
        self.standings = Standings(self.worker)
        self.jobs = Jobs(self.worker, self.standings)
        for model, prepared in zip(loaded, first, strict=True):
            self._serve(model, prepared)
        self._watch()

    # --- the server ---

    async def start(self) -> None:
        """Start what runs."""
        self.worker.start()
        for part in self._parts.values():
            await part.lifecycle.start()

    async def close(self) -> None:
        """End what runs, when requests are over."""
        self.worker.close()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        for part in self._parts.values():
            part.keeper.close()
        await asyncio.gather(*(part.lifecycle.close() for part in self._parts.values()))
        for store in self._stores.values():
            store.close()
        self.decoder.close()
        self.encoder.close()

    def _watch(self) -> None:
        worker, admission = self.worker, self.admission
        self.metrics.watch(
            tasks=lambda: len(asyncio.all_tasks()),  # /metrics is answered in the event loop
            rows_active=lambda: worker.rows_active,
            rows_waiting=lambda: max(0, admission.rows - worker.rows_active),
            backlog_s=lambda: admission.backlog_s,
            device_memory_bytes=lambda: max((engine.memory_bytes() or 0 for engine in self._engines()), default=0),
            store_up=lambda: all(store.failure is None for store in self._stores.values()),
            streams_open=lambda: self.streams.open,
            stalled_s=lambda: worker.stalled_s,
            tick_time_ratio=lambda: admission.tick_time_ratio,
        )

    # --- models that come ---

    async def join(self, prepared: Prepared) -> Services:
        """Serve one more model, in place of another of its name. Raises Draining, and what its first tick raises."""
        weights_hash = prepared.engine.info.weights_hash
        others_jobs = weights_hash in self._stores
        if not others_jobs:
            store = await asyncio.to_thread(self._open_store, weights_hash)
            self._stores[weights_hash] = AsyncStore(store)
        model = self._loaded(prepared)
        try:
            await asyncio.wrap_future(self.worker.load(model))
        except BaseException:
            self.admission.remove(model.number)
            self._release_store(weights_hash)
            raise
        part = self._serve(model, prepared)
        # Where the same weights are loaded again, their jobs that have not ended stay with the engine they began on.
        await part.lifecycle.start(take_on=not others_jobs)
        return part.services

    def _loaded(self, prepared: Prepared) -> LoadedModel:
        number, info = next(self._numbers), prepared.engine.info
        self.admission.put(number, prepared.speed)
        keeper = SnapshotKeeper(self._store(info.weights_hash), info.fingerprint, self.metrics)
        scheduler = Scheduler(prepared.speed.sharing, self._arrivals)
        return LoadedModel(number, prepared.engine, scheduler, keeper)

    def _store(self, weights_hash: str) -> AsyncStore:
        if weights_hash not in self._stores:
            self._stores[weights_hash] = AsyncStore(self._open_store(weights_hash))
        return self._stores[weights_hash]

    def _serve(self, model: LoadedModel, prepared: Prepared) -> _Part:
        info = model.info
        lifecycle = Lifecycle(
            self._store(info.weights_hash), self.worker, model.number, info, prepared.limits, self.metrics
        )
        services = Services(
            number=model.number,
            model=info,
            limits=prepared.limits,
            doors=self.doors,
            metrics=self.metrics,
            worker=self.worker,
            jobs=self.jobs,
            standings=self.standings,
            decoder=self.decoder,
            encoder=self.encoder,
            cache=self.cache,
            streams=self.streams,
            recordings=self.recordings,
            noise_turn=self._noise_turn,
        )
        assert isinstance(model.keeper, SnapshotKeeper)
        part = self._parts[model.number] = _Part(services, model.engine, lifecycle, model.keeper, prepared.release)
        self.jobs.put(lifecycle)
        self.metrics.model_loaded(info)
        self.models.put(services)
        return part

    # --- models that go ---

    def leave(self, services: Services) -> None:
        """Free a model that is served no more, when its jobs have ended."""
        task = asyncio.get_running_loop().create_task(self._leave(self._parts[services.number]))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def is_leaving(self, name: str) -> bool:
        """Whether a model of this name still has jobs to finish, and is served no more."""
        return any(part.services.model.name == name and part.engine is not None for part in self._unserved())

    async def _leave(self, part: _Part) -> None:
        number, info = part.services.number, part.services.model
        try:
            while self.models.is_used(number):  # noqa: ASYNC110  requests come and go in many places
                await asyncio.sleep(LOOK_S)
            await part.lifecycle.idle()
            await asyncio.wrap_future(self.worker.unload(number))
        except ServiceError:  # the server ends
            return
        self.admission.remove(number)
        part.engine = None
        if all(services.model.name != info.name for services in self.models):
            self.metrics.model_gone(info.name)
        await asyncio.to_thread(part.keeper.close)
        await asyncio.to_thread(part.release)
        log.info("%s, fingerprint %s, is unloaded", info.name, info.fingerprint)
        # Clients may still ask for what it has made.
        while not self._shares_store(part) and await self._keeps_jobs(part):  # noqa: ASYNC110
            await asyncio.sleep(KEPT_S)
        self.jobs.remove(number)
        self.models.forget(number)
        del self._parts[number]
        await part.lifecycle.close()
        self._release_store(info.weights_hash)

    def _engines(self) -> list[RowEngine]:
        return [part.engine for part in self._parts.values() if part.engine is not None]

    def _unserved(self) -> list[_Part]:
        served = {services.number for services in self.models}
        return [part for number, part in self._parts.items() if number not in served]

    def _shares_store(self, part: _Part) -> bool:
        return any(other.lifecycle.store is part.lifecycle.store for other in self._parts.values() if other is not part)

    @staticmethod
    async def _keeps_jobs(part: _Part) -> bool:
        try:
            return bool(await part.lifecycle.store.finished(None, OUTCOMES, 1) or part.lifecycle.all())
        except StorageFailed:
            return True

    def _release_store(self, weights_hash: str) -> None:
        """Close the store of weights that no model has any more."""
        if all(part.services.model.weights_hash != weights_hash for part in self._parts.values()):
            self._stores.pop(weights_hash).close()
