"""A function in a thread that the end of the process does not wait for."""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

Result = TypeVar("Result")
LOADING = "tminus-load"  # the name of threads that measure models


async def in_daemon_thread(act: Callable[[], Result], name: str) -> Result:
    """Wait for a function that takes long. Raises what it raises. If the waiting is cancelled, the function goes on."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(outcome: Result | Exception) -> None:
        if done.done():  # it was cancelled, as the server stops
            return
        if isinstance(outcome, Exception):
            done.set_exception(outcome)
        else:
            done.set_result(outcome)

    def run() -> None:
        outcome: Result | Exception
        try:
            outcome = act()
        except Exception as error:
            outcome = error
        with suppress(RuntimeError):  # the loop may have ended meanwhile
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await done
