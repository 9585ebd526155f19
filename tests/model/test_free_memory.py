from pathlib import Path

import pytest

from tminus.model import free_memory
from tminus.model.free_memory import free_memory_bytes


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


def test_limit_of_a_container_counts_where_it_is_less(system: Path) -> None:
    cgroup(system, "6000", 5000, 100)
    assert free_memory_bytes() == 1100
    cgroup(system, "6000", 7000, 0)
    assert free_memory_bytes() == 0
    cgroup(system, "60000", 5000, 0)
    assert free_memory_bytes() == 8192


def test_system_that_does_not_tell_is_not_guessed(system: Path) -> None:
    (system / "meminfo").unlink()
    assert free_memory_bytes() is None
    cgroup(system, "6000", 5000, 0)
    assert free_memory_bytes() == 1000


def test_this_machine_tells() -> None:
    free = free_memory_bytes()
    assert free is not None
    assert free > 2**20
