"""Pools of threads that are there before they are needed."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier


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
