"""The models of a server: what they share, how one joins and leaves, comes into memory and goes out of it.

In the event loop's thread only. When that happens is decided in changes.py.
"""

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from typing import Protocol

from tminus.service.access.access import Access
from tminus.service.api.answers.caching import ResultCache
from tminus.service.api.answers.documents import document
from tminus.service.api.edge.connections import Streams
from tminus.service.api.edge.origin import AllowedSites
from tminus.service.api.models import Models, Services
from tminus.service.api.other_replicas import OtherReplicas
from tminus.service.byte_budget import ByteBudget
from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import (
    Draining,
    EngineFailed,
    ServiceError,
    StorageFailed,
)
from tminus.service.images.decoder import Decoder
from tminus.service.images.encoder import Encoder
from tminus.service.jobs.crash_report import CrashFile
from tminus.service.jobs.jobs import Jobs
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.new_jobs import NewJobs
from tminus.service.jobs.snapshot_keeper import SnapshotKeeper
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import OUTCOMES
from tminus.service.jobs.stores import Stores
from tminus.service.jobs.views import JobStatuses
from tminus.service.jobs.webhooks.deliverer import Deliverer, Rules
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.owners import ClassTimes
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.threads import Pulse
from tminus.service.turns import CallerTurns
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.loop import note_nothing
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
    spare_work: Iterator[None] | None = None  # done while no job runs; it may change the engine's `info`
    memory_bytes: int = 0  # that the model takes, roughly


@dataclass(frozen=True, slots=True)
class Described:
    """A model that is served and not in memory: what is known of it before it was measured."""

    info: ModelInfo  # without what only an engine knows: executor, precision and fingerprint are empty
    limits: Limits
    speed: Speed  # of which nothing is measured


@dataclass(slots=True)
class _InMemory:
    """What a model has while it is in memory."""

    engine: RowEngine
    keeper: SnapshotKeeper
    release: Callable[[], object]
    memory_bytes: int


@dataclass(slots=True)
class _OneModel:
    """The parts of one model, for as long as something of it is there."""

    services: Services
    lifecycle: Lifecycle
    loaded: _InMemory | None  # None while it is out of memory, and once it has left


