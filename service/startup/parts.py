"""What all models of a server share, and how a model joins it and leaves it. In the event loop's thread only."""

import asyncio
import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

from tminus.service.access.access import Access
from tminus.service.api.answers.caching import ResultCache
from tminus.service.api.answers.documents import document
from tminus.service.api.edge.origin import Doors
from tminus.service.api.edge.stream_limits import Streams
from tminus.service.api.models import Models, Services
from tminus.service.api.other_replicas import OtherReplicas
from tminus.service.byte_budget import ByteBudget
from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import Draining, EngineFailed, ServiceError, StorageFailed
from tminus.service.images.decoder import Decoder
from tminus.service.images.encoder import Encoder
from tminus.service.jobs.jobs import Jobs
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.new_jobs import NewJobs
from tminus.service.jobs.snapshot_keeper import SnapshotKeeper
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import OUTCOMES
from tminus.service.jobs.store.results import Results
from tminus.service.jobs.stores import Stores
from tminus.service.jobs.views import JobStatuses
from tminus.service.jobs.webhooks.deliverer import Deliverer, Rules
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.owners import Served
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.worker.loaded_models import LoadedModel
from tminus.service.worker.loop import Note, note_nothing
from tminus.service.worker.recording import RecordingRoom
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

LOOK_S = 0.05  # how often it is looked whether a model is still used
KEPT_S = 10.0  # and whether jobs of a model that left are still kept
RETRY_S = 1.0  # until a worker that hangs is asked again
MOST_KEPT = 8  # models that have left whose jobs can still be asked for; those of earlier ones stay on the disk


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
        self,
        first: list[Prepared],
        limits: Limits,
        open_store: Callable[[str], JobStore],
        doors: Doors,
        access: Access,
        results: Results | None = None,
        webhooks: Rules | None = None,
        note: Note = note_nothing,
    ) -> None:
        """first: the models that it begins with, the default one first. open_store: for the hash of weights.

        results: where large ones of durable jobs go, if not into their store. webhooks: how they are sent, if they are.
        note: as the worker's loop has it.
        """
        self._webhooks = webhooks
        self.metrics, self.models, self.doors, self.access = Metrics(), Models(), doors, access
        self._numbers, self._arrivals, self._served = count(), count(), Served()
        self._stores = Stores(open_store, results)
        self._parts: dict[int, _Part] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None  # None until it starts
        self._noise_turn = asyncio.Lock()
        self.admission = Admission(limits, self._served, shared=access.has_keys)
        self.cache = ResultCache(limits.result_cache_bytes)
        self.streams = Streams(limits.max_streams, limits.max_streams_per_address)
        self.other_replicas = OtherReplicas()
        self.answers = ByteBudget()  # what is held of answers: frames they are made of, and bodies until they have left
        self.decoder, self.encoder = Decoder(), Encoder(self.metrics.encoded)
        self.recordings = RecordingRoom(self.answers)
        stores = [self._stores.take_first(prepared.engine.info.weights_hash) for prepared in first]
        loaded = [self._loaded(prepared, store) for prepared, store in zip(first, stores, strict=True)]
        self.worker = Worker(loaded, self.admission, self.metrics, note=note)
        self.statuses = JobStatuses(self.worker)
        self.jobs = Jobs(self.worker, self.statuses)
        self.new_jobs = NewJobs(self.worker, self.jobs)
        for model, prepared, store in zip(loaded, first, stores, strict=True):
            self._serve(model, prepared, store)
        self._watch()

    # --- the server ---

    async def start(self) -> None:
        """Start what runs."""
        self._loop = asyncio.get_running_loop()
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
        self._stores.close()
        await self.other_replicas.close()
        self.decoder.close()
        self.encoder.close()

    def _watch(self) -> None:
        worker, admission = self.worker, self.admission
        self.metrics.watch(
            tasks=lambda: len(asyncio.all_tasks(self._loop)) if self._loop is not None else 0,
            rows_active=lambda: worker.rows_active,
            rows_waiting=lambda: max(0, admission.rows - worker.rows_active),
            backlog_s=lambda: admission.backlog_s,
            device_memory_bytes=lambda: max((engine.memory_bytes() or 0 for engine in self._engines()), default=0),
            keys_up=lambda: self.access.keys_up,
            store_up=lambda: self.jobs.store_failure() is None,
            streams_open=lambda: self.streams.open,
            stalled_s=lambda: worker.stalled_s,
            tick_time_ratio=lambda: admission.tick_time_ratio,
            waiting_in_store=self.waiting_in_store,
        )

    def waiting_in_store(self) -> tuple[int, float] | None:
        """The jobs of a shared store that nobody holds, and the seconds that one server takes for them.

        As of the last renewal; None without such a store, or while it does not answer. Of all weights that are served.
        What is loaded twice, as after a reload of the same weights, counts once.
        """
        loads = {
            part.services.model.weights_hash: part.lifecycle.leases.load
            for part in list(self._parts.values())
            if part.lifecycle.leases is not None
        }
        known = [load for load in loads.values() if load is not None]
        return (sum(load.jobs for load in known), sum(load.waiting_s for load in known)) if known else None

    # --- models that come ---

    async def join(self, prepared: Prepared) -> Services:
        """Serve one more model, in place of another of its name.

        Raises Draining and the like, what its first tick raises, and StorageFailed where its store cannot be opened.
        """
        weights_hash = prepared.engine.info.weights_hash
        try:
            store, shared = await self._stores.take(weights_hash)
        except ValueError as error:
            raise StorageFailed(f"the store of the model's durable jobs cannot be opened: {error}") from None
        model = self._loaded(prepared, store)
        try:
            await asyncio.wrap_future(self.worker.load(model))
        except BaseException:
            self.admission.remove(model.number)
            await self._stores.release(weights_hash)
            raise
        part = self._serve(model, prepared, store)
        # Where the same weights are loaded again, their jobs that have not ended stay with the engine they began on.
        await part.lifecycle.start(take_on=not shared)
        return part.services

    def _loaded(self, prepared: Prepared, store: AsyncStore) -> LoadedModel:
        number = next(self._numbers)
        self.admission.put(number, prepared.speed)
        keeper = SnapshotKeeper(store, prepared.engine.info.fingerprint, self.metrics)
        scheduler = Scheduler(prepared.speed.sharing, self._arrivals, self._served)
        return LoadedModel(number, prepared.engine, scheduler, keeper)

    def _serve(self, model: LoadedModel, prepared: Prepared, store: AsyncStore) -> _Part:
        info = model.info
        lifecycle = Lifecycle(
            store, self.worker, self.admission, model.number, info, prepared.limits, self.metrics,
            self._deliver if self._webhooks is not None else None,
        )  # fmt: skip
        services = Services(
            number=model.number,
            model=info,
            limits=prepared.limits,
            doors=self.doors,
            access=self.access,
            metrics=self.metrics,
            worker=self.worker,
            jobs=self.jobs,
            new_jobs=self.new_jobs,
            statuses=self.statuses,
            decoder=self.decoder,
            encoder=self.encoder,
            cache=self.cache,
            streams=self.streams,
            other_replicas=self.other_replicas,
            recordings=self.recordings,
            webhooks=self._webhooks.allowed if self._webhooks is not None else None,
            loaded_s=int(time.time()),
            noise_turn=self._noise_turn,
        )
        assert isinstance(model.keeper, SnapshotKeeper)
        part = self._parts[model.number] = _Part(services, model.engine, lifecycle, model.keeper, prepared.release)
        self.jobs.put(lifecycle)
        self.metrics.model_loaded(info)
        self.models.put(services)
        return part

    async def _deliver(self, lifecycle: Lifecycle) -> None:
        assert self._webhooks is not None
        view = partial(self.jobs.to_deliver, lifecycle)
        await Deliverer(lifecycle.store, self._webhooks, view, document, self.metrics).run()

    # --- models that go ---

    def leave(self, services: Services) -> None:
        """Free a model that is served no more, when its jobs have ended."""
        part = self._parts[services.number]
        part.lifecycle.retired = True
        task = asyncio.get_running_loop().create_task(self._leave(part))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def is_leaving(self, name: str) -> bool:
        """Whether a model of this name still has jobs to finish, and is served no more."""
        return any(part.services.model.name == name and part.engine is not None for part in self._unserved())

    async def _leave(self, part: _Part) -> None:
        try:
            if await self._free(part):
                await self._forget(part)
        except Exception:
            log.exception("%s could not be unloaded", part.services.model.name)

    async def _free(self, part: _Part) -> bool:
        """Wait for the end of a model's jobs, and free its memory; False if the server ends before."""
        number, info = part.services.number, part.services.model
        while self.models.is_used(number):  # noqa: ASYNC110  requests come and go in many places
            await asyncio.sleep(LOOK_S)
        await part.lifecycle.idle()
        if part.lifecycle.leases is not None:
            part.lifecycle.leases.end()
        while True:
            try:
                await asyncio.wrap_future(self.worker.unload(number))
                break
            except (Draining, EngineFailed):
                return False
            except ServiceError:  # a tick hangs: if it ends after all, the model goes
                await asyncio.sleep(RETRY_S)
        self.admission.remove(number)
        part.engine = None
        if all(services.model.name != info.name for services in self.models):
            self.metrics.model_gone(info.name)
        await asyncio.to_thread(part.keeper.close)
        await asyncio.to_thread(part.release)
        log.info("%s, fingerprint %s, is unloaded", info.name, info.fingerprint)
        return True

    async def _forget(self, part: _Part) -> None:
        """Forget a model that is freed, once clients can ask for nothing that it has made."""
        number, weights_hash = part.services.number, part.services.model.weights_hash
        while (  # noqa: ASYNC110
            not self._stores.is_shared(weights_hash) and await self._keeps_jobs(part) and not self._too_old(part)
        ):
            await asyncio.sleep(KEPT_S)
        self.jobs.remove(number)
        self.models.forget(number)
        del self._parts[number]
        await part.lifecycle.close()
        await self._stores.release(weights_hash)

    def _engines(self) -> list[RowEngine]:
        return [part.engine for part in list(self._parts.values()) if part.engine is not None]

    def _unserved(self) -> list[_Part]:
        served = {services.number for services in self.models}
        return [part for number, part in self._parts.items() if number not in served]

    def _too_old(self, part: _Part) -> bool:
        """Whether so many later models were replaced that this one's store is not to be kept open."""
        freed = [each for each in self._unserved() if each.engine is None]
        return len(freed) > MOST_KEPT and part is freed[0]

    @staticmethod
    async def _keeps_jobs(part: _Part) -> bool:
        try:
            return bool(await part.lifecycle.store.call(JobStore.page, None, OUTCOMES, 1) or part.lifecycle.all())
        except StorageFailed:
            return True
