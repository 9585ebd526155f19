"""How much memory this process may still take, on the host. No torch."""

from pathlib import Path

GIB = 2**30
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")


def free_memory_bytes() -> int | None:
    """What the machine has left, or a container's limit if that is less; None where the system does not tell."""
    known = [free for free in (_of_machine(), _of_cgroup()) if free is not None]
    return min(known, default=None)


def _of_machine() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _of_cgroup() -> int | None:
    """Of cgroup v2, in which containers run. Cached files count as free, as they are dropped when memory is short."""
    try:
        limit = int((CGROUP / "memory.max").read_text())  # "max" where there is no limit
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
