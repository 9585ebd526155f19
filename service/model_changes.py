"""Load, reload and unload models while the server runs, one at a time. In the event loop's thread only."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tminus.model.files import CheckpointError
from tminus.service.api.services import Services
from tminus.service.errors import CheckpointRefused, ModelBusy, ModelNotFound, ServiceError
from tminus.service.library import Library
from tminus.service.parts import Parts, Prepared
from tminus.service.threads import in_daemon_thread

log = logging.getLogger(__name__)

Prepare = Callable[[str, Path], Prepared]  # reads a folder and measures the model, under a name


def prepare_nothing(name: str, folder: Path) -> Prepared:
    """Of a server that loads nothing while it runs."""
    raise CheckpointRefused(f"{name} cannot be loaded from {folder}", field="model", value=name)


class ModelChanges:
    """Owns what is being loaded."""

    def __init__(self, parts: Parts, library: Library, prepare: Prepare) -> None:
        self._parts, self._library, self._prepare = parts, library, prepare
        self._loading: str | None = None

    @property
    def is_loading(self) -> bool:
        """Whether a model is being loaded."""
        return self._loading is not None

    @property
    def unloaded(self) -> dict[str, str]:
        """The models that can be loaded and are not, and what is going on with each."""
        served = {services.model.name for services in self._parts.models}
        return {name: self._state(name) for name in sorted(self._library.folders()) if name not in served}

    def _state(self, name: str) -> str:
        if name == self._loading:
            return "loading"
        return "unloading" if self._parts.is_leaving(name) else "unloaded"

    async def load(self, name: str) -> Services:
        """Serve a model that is not loaded. Raises ModelBusy, ModelNotFound, CheckpointRefused, Draining."""
        folder = self._folder(name)
        if any(services.model.name == name for services in self._parts.models):
            raise ModelBusy(f"{name} is loaded already; reload reads its folder again", field="model", value=name)
        return await self._load(name, folder)

    async def reload(self, name: str) -> Services:
        """Read a model's folder again, and serve what is there now. Its jobs end on the weights they began with.

        Raises ModelBusy, ModelNotFound, CheckpointRefused, Draining; then what was served is served on.
        """
        before, folder = self._parts.models.named(name), self._folder(name)
        services = await self._load(name, folder)
        self._parts.leave(before)
        return services

    async def unload(self, name: str) -> None:
        """Serve a model no more; its memory is freed when its jobs have ended. Raises ModelBusy, ModelNotFound."""
        services = self._parts.models.named(name)
        if services is self._parts.models.default:
            raise ModelBusy(
                f"{name} is the default model, of requests that name none, and stays", field="model", value=name
            )
        with self._alone(name):
            self._parts.models.remove(name)
            self._parts.leave(services)

    async def _load(self, name: str, folder: Path) -> Services:
        with self._alone(name):
            log.info("loading %s from %s", name, folder)
            began_s = time.perf_counter()
            try:
                prepared = await in_daemon_thread(lambda: self._prepare(name, folder), "tminus-load")
                self._check_weights(name, prepared)
                services = await self._parts.join(prepared)
            except ServiceError as error:
                self._parts.metrics.loaded_while_running("refused")
                log.warning("%s cannot be loaded: %s", name, error.detail)
                raise
            except (CheckpointError, ValueError, OSError, MemoryError) as error:
                self._parts.metrics.loaded_while_running("refused")
                log.warning("%s cannot be loaded: %s", name, error)
                detail = f"{name} cannot be loaded: {str(error) or type(error).__name__}"
                raise CheckpointRefused(detail, field="model", value=name) from None
            self._parts.metrics.loaded_while_running("done")
            model, seconds = services.model, time.perf_counter() - began_s
            log.info("%s, fingerprint %s, is served after %.1f s", name, model.fingerprint, seconds)
            return services

    def _check_weights(self, name: str, prepared: Prepared) -> None:
        """Raise CheckpointRefused for weights that are served under another name: their jobs share a store."""
        for services in self._parts.models:
            if services.model.name != name and services.model.weights_hash == prepared.engine.info.weights_hash:
                raise CheckpointRefused(
                    f"{name} has the weights of {services.model.name}, which is loaded", field="model", value=name
                )

    def _folder(self, name: str) -> Path:
        folders = self._library.folders()
        if name not in folders:
            raise ModelNotFound.of(name, folders)
        return folders[name]

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One change at a time. Raises ModelBusy."""
        if self._loading is not None:
            raise ModelBusy(f"{self._loading} is being loaded; try again when it is done", field="model", value=name)
        self._loading = name
        try:
            yield
        finally:
            self._loading = None
