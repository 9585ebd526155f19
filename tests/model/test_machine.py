import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tminus.model import machine as free_memory
from tminus.model import machine as threads
from tminus.model.machine import OtherPrograms, free_cores, free_memory_bytes

Machine = Callable[..., None]


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8 KiB free, which has no cgroup yet."""
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:  8 kB\n")
    monkeypatch.setattr(free_memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(free_memory, "CGROUP", tmp_path / "cgroup")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def cgroup(system: Path, limit: str, used: int, cached: int) -> None:
    (system / "cgroup" / "memory.max").write_text(f"{limit}\n")
    (system / "cgroup" / "memory.current").write_text(f"{used}\n")
    (system / "cgroup" / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")


def test_machine_without_limits_has_what_the_kernel_says(system: Path) -> None:
    assert free_memory_bytes() == 8192
    cgroup(system, "max", 5000, 10)
    assert free_memory_bytes() == 8192


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of 8 cores, all for this process, as the kernel would tell of it."""
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    monkeypatch.setattr(threads, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)

    def make(*, load: float, busy: float, cores: int = 8, quota: str = "max 100000") -> None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
        clock = [0.0]

        def tick(seconds: float) -> None:
            clock[0] += seconds
            idle = 100 * clock[0] * (1 - busy / 8)
            lines = [f"cpu{core} 5 5 5 {idle:.0f} 0 9 9 9 9 9" for core in range(8)]
            (tmp_path / "stat").write_text("\n".join(["cpu 1 2 3 4 5 6 7 8 9 10", *lines, "intr 5 6"]))

        tick(0.0)
        monkeypatch.setattr(time, "sleep", tick)
        monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    return make


@pytest.mark.parametrize(
    ("load", "busy", "free"),
    [(0.1, 0, 8), (3.0, 3, 5), (8.0, 8, 1), (40.0, 8, 1), (8.0, 0, 8), (0.1, 8, 8), (7.0, 4, 4)],
    ids=["idle", "some", "full", "overfull", "was busy until now", "busy for a moment", "less busy than it was"],
)
def test_cores_are_free_unless_they_are_busy_now_and_have_been_for_a_minute(
    machine: Machine, load: float, busy: float, free: int
) -> None:
    machine(load=load, busy=busy)
    assert free_cores() == free


def test_a_system_that_does_not_tell_is_taken_for_idle(machine: Machine, tmp_path: Path) -> None:
    machine(load=40.0, busy=8)
    for file in ("stat", "cpu.max"):
        (tmp_path / file).unlink()
    assert free_cores() == 8


def test_time_that_is_neither_idle_nor_ours_is_that_of_other_programs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight cores of which five are busy, one with us."""
    machine(load=5.0, busy=5)
    monkeypatch.setattr(time, "process_time", time.monotonic)
    others = OtherPrograms()
    for _ in range(4):
        with others.measured():
            time.sleep(0.1)
        time.sleep(3)  # does not count
    assert others.share == 0, "too little to tell"
    with others.measured():
        time.sleep(2)
    assert others.share == pytest.approx(4 / 8, abs=0.01)


def test_programs_that_compute_beside_us_are_noticed() -> None:
    """By the kernel of this machine."""
    others = OtherPrograms()
    spinning = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(len(os.sched_getaffinity(0)))
    ]
    try:
        with others.measured():
            time.sleep(1.5)
    finally:
        for process in spinning:
            process.kill()
            process.wait()
    assert others.share > 0.7