class ServedModels:
    """Owns what all models share, and the models that are served, that are leaving, or whose jobs are still kept.

    A model joins when its store is taken and the worker has run a tick of it; from then on requests find it. It may go
    out of memory and come back, and is served all the while. It leaves when its last request and its last job have
    ended: then its memory is freed. It is forgotten, and its store given back, when clients can ask for nothing any
    more that it has made.
    """

    def __init__(
        self,
        first: list[Prepared],
        stores: Stores,
        allowed_sites: AllowedSites,
        access: Access,
        webhooks: Rules | None = None,
        crash_file: CrashFile | None = None,
        described: Sequence[Described] = (),
    ) -> None:
        """Serve the first models, the default one first, when `start` is called.

        The default one's limits are those of the whole server. described: more models, out of memory. stores: of
        durable jobs, closed with this. access: who may ask; allowed_sites: by what names, and for which pages.
        webhooks: how they are sent, if they are. crash_file: outlives the process where that fails; it is closed with
        this.
        """
        self._webhooks, self._end_file = webhooks, crash_file
        self.limits = limits = first[0].limits
        self.metrics, self.models, self.allowed_sites, self.access = Metrics(), Models(), allowed_sites, access
        self._numbers, self._arrivals, self._times = count(), count(), ClassTimes()
        self._stores = stores
        self._by_number: dict[int, _OneModel] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None  # None until it starts
        self._brings_in: BringsIn | None = None
        self.admission = Admission(limits, self._times, shared=access.has_keys)
        self.streams = Streams(limits.max_streams, limits.max_streams_per_address)
        self.answers = ByteBudget()  # what is held of answers: frames they are made of, and bodies until they have left
        self._decoder, self._encoder, self._other_replicas = Decoder(), Encoder(self.metrics.encoded), OtherReplicas()
        taken = [stores.take_first(prepared.engine.info.weights_hash) for prepared in first]
        loaded = [
            self._loaded(next(self._numbers), prepared, store) for prepared, store in zip(first, taken, strict=True)
        ]
        note = crash_file.work_on if crash_file is not None else note_nothing
        self._pulse = Pulse("the event loop")
        pulses = (self._pulse, self._decoder.pulse, *self._encoder.pulses)
        self.worker = Worker(loaded, self.admission, self.metrics, note=note, beside=pulses)
        if crash_file is not None:
            crash_file.watch(lambda: self.worker.stalled_s)
        statuses = JobStatuses(self.worker)
        self.jobs = Jobs(self.worker, statuses)
        self._services = partial(  # what all models share; the rest is of one
            Services,
            allowed_sites=allowed_sites,
            access=access,
            metrics=self.metrics,
            worker=self.worker,
            jobs=self.jobs,
            new_jobs=NewJobs(self.worker, self.jobs),
            statuses=statuses,
            decoder=self._decoder,
            encoder=self._encoder,
            cache=ResultCache(limits.result_cache_bytes),
            streams=self.streams,
            other_replicas=self._other_replicas,
            recordings=RecordingRoom(self.answers),
            webhooks=webhooks.allowed if webhooks is not None else None,
            noise_turns=CallerTurns(),
            residence=self,
        )
        for model, prepared, store in zip(loaded, first, taken, strict=True):
            self._serve(model.number, model.info, prepared.limits, store, _in_memory(model, prepared))
        for one in described:
            number = next(self._numbers)
            self.admission.put(number, one.speed)
            self._serve(number, one.info, one.limits, stores.take_first(one.info.weights_hash), None)
        self._watch()

    # --- the server ---

    async def start(self) -> None:
        """Start what runs."""
        self._loop = asyncio.get_running_loop()
        self._beating = self._loop.create_task(self._pulse.beat())
        self.worker.start()
        for one in self._by_number.values():
            await self._start(one)

    async def close(self) -> None:
        """End what runs, when requests are over."""
        self.worker.close()
        if self._end_file is not None:
            await self._stores.count_crash(self._end_file.close())  # before others may have the jobs
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        keepers = [one.loaded.keeper for one in self._by_number.values() if one.loaded is not None]
        await asyncio.gather(*(asyncio.to_thread(keeper.close) for keeper in keepers))
        await asyncio.gather(*(one.lifecycle.close() for one in self._by_number.values()))
        self._stores.close()
        await self._other_replicas.close()
        self._decoder.close()
        self._encoder.close()
        self._beating.cancel()

    @property
    def codes_images(self) -> bool:
        """Whether a picture is being encoded or decoded; after the end of all requests nobody waits for it."""
        return any(pulse.is_busy for pulse in (self._decoder.pulse, *self._encoder.pulses))

    def _watch(self) -> None:
        worker, admission = self.worker, self.admission
        self.metrics.watch(
            tasks=lambda: len(asyncio.all_tasks(self._loop)) if self._loop is not None else 0,
            rows_active=lambda: worker.rows_active,
            rows_waiting=lambda: max(0, admission.rows - worker.rows_active),
            backlog_s=lambda: admission.backlog_s,
            background_rows=lambda: admission.background_rows,
            background_backlog_s=lambda: admission.background_backlog_s,
            device_memory_bytes=self._device_memory_bytes,
            keys_up=lambda: self.access.keys_up,
            store_up=lambda: self.jobs.store_failure() is None,
            streams_open=lambda: self.streams.open,
            stalled_s=lambda: stall.seconds if (stall := worker.stall) else 0.0,
            tick_time_ratio=lambda: admission.tick_time_ratio,
            waiting_in_store=self.waiting_in_store,
            models=self._count_models,
        )

    def _count_models(self) -> Mapping[str, int]:
        """Count the models that are served, by whether they are in memory."""
        served = [one.loaded is not None for one in self._served()]
        return {"loaded": served.count(True), "unloaded": served.count(False)}

    def waiting_in_store(self) -> tuple[int, float] | None:
        """The jobs of a shared store that nobody holds, and the seconds that one server takes for them.

        As of the last renewal; None without such a store, or while it does not answer. Of all weights that are served.
        What is loaded twice, as after a reload of the same weights, counts once.
        """
        loads = {
            one.services.model.weights_hash: one.lifecycle.leases.load
            for one in list(self._by_number.values())
            if one.lifecycle.leases is not None
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
            store = await self._stores.take(weights_hash)
        except ValueError as error:
            raise StorageFailed(f"the store of the model's durable jobs cannot be opened: {error}") from None
        model, is_again = self._loaded(next(self._numbers), prepared, store), self._stores.is_shared(weights_hash)
        try:
            await asyncio.wrap_future(self.worker.load(model))
        except BaseException:
            self.admission.remove(model.number)
            await self._stores.release(weights_hash)
            raise
        one = self._serve(model.number, model.info, prepared.limits, store, _in_memory(model, prepared))
        # Where the same weights are loaded again, their jobs that have not ended stay with the engine they began on.
        await self._start(one, take_on=not is_again)
        return one.services

    async def come_in(self, number: int, prepared: Prepared) -> Services:
        """Bring a model that is out into memory, with the weights that it is known by.

        Raises Draining and the like, and what its first tick raises.
        """
        one = self._by_number[number]
        assert one.loaded is None
        model = self._loaded(number, prepared, one.lifecycle.store)
        await asyncio.wrap_future(self.worker.load(model))
        one.loaded = _in_memory(model, prepared)
        one.services = self.models.change(one.services, model.info, prepared.limits)
        one.lifecycle.change(model.info, prepared.limits)
        self.metrics.model_loaded(model.info)
        return one.services

    def _loaded(self, number: int, prepared: Prepared, store: AsyncStore) -> LoadedModel:
        self.admission.put(number, prepared.speed)
        keeper = SnapshotKeeper(store, prepared.engine.info.fingerprint, self.metrics)
        scheduler = Scheduler(prepared.speed.sharing, self._arrivals, self._times)
        spare_work = self._spare_work(number, prepared) if prepared.spare_work is not None else None
        return LoadedModel(number, prepared.engine, scheduler, keeper, spare_work)

    def _spare_work(self, number: int, prepared: Prepared) -> Iterator[None]:
        """What a model does while no job runs, in the worker's thread. What it finds out is told to clients."""
        assert prepared.spare_work is not None
        info = prepared.engine.info
        for _ in chain(prepared.spare_work, (None,)):
            if prepared.engine.info is not info and self._loop is not None:
                info = prepared.engine.info
                self._loop.call_soon_threadsafe(self._tell_info, number, info)
            yield

    def _tell_info(self, number: int, info: ModelInfo) -> None:
        if (one := self._by_number.get(number)) is not None:
            one.services = self.models.change(one.services, info)
            one.lifecycle.change(info)
            if one.loaded is not None:
                one.loaded.keeper.change(info.fingerprint)
            if not one.lifecycle.retired:
                self.metrics.model_loaded(info)

    def _serve(
        self, number: int, info: ModelInfo, limits: Limits, store: AsyncStore, loaded: _InMemory | None
    ) -> _OneModel:
        lifecycle = Lifecycle(store, self.worker, self.admission, number, info, limits, self.metrics, self)
        services = self._services(number=number, model=info, limits=limits, loaded_s=int(time.time()))
        one = self._by_number[number] = _OneModel(services, lifecycle, loaded)
        self.jobs.put(lifecycle)
        if loaded is not None:
            self.metrics.model_loaded(info)
        self.models.put(services)
        return one

    async def _start(self, one: _OneModel, *, take_on: bool = True) -> None:
        await one.lifecycle.start(take_on=take_on)
        if self._webhooks is not None:
            view = partial(self.jobs.to_deliver, one.lifecycle)
            deliverer = Deliverer(one.lifecycle.store, self._webhooks, view, document, self.metrics)
            one.lifecycle.do_beside(deliverer.run())

    # --- models that go ---

    def leave(self, services: Services) -> None:
        """Free a model that is served no more, when its jobs have ended."""
        one = self._by_number[services.number]
        one.lifecycle.retired = True
        task = asyncio.get_running_loop().create_task(self._leave(one))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def is_leaving(self, name: str) -> bool:
        """Whether a model of this name still has jobs to finish, and is served no more."""
        return any(one.services.model.name == name and one.loaded is not None for one in self._unserved())

    async def _leave(self, one: _OneModel) -> None:
        try:
            if await self._free(one):
                await self._forget(one)
        except Exception:
            log.exception("%s could not be unloaded", one.services.model.name)

    async def _free(self, one: _OneModel) -> bool:
        """Wait for the end of a model's jobs, and free its memory; False if the server ends before."""
        number, info = one.services.number, one.services.model
        while self.models.users(number):  # noqa: ASYNC110  requests come and go in many places
            await asyncio.sleep(LOOK_S)
        if one.loaded is not None:  # or else what jobs it has wait for a start with its weights
            await one.lifecycle.idle()
        if one.lifecycle.leases is not None:
            one.lifecycle.leases.end()
        while one.loaded is not None:
            try:
                await asyncio.wrap_future(self.worker.unload(number))
                break
            except (Draining, EngineFailed):
                return False
            except ServiceError:  # a tick hangs: if it ends after all, the model goes
                await asyncio.sleep(RETRY_S)
        self.admission.remove(number)
        if all(services.model.name != info.name for services in self.models):
            self.metrics.model_gone(info.name)
        await self._release(one)
        return True

    async def go_out(self, number: int) -> None:
        """Free the memory of a model that nobody uses and that is closing, and serve it on. Raises Draining, …"""
        one = self._by_number[number]
        assert self.is_out(number), "no new request may come"
        assert not self.is_busy(number)
        await asyncio.wrap_future(self.worker.unload(number))
        self.metrics.model_gone(one.services.model.name)
        await self._release(one)

    async def _release(self, one: _OneModel) -> None:
        """Free what a model took that the worker has forgotten."""
        if (loaded := one.loaded) is None:
            return
        one.loaded, release, keeper = None, loaded.release, loaded.keeper
        del loaded  # it has the engine
        await asyncio.to_thread(keeper.close)
        await asyncio.to_thread(release)
        log.info("%s, fingerprint %s, is unloaded", one.services.model.name, one.services.model.fingerprint)

    # --- who is in memory ---

    def brought_in_by(self, brings_in: "BringsIn") -> None:
        """Have models that are out brought in when they are asked for."""
        self._brings_in = brings_in

    def is_out(self, number: int) -> bool:
        """Whether a model is served and not in memory, or is about to leave it."""
        if self._brings_in is None or (one := self._by_number.get(number)) is None or one.lifecycle.retired:
            return False
        return one.loaded is None or self._brings_in.is_closing(number)

    def is_loaded(self, number: int) -> bool:
        """Whether a model is in memory, whether it is about to go out or not."""
        return self._by_number[number].loaded is not None

    def expected_s(self, number: int) -> float:
        """Return roughly how many seconds it takes until a model that is out is in memory."""
        return self._brings_in.expected_s(self._by_number[number].services) if self._brings_in is not None else 0.0

    async def bring_in(self, number: int, deadline_s: float | None = None, *, of_request: bool = False) -> Services:
        """Wait until a model is in memory, and return it. Raises as Residence.bring_in does."""
        if self._brings_in is not None and self.is_out(number):
            services = self._by_number[number].services
            await self._brings_in.bring_in(services, deadline_s, of_request=of_request)
            if self._by_number[number].lifecycle.retired:  # the folder has other weights by now
                return self.models.named(services.model.name)
        return self.models.numbered(number)

    def in_memory(self) -> list[Services]:
        """Return the models that are served and in memory."""
        return [one.services for one in self._served() if one.loaded is not None]

    def is_busy(self, number: int) -> bool:
        """Whether a request or a job needs a model."""
        waiting = self._brings_in.waiting(number) if self._brings_in is not None else 0
        if self.models.users(number) > waiting or self._by_number[number].lifecycle.needs_model:
            return True
        return self.admission.work_left_s(number) > 0

    def _served(self) -> list[_OneModel]:
        return [self._by_number[services.number] for services in self.models]

    async def _forget(self, one: _OneModel) -> None:
        """Forget a model that is freed, once clients can ask for nothing that it has made."""
        number, weights_hash = one.services.number, one.services.model.weights_hash
        while (  # noqa: ASYNC110
            not self._stores.is_shared(weights_hash) and await self._keeps_jobs(one) and not self._too_old(one)
        ):
            await asyncio.sleep(KEPT_S)
        self.jobs.remove(number)
        self.models.forget(number)
        del self._by_number[number]
        await one.lifecycle.close()
        await self._stores.release(weights_hash)

    @property
    def memory_bytes(self) -> int:
        """Tell roughly what all models take together, with those that only finish their jobs."""
        return sum(one.loaded.memory_bytes for one in self._by_number.values() if one.loaded is not None)

    def _device_memory_bytes(self) -> int:
        loaded = [one.loaded for one in list(self._by_number.values())]
        return max((each.engine.memory_bytes() or 0 for each in loaded if each is not None), default=0)

    def _unserved(self) -> list[_OneModel]:
        served = {services.number for services in self.models}
        return [one for number, one in self._by_number.items() if number not in served]

    def _too_old(self, one: _OneModel) -> bool:
        """Whether so many later models were replaced that this one's store is not to be kept open."""
        freed = [each for each in self._unserved() if each.loaded is None]
        return len(freed) > MOST_KEPT and one is freed[0]

    @staticmethod
    async def _keeps_jobs(one: _OneModel) -> bool:
        try:
            return bool(await one.lifecycle.store.call(JobStore.page, None, OUTCOMES, 1) or one.lifecycle.held)
        except StorageFailed:
            return True


class BringsIn(Protocol):
    """Decides when models come into memory and go out."""

    def is_closing(self, number: int) -> bool:
        """Whether a model in memory takes no new requests, since it is to go out."""

    def waiting(self, number: int) -> int:
        """How many requests wait until a model is in memory."""

    def expected_s(self, services: Services) -> float:
        """Return roughly how many seconds it takes until a model is in memory."""

    async def bring_in(self, services: Services, deadline_s: float | None, *, of_request: bool) -> None:
        """Wait until a model is in memory. Raises ModelLoading, CheckpointRefused, Draining."""


def _in_memory(model: LoadedModel, prepared: Prepared) -> _InMemory:
    assert isinstance(model.keeper, SnapshotKeeper)
    return _InMemory(model.engine, model.keeper, prepared.release, prepared.memory_bytes)
