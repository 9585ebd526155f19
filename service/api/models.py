"""The served models by name, and the parts that answer their requests. The default model answers requests without a
name.
"""

import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

from cachetools import LRUCache
from fastapi import Request, Response
from starlette.requests import HTTPConnection

from tminus.service.access.access import Access
from tminus.service.api.edge.connections import Streams
from tminus.service.api.edge.origin import AllowedSites
from tminus.service.api.other_replicas import OtherReplicas
from tminus.service.api.request.reading import while_connected
from tminus.service.api.request.schemas import Bounds, bounds_of
from tminus.service.errors import ModelNotFound, ModelUnloaded
from tminus.service.images.decoder import Decoder
from tminus.service.images.encoder import Encoder
from tminus.service.jobs.jobs import Jobs, JobStatuses, NewJobs
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.retention import SnapshotKeeper
from tminus.service.jobs.webhooks.webhook import AllowedReceivers
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.turns import CallerTurns
from tminus.service.worker.load_queue import LoadQueue
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.recording import RecordingRoom
from tminus.service.worker.worker import Worker


@dataclass(frozen=True, slots=True)
class Services:
    """One model, with the parts that all models share. Each loaded model has a Services, which every handler takes."""

    number: int  # of the model in this process; never reused
    model: ModelInfo
    limits: Limits  # of the model's requests
    allowed_sites: AllowedSites
    access: Access
    metrics: Metrics
    worker: Worker
    jobs: Jobs
    new_jobs: NewJobs
    statuses: JobStatuses
    decoder: Decoder
    encoder: Encoder
    cache: LRUCache[str, bytes]  # bodies of answers, by ETag; in the event loop's thread only
    streams: Streams
    other_replicas: OtherReplicas
    recordings: RecordingRoom
    webhooks: AllowedReceivers | None  # receivers allowed in addition to public ones; None: webhooks are off
    loaded_s: int  # when the model was loaded, Unix time
    noise_turns: CallerTurns  # the worker gets one image of POST /noise at a time
    models: "Models"  # all of them

    @property
    def bounds(self) -> Bounds:
        """The bounds of parameters that depend on the model."""
        return bounds_of(self.model, self.limits)

    @property
    def is_unloaded(self) -> bool:
        """Whether a request has to wait until the model is loaded."""
        return self.models.load_queue.is_unloaded(self.model.name)

    async def ensure_loaded(self, request: Request | None, deadline_s: float | None = None) -> "Services":
        """Wait until the model is in memory, and return the Services that its name has then.

        request: cancels the wait if its client disconnects; None for a message of a WebSocket. Raises the errors of
        LoadQueue.ensure_loaded.
        """
        if not self.is_unloaded:
            return self
        loading = self.models.load_queue.ensure_loaded(self.model.name, deadline_s)
        await (loading if request is None else while_connected(request, loading))
        return self.models.named(self.model.name)


@dataclass(slots=True)
class InMemory:
    """The parts of a model that exist while it is in memory."""

    model: LoadedModel
    keeper: SnapshotKeeper
    release: Callable[[], object]  # called when the engine has no users left
    memory_bytes: int


@dataclass(slots=True, eq=False)
class ServedModel:
    """A model, until it is no longer served and its jobs are forgotten. Only ServedModels and the loader change it."""

    services: Services
    lifecycle: Lifecycle
    loaded: InMemory | None  # None while the model is unloaded, and after it has left
    users: int = 0  # requests that are being answered
    loaded_s: float = float("-inf")  # time.monotonic of the last load while the server ran
    last_used_s: float = field(default_factory=time.monotonic)  # when it was last busy or loaded

    @property
    def name(self) -> str:
        """The name that requests use."""
        return self.services.model.name

    @property
    def number(self) -> int:
        """Its number in this process."""
        return self.services.number

    def change(self, info: ModelInfo, limits: Limits | None = None) -> None:
        """Replace the model's info and limits."""
        self.services = replace(self.services, model=info, limits=limits or self.services.limits)
        self.lifecycle.change(info, limits)


Handler = Callable[[Services, Request], Awaitable[Response]]


class Models:
    """The registry: owns the names, the served models, and models with jobs that are still kept.

    In the event loop's thread only.
    """

    def __init__(self, load_queue: LoadQueue) -> None:
        self.load_queue = load_queue
        self._served: dict[str, ServedModel] = {}  # by name; the first is the default
        self._by_number: dict[int, ServedModel] = {}  # also replaced and unloaded models

    # --- for requests ---

    @property
    def default(self) -> Services:
        """Return the model of a request that names none."""
        return next(iter(self))

    def __iter__(self) -> Iterator[Services]:
        return (one.services for one in self._served.values())

    def named(self, name: str) -> Services:
        """Return the model that is served under a name. Raises ModelNotFound."""
        if (one := self._served.get(name)) is None:
            raise ModelNotFound.of(name, self._served)
        return one.services

    def numbered(self, number: int) -> Services:
        """Return a model that is served or still has jobs. Raises ModelUnloaded if it has been forgotten."""
        if (one := self._by_number.get(number)) is None:
            raise ModelUnloaded
        return one.services

    def of(self, request: HTTPConnection) -> Services:
        """Return the model that a request is for. Raises ModelNotFound."""
        name = request.path_params.get("model")
        return self.default if name is None else self.named(name)

    def used(self, request: HTTPConnection) -> AbstractContextManager[Services]:
        """Return the model that a request is for, and keep it from being unloaded meanwhile. Raises ModelNotFound."""
        return self.using(self.of(request))

    @contextmanager
    def using(self, services: Services) -> Iterator[Services]:
        """Count a user of a served model, which keeps it from being unloaded."""
        one = self._by_number[services.number]
        one.users += 1
        try:
            yield services
        finally:
            one.users -= 1
            one.last_used_s = time.monotonic()

    def handler(self, handle: Handler, name: str) -> Callable[[Request], Awaitable[Response]]:
        """Make a route's handler from one that also takes the services. name: the operation's name in OpenAPI."""

        async def with_services(request: Request) -> Response:
            with self.used(request) as services:
                return await handle(services, request)

        with_services.__name__ = name
        return with_services

    # --- for loading and unloading ---

    @property
    def served(self) -> list[ServedModel]:
        """The models that are served, the default one first."""
        return list(self._served.values())

    @property
    def all(self) -> list[ServedModel]:
        """All models, in the order of their loads. Callable from any thread."""
        return list(self._by_number.values())

    @property
    def left(self) -> list[ServedModel]:
        """The models that are no longer served, the oldest first."""
        return [one for one in self.all if self._served.get(one.name) is not one]

    @property
    def in_memory(self) -> list[ServedModel]:
        """The models that are served and in memory."""
        return [one for one in self.served if one.loaded is not None]

    def find(self, name: str) -> ServedModel | None:
        """Return the model that is served under a name."""
        return self._served.get(name)

    def put(self, one: ServedModel) -> None:
        """Serve a model, in place of an earlier one with its name."""
        self._served[one.name] = self._by_number[one.number] = one

    def remove(self, name: str) -> ServedModel:
        """Stop serving a model, and return it. It must not be the default one."""
        assert name != self.default.model.name
        return self._served.pop(name)

    def forget(self, number: int) -> None:
        """Forget a model that is not served and has no jobs."""
        del self._by_number[number]
