"""The registry of served models, and the objects that their request handlers need.

A request that names no model uses the default model.
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
from tminus.service.api.request.specs import place_of
from tminus.service.errors import ModelNotFound, ModelUnloaded
from tminus.service.images.decoder import Decoder
from tminus.service.images.encoder import Encoder
from tminus.service.jobs.jobs import Jobs, JobStatuses, NewJobs
from tminus.service.jobs.lifecycle import Lifecycle
from tminus.service.jobs.retention import SnapshotKeeper
from tminus.service.jobs.webhooks.webhook import AllowedReceivers
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.spec import SampleSpec
from tminus.service.turns import CallerTurns
from tminus.service.worker.load_queue import LoadQueue
from tminus.service.worker.loaded_model import LoadedModel
from tminus.service.worker.recording import RecordingRoom
from tminus.service.worker.worker import Worker


@dataclass(frozen=True, slots=True)
class Services:
    """What handlers need to serve one model: the model itself, and the parts that all models share."""

    number: int  # identifies the model in this process; never reused
    model: ModelInfo
    limits: Limits  # limits on requests to this model
    allowed_sites: AllowedSites
    access: Access
    metrics: Metrics
    worker: Worker
    jobs: Jobs
    new_jobs: NewJobs
    statuses: JobStatuses
    decoder: Decoder
    encoder: Encoder
    cache: LRUCache[str, bytes]  # response bodies by ETag; use only in the event loop's thread
    streams: Streams
    other_replicas: OtherReplicas
    recordings: RecordingRoom
    webhooks: AllowedReceivers | None  # receivers allowed besides public ones; None if webhooks are off
    loaded_s: int  # Unix time at which the model was registered
    noise_turns: CallerTurns  # gives the worker one image of POST /noise at a time
    models: "Models"  # the registry of all models

    @property
    def bounds(self) -> Bounds:
        return bounds_of(self.model, self.limits)

    def quality_of(self, spec: SampleSpec) -> str | None:
        """Return the place of a spec's setting in the ladder, such as 2/5, or None if it has none there.

        For a student, the ladder is that of a served model which names the student, if there is one.
        """
        others = (each.model for each in self.models if each.number != self.number)
        family = (each for each in others if any(rung.model == self.model.name for rung in each.ladder))
        ladder_of = next(family, self.model)
        return place_of(spec, self.model, ladder_of.ladder, own=ladder_of is self.model)

    @property
    def is_unloaded(self) -> bool:
        """True if a request must wait for the model to load."""
        return self.models.load_queue.is_unloaded(self.model.name)

    async def ensure_loaded(self, request: Request | None, deadline_s: float | None = None) -> "Services":
        """Wait until the model is in memory, and return its current Services.

        request: the wait ends if this request's client disconnects; None for a WebSocket message. Raises the errors of
        LoadQueue.ensure_loaded.
        """
        if not self.is_unloaded:
            return self
        loading = self.models.load_queue.ensure_loaded(self.model.name, deadline_s)
        await (loading if request is None else while_connected(request, loading))
        return self.models.named(self.model.name)


@dataclass(slots=True)
class InMemory:
    """What exists only while a model is in memory."""

    model: LoadedModel
    keeper: SnapshotKeeper
    release: Callable[[], object]  # called once the worker has unloaded the model
    memory_bytes: int


@dataclass(slots=True, eq=False)
class ServedModel:
    """A model that is being served or still has jobs. Only Models, ServedModels and ModelLoader change it."""

    services: Services
    lifecycle: Lifecycle
    loaded: InMemory | None  # None while the model is not in memory
    users: int = 0  # number of requests in progress
    loaded_s: float = float("-inf")  # when the model was last loaded after startup, by time.monotonic()
    last_used_s: float = field(default_factory=time.monotonic)  # when the model was last used or loaded

    @property
    def name(self) -> str:
        return self.services.model.name

    @property
    def number(self) -> int:
        return self.services.number

    def change(self, info: ModelInfo, limits: Limits | None = None) -> None:
        self.services = replace(self.services, model=info, limits=limits or self.services.limits)
        self.lifecycle.change(info, limits)


Handler = Callable[[Services, Request], Awaitable[Response]]


class Models:
    """The registry of served models, and of models that are no longer served but whose jobs are still kept.

    Use only in the event loop's thread, except for `all`.
    """

    def __init__(self, load_queue: LoadQueue) -> None:
        self.load_queue = load_queue
        self._served: dict[str, ServedModel] = {}  # keyed by name; the first one is the default
        self._by_number: dict[int, ServedModel] = {}  # also holds replaced and unloaded models

    # --- requests ---

    @property
    def default(self) -> Services:
        """The model used by requests that name no model."""
        return next(iter(self))

    def __iter__(self) -> Iterator[Services]:
        return (one.services for one in self._served.values())

    def named(self, name: str) -> Services:
        """Return the served model with this name. Raises ModelNotFound."""
        if (one := self._served.get(name)) is None:
            raise ModelNotFound.of(name, self._served)
        return one.services

    def numbered(self, number: int) -> Services:
        """Return the registered model with this number, served or not. Raises ModelUnloaded after `forget`."""
        if (one := self._by_number.get(number)) is None:
            raise ModelUnloaded
        return one.services

    def of(self, request: HTTPConnection) -> Services:
        """Return the model named in the request's path, or the default model. Raises ModelNotFound."""
        name = request.path_params.get("model")
        return self.default if name is None else self.named(name)

    def used(self, request: HTTPConnection) -> AbstractContextManager[Services]:
        """Return a context manager that yields the request's model and keeps it loaded. Raises ModelNotFound."""
        return self.using(self.of(request))

    @contextmanager
    def using(self, services: Services) -> Iterator[Services]:
        """Keep the model from being unloaded while the block runs."""
        one = self._by_number[services.number]
        one.users += 1
        try:
            yield services
        finally:
            one.users -= 1
            one.last_used_s = time.monotonic()

    def handler(self, handle: Handler, name: str) -> Callable[[Request], Awaitable[Response]]:
        """Return a route handler that calls `handle` with the request's model. name: the route's name."""

        async def with_services(request: Request) -> Response:
            with self.used(request) as services:
                return await handle(services, request)

        with_services.__name__ = name
        return with_services

    # --- loading and unloading ---

    @property
    def served(self) -> list[ServedModel]:
        """The served models, starting with the default model."""
        return list(self._served.values())

    @property
    def all(self) -> list[ServedModel]:
        """All registered models, in order of registration. Safe to call from any thread."""
        return list(self._by_number.values())

    @property
    def left(self) -> list[ServedModel]:
        """The models that are no longer served, oldest first."""
        return [one for one in self.all if self._served.get(one.name) is not one]

    @property
    def in_memory(self) -> list[ServedModel]:
        return [one for one in self.served if one.loaded is not None]

    def find(self, name: str) -> ServedModel | None:
        return self._served.get(name)

    def put(self, one: ServedModel) -> None:
        """Serve a model. It replaces any served model of the same name."""
        self._served[one.name] = self._by_number[one.number] = one

    def remove(self, name: str) -> ServedModel:
        """Stop serving a model and return it. The default model cannot be removed."""
        assert name != self.default.model.name
        return self._served.pop(name)

    def forget(self, number: int) -> None:
        del self._by_number[number]
