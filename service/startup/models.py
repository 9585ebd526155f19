"""The models of a server, and the parts that all models share. Serves, unloads and forgets models.

After `start`, methods are called in the event loop's thread. Spare work runs in the worker's thread, and any thread may
read the gauges. loader.py decides when models are loaded and unloaded.
"""

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path

from cachetools import LRUCache

from tminus.service.access.access import Access
from tminus.service.api.answers.documents import document
from tminus.service.api.edge.connections import Streams
from tminus.service.api.edge.origin import AllowedSites
from tminus.service.api.models import InMemory, Models, ServedModel, Services
from tminus.service.api.other_replicas import OtherReplicas
from tminus.service.byte_budget import ByteBudget
from tminus.service.engine.protocol import RowEngine
from tminus.service.errors import CheckpointRefused, Draining, EngineFailed, ServiceError, StorageFailed
from tminus.service.images.decoder import Decoder
from tminus.service.images.encoder import Encoder
from tminus.service.jobs.crash_report import CrashFile
from tminus.service.jobs.jobs import Jobs, JobStatuses, NewJobs
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.retention import SnapshotKeeper
from tminus.service.jobs.store.async_store import AsyncStore, Stores
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import OUTCOMES
from tminus.service.jobs.webhooks.deliverer import Deliverer, Rules
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.scheduling.admission import Admission
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.owners import OwnerTimes
from tminus.service.scheduling.scheduler import Scheduler
from tminus.service.threads import Pulse
from tminus.service.turns import CallerTurns
from tminus.service.worker.load_queue import LoadQueue
from tminus.service.worker.loaded_model import LoadedModel, TickWatch
from tminus.service.worker.recording import RecordingRoom
from tminus.service.worker.ticks import report_nothing
from tminus.service.worker.worker import Worker

log = logging.getLogger(__name__)

POLL_INTERVAL_S = 0.05  # seconds between checks whether a model is still in use
KEPT_JOBS_INTERVAL_S = 10.0  # seconds between checks whether jobs of a removed model are still stored
RETRY_S = 1.0  # seconds between attempts while the worker hangs
MAX_LEFT_MODELS = 8  # removed models whose jobs are still shown; jobs of older removed models stay stored


@dataclass(frozen=True, slots=True)
class Prepared:
    """A loaded and measured model, ready to be served."""

    engine: RowEngine
    limits: Limits
    speed: Speed
    release: Callable[[], object] = gc.collect  # called when nothing refers to the engine any more
    spare_work: Iterator[None] | None = None  # runs while there are no jobs; may change the engine's `info`
    memory_bytes: int = 0  # approximate
    measure_again: Callable[[], None] | None = None  # has the next start on an idle machine measure again


@dataclass(frozen=True, slots=True)
class UnloadedModel:
    """A model that is served but not in memory, and has not been measured."""

    folder: Path
    info: ModelInfo  # without executor, precision and fingerprint, which only an engine has
    limits: Limits
    speed: Speed  # an estimate


