"""Which models are served, by name, and what answers their requests. A request without a name is of the default one."""

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace

from fastapi import Request, Response
from starlette.requests import HTTPConnection

from tminus.service.access.access import Access
from tminus.service.api.answers.caching import ResultCache
from tminus.service.api.edge.connections import Streams
from tminus.service.api.edge.origin import AllowedSites
from tminus.service.api.other_replicas import OtherReplicas
from tminus.service.api.request.bounds import Bounds, bounds_of
from tminus.service.api.request.reading import while_connected
from tminus.service.errors import ModelNotFound, ModelUnloaded
from tminus.service.images.decoder import Decoder
from tminus.service.images.encoder import Encoder
from tminus.service.jobs.jobs import Jobs
from tminus.service.jobs.new_jobs import NewJobs
from tminus.service.jobs.views import JobStatuses
from tminus.service.jobs.webhooks.webhook import AllowedReceivers
from tminus.service.metrics import Metrics
from tminus.service.model_info import Limits, ModelInfo
from tminus.service.turns import CallerTurns
from tminus.service.worker.loaded_model import Residence
from tminus.service.worker.recording import RecordingRoom
from tminus.service.worker.worker import Worker


@dataclass(frozen=True, slots=True)
class Services:
    """A model and what all models share. One is built for each model that is loaded; every handler takes one."""

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
    cache: ResultCache
    streams: Streams
    other_replicas: OtherReplicas
    recordings: RecordingRoom
    webhooks: AllowedReceivers | None  # who may be told of jobs beside public receivers; None: nobody
    loaded_s: int  # when the model was loaded, Unix time
    noise_turns: CallerTurns  # the worker gets one image of POST /noise at a time
    residence: "Residence[Services]"  # of all models

    @property
    def bounds(self) -> Bounds:
        """The bounds of parameters that depend on the model."""
        return bounds_of(self.model, self.limits)

    async def in_memory(self, request: Request | None, deadline_s: float | None = None) -> "Services":
        """Wait until the model is in memory; returns what it is then. Raises as Residence.bring_in does.

        request: whose client may go away meanwhile; None for a message of a WebSocket.
        """
        if not self.residence.is_out(self.number):
            return self
        coming = self.residence.bring_in(self.number, deadline_s, of_request=True)
        return await (coming if request is None else while_connected(request, coming))


Handler = Callable[[Services, Request], Awaitable[Response]]


class Models:
    """Owns the names, and who uses which model now. In the event loop's thread only."""

    def __init__(self) -> None:
        self._served: dict[str, Services] = {}  # by name; the first is the default
        # By number, also those that were replaced or unloaded, for as long as their jobs are kept.
        self._by_number: dict[int, Services] = {}
        self._users: Counter[int] = Counter()
        self._last_used_s: dict[int, float] = {}  # when the last user left, by time.monotonic

    @property
    def default(self) -> Services:
        """Return the model of a request that names none."""
        return next(iter(self._served.values()))

    def __iter__(self) -> Iterator[Services]:
        return iter(self._served.values())

    def named(self, name: str) -> Services:
        """Return the model that is served under a name. Raises ModelNotFound."""
        if (services := self._served.get(name)) is None:
            raise ModelNotFound.of(name, self._served)
        return services

    def numbered(self, number: int) -> Services:
        """Return a model that is loaded, or still has jobs. Raises ModelUnloaded for one that was forgotten since."""
        if (services := self._by_number.get(number)) is None:
            raise ModelUnloaded
        return services

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
        self._users[services.number] += 1
        try:
            yield services
        finally:
            self._users[services.number] -= 1
            self._last_used_s[services.number] = time.monotonic()

    def handler(self, handle: Handler, name: str) -> Callable[[Request], Awaitable[Response]]:
        """Make a handler of a route from one that takes the services too. name: of the operation in OpenAPI."""

        async def with_services(request: Request) -> Response:
            with self.used(request) as services:
                return await handle(services, request)

        with_services.__name__ = name
        return with_services

    # --- when models change ---

    def change(self, services: Services, info: ModelInfo, limits: Limits | None = None) -> Services:
        """Tell something else of a model from now on, whether it is served or only has jobs; returns what tells it."""
        changed = replace(services, model=info, limits=limits or services.limits)
        if self._served.get(info.name) is services:
            self._served[info.name] = changed
        self._by_number[services.number] = changed
        return changed

    def put(self, services: Services) -> None:
        """Serve a model, in place of another of its name."""
        self._served[services.model.name] = services
        self._by_number[services.number] = services

    def remove(self, name: str) -> None:
        """Serve a model no more. It must not be the default one."""
        assert self._served[name] is not self.default
        del self._served[name]

    def users(self, number: int) -> int:
        """How many requests of a model are being answered."""
        return self._users[number]

    def last_used_s(self, number: int) -> float:
        """When the last of them was answered, by time.monotonic; minus infinity if none was."""
        return self._last_used_s.get(number, float("-inf"))

    def forget(self, number: int) -> None:
        """Forget a model that is not served and has no jobs any more."""
        del self._by_number[number], self._users[number]
        self._last_used_s.pop(number, None)
