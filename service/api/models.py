"""Which models are served, by name, and what answers their requests. A request without a name is of the default one."""

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
    """A model, and the parts that all models share. Each loaded model has one; every handler takes one."""

    number: int  # of the model in this process; it is never given again
    model: ModelInfo
    limits: Limits  # of its requests
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
    webhooks: AllowedReceivers | None  # who may be told of jobs beside public receivers; None: nobody
    loaded_s: int  # when the model was loaded, Unix time
    noise_turns: CallerTurns  # the worker gets one image of POST /noise at a time
    models: "Models"  # all of them

    @property
    def bounds(self) -> Bounds:
        """The bounds of parameters that depend on the model."""
        return bounds_of(self.model, self.limits)

    @property
    def is_unloaded(self) -> bool:
        """Whether a request has to wait until the model is in memory."""
        return self.models.load_queue.is_unloaded(self.model.name)

    async def ensure_loaded(self, request: Request | None, deadline_s: float | None = None) -> "Services":
        """Wait until the model is in memory, and return what is served under its name then.

        request: whose client may go away meanwhile; None for a message of a WebSocket. Raises as
        LoadQueue.ensure_loaded does.
        """
        if not self.is_unloaded:
            return self
        loading = self.models.load_queue.ensure_loaded(self.model.name, deadline_s)
        await (loading if request is None else while_connected(request, loading))
        return self.models.named(self.model.name)


@dataclass(slots=True)
class InMemory:
    """The parts of a model that are there while it is in memory."""

    model: LoadedModel
    keeper: SnapshotKeeper
    release: Callable[[], object]  # called when nobody has the engine any more
    memory_bytes: int


@dataclass(slots=True, eq=False)
class ServedModel:
    """A model for as long as something of it is there. Only ServedModels and the loader change it."""

    services: Services
    lifecycle: Lifecycle
    loaded: InMemory | None  # None while it is unloaded, and once it has left
    users: int = 0  # requests that are being answered
    loaded_s: float = float("-inf")  # when it was last loaded while the server ran, by time.monotonic
    last_used_s: float = field(default_factory=time.monotonic)  # when it was last seen busy, or was loaded

    @property
    def name(self) -> str:
        """The name by which requests ask for it."""
        return self.services.model.name

    @property
    def number(self) -> int:
        """Its number in this process."""
        return self.services.number

    def change(self, info: ModelInfo, limits: Limits | None = None) -> None:
        """Tell something else of the model from now on."""
        self.services = replace(self.services, model=info, limits=limits or self.services.limits)
        self.lifecycle.change(info, limits)


Handler = Callable[[Services, Request], Awaitable[Response]]


class Models:
    """The registry: owns the names, and the models that are served or whose jobs are still kept.

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
        """Return a model that is served, or still has jobs. Raises ModelUnloaded for one that was forgotten since."""
        if (one := self._by_number.get(number)) is None:
            raise ModelUnloaded
        return one.services

    def of(self, request: HTTPConnection) -> Services:
        """Return the model that a request is for. Raises ModelNotFound."""
        name = request.path_params.get("model")
        return self.default if name is None else self.named(name)

    def used(self, request: HTTPConnection) -> AbstractContextManager[Services]:
        """Return the model that a request is for; it is not unloaded meanwhile. Raises ModelNotFound."""
        return self.using(self.of(request))

    @contextmanager
    def using(self, services: Services) -> Iterator[Services]:
        """Note that a model that is served is used; it is not unloaded meanwhile."""
        one = self._by_number[services.number]
        one.users += 1
        try:
            yield services
        finally:
            one.users -= 1
            one.last_used_s = time.monotonic()

    def handler(self, handle: Handler, name: str) -> Callable[[Request], Awaitable[Response]]:
        """Make a handler of a route from one that takes the services too. name: of the operation in OpenAPI."""

        async def with_services(request: Request) -> Response:
            with self.used(request) as services:
                return await handle(services, request)

        with_services.__name__ = name
        return with_services

    # --- for what loads and unloads ---

    @property
    def served(self) -> list[ServedModel]:
        """The models that are served, the default one first."""
        return list(self._served.values())

    @property
    def all(self) -> list[ServedModel]:
        """All models, in the order of their loads; any thread may ask."""
        return list(self._by_number.values())

    @property
    def left(self) -> list[ServedModel]:
        """The models that are served no more, the oldest first."""
        return [one for one in self.all if self._served.get(one.name) is not one]

    @property
    def in_memory(self) -> list[ServedModel]:
        """The models that are served and in memory."""
        return [one for one in self.served if one.loaded is not None]

    def find(self, name: str) -> ServedModel | None:
        """Return the model that is served under a name."""
        return self._served.get(name)

    def put(self, one: ServedModel) -> None:
        """Serve a model, in place of another of its name."""
        self._served[one.name] = self._by_number[one.number] = one

    def remove(self, name: str) -> ServedModel:
        """Serve a model no more, and return it. It must not be the default one."""
        assert name != self.default.model.name
        return self._served.pop(name)

    def forget(self, number: int) -> None:
        """Forget a model that is not served and has no jobs any more."""
        del self._by_number[number]
