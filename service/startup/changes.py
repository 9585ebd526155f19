"""When models are loaded, reloaded and unloaded while the server runs: by an admin, on demand, for room, when idle.

In the event loop's thread only; what is read and measured is, in a thread of its own. How a model comes and goes is in
models.py.
"""

import asyncio
import logging
import math
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

from tminus.model.files import CheckpointError
from tminus.service.api.models import Services
from tminus.service.errors import (
    CheckpointRefused,
    Draining,
    ModelBusy,
    ModelLoading,
    ModelNotFound,
    ServiceError,
    short,
)
from tminus.service.startup.models import LOOK_S, Prepared, ServedModels
from tminus.service.startup.settings import Library
from tminus.service.threads import LOADING, in_daemon_thread

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Reason = Literal["admin", "demand"]
END_LOOK_S = 0.2  # how often a change that is waited for looks whether the server ends
IDLE_LOOK_S = 1.0  # how often it is looked which models are idle
# A model stays at least this long after a load. A small one loads in half a second, so models that take turns on too
# little room spend most of the time on work, and a request for the next one waits hardly longer.
STAY_S = 3.0
LOAD_S = 10.0  # that loading takes, while nothing is known


@dataclass(slots=True, eq=False)
class _Want:
    """A model that is to come into memory, and who waits for it."""

    services: Services
    task: "asyncio.Task[None]"
    requests: int = 0  # that wait


@dataclass(slots=True)
class _Loads:
    """How long loads took, by the model's name, and when the one that runs began."""

    took_s: dict[str, float] = field(default_factory=dict)
    name: str | None = None
    began_s: float = 0.0

    def expected_s(self, name: str) -> float:
        """Return roughly how long it takes to load a model, from now on if that has begun."""
        took_s = self.took_s.get(name) or (median(self.took_s.values()) if self.took_s else LOAD_S)
        return max(0.0, took_s - (time.monotonic() - self.began_s)) if name == self.name else took_s


