"""What a replica does by itself, without a cluster. tests/e2e/test_ray.py has one."""

import asyncio
import threading
from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from tminus.service.ray_serve import replica as module
from tminus.service.ray_serve.replica import Replica


class Worker:
    """A worker whose thread has ended."""

    def __init__(self, *, crashed: bool) -> None:
        self.state = SimpleNamespace(crashed=crashed)

    def join(self) -> None:
        """It has."""


async def watched(monkeypatch: pytest.MonkeyPatch, *, crashed: bool) -> list[str]:
    """What happens, in order, after a worker has ended."""
    happened: list[str] = []

    async def stop() -> None:
        happened.append("port closed")

    monkeypatch.setattr(module.os, "_exit", lambda code: happened.append(f"exit {code}"))
    monkeypatch.setattr(module, "FAILED_S", 0.0)
    stack = AsyncExitStack()
    stack.callback(lambda: happened.append("stores closed"))
    # No Replica: Serve awaits the end of one, and nothing here does.
    one: Any = SimpleNamespace(
        _loop=asyncio.get_running_loop(),
        _stack=stack,
        _served=SimpleNamespace(worker=Worker(crashed=crashed)),
        _front=SimpleNamespace(end_streams=lambda: happened.append("streams ended")),
        _peers=SimpleNamespace(stop=stop),
    )
    one._end_crashed = lambda: Replica._end_crashed(one)
    thread = threading.Thread(target=Replica._watch, args=(one,))
    thread.start()
    await asyncio.to_thread(thread.join)
    return happened


def test_a_crash_of_the_worker_ends_the_process_once_the_stores_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    happened = asyncio.run(watched(monkeypatch, crashed=True))
    assert happened == ["streams ended", "port closed", "stores closed", "exit 1"]


def test_a_drained_worker_ends_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asyncio.run(watched(monkeypatch, crashed=False)) == []
