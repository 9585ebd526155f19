"""The models of a server: what they share, how one joins and leaves, and how it is loaded and unloaded meanwhile.

In the event loop's thread only.
"""

import asyncio
import gc
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TypeVar

from tminus.model.files import CheckpointError
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
    CheckpointRefused,
    Draining,
    EngineFailed,
    ModelBusy,
    ModelNotFound,
    ServiceError,
    StorageFailed,
    short,
)
from tminus.service.images.decoder import Decoder
from tminus.service.images.encoder import Encoder
from tminus.service.jobs.jobs import Jobs
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.new_jobs import NewJobs
from tminus.service.jobs.process_end import EndFile
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
from tminus.service.startup.settings import Library
from tminus.service.threads import LOADING, begin_in_daemon_thread
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.loop import note_nothing
from tminus.service.worker.recording import RecordingRoom
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

Result = TypeVar("Result")
LOOK_S = 0.05  # how often it is looked whether a model is still used
KEPT_S = 10.0  # and whether jobs of a model that left are still kept
RETRY_S = 1.0  # until a worker that hangs is asked again
MOST_KEPT = 8  # models that have left whose jobs can still be asked for; those of earlier ones stay on the disk
END_LOOK_S = 0.2  # how often a change that is waited for looks whether the server ends


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that is ready to be served."""

    engine: RowEngine
    limits: Limits  # of its requests
    speed: Speed
    release: Callable[[], object] = gc.collect  # called when nobody has the engine any more
    spare_work: Iterator[None] | None = None  # done while no job runs; it may change the engine's `info`
    memory_bytes: int = 0  # that the model takes, roughly


@dataclass(slots=True)
class _OneModel:
    """The parts of one model, for as long as something of it is there."""

    services: Services
    engine: RowEngine | None  # None once it has left
    lifecycle: Lifecycle
    keeper: SnapshotKeeper
    release: Callable[[], object]
    memory_bytes: int


class ServedModels:
    """Owns what all models share, and the models that are served, that are leaving, or whose jobs are still kept.

    A model joins when its store is taken and the worker has run a tick of it; from then on requests find it. It leaves
    when its last request and its last job have ended: then its memory is freed. It is forgotten, and its store given
    back, when clients can ask for nothing any more that it has made.
    """

    def __init__(
        self,
        first: list[Prepared],
        stores: Stores,
        allowed_sites: AllowedSites,
        access: Access,
        webhooks: Rules | None = None,
        end_file: EndFile | None = None,
    ) -> None:
        """Serve the first models, the default one first, when `start` is called.

        The default one's limits are those of the whole server. stores: of durable jobs, closed with this. access: who
        may ask; allowed_sites: by what names, and for which pages. webhooks: how they are sent, if they are. end_file:
        outlives the process where that ends by itself; it is closed with this.
        """
        self._webhooks, self._end_file = webhooks, end_file
        self.limits = limits = first[0].limits
        self.metrics, self.models, self.allowed_sites, self.access = Metrics(), Models(), allowed_sites, access
        self._numbers, self._arrivals, self._times = count(), count(), ClassTimes()
        self._stores = stores
        self._by_number: dict[int, _OneModel] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None  # None until it starts
        self.admission = Admission(limits, self._times, shared=access.has_keys)
        self.streams = Streams(limits.max_streams, limits.max_streams_per_address)
        self.answers = ByteBudget()  # what is held of answers: frames they are made of, and bodies until they have left
        self._decoder, self._encoder, self._other_replicas = Decoder(), Encoder(self.metrics.encoded), OtherReplicas()
        taken = [stores.take_first(prepared.engine.info.weights_hash) for prepared in first]
        loaded = [self._loaded(prepared, store) for prepared, store in zip(first, taken, strict=True)]
        note = end_file.work_on if end_file is not None else note_nothing
        self.worker = Worker(loaded, self.admission, self.metrics, note=note)
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
            noise_turn=asyncio.Lock(),
        )
        for model, prepared, store in zip(loaded, first, taken, strict=True):
            self._serve(model, prepared, store)
        self._watch()

    # --- the server ---

    async def start(self) -> None:
        """Start what runs."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()
        for one in self._by_number.values():
            await self._start(one)

    async def close(self) -> None:
        """End what runs, when requests are over."""
        self.worker.close()
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await asyncio.gather(*(asyncio.to_thread(one.keeper.close) for one in self._by_number.values()))
        await asyncio.gather(*(one.lifecycle.close() for one in self._by_number.values()))
        self._stores.close()
        await self._other_replicas.close()
        self._decoder.close()
        self._encoder.close()
        if self._end_file is not None:
            self._end_file.close()

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
        model, is_again = self._loaded(prepared, store), self._stores.is_shared(weights_hash)
        try:
            await asyncio.wrap_future(self.worker.load(model))
        except BaseException:
            self.admission.remove(model.number)
            await self._stores.release(weights_hash)
            raise
        one = self._serve(model, prepared, store)
        # Where the same weights are loaded again, their jobs that have not ended stay with the engine they began on.
        await self._start(one, take_on=not is_again)
        return one.services

    def _loaded(self, prepared: Prepared, store: AsyncStore) -> LoadedModel:
        number = next(self._numbers)
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
            one.keeper.change(info.fingerprint)
            if not one.lifecycle.retired:
                self.metrics.model_loaded(info)

    def _serve(self, model: LoadedModel, prepared: Prepared, store: AsyncStore) -> _OneModel:
        info = model.info
        lifecycle = Lifecycle(store, self.worker, self.admission, model.number, info, prepared.limits, self.metrics)
        services = self._services(number=model.number, model=info, limits=prepared.limits, loaded_s=int(time.time()))
        assert isinstance(model.keeper, SnapshotKeeper)
        one = self._by_number[model.number] = _OneModel(
            services, model.engine, lifecycle, model.keeper, prepared.release, prepared.memory_bytes
        )
        self.jobs.put(lifecycle)
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
        return any(one.services.model.name == name and one.engine is not None for one in self._unserved())

    async def _leave(self, one: _OneModel) -> None:
        try:
            if await self._free(one):
                await self._forget(one)
        except Exception:
            log.exception("%s could not be unloaded", one.services.model.name)

    async def _free(self, one: _OneModel) -> bool:
        """Wait for the end of a model's jobs, and free its memory; False if the server ends before."""
        number, info = one.services.number, one.services.model
        while self.models.is_used(number):  # noqa: ASYNC110  requests come and go in many places
            await asyncio.sleep(LOOK_S)
        await one.lifecycle.idle()
        if one.lifecycle.leases is not None:
            one.lifecycle.leases.end()
        while True:
            try:
                await asyncio.wrap_future(self.worker.unload(number))
                break
            except (Draining, EngineFailed):
                return False
            except ServiceError:  # a tick hangs: if it ends after all, the model goes
                await asyncio.sleep(RETRY_S)
        self.admission.remove(number)
        one.engine = None
        if all(services.model.name != info.name for services in self.models):
            self.metrics.model_gone(info.name)
        await asyncio.to_thread(one.keeper.close)
        await asyncio.to_thread(one.release)
        log.info("%s, fingerprint %s, is unloaded", info.name, info.fingerprint)
        return True

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
        return sum(one.memory_bytes for one in self._by_number.values() if one.engine is not None)

    def _device_memory_bytes(self) -> int:
        engines = [one.engine for one in list(self._by_number.values()) if one.engine is not None]
        return max((engine.memory_bytes() or 0 for engine in engines), default=0)

    def _unserved(self) -> list[_OneModel]:
        served = {services.number for services in self.models}
        return [one for number, one in self._by_number.items() if number not in served]

    def _too_old(self, one: _OneModel) -> bool:
        """Whether so many later models were replaced that this one's store is not to be kept open."""
        freed = [each for each in self._unserved() if each.engine is None]
        return len(freed) > MOST_KEPT and one is freed[0]

    @staticmethod
    async def _keeps_jobs(one: _OneModel) -> bool:
        try:
            return bool(await one.lifecycle.store.call(JobStore.page, None, OUTCOMES, 1) or one.lifecycle.all())
        except StorageFailed:
            return True


