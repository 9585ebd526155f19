"""Load, reload and unload models while the server runs, one at a time. In the event loop's thread only."""

import asyncio
import logging
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tminus.model.files import CheckpointError
from tminus.service.api.models import Services
from tminus.service.errors import CheckpointRefused, Draining, ModelBusy, ModelNotFound, ServiceError, short
from tminus.service.startup.library import Library
from tminus.service.startup.parts import Parts, Prepared
from tminus.service.startup.threads import LOADING, in_daemon_thread

log = logging.getLogger(__name__)

LOOK_S = 0.2  # how often a change that is waited for looks whether the server ends
Prepare = Callable[[str, Path], Prepared]  # reads a folder and measures the model, under a name


def prepare_nothing(name: str, folder: Path) -> Prepared:
    """Of a server that loads nothing while it runs."""
    raise CheckpointRefused(f"{name} cannot be loaded from {folder}", field="model", value=name)


class ModelChanges:
    """Owns what is being loaded."""

    def __init__(self, parts: Parts, library: Library, prepare: Prepare) -> None:
        self._parts, self._library, self._prepare = parts, library, prepare
        self._loading: str | None = None
        self._tasks: set[asyncio.Task[Services]] = set()  # asyncio holds tasks weakly

    async def unloaded(self) -> dict[str, str]:
        """The models that can be loaded and are not, and what is going on with each."""
        folders = await asyncio.to_thread(self._library.folders)
        served = {services.model.name for services in self._parts.models}
        return {name: self._state(name) for name in sorted(folders) if name not in served}

    def _state(self, name: str) -> str:
        if name == self._loading:
            return "loading"
        return "unloading" if self._parts.is_leaving(name) else "unloaded"

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
        self._parts.models.named(name)
        return await self._change(name, await self._folder(name))

    async def unload(self, name: str) -> None:
        """Serve a model no more; its memory is freed when its jobs have ended. Raises ModelBusy, ModelNotFound."""
        services = self._parts.models.named(name)
        if services is self._parts.models.default:
            raise ModelBusy(
                f"{name} is the default model, of requests that name none, and stays", field="model", value=name
            )
        self._check_alone(name)
        self._parts.worker.check_open()
        self._parts.models.remove(name)
        self._parts.leave(services)

    async def _change(self, name: str, folder: Path) -> Services:
        """Load a model in a task of its own, which goes on where the client goes away."""
        self._check_alone(name)
        self._parts.worker.check_open()
        self._loading = name
        task = asyncio.get_running_loop().create_task(self._load(name, folder))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        while not task.done():
            await asyncio.wait([task], timeout=LOOK_S)
            if self._parts.worker.draining and not task.done():
                task.add_done_callback(_retrieve)
                raise Draining
        return task.result()

    async def _load(self, name: str, folder: Path) -> Services:
        log.info("loading %s from %s", name, folder)
        began_s = time.perf_counter()
        try:
            services = await self._read_and_join(name, folder)
        except ServiceError as error:
            self._parts.metrics.loaded_while_running("refused")
            log.warning("%s cannot be loaded: %s", name, error.detail)
            raise
        finally:
            self._loading = None
        self._parts.metrics.loaded_while_running("done")
        model, seconds = services.model, time.perf_counter() - began_s
        log.info("%s, fingerprint %s, is served after %.1f s", name, model.fingerprint, seconds)
        return services

    async def _read_and_join(self, name: str, folder: Path) -> Services:
        try:
            prepared = await in_daemon_thread(lambda: self._prepare(name, folder), LOADING)
        except ServiceError:
            raise
        except Exception as error:  # torch and OpenVINO raise RuntimeError, for want of memory too
            if not isinstance(error, (CheckpointError, ValueError, OSError)):
                log.exception("%s cannot be loaded", name)
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            raise CheckpointRefused(f"{name} cannot be loaded: {reason}", field="model", value=name) from None
        release, before = prepared.release, self._named(name)
        try:
            services = await self._join(name, prepared)
        except Exception as error:
            del prepared
            traceback.clear_frames(error.__traceback__)  # whose variables hold the model
            await asyncio.to_thread(release)
            raise
        if before is not None:
            self._parts.leave(before)
        return services

    async def _join(self, name: str, prepared: Prepared) -> Services:
        weights_hash = prepared.engine.info.weights_hash
        for services in self._parts.models:
            if services.model.name != name and services.model.weights_hash == weights_hash:  # their jobs share a store
                detail = f"{name} has the weights of {services.model.name}, which is loaded"
                raise CheckpointRefused(detail, field="model", value=name)
        return await self._parts.join(prepared)

    def _named(self, name: str) -> Services | None:
        return next((services for services in self._parts.models if services.model.name == name), None)

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


def _retrieve(task: "asyncio.Task[Services]") -> None:
    """Nobody waits for this task any more; asyncio would complain about an error that is never retrieved."""
    if not task.cancelled():
        task.exception()
