"""Loads, reloads and unloads models while the server runs.

A model may be loaded for an admin or on demand. It may be unloaded for an admin, to free memory, or when idle.
Everything runs in the event loop's thread, except that a separate thread reads folders and measures models.
"""

import asyncio
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tminus.model.files import CheckpointError
from tminus.service.api.models import ServedModel, Services
from tminus.service.errors import CheckpointRefused, ModelBusy, ModelNotFound, ServiceError, short
from tminus.service.startup.models import POLL_INTERVAL_S, Prepared, ServedModels
from tminus.service.startup.settings import Library
from tminus.service.threads import LOADING, in_daemon_thread
from tminus.service.worker.load_queue import PendingLoad, Reason

log = logging.getLogger(__name__)

IDLE_INTERVAL_S = 1.0  # seconds between checks for idle models
# Minimum seconds that a loaded model stays in memory. A small model loads in half a second, so models that take turns
# in too little memory still spend most of the time on work. The next model waits only a little longer.
STAY_S = 3.0


class ModelLoader:
    """Loads models one at a time, in a single task that also unloads idle models.

    With `idle_unload_s`, a request for an unloaded model loads that model. Models are loaded in the order in which they
    are requested. If memory is short, the least recently used idle model is unloaded first. If all models are busy, the
    model with the least work left gets no new jobs until it has been unloaded. Requests for that model wait in the load
    queue.
    """

    def __init__(
        self,
        served: ServedModels,
        library: Library,
        prepare: Callable[[str, Path], Prepared],
        room_lacking: Callable[[Path, int], str | None] = lambda *_: None,
        idle_unload_s: float | None = None,
    ) -> None:
        """prepare: takes a model's name and folder, reads the folder, and measures the model.

        room_lacking: takes a folder and the bytes that other models use. Returns why the model does not fit, or None if
        it fits. Raises CheckpointError.

        idle_unload_s: idle time after which a model is unloaded; None if only an admin loads and unloads models.
        """
        self._served, self._models, self._queue = served, served.models, served.load_queue
        self._library, self._prepare, self._room_lacking = library, prepare, room_lacking
        self._idle_unload_s = idle_unload_s
        self._idle_interval_s = None if idle_unload_s is None else min(IDLE_INTERVAL_S, idle_unload_s / 4)
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._running = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop the task, and refuse the loads that are still queued."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._queue.close()

    # --- states ---

    async def unloaded_models(self) -> dict[str, str]:
        """Return the state of each model that an admin can load and that is not served, keyed by name."""
        folders = await asyncio.to_thread(self._library.folders)
        leaving = {one.name for one in self._models.left if one.loaded is not None}
        return {
            name: "loading" if self._queue.find(name) else "unloading" if name in leaving else "unloaded"
            for name in sorted(folders)
            if self._models.find(name) is None
        }

    def state(self, services: Services) -> str:
        one = self._models.find(services.model.name)
        if one is not None and one.loaded is not None:
            return "unloading" if self._queue.is_unloaded(one.name) else "loaded"
        return "loading" if self._queue.find(services.model.name) else "unloaded"

    # --- for an admin ---

    async def load(self, name: str) -> Services:
        """Load a model into memory. Raises ModelBusy, ModelNotFound, CheckpointRefused, Draining."""
        if self._models.find(name) is None:
            return await self._change(name)
        if not self._queue.is_unloaded(name):
            raise ModelBusy(f"{name} is loaded already; reload reads its folder again", field="model", value=name)
        await self._queue.load(name, "admin")
        return self._models.named(name)

    async def reload(self, name: str) -> Services:
        """Read a model's folder again, and serve its new content. Running jobs finish on the old weights.

        Raises ModelBusy, ModelNotFound, CheckpointRefused, Draining. If the reload fails, the old weights are still
        served.
        """
        self._models.named(name)
        return await self._change(name)

    async def unload(self, name: str) -> None:
        """Free a model's memory when its jobs have ended.

        Without `idle_unload_s`, also stop serving the model. Raises ModelBusy, ModelNotFound, Draining.
        """
        services = self._models.named(name)
        if self._idle_unload_s is not None:
            self._served.worker.state.check_open()
            self._queue.mark_unloaded(name)
            return
        if services is self._models.default:
            raise ModelBusy(f"{name} is the default model, which cannot be unloaded", field="model", value=name)
        self._check_no_load(name)
        self._served.worker.state.check_open()
        self._served.leave(self._models.remove(name))

    async def _change(self, name: str) -> Services:
        await self._folder(name)
        if self._idle_unload_s is None:  # with idle_unload_s, the load waits in the queue
            self._check_no_load(name)
        await self._queue.load(name, "admin", again=True)
        return self._models.named(name)

    def _check_no_load(self, name: str) -> None:
        if self._queue.pending:
            detail = f"{self._queue.pending[0].name} is being loaded; try again when it is done"
            raise ModelBusy(detail, field="model", value=name)

    # --- the task ---

    async def _run(self) -> None:
        while True:
            await self._unload_unused()
            closing = {one.name for one in self._models.in_memory if self._queue.is_unloaded(one.name)}
            found = (each for each in self._queue.pending if each.again or each.name not in closing)
            if (pending := next(found, None)) is not None:
                await self._do(pending)
            elif closing:
                await asyncio.sleep(POLL_INTERVAL_S)
            else:
                await self._queue.wait(self._idle_interval_s)

    async def _unload_unused(self) -> None:
        """Unload idle models, and models that an admin wants unloaded. Skip busy models."""
        for one in self._models.in_memory:
            now_s, closing = time.monotonic(), self._queue.is_unloaded(one.name)
            is_idle = self._idle_unload_s is not None and now_s - one.last_used_s >= self._idle_unload_s
            if self._served.is_busy(one):
                one.last_used_s = now_s
            elif closing or is_idle:
                try:
                    await self._unload(one, "admin" if closing else "idle")
                except ServiceError:  # the server is stopping, or its worker hangs: retry later
                    continue
                except Exception:
                    log.exception("%s could not be unloaded", one.name)

    async def _do(self, pending: PendingLoad) -> None:
        try:
            if pending.again or self._queue.is_unloaded(pending.name):
                await self._load(pending.name, pending.reason)
        except Exception as error:
            self._queue.end(pending, error)
        else:
            self._queue.end(pending)

    # --- unloading ---

    async def _make_room(self, name: str, folder: Path) -> None:
        """Unload other models until this model fits. Raises CheckpointRefused if that is not possible."""
        while True:
            # A removed model still uses memory until its jobs have ended.
            used_bytes = sum(one.loaded.memory_bytes for one in self._models.all if one.loaded is not None)
            reason = await in_daemon_thread(partial(self._room_lacking, folder, used_bytes), LOADING)
            if reason is None:
                return
            others = [each for each in self._models.in_memory if each.name != name]
            if self._idle_unload_s is None or not others:
                unload = "; unload another model first" if self._idle_unload_s is None else ""
                detail = f"{name} cannot be loaded: it {reason}{unload}"
                raise CheckpointRefused(detail, field="model", value=name)
            await self._unload(await self._wait_for_idle(others), "room")

    async def _wait_for_idle(self, others: list[ServedModel]) -> ServedModel:
        """Wait until one of the models is idle and has been loaded for at least STAY_S.

        Raises the worker's errors, such as Draining.
        """
        closing: ServedModel | None = None
        try:
            while True:
                now_s = time.monotonic()
                stayed = [one for one in others if now_s - one.loaded_s >= STAY_S]
                if idle := [one for one in stayed if not self._served.is_busy(one)]:
                    return min(idle, key=lambda one: one.last_used_s)
                still_open = [one for one in stayed if not self._queue.is_unloaded(one.name)]
                if closing is None and still_open:
                    work_left_s = self._served.admission.work_left_s
                    closing = min(still_open, key=lambda one: (work_left_s(one.number), one.last_used_s))
                    self._queue.mark_unloaded(closing.name)
                self._served.worker.state.check_open()
                await asyncio.sleep(POLL_INTERVAL_S)
        finally:
            if closing is not None:
                self._queue.mark_loaded(closing.name)

    async def _unload(self, one: ServedModel, reason: str) -> None:
        was_closing = self._queue.is_unloaded(one.name)
        self._queue.mark_unloaded(one.name)
        try:
            await self._served.unload(one)
            self._served.metrics.count("tminus_model_unloads_total", reason)
        finally:
            if one.loaded is not None and not was_closing:
                self._queue.mark_loaded(one.name)

    # --- loading ---

    async def _load(self, name: str, reason: Reason) -> None:
        folder = await self._folder(name)
        log.info("loading %s from %s", name, folder)
        try:
            with _as_refusals(name):
                await self._make_room(name, folder)
            with self._queue.times.measure(name):
                one = await self._read_and_serve(name, folder)
        except ServiceError as error:
            self._served.metrics.count("tminus_model_loads_total", "refused", reason)
            log.warning("%s cannot be loaded: %s", name, error.detail)
            raise
        one.loaded_s = one.last_used_s = time.monotonic()
        self._served.metrics.count("tminus_model_loads_total", "done", reason)
        log.info(
            "%s, fingerprint %s, is served after %.1f s",
            name, one.services.model.fingerprint, self._queue.times.expected_s(name),
        )  # fmt: skip

    async def _read_and_serve(self, name: str, folder: Path) -> ServedModel:
        with _as_refusals(name):
            prepared = await in_daemon_thread(lambda: self._prepare(name, folder), LOADING)
        release = prepared.release
        try:
            return await self._served.serve(prepared)
        except Exception as error:
            del prepared
            traceback.clear_frames(error.__traceback__)  # variables in the traceback's frames refer to the model
            await asyncio.to_thread(release)
            raise

    async def _folder(self, name: str) -> Path:
        folders = await asyncio.to_thread(self._library.folders)
        if name in folders:
            return folders[name]
        if self._models.find(name) is not None:
            raise CheckpointRefused(f"the folder of {name} is gone", field="model", value=name)
        detail = f"no model {short(name)!r} can be loaded; those that can: {', '.join(sorted(folders)) or 'none'}"
        raise ModelNotFound(detail, field="model", value=name, bound="a model that GET /models lists")


@contextmanager
def _as_refusals(name: str) -> Iterator[None]:
    """Turn errors that a model's folder causes into CheckpointRefused."""
    try:
        yield
    except ServiceError:
        raise
    except Exception as error:  # torch and OpenVINO raise RuntimeError, even when memory is short
        if not isinstance(error, (CheckpointError, ValueError, OSError)):
            log.exception("%s cannot be loaded", name)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointRefused(f"{name} cannot be loaded: {reason}", field="model", value=name) from None
