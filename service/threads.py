"""Pools of threads that are there before they are needed, and threads that the process does not wait for."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

Result = TypeVar("Result")

LOADING = "tminus-load"  # the name of threads that load or measure models


def started_pool(threads: int, name: str) -> ThreadPoolExecutor:
    """Make a pool whose threads all run already; name: what theirs begin with.

    A pool of the standard library starts a thread with the first task that finds none idle. If there is no memory for
    it just then, the thread may end before it has said that it runs, and `Thread.start` waits for that for ever: so did
    the worker, and with it every client.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    all_run = Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_run.wait)
    all_run.wait()
    return pool


def begin_in_daemon_thread(act: Callable[[], Result], name: str) -> Future[Result]:
    """Begin a function that takes long; the future gets what it returns or raises, and cannot be cancelled."""
    done = Future[Result]()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(act())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return done


async def in_daemon_thread(act: Callable[[], Result], name: str) -> Result:
    """Wait for a function that takes long. Raises what it raises. If the waiting is cancelled, the function goes on."""
    return await asyncio.wrap_future(begin_in_daemon_thread(act, name))
