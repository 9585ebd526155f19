"""Thread pools that start at once, threads that do not delay process exit, and checks for hung threads."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

from tminus.service.errors import Stalled

Result = TypeVar("Result")

LOADING = "tminus-load"  # name of threads that load or measure models
STALL_S, STALL_TIMES = 60.0, 20.0  # a call hangs if it exceeds both STALL_S seconds and STALL_TIMES its usual time
LOOK_S = 1.0  # seconds between checks for hung threads


class Pulse:
    """Measures how long a thread has been stuck in one call. Any thread may ask.

    The watched thread reports the start and the end of each call. The threads of a pool share one pulse; see `run`.
    """

    def __init__(
        self,
        name: str,
        usual_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """name: the thread's name in messages. usual_s: returns the longest usual duration of a call, in seconds."""
        self.name, self._usual_s, self._clock = name, usual_s, clock
        self._began_s: dict[object, float] = {}  # start time of each running call; each thread changes only its own

    def begin(self, what: object = None) -> None:
        """Record the start of a call. Threads that share the pulse need a different `what` for each call."""
        self._began_s[what] = self._clock()

    def rest(self, what: object = None) -> None:
        """Record the end of a call."""
        self._began_s.pop(what, None)

    @property
    def is_busy(self) -> bool:
        return bool(self._began_s)

    @property
    def stalled_s(self) -> float:
        """Seconds since the oldest running call began, if it counts as hung; otherwise 0.0."""
        if not (began_s := tuple(self._began_s.values())):
            return 0.0
        took_s = self._clock() - min(began_s)
        return took_s if took_s > max(STALL_S, STALL_TIMES * self._usual_s()) else 0.0

    async def beat(self) -> None:
        """Record a call every LOOK_S seconds until cancelled. If the next call is late, the event loop hangs."""
        try:
            while True:
                self.begin()
                await asyncio.sleep(LOOK_S)
        finally:
            self.rest()

    async def run(self, pool: Executor, act: Callable[[], Result]) -> Result:
        """Run a function in a pool's thread. Raises the function's exceptions, and Stalled if a thread hangs.

        If the caller is cancelled before the function starts, the function does not run.
        """

        what = object()

        def run() -> Result:
            self.begin(what)
            try:
                return act()
            finally:
                self.rest(what)

        done = asyncio.get_running_loop().run_in_executor(pool, run)
        try:
            while not (await asyncio.wait((done,), timeout=LOOK_S))[0]:
                if stalled_s := self.stalled_s:
                    raise Stalled(stalled_s, self.name)
            return done.result()
        finally:
            done.cancel()


def started_pool(threads: int, name: str, begin: Callable[[], object] | None = None) -> ThreadPoolExecutor:
    """Return a pool whose threads are already running.

    Each thread first calls `begin`. name: prefix of thread names.

    A standard-library pool starts its threads later, when a task finds no idle thread. If memory is short at that
    moment, the new thread may die before it signals that it has started, and `Thread.start` waits for that signal
    forever. In the worker, this would block every client.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=begin)
    all_run = Barrier(threads + 1)
    for _ in range(threads):
        pool.submit(all_run.wait)
    all_run.wait()
    return pool


def begin_in_daemon_thread(act: Callable[[], Result], name: str) -> Future[Result]:
    """Start a function in a daemon thread. The returned future cannot be cancelled."""
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
    """Run a function in a daemon thread. The function continues even if the caller is cancelled."""
    return await asyncio.wrap_future(begin_in_daemon_thread(act, name))
