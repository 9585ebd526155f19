"""Pools of threads that are there before they are needed, threads that the process does not wait for, and hangs."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from threading import Barrier
from typing import TypeVar

from tminus.service.errors import Stalled

Result = TypeVar("Result")

LOADING = "tminus-load"  # the name of threads that load or measure models
STALL_S, STALL_TIMES = 60.0, 20.0  # a call hangs if it exceeds both: seconds, and times its usual
LOOK_S = 1.0  # how often it is looked whether what is waited for hangs


class Pulse:
    """Tells for how long a thread hangs: it has been at one thing beyond its time. Any thread may ask.

    The thread says when it begins something, and when it rests. The threads of a pool share a pulse, see `run`.
    """

    def __init__(
        self,
        name: str,
        usual_s: Callable[[], float] = lambda: 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """name: of the thread, in messages. usual_s: what one thing takes at most."""
        self.name, self._usual_s, self._clock = name, usual_s, clock
        self._began_s: dict[object, float] = {}  # when each thing began that is being done; each thread changes its own

    def begin(self, what: object = None) -> None:
        """Note that something begins now. A thread of its own has ended what it did before."""
        self._began_s[what] = self._clock()

    def rest(self, what: object = None) -> None:
        """Note that it has ended."""
        self._began_s.pop(what, None)

    @property
    def is_busy(self) -> bool:
        """Whether something is being done."""
        return bool(self._began_s)

    @property
    def stalled_s(self) -> float:
        """Seconds that the oldest running call has taken; 0.0 while that is within its limit."""
        if not (began_s := tuple(self._began_s.values())):
            return 0.0
        took_s = self._clock() - min(began_s)
        return took_s if took_s > max(STALL_S, STALL_TIMES * self._usual_s()) else 0.0

    async def beat(self) -> None:
        """Beat until cancelled. A missing beat shows that the event loop hangs."""
        try:
            while True:
                self.begin()
                await asyncio.sleep(LOOK_S)
        finally:
            self.rest()

    async def run(self, pool: Executor, act: Callable[[], Result]) -> Result:
        """Wait for a function that runs in a thread of a pool. Raises what it raises, and Stalled where a thread hangs.

        If the waiting is cancelled before the function has begun, it never begins.
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
    """Make a pool whose threads all run already; name: what theirs begin with. Each thread calls `begin` first.

    A pool of the standard library starts a thread with the first task that finds none idle. If there is no memory for
    it just then, the thread may end before it has said that it runs, and `Thread.start` waits for that for ever: so did
    the worker, and with it every client.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name, initializer=begin)
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