class ServedModels:
    """Owns the parts that all models share. Adds models to the registry and the worker, and removes them.

    A model is served once its store is open and the worker has run its first tick (one batched step). It is still
    served while it is unloaded. `leave` stops serving a model, and its memory is freed after its last request and job.
    When none of its jobs is stored any more, the model is forgotten and its store is closed.
    """

    def __init__(
        self,
        first: list[Prepared],
        stores: Stores,
        allowed_sites: AllowedSites,
        access: Access,
        webhooks: Rules | None = None,
        crash_file: CrashFile | None = None,
        unloaded: Sequence[UnloadedModel] = (),
    ) -> None:
        """Create the shared parts, and add the models.

        first: models in memory, the default model first. The default model's limits apply to the whole server. stores:
        the stores of durable jobs. webhooks: rules for sending webhooks, or None to send none. unloaded: further
        models, not in memory. `close` also closes `stores` and `crash_file`.
        """
        self._stores, self._webhooks, self._crash_file = stores, webhooks, crash_file
        self.limits = limits = first[0].limits
        self.metrics, self.allowed_sites, self.access = Metrics(), allowed_sites, access
        self._numbers, self._arrivals, self._times = count(), count(), OwnerTimes()
        self._leaving: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None  # None until `start`
        self.admission = Admission(limits, self._times, shared=access.has_keys)
        self.streams = Streams(limits.max_streams, limits.max_streams_per_address)
        self.answers = ByteBudget()  # bytes of preview frames, and of response bodies until they are sent
        encode_times = "tminus_encode_duration_seconds"
        self._encoder = Encoder(lambda kind, seconds: self.metrics.observe(encode_times, seconds, kind))
        self._decoder, self._other_replicas = Decoder(), OtherReplicas()
        taken = [stores.take_first(prepared.engine.info.weights_hash) for prepared in first]
        loaded = [self._make(next(self._numbers), each, store) for each, store in zip(first, taken, strict=True)]
        report = crash_file.work_on if crash_file is not None else report_nothing
        self._pulse = Pulse("the event loop")
        pulses = (self._pulse, self._decoder.pulse, *self._encoder.pulses)
        self.worker = Worker(
            [each.model for each in loaded], self.admission, self.metrics, report=report, other_pulses=pulses
        )
        if crash_file is not None:
            crash_file.watch(lambda: self.worker.state.stalled_s)
        self.load_queue = LoadQueue(self.worker.state, limits.max_backlog_s, [one.info.name for one in unloaded])
        self.models = Models(self.load_queue)
        statuses = JobStatuses(self.worker)
        self.jobs = Jobs(self.worker, statuses)
        self._services = partial(  # the parts that all models share
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
            cache=LRUCache(limits.result_cache_bytes, getsizeof=len),
            streams=self.streams,
            other_replicas=self._other_replicas,
            recordings=RecordingRoom(self.answers),
            webhooks=webhooks.allowed if webhooks is not None else None,
            noise_turns=CallerTurns(),
            models=self.models,
        )
        for each, prepared, store in zip(loaded, first, taken, strict=True):
            self._put(each.model.number, each.model.info, prepared.limits, store, each)
        for one in unloaded:
            number = next(self._numbers)
            self.admission.put(number, one.speed)
            self._put(number, one.info, one.limits, stores.take_first(one.info.weights_hash), None)
        self._watch()

    # --- the server ---

    async def start(self) -> None:
        """Start the worker, and resume the durable jobs of earlier processes."""
        self._loop = asyncio.get_running_loop()
        self._beating = self._loop.create_task(self._pulse.beat())
        self.worker.start()
        for one in self.models.all:
            await self._start(one)

    async def close(self) -> None:
        """Stop the worker, and store the outcomes of its jobs. Call this after all requests have been answered."""
        self.worker.close()
        if self._crash_file is not None:
            await self._stores.count_crash(self._crash_file.close())  # before other servers can claim the jobs
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        keepers = [one.loaded.keeper for one in self.models.all if one.loaded is not None]
        await asyncio.gather(*(asyncio.to_thread(keeper.close) for keeper in keepers))
        await asyncio.gather(*(one.lifecycle.close() for one in self.models.all))
        self._stores.close()
        await self._other_replicas.close()
        self._decoder.close()
        self._encoder.close()
        self._beating.cancel()

    @property
    def codes_images(self) -> bool:
        """True while an image is being encoded or decoded. After the last response, nobody needs that image."""
        return any(pulse.is_busy for pulse in (self._decoder.pulse, *self._encoder.pulses))

    def _watch(self) -> None:
        worker, admission = self.worker, self.admission
        gauges: dict[str, Callable[[], float]] = {
            "tminus_asyncio_tasks": lambda: len(asyncio.all_tasks(self._loop)) if self._loop is not None else 0,
            "tminus_rows_active": lambda: worker.rows_active,
            "tminus_rows_waiting": lambda: max(0, admission.rows - worker.rows_active),
            "tminus_backlog_seconds": lambda: admission.backlog_s,
            "tminus_device_memory_bytes": self._device_memory_bytes,
            "tminus_keys_up": lambda: self.access.keys_up,
            "tminus_store_up": lambda: self.jobs.store_failure() is None,
            "tminus_streams_open": lambda: self.streams.open,
            "tminus_stalled_seconds": lambda: stall.seconds if (stall := worker.state.stall) else 0.0,
            "tminus_tick_time_ratio": lambda: admission.tick_time_ratio,
        }
        states: dict[str, Callable[[], float]] = {
            "loaded": lambda: len(self.models.in_memory),
            "unloaded": lambda: len(self.models.served) - len(self.models.in_memory),
        }
        self.metrics.watch(gauges, states, self.waiting_in_store)

    def _device_memory_bytes(self) -> int:
        loaded = [one.loaded for one in self.models.all]
        return max((each.model.engine.memory_bytes() or 0 for each in loaded if each is not None), default=0)

    def waiting_in_store(self) -> tuple[int, float] | None:
        """Return the number of unclaimed jobs in shared stores, and the seconds one server needs for them.

        The values were read at the last renewal of leases. Returns None if no store is shared, or none responds. Models
        with the same weights count once.
        """
        loads = {
            one.services.model.weights_hash: one.lifecycle.leases.load
            for one in self.models.all
            if one.lifecycle.leases is not None
        }
        known = [load for load in loads.values() if load is not None]
        return (sum(load.jobs for load in known), sum(load.waiting_s for load in known)) if known else None

    # --- adding models ---

    async def serve(self, prepared: Prepared) -> ServedModel:
        """Serve a model, in place of any served model of the same name.

        If that model is unloaded and has the same weights, it is loaded again instead of replaced.

        Raises CheckpointRefused if another model has the same weights, and StorageFailed if the store cannot be opened.
        Also raises the worker's errors, such as Draining, and the errors of the first tick.
        """
        name, weights_hash = prepared.engine.info.name, prepared.engine.info.weights_hash
        for other in self.models:
            if other.model.name != name and other.model.weights_hash == weights_hash:  # they would share a job store
                detail = f"{name} has the weights of {other.model.name}, which is loaded"
                raise CheckpointRefused(detail, field="model", value=name)
        before = self.models.find(name)
        if before is not None and before.loaded is None and before.services.model.weights_hash == weights_hash:
            await self._come_back(before, prepared)
            return before
        one = await self._join(prepared)
        if before is not None:
            self.leave(before)
        return one

    async def _come_back(self, one: ServedModel, prepared: Prepared) -> None:
        loaded = self._make(one.number, prepared, one.lifecycle.store)
        await asyncio.wrap_future(self.worker.load(loaded.model))
        one.loaded = loaded
        one.change(loaded.model.info, prepared.limits)
        self.load_queue.mark_loaded(one.name)
        self.metrics.model_loaded(loaded.model.info)

    async def _join(self, prepared: Prepared) -> ServedModel:
        weights_hash = prepared.engine.info.weights_hash
        try:
            store = await self._stores.take(weights_hash)
        except ValueError as error:
            raise StorageFailed(f"the store of the model's durable jobs cannot be opened: {error}") from None
        is_again = self._stores.is_shared(weights_hash)
        number = next(self._numbers)
        loaded = self._make(number, prepared, store)
        try:
            await asyncio.wrap_future(self.worker.load(loaded.model))
        except BaseException:
            self.admission.remove(number)
            await self._stores.release(weights_hash)
            raise
        one = self._put(number, loaded.model.info, prepared.limits, store, loaded)
        self.load_queue.mark_loaded(one.name)
        # After a reload of the same weights, unfinished jobs stay with the engine that began them.
        await self._start(one, take_on=not is_again)
        return one

    def _make(self, number: int, prepared: Prepared, store: AsyncStore) -> InMemory:
        self.admission.put(number, prepared.speed)
        keeper = SnapshotKeeper(store, prepared.engine.info.fingerprint, self.metrics)
        scheduler = Scheduler(prepared.speed.policy, self._arrivals, self._times)
        spare_work = self._spare_work(number, prepared) if prepared.spare_work is not None else None
        again, times = prepared.measure_again, prepared.speed.policy.times
        watch = TickWatch(times, again) if again is not None else None
        model = LoadedModel(number, prepared.engine, scheduler, keeper, spare_work, watch)
        return InMemory(model, keeper, prepared.release, prepared.memory_bytes)

    def _spare_work(self, number: int, prepared: Prepared) -> Iterator[None]:
        """Run a model's spare work in the worker's thread, and publish changes of the model's info."""
        assert prepared.spare_work is not None
        info = prepared.engine.info
        for _ in chain(prepared.spare_work, (None,)):
            if prepared.engine.info is not info and self._loop is not None:
                info = prepared.engine.info
                self._loop.call_soon_threadsafe(self._publish_info, number, info)
            yield

    def _publish_info(self, number: int, info: ModelInfo) -> None:
        one = next((one for one in self.models.all if one.number == number), None)
        if one is not None and one.loaded is not None:
            one.change(info)
            one.loaded.keeper.change(info.fingerprint)
            if not one.lifecycle.served.retired:
                self.metrics.model_loaded(info)

    def _put(
        self, number: int, info: ModelInfo, limits: Limits, store: AsyncStore, loaded: InMemory | None
    ) -> ServedModel:
        lifecycle = Lifecycle(store, self.worker, self.admission, number, info, limits, self.metrics, self.load_queue)
        services = self._services(number=number, model=info, limits=limits, loaded_s=int(time.time()))
        self.jobs.put(lifecycle)
        if loaded is not None:
            self.metrics.model_loaded(info)
        one = ServedModel(services, lifecycle, loaded)
        self.models.put(one)
        return one

    async def _start(self, one: ServedModel, *, take_on: bool = True) -> None:
        await one.lifecycle.start(take_on=take_on)
        if self._webhooks is not None:
            view = partial(self.jobs.to_deliver, one.lifecycle)
            deliverer = Deliverer(one.lifecycle.store, self._webhooks, view, document, self.metrics)
            one.lifecycle.tasks.spawn_until_closed(deliverer.run())

    # --- unloading and removing models ---

    def is_busy(self, one: ServedModel) -> bool:
        """Return True if a request or a job needs the model in memory."""
        pending = self.load_queue.find(one.name)
        waiting = pending.requests if pending is not None else 0
        return one.users > waiting or one.lifecycle.needs_model or self.admission.holds(one.number)

    async def unload(self, one: ServedModel) -> None:
        """Free the memory of a model that is not busy and accepts no jobs. The model is still served.

        Raises the worker's errors, such as Draining.
        """
        assert self.load_queue.is_unloaded(one.name), "no new job may come"
        assert not self.is_busy(one)
        await asyncio.wrap_future(self.worker.unload(one.number))
        self.metrics.model_gone(one.name)
        await self._release(one)

    def leave(self, one: ServedModel) -> None:
        """Stop serving a model. Its memory is freed when its jobs have ended."""
        one.lifecycle.served.retired = True
        task = asyncio.get_running_loop().create_task(self._leave(one))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def _leave(self, one: ServedModel) -> None:
        try:
            if await self._free(one):
                await self._forget(one)
        except Exception:
            log.exception("%s could not be unloaded", one.name)

    async def _free(self, one: ServedModel) -> bool:
        """Wait until a model's jobs have ended, then free its memory. Return False if the server stops first."""
        # A request to another model may have chosen this one, see quality=adaptive.
        while one.users or self.admission.holds(one.number):  # noqa: ASYNC110  requests come and go in many places
            await asyncio.sleep(POLL_INTERVAL_S)
        if one.loaded is not None:  # an unloaded model runs no jobs; they wait for a server with its weights
            await one.lifecycle.idle()
        if one.lifecycle.leases is not None:
            one.lifecycle.leases.end()
        while one.loaded is not None:
            try:
                await asyncio.wrap_future(self.worker.unload(one.number))
                break
            except (Draining, EngineFailed):
                return False
            except ServiceError:  # a tick hangs, but may still end: retry
                await asyncio.sleep(RETRY_S)
        self.admission.remove(one.number)
        if self.models.find(one.name) is None:
            self.metrics.model_gone(one.name)
        await self._release(one)
        return True

    async def _release(self, one: ServedModel) -> None:
        """Free the memory of a model that the worker has unloaded."""
        if (loaded := one.loaded) is None:
            return
        one.loaded, release, keeper = None, loaded.release, loaded.keeper
        del loaded  # it refers to the engine
        await asyncio.to_thread(keeper.close)
        await asyncio.to_thread(release)
        log.info("%s, fingerprint %s, is unloaded", one.name, one.services.model.fingerprint)

    async def _forget(self, one: ServedModel) -> None:
        """Wait until none of a removed model's jobs is stored any more, then forget the model."""
        weights_hash = one.services.model.weights_hash
        while (  # noqa: ASYNC110
            not self._stores.is_shared(weights_hash) and await self._keeps_jobs(one) and not self._too_old(one)
        ):
            await asyncio.sleep(KEPT_JOBS_INTERVAL_S)
        self.jobs.remove(one.number)
        self.models.forget(one.number)
        await one.lifecycle.close()
        await self._stores.release(weights_hash)

    def _too_old(self, one: ServedModel) -> bool:
        """Return True if more than MAX_LEFT_MODELS removed models remain, and this one is the oldest."""
        freed = [each for each in self.models.left if each.loaded is None]
        return len(freed) > MAX_LEFT_MODELS and one is freed[0]

    @staticmethod
    async def _keeps_jobs(one: ServedModel) -> bool:
        try:
            return bool(await one.lifecycle.store.call(JobStore.page, None, OUTCOMES, 1) or one.lifecycle.held)
        except StorageFailed:
            return True
