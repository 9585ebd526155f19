"""Damage to the log of a killed server is told, and a torn last transaction is none."""

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tminus.service.jobs.sqlite_store import SqliteStore
from tminus.service.jobs.wal import FRAME, HEADER, find_damage

JOBS = 12
PAGE = 4096
NAMES = [f"{k:032x}" for k in range(JOBS)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a killed server leaves that had accepted some jobs: all of them in the WAL."""
    folder = tmp_path_factory.mktemp("killed")
    script = f"""
import os, signal
from pathlib import Path
from tminus.service.jobs.sqlite_store import SqliteStore
from tminus.service.jobs.store import JobRecord
from tests.service.fakes import make_spec
store = SqliteStore(Path({str(folder / "jobs.sqlite3")!r}))
for k in range({JOBS}):
    store.add(JobRecord(f"{{k:032x}}", make_spec(), k))
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script], check=False)
    return folder


@pytest.fixture
def file(killed: Path, tmp_path: Path) -> Path:
    shutil.copytree(killed, tmp_path / "state")
    return tmp_path / "state" / "jobs.sqlite3"


def wal_of(file: Path) -> Path:
    return file.with_name(f"{file.name}-wal")


def flip(wal: Path, at: int) -> None:
    data = bytearray(wal.read_bytes())
    data[at] ^= 1
    wal.write_bytes(data)


def test_a_sound_log_has_no_damage_and_gives_all_jobs(file: Path) -> None:
    assert find_damage(wal_of(file)) is None
    store = SqliteStore(file)
    assert [record.id for record in store.claim()] == NAMES
    store.close()


@pytest.mark.parametrize("part", [0.3, 0.6])
@pytest.mark.parametrize("offset", [7, 9, 13, 18, FRAME + 100], ids=["size", "salt 1", "salt 2", "checksum", "page"])
def test_one_damaged_byte_is_told_with_the_jobs_in_doubt_and_what_to_do(file: Path, part: float, offset: int) -> None:
    frames = (wal_of(file).stat().st_size - HEADER) // (FRAME + PAGE)
    told_and_mended(file, HEADER + int(part * frames) * (FRAME + PAGE) + offset)


@pytest.mark.parametrize("offset", [0, 3, 5, 10, 15, 17, 21, 25, 31])
def test_so_is_one_in_the_header(file: Path, offset: int) -> None:
    told_and_mended(file, offset)


def told_and_mended(file: Path, damaged_at: int) -> None:
    wal = wal_of(file)
    flip(wal, damaged_at)
    before = wal.read_bytes()
    with pytest.raises(ValueError, match="is damaged: ") as caught:
        SqliteStore(file)
    assert wal.read_bytes() == before, "nothing was changed"
    damage = find_damage(wal)
    assert damage is not None
    assert damage.transactions >= 2
    assert NAMES[-1] in damage.job_ids
    subprocess.run(f"truncate {str(caught.value).rpartition('truncate ')[2]}", shell=True, check=True)
    store = SqliteStore(file)
    left = {record.id for record in store.claim()}
    assert NAMES[-1] not in left
    assert left | set(damage.job_ids) == set(NAMES), "each is there or in doubt"
    store.close()


def test_a_torn_last_transaction_is_no_damage(file: Path) -> None:
    wal = wal_of(file)
    data = wal.read_bytes()
    for cut in (1, FRAME, PAGE // 2, PAGE + FRAME + 1):
        wal.write_bytes(data[:-cut])
        assert find_damage(wal) is None
    wal.write_bytes(data)
    flip(wal, len(data) - 100)
    assert find_damage(wal) is None
    store = SqliteStore(file)
    assert [record.id for record in store.claim()] == NAMES[:-1]
    store.close()


def test_frames_that_an_earlier_log_has_left_are_no_damage(file: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(RESTART)")
        for crashes in (1, 2):
            with connection:
                connection.execute(f"UPDATE jobs SET crashes = {crashes}")
        shutil.copy(wal_of(file), tmp_path / "wal")
    data = (tmp_path / "wal").read_bytes()
    salts = {data[at + 8 : at + 16] for at in range(HEADER, len(data) - FRAME - PAGE + 1, FRAME + PAGE)}
    assert len(salts) == 2
    assert find_damage(tmp_path / "wal") is None


def test_what_is_no_log_is_left_to_sqlite(tmp_path: Path) -> None:
    for data in (b"", b"x" * 31, b"x" * 10_000, bytes(10_000), bytes(1_000_000)):
        (tmp_path / "wal").write_bytes(data)
        assert find_damage(tmp_path / "wal") is None