class ModelChanges:
    """Changes which models are in memory, one change at a time. Owns what is being loaded and what is to go.

    With `idle_unload_s`, models that are out are brought in when they are asked for, in the order in which they were
    asked for first. For room, those go out that were used the longest ago. Where all are busy, the one with the least
    work left takes no new requests until it has gone out; what comes for it meanwhile waits like all others.
    """

    def __init__(
        self,
        served: ServedModels,
        library: Library,
        prepare: Callable[[str, Path], Prepared],
        room_lacking: Callable[[Path, int], str | None] = lambda *_: None,
        idle_unload_s: float | None = None,
    ) -> None:
        """prepare: reads a folder and measures the model, under a name.

        room_lacking: says why a model of a folder is too large beside those that take so many bytes, None where it is
        not; raises CheckpointError. idle_unload_s: None where models come and go by calls of an admin alone.
        """
        self._served, self._library, self._prepare, self._room_lacking = served, library, prepare, room_lacking
        self._idle_unload_s = idle_unload_s
        self._turn = asyncio.Lock()  # who waits for it gets it in order
        self._changing: list[str] = []  # what an admin has asked for and is not done
        self._wants: dict[int, _Want] = {}  # by the model's number, in order
        self._closing: set[int] = set()  # models in memory that take no new requests
        self._loads = _Loads()
        self._came_s: dict[int, float] = {}  # when a model came in, by its number
        self._used_s: dict[int, float] = {}  # when a model came in or was last seen busy
        self._tasks: set[asyncio.Task[Any]] = set()  # asyncio holds tasks weakly
        if idle_unload_s is not None:
            served.brought_in_by(self)

    def start(self) -> None:
        """Begin to unload what is idle."""
        if self._idle_unload_s is not None:
            self._spawn(self._unload_idle(self._idle_unload_s))

    async def close(self) -> None:
        """Change nothing any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- what clients are told ---

    async def unserved(self) -> dict[str, str]:
        """The models that an admin can load and that are not served, and what is going on with each."""
        folders = await asyncio.to_thread(self._library.folders)
        served = {services.model.name for services in self._served.models}
        return {name: self._unserved_state(name) for name in sorted(folders) if name not in served}

    def _unserved_state(self, name: str) -> str:
        if name in self._changing:
            return "loading"
        return "unloading" if self._served.is_leaving(name) else "unloaded"

    def state(self, services: Services) -> str:
        """Return what is going on with a model that is served."""
        number = services.number
        if self._served.is_loaded(number):
            return "unloading" if number in self._closing else "loaded"
        return "loading" if number in self._wants else "unloaded"

    # --- by an admin ---

    async def load(self, name: str) -> Services:
        """Bring a model into memory. Raises ModelBusy, ModelNotFound, CheckpointRefused, Draining."""
        services = self._named(name)
        if services is None:
            return await self._change(name, await self._folder(name))
        if not self._served.is_out(services.number):
            raise ModelBusy(f"{name} is loaded already; reload reads its folder again", field="model", value=name)
        want = self._wants.get(services.number) or self._want(services, "admin")
        await self._wait_for(want.task)
        return self._served.models.named(name)

    async def reload(self, name: str) -> Services:
        """Read a model's folder again, and serve what is there now. Its jobs end on the weights they began with.

        Raises ModelBusy, ModelNotFound, CheckpointRefused, Draining; then what was served is served on.
        """
        self._served.models.named(name)
        return await self._change(name, await self._folder(name))

    async def unload(self, name: str) -> None:
        """Free a model's memory when its jobs have ended; without `idle_unload_s` it is served no more.

        Raises ModelBusy, ModelNotFound.
        """
        services = self._served.models.named(name)
        if self._idle_unload_s is not None:
            self._served.worker.state.check_open()
            if not self._served.is_out(services.number):
                self._closing.add(services.number)
                self._spawn(self._put_out(services.number))
            return
        if services is self._served.models.default:
            raise ModelBusy(f"{name} is the default model, which cannot be unloaded", field="model", value=name)
        self._check_alone(name)
        self._served.worker.state.check_open()
        self._served.models.remove(name)
        self._served.leave(services)

    async def _change(self, name: str, folder: Path) -> Services:
        """Load a model in a task of its own, which goes on where the client goes away."""
        if self._idle_unload_s is None:  # else it waits for its turn
            self._check_alone(name)
        self._served.worker.state.check_open()
        self._changing.append(name)
        return await self._wait_for(self._spawn(self._load_in_turn(name, folder)))

    async def _load_in_turn(self, name: str, folder: Path) -> Services:
        try:
            async with self._turn:
                return await self._load(name, folder, "admin")
        finally:
            self._changing.remove(name)

    async def _put_out(self, number: int) -> None:
        """Have a model go out when nobody uses it any more; it takes no new requests."""
        try:
            while self._served.is_busy(number):  # noqa: ASYNC110  requests and jobs come and go in many places
                await asyncio.sleep(LOOK_S)
            async with self._turn:
                if self._served.is_loaded(number) and not self._served.is_busy(number):
                    await self._go_out(number, "admin")
        except ServiceError as error:
            log.warning("a model could not be unloaded: %s", error.detail)
        finally:
            self._closing.discard(number)

    def _check_alone(self, name: str) -> None:
        """One change at a time. Raises ModelBusy."""
        if self._changing:
            detail = f"{self._changing[0]} is being loaded; try again when it is done"
            raise ModelBusy(detail, field="model", value=name)

    async def _wait_for(self, task: "asyncio.Task[Result]", most_s: float = math.inf) -> Result:
        """Wait for a task that goes on where whoever waits goes away.

        Raises what it raises, Draining, and TimeoutError after so many seconds.
        """
        until_s = time.monotonic() + most_s
        while not task.done():
            if (left_s := until_s - time.monotonic()) <= 0:
                raise TimeoutError
            await asyncio.wait([task], timeout=min(END_LOOK_S, left_s))
            if self._served.worker.state.draining and not task.done():
                raise Draining
        return task.result()

    # --- on demand ---

    def is_closing(self, number: int) -> bool:
        """Whether a model in memory takes no new requests, since it is to go out."""
        return number in self._closing

    def waiting(self, number: int) -> int:
        """How many requests wait until a model is in memory."""
        want = self._wants.get(number)
        return want.requests if want is not None else 0

    def expected_s(self, services: Services) -> float:
        """Return roughly how many seconds it takes until a model is in memory: after those that were wanted before."""
        total_s = 0.0
        for number, want in self._wants.items():
            total_s += self._loads.expected_s(want.services.model.name)
            if number == services.number:
                return total_s
        return total_s + self._loads.expected_s(services.model.name)

    async def bring_in(self, services: Services, deadline_s: float | None, *, of_request: bool) -> None:
        """Wait until a model is in memory. Raises ModelLoading, CheckpointRefused, Draining."""
        self._served.worker.state.check_open()
        number, name, began_s = services.number, services.model.name, time.monotonic()
        want = self._wants.get(number) or self._want(services, "demand")
        if deadline_s is not None and name in self._loads.took_s and self.expected_s(services) > deadline_s:
            raise ModelLoading(name, deadline_s, self.expected_s(services))
        most_s = services.limits.max_backlog_s
        want.requests += of_request
        try:
            await self._wait_for(want.task, min(most_s, deadline_s or most_s) if of_request else math.inf)
        except TimeoutError:
            raise ModelLoading(name, time.monotonic() - began_s, self.expected_s(services)) from None
        finally:
            want.requests -= of_request

    def _want(self, services: Services, reason: Reason) -> _Want:
        want = self._wants[services.number] = _Want(services, self._spawn(self._bring_in(services, reason)))
        return want

    async def _bring_in(self, services: Services, reason: Reason) -> None:
        """Load a model in its turn. From the moment on when it is there, those who waited for it keep it in."""
        number, name = services.number, services.model.name
        try:
            folder = await self._folder(name)
            while self._served.is_out(number):
                while self._served.is_loaded(number) and number in self._closing:  # noqa: ASYNC110
                    await asyncio.sleep(LOOK_S)
                async with self._turn:  # meanwhile it may have come in, or other weights in its place
                    if self._served.is_out(number) and not self._served.is_loaded(number):
                        await self._load(name, folder, reason)
        finally:
            del self._wants[number]

    # --- what goes out ---

    async def _make_room(self, name: str, folder: Path) -> None:
        """Have models go out until one more fits. Raises CheckpointRefused where it does not fit alone."""
        while True:
            lacks = await in_daemon_thread(partial(self._room_lacking, folder, self._served.memory_bytes), LOADING)
            if lacks is None:
                return
            others = [each for each in self._served.in_memory() if each.model.name != name]
            if self._idle_unload_s is None or not others:
                unload = "; unload another model first" if self._idle_unload_s is None else ""
                detail = f"{name} cannot be loaded: it {lacks}{unload}"
                raise CheckpointRefused(detail, field="model", value=name)
            await self._go_out(await self._free_one(others), "room")

    async def _free_one(self, others: list[Services]) -> int:
        """Wait until one of the models has stayed long enough and is idle; return its number. Raises Draining, …"""
        work_left_s, closing = self._served.admission.work_left_s, None
        try:
            while True:
                now_s = time.monotonic()
                stayed = [each.number for each in others if now_s - self._came_s.get(each.number, -math.inf) >= STAY_S]
                if idle := [number for number in stayed if not self._served.is_busy(number)]:
                    return min(idle, key=self._last_used_s)
                if stayed:
                    if closing is None:
                        closing = min(stayed, key=lambda number: (work_left_s(number), self._last_used_s(number)))
                    self._closing.add(closing)
                self._served.worker.state.check_open()
                await asyncio.sleep(LOOK_S)
        finally:
            if closing is not None:
                self._closing.discard(closing)

    async def _go_out(self, number: int, reason: str) -> None:
        self._closing.add(number)
        try:
            await self._served.go_out(number)
            self._served.metrics.unloaded_while_running(reason)
        finally:
            self._closing.discard(number)

    def _last_used_s(self, number: int) -> float:
        return max(self._served.models.last_used_s(number), self._used_s.get(number, 0.0))

    async def _unload_idle(self, idle_s: float) -> None:
        """Have models go out that nobody has used for so long."""
        while True:
            await asyncio.sleep(min(IDLE_LOOK_S, idle_s / 4))
            now_s = time.monotonic()
            for number in [services.number for services in self._served.in_memory()]:
                if self._served.is_busy(number) or number not in self._used_s:
                    self._used_s[number] = now_s
                elif now_s - self._last_used_s(number) >= idle_s and not self._turn.locked():
                    try:
                        async with self._turn:
                            await self._go_out(number, "idle")
                    except ServiceError as error:  # the server ends, or its worker hangs
                        log.debug("an idle model stays: %s", error.detail)

    # --- what comes in ---

    async def _load(self, name: str, folder: Path, reason: Reason) -> Services:
        log.info("loading %s from %s", name, folder)
        try:
            services = await self._read_and_join(name, folder)
        except ServiceError as error:
            self._served.metrics.loaded_while_running("refused", reason)
            log.warning("%s cannot be loaded: %s", name, error.detail)
            raise
        finally:
            self._loads.name, seconds = None, time.monotonic() - self._loads.began_s
        self._loads.took_s[name] = seconds
        self._came_s[services.number] = self._used_s[services.number] = time.monotonic()
        self._served.metrics.loaded_while_running("done", reason)
        log.info("%s, fingerprint %s, is served after %.1f s", name, services.model.fingerprint, seconds)
        return services

    async def _read_and_join(self, name: str, folder: Path) -> Services:
        try:
            await self._make_room(name, folder)
            self._loads.name, self._loads.began_s = name, time.monotonic()
            prepared = await in_daemon_thread(lambda: self._prepare(name, folder), LOADING)
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
            is_known = before is not None and before.model.weights_hash == weights_hash
            if before is not None and is_known and not self._served.is_loaded(before.number):
                return await self._served.come_in(before.number, prepared)
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

    def _spawn(self, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Perhaps nobody waits to its end; asyncio complains about an error that is never retrieved.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        return task
