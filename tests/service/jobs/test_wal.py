"""Damage to the log of a killed server is told, and where it was cut or is gone; a torn end is no damage."""

import logging
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.service.fakes import make_spec
from tminus.service.jobs.store.records import JobRecord
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.jobs.store.wal import FRAME, HEADER, Cut, find_damage

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
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.jobs.store.records import JobRecord
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
    assert [record.id for record in store.claim().jobs] == NAMES
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
    left = {record.id for record in store.claim().jobs}
    assert NAMES[-1] not in left
    assert left | set(damage.job_ids) == set(NAMES), "each is there or in doubt"
    store.close()


def test_a_torn_last_transaction_is_no_damage(file: Path) -> None:
    wal = wal_of(file)
    flip(wal, wal.stat().st_size - 100)
    assert find_damage(wal) is None
    store = SqliteStore(file)
    assert [record.id for record in store.claim().jobs] == NAMES[:-1]
    store.close()


@pytest.mark.parametrize("cut", [1, FRAME, PAGE // 2, PAGE + FRAME + 1, "half"])
def test_a_log_that_ends_inside_a_frame_is_told_in_one_line(
    file: Path, cut: int | str, caplog: pytest.LogCaptureFixture
) -> None:
    wal = wal_of(file)
    data = wal.read_bytes()
    left = len(data) - cut if isinstance(cut, int) else HEADER + len(data) // (2 * (FRAME + PAGE)) * (FRAME + PAGE) + 99
    wal.write_bytes(data[:left])
    damage = find_damage(wal)
    assert isinstance(damage, Cut)
    assert (left - damage.ignored_bytes - HEADER) % (FRAME + PAGE) == 0
    store = SqliteStore(file)
    assert told(caplog) == [f"{wal} ends inside a frame: its last {damage.ignored_bytes} bytes are ignored"]
    assert [record.id for record in store.claim().jobs] == (NAMES[:-1] if isinstance(cut, int) else NAMES[:5])
    store.close()


@pytest.mark.parametrize("left", [None, 0, HEADER])
def test_a_log_that_is_gone_is_told_once(file: Path, left: int | None, caplog: pytest.LogCaptureFixture) -> None:
    wal = wal_of(file)
    wal.unlink() if left is None else wal.write_bytes(wal.read_bytes()[:left])
    store = SqliteStore(file)
    assert told(caplog) == [f"the last server left {wal}, and it is gone: jobs that were only in it are missing"]
    assert store.claim().jobs == []
    store.close()
    caplog.clear()
    SqliteStore(file).close()
    assert told(caplog) == []


def test_whenever_a_server_is_killed_no_log_is_said_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By copies of its folder between any two statements, as a kill would leave it, or a backup of a paused server."""
    monkeypatch.setattr(
        "tminus.service.jobs.store.sqlite_store.WAL_BYTES", 3 * (FRAME + PAGE)
    )  # begun anew with each job
    (tmp_path / "state").mkdir()
    store = SqliteStore(tmp_path / "state" / "jobs.sqlite3")
    copies = iter(range(1000))
    store._driver.set_trace_callback(lambda _: shutil.copytree(tmp_path / "state", tmp_path / str(next(copies))))
    for name in NAMES[:3]:
        store.add(JobRecord(name, make_spec(), 1))
    store.close()
    shutil.copytree(tmp_path / "state", tmp_path / str(next(copies)))
    for copy in (tmp_path / str(k) for k in range(next(copies))):
        again = SqliteStore(copy / "jobs.sqlite3")
        again.close()
    assert told(caplog) == []


def test_a_backup_that_was_checked_by_sqlite3_lacks_no_log(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As docs/operations.md has it: sqlite3 copies the log into the file, and deletes it."""
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert not wal_of(file).exists()
    store = SqliteStore(file)
    assert told(caplog) == []
    assert [record.id for record in store.claim().jobs] == NAMES
    store.close()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


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
