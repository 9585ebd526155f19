"""How many threads torch takes: an executor that has its own leaves torch one, and a busy machine leaves it few."""

import math
import os
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager
from pathlib import Path

import torch

STAT = Path("/proc/stat")
CGROUP = Path("/sys/fs/cgroup")
LOOK_S = 0.5


@contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """Let torch take so many threads meanwhile; None: as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_cores() -> int:
    """Count the cores that other programs leave to this process, at least 1; looking takes half a second.

    torch's threads wait for one another in every layer, so that one that another program keeps from running keeps all
    of them: on a core that is shared two threads are several times slower than one.
    """
    cores = os.sched_getaffinity(0)
    # The load of the last minute still counts programs that have ended; a look of half a second also counts those that
    # run for a moment. So a core is busy only if both say so.
    of_last_minute = (os.cpu_count() or 1) - os.getloadavg()[0]
    free = max(of_last_minute, _idle_cores(cores))
    return max(1, min(round(free), len(cores), _quota()))


def _idle_cores(cores: Set[int]) -> float:
    """Look how many of these cores have nothing to do, with fractions; all of them where the system does not tell."""
    try:
        before, begun_s = _idle_s(cores), time.monotonic()
        time.sleep(LOOK_S)
        return (_idle_s(cores) - before) / (time.monotonic() - begun_s)
    except (OSError, ValueError, IndexError):
        return len(cores)


def _idle_s(cores: Set[int]) -> float:
    """Read how long these cores have been idle since the machine started, in all. Waiting for a disk is idle."""
    ticks = 0
    for line in STAT.read_text().splitlines():
        name, *fields = line.split()
        if name.startswith("cpu") and name != "cpu" and int(name[3:]) in cores:
            ticks += int(fields[3]) + int(fields[4])
    return ticks / os.sysconf("SC_CLK_TCK")


def _quota() -> int:
    """Read how many cores a container's limit on CPU time (cgroup v2) comes to, rounded up; no bound without one."""
    try:
        limit, period = (CGROUP / "cpu.max").read_text().split()
        return math.ceil(int(limit) / int(period))
    except (OSError, ValueError):  # "max" where there is no limit
        return os.cpu_count() or 1