class ModelChanges:
    """Loads, reloads and unloads models while the server runs, one at a time. Owns what is being loaded."""

    def __init__(
        self,
        served: ServedModels,
        library: Library,
        prepare: Callable[[str, Path], Prepared],
        check_room: Callable[[str, Path, int], None] = lambda *_: None,
    ) -> None:
        """prepare: reads a folder and measures the model, under a name.

        check_room: raises CheckpointRefused for one that is too large beside models that take so many bytes.
        """
        self._served, self._library, self._prepare, self._check_room = served, library, prepare, check_room
        self._loading: str | None = None
        self._tasks: set[asyncio.Task[Services]] = set()  # asyncio holds tasks weakly

    async def unloaded(self) -> dict[str, str]:
        """The models that can be loaded and are not, and what is going on with each."""
        folders = await asyncio.to_thread(self._library.folders)
        served = {services.model.name for services in self._served.models}
        return {name: self._state(name) for name in sorted(folders) if name not in served}

    def _state(self, name: str) -> str:
        if name == self._loading:
            return "loading"
        return "unloading" if self._served.is_leaving(name) else "unloaded"

    async def load(self, name: str) -> Services:
        """Serve a model that is not loaded. Raises ModelBusy, ModelNotFound, CheckpointRefused, Draining."""
        folder = await self._folder(name)
        if self._named(name) is not None:
            raise ModelBusy(f"{name} is loaded already; reload reads its folder again", field="model", value=name)
        return await self._change(name, folder)

    async def reload(self, name: str) -> Services:
        """Read a model's folder again, and serve what is there now. Its jobs end on the weights they began with.

        Raises ModelBusy, ModelNotFound, CheckpointRefused, Draining; then what was served is served on.
        """
        self._served.models.named(name)
        return await self._change(name, await self._folder(name))

    async def unload(self, name: str) -> None:
        """Serve a model no more; its memory is freed when its jobs have ended. Raises ModelBusy, ModelNotFound."""
        services = self._served.models.named(name)
        if services is self._served.models.default:
            raise ModelBusy(
                f"{name} is the default model, of requests that name none, and stays", field="model", value=name
            )
        self._check_alone(name)
        self._served.worker.check_open()
        self._served.models.remove(name)
        self._served.leave(services)

    async def _change(self, name: str, folder: Path) -> Services:
        """Load a model in a task of its own, which goes on where the client goes away."""
        self._check_alone(name)
        self._served.worker.check_open()
        self._loading = name
        task = asyncio.get_running_loop().create_task(self._load(name, folder))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        while not task.done():
            await asyncio.wait([task], timeout=END_LOOK_S)
            if self._served.worker.draining and not task.done():
                # Nobody waits for it any more; asyncio would complain about an error that is never retrieved.
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
                raise Draining
        return task.result()

    async def _load(self, name: str, folder: Path) -> Services:
        log.info("loading %s from %s", name, folder)
        began_s = time.perf_counter()
        try:
            services = await self._read_and_join(name, folder)
        except ServiceError as error:
            self._served.metrics.loaded_while_running("refused")
            log.warning("%s cannot be loaded: %s", name, error.detail)
            raise
        finally:
            self._loading = None
        self._served.metrics.loaded_while_running("done")
        model, seconds = services.model, time.perf_counter() - began_s
        log.info("%s, fingerprint %s, is served after %.1f s", name, model.fingerprint, seconds)
        return services

    async def _read_and_join(self, name: str, folder: Path) -> Services:
        try:
            used_bytes = self._served.memory_bytes

            def prepare() -> Prepared:
                self._check_room(name, folder, used_bytes)
                return self._prepare(name, folder)

            prepared = await in_daemon_thread(prepare, LOADING)
        except ServiceError:
            raise
        except Exception as error:  # torch and OpenVINO raise RuntimeError, for want of memory too
            if not isinstance(error, (CheckpointError, ValueError, OSError)):
                log.exception("%s cannot be loaded", name)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise CheckpointRefused(f"{name} cannot be loaded: {reason}", field="model", value=name) from None
        release, before, weights_hash = prepared.release, self._named(name), prepared.engine.info.weights_hash
        try:
            for other in self._served.models:
                if other.model.name != name and other.model.weights_hash == weights_hash:  # their jobs share a store
                    detail = f"{name} has the weights of {other.model.name}, which is loaded"
                    raise CheckpointRefused(detail, field="model", value=name)
            services = await self._served.join(prepared)
        except Exception as error:
            del prepared
            traceback.clear_frames(error.__traceback__)  # whose variables hold the model
            await asyncio.to_thread(release)
            raise
        if before is not None:
            self._served.leave(before)
        return services

    def _named(self, name: str) -> Services | None:
        return next((services for services in self._served.models if services.model.name == name), None)

    async def _folder(self, name: str) -> Path:
        folders = await asyncio.to_thread(self._library.folders)
        if name in folders:
            return folders[name]
        if self._named(name) is not None:
            raise CheckpointRefused(f"the folder of {name} is gone", field="model", value=name)
        detail = f"no model {short(name)!r} can be loaded; those that can: {', '.join(sorted(folders)) or 'none'}"
        raise ModelNotFound(detail, field="model", value=name, bound="a model that GET /models lists")

    def _check_alone(self, name: str) -> None:
        """One change at a time. Raises ModelBusy."""
        if self._loading is not None:
            raise ModelBusy(f"{self._loading} is being loaded; try again when it is done", field="model", value=name)


async def in_daemon_thread(act: Callable[[], Result], name: str) -> Result:
    """Wait for a function that takes long. Raises what it raises. If the waiting is cancelled, the function goes on."""
    return await asyncio.wrap_future(begin_in_daemon_thread(act, name))
