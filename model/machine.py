"""Measure free memory and free CPU cores, and set torch's number of threads."""

import logging
import math
import os
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

import torch

log = logging.getLogger(__name__)

GIB = 2**30
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
STAT = Path("/proc/stat")
LOOK_S = 0.5
IDLE_LOAD = 0.3  # load average per core below which a machine counts as idle


def free_memory_bytes() -> int | None:
    """Return the free memory of the machine or the container, whichever has less; None if unknown."""
    known = [free for free in (_of_machine(), _of_cgroup()) if free is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _of_cgroup() -> int | None:
    """Return the free memory of the container (cgroup v2), or None if there is no known limit.

    The inactive file cache counts as free, because the kernel can drop it.
    """
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max" means no limit
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Set torch's number of threads inside the `with` block. None leaves it unchanged."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_left(usual: int) -> int:
    """Return the usual number of torch threads, reduced to the number of free cores.

    Logs a message if the number is reduced.
    """
    threads = min(usual, free_cores()) if usual > 1 else 1
    if threads < usual:
        log.info(
            "torch takes %d of its %d threads: other programs or a CPU limit leave no more; --threads sets it",
            threads, usual,
        )  # fmt: skip
    return threads


def free_cores() -> int:
    """Return how many cores other programs leave free, at least 1.

    The measurement takes half a second.

    torch's threads wait for each other in every layer, so one thread that shares its core with another program delays
    all of them. Two threads on a shared core are several times slower than a single thread.
    """
    cores = os.sched_getaffinity(0)
    # The load average still counts programs that have just ended. The half-second measurement counts programs that run
    # only for a moment. A core counts as busy only if both say so.
    of_last_minute = (os.cpu_count() or 1) - os.getloadavg()[0]
    free = max(of_last_minute, _idle_cores(cores))
    return max(1, min(round(free), len(cores), _quota()))


def is_idle() -> bool:
    """Return True if few programs have run in the last minute.

    After a crash the load of the dead server still counts, so a restart at once keeps its choice and its bits.
    """
    return os.getloadavg()[0] < IDLE_LOAD * (os.cpu_count() or 1)


class OtherPrograms:
    """Measures how much of the cores other programs use while its `with` blocks run."""

    def __init__(self) -> None:
        self._cores = os.sched_getaffinity(0)
        # Over all cores and blocks: the time that was idle or ours, and all time.
        self._known_s = self._passed_s = 0.0

    @contextmanager
    def measured(self) -> Iterator[None]:
        begun_s, before_s = time.monotonic(), self._not_theirs_s()
        yield
        passed_s, after_s = time.monotonic() - begun_s, self._not_theirs_s()
        if before_s is not None and after_s is not None:
            self._known_s += after_s - before_s
            self._passed_s += passed_s * len(self._cores)

    def _not_theirs_s(self) -> float | None:
        """Return the idle time of the cores plus this process's CPU time, in seconds; None if unknown."""
        try:
            return _idle_s(self._cores) + time.process_time()
        except (OSError, ValueError, IndexError):
            return None

    @property
    def share(self) -> float:
        """The share of the cores' time that other programs used, 0 to 1.

        0 if it is unknown, or if the blocks took less than LOOK_S seconds, because the kernel counts in steps of 10 ms.
        """
        if self._passed_s < LOOK_S * len(self._cores):
            return 0.0
        return min(1.0, max(0.0, 1 - self._known_s / self._passed_s))


def _idle_cores(cores: Set[int]) -> float:
    """Measure how many of these cores are idle on average.

    Returns the number of cores if the system does not report idle times.
    """
    try:
        before, begun_s = _idle_s(cores), time.monotonic()
        time.sleep(LOOK_S)
        return (_idle_s(cores) - before) / (time.monotonic() - begun_s)
    except (OSError, ValueError, IndexError):
        return len(cores)


def _idle_s(cores: Set[int]) -> float:
    """Return the total idle time of these cores since boot, in seconds. Waiting for a disk is idle time."""
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cores:
            ticks += int(fields[3]) + int(fields[4])
    return ticks / os.sysconf("SC_CLK_TCK")


def _quota() -> int:
    """Return the container's CPU limit (cgroup v2) in cores, rounded up.

    Without a limit, returns the machine's number of cores.
    """
    try:
        limit, period = (CGROUP / "cpu.max").read_text().split()
        return math.ceil(int(limit) / int(period))
    except (OSError, ValueError):  # "max" means no limit
        return os.cpu_count() or 1
