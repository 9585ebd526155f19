"""The app on a fake engine behind a real socket, and both clients of it, the async one called as if it were sync."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from tests.service.conftest import INSTANT, Site, prepare
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, FakeEngine
from tests.service.keys import access_of, key_line
from tminus.model.files import CheckpointError
from tminus.service.api.edge.connections import stream_protocol
from tminus.service.client import AsyncClient, AsyncJob, AsyncWatching, Client
from tminus.service.startup.models import Prepared
from tminus.service.startup.server import bind
from tminus.service.startup.settings import Library

SPEC: dict[str, Any] = {"n": 2, "steps": 4, "seed": 5}
ADMIN_KEY = "a-key-of-the-tests"
COLOUR = replace(INFO, name="colour", channels=3, weights_hash="cd" * 32, fingerprint="fedcba9876543210")
SPARE = replace(COLOUR, name="spare", weights_hash="ef" * 32)
MakeServed = Callable[..., "Served"]
Connect = Callable[..., Any]


def job_members(**members: Any) -> dict[str, Any]:
    """A job's document as the server sends it, of a job that runs unless told otherwise."""
    empty = dict.fromkeys(("problem", "fingerprint", "finished", "position", "eta_s"))
    job = {"id": "x", "state": "running", "durable": True, "step": 0, "steps": 1, "n": 1, "seed": 0, "age_s": 0}
    return (
        empty
        | job
        | {"model": "fake", "parameters": {}, "created": "2026-01-01T00:00:00.000Z", "sampler": "ddpm"}
        | members
    )


class Served(Site):
    """The app of a Site behind a real socket."""

    url = ""

    @contextmanager
    def running(self) -> Iterator["Served"]:
        listener = bind("127.0.0.1", 0)
        listener.listen()
        config = uvicorn.Config(self.app, log_config=None, access_log=False, ws=stream_protocol())
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            self.wait_until_ready()
            yield self
        finally:
            self.engine.gate.open()
            self.worker.close()
            server.should_exit = True
            thread.join(PATIENCE_S)
            listener.close()
        assert self.engine.jobs == {}


@pytest.fixture
def make_served() -> Iterator[MakeServed]:
    with ExitStack() as stack:

        def make(**limits: object) -> Served:
            limits.setdefault("max_streams", 8)
            limits.setdefault("max_streams_per_address", 8)
            site = Served(INFO, replace(LIMITS, **limits), INSTANT)  # type: ignore[arg-type]
            return stack.enter_context(site.running())

        yield make


@pytest.fixture
def served(make_served: MakeServed) -> Served:
    return make_served()


@pytest.fixture
def several() -> Iterator[Served]:
    """A server of `fake`, its default model, and `colour`; it may load `spare`, and `broken`, which it refuses."""

    def load(name: str, folder: Path) -> Prepared:
        if name == "broken":
            raise CheckpointError(f"{folder}: no checkpoint")
        return prepare(FakeEngine({"colour": COLOUR, "spare": SPARE}[name]), LIMITS, INSTANT)

    more: dict[str, Any] = {
        "others": [load("colour", Path())],
        "library": Library({name: Path(name) for name in ("fake", "colour", "spare", "broken")}),
        "prepare": load,
        "access": access_of(key_line("ops", ADMIN_KEY, "admin"), is_open=True),
    }
    with Served(INFO, replace(LIMITS, max_streams=8, max_streams_per_address=8), INSTANT, **more).running() as served:
        yield served


class InLoop:
    """The async client, or what it gives, called as if it were the sync one."""

    def __init__(self, runner: asyncio.Runner, thing: Any) -> None:
        self.runner, self.thing = runner, thing

    def _of(self, thing: Any) -> Any:
        async_kinds = (AsyncClient, AsyncJob, AsyncWatching, AsyncIterator)
        return InLoop(self.runner, thing) if isinstance(thing, async_kinds) else thing

    def _wait(self, awaitable: Any) -> Any:
        async def wait() -> Any:
            return await awaitable

        return self.runner.run(wait())

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.thing, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            result = value(*args, **kwargs)
            return self._of(self._wait(result) if inspect.iscoroutine(result) else result)

        return call

    def __iter__(self) -> Iterator[Any]:
        iterator = aiter(self.thing)
        try:
            while True:
                try:
                    value = self._wait(anext(iterator))
                except StopAsyncIteration:
                    return
                yield value
        finally:
            self._wait(iterator.aclose())

    def __next__(self) -> Any:
        return self._wait(anext(self.thing))

    def __enter__(self) -> "InLoop":
        self._wait(self.thing.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._wait(self.thing.__aexit__(*error))


@pytest.fixture(params=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Makes clients; each test runs once with sync and once with async ones."""
    with ExitStack() as stack:
        if request.param == "sync":
            yield lambda url, **options: stack.enter_context(Client(url, **options))
        else:
            runner = stack.enter_context(asyncio.Runner())
            yield lambda url, **options: stack.enter_context(InLoop(runner, AsyncClient(url, **options)))
