"""A file of durable jobs that is refused, damaged, or was left by a killed server; files of earlier versions."""

import logging
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.service.fakes import make_spec
from tests.service.jobs.kept import PIXELS, SPECS, ended, job, same, snapshot
from tminus.service.jobs.store import sqlite_file
from tminus.service.jobs.store.arrays import unpack_images
from tminus.service.jobs.store.records import OUTCOMES, JobRecord, Key
from tminus.service.jobs.store.sqlite_file import FRAME, HEADER, VERSION, kept
from tminus.service.jobs.store.sqlite_store import SqliteStore

pytestmark = pytest.mark.slow

PAGE = 4096
IN_FILE = [f"{k:032x}" for k in range(6)]
IN_WAL = [f"{k:032x}" for k in range(6, 18)]  # with these no more than are named in a message


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a killed server leaves: some jobs in its file, and the last ones in the WAL."""
    folder = tmp_path_factory.mktemp("state")
    store = SqliteStore(folder / "jobs.sqlite3")
    for name in IN_FILE:
        store.add(JobRecord(name, make_spec(), 1))
    store._driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    store._begin_wal()
    for name in IN_WAL:
        store.add(JobRecord(name, make_spec(), 1))
    copy = tmp_path_factory.mktemp("killed") / "state"
    shutil.copytree(folder, copy)
    store.close()
    return copy


@pytest.fixture
def file(killed: Path, tmp_path: Path) -> Path:
    shutil.copytree(killed, tmp_path / "state")
    return tmp_path / "state" / "jobs.sqlite3"


def wal_of(file: Path) -> Path:
    return file.with_name(f"{file.name}-wal")


def jobs_of(file: Path) -> list[str]:
    """Those that a server finds which opens the file."""
    with closing(SqliteStore(file)) as store:
        return [record.id for record in store.claim_all().jobs]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def found(folder: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in folder.iterdir()}


def test_what_a_killed_server_left_is_taken_up(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert jobs_of(file) == IN_FILE + IN_WAL
    assert not file.with_name(f"{file.name}-shm").exists()
    assert told(caplog) == []


# --- files that are refused ---


def header(at: int, value: int) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(value.to_bytes(4, "big"))

    return spoil


def truncate(size: int) -> Callable[[Path], None]:
    return lambda file: os.truncate(file, size)


def scramble(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[PAGE * 4 :] = b"\xa5" * (len(data) - PAGE * 4)
    file.write_bytes(data)


def make_somebody_elses(file: Path) -> None:
    for each in file.parent.iterdir():
        each.unlink()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE cats (name TEXT)")


def make_newer_in_the_wal(file: Path) -> None:
    copy = file.parent.parent / "copy"
    shutil.copytree(file.parent, copy)
    with closing(sqlite3.connect(copy / file.name)) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
        for each in copy.iterdir():
            shutil.copy(each, file.parent)
    file.with_name(f"{file.name}-shm").unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (header(60, VERSION + 1), f"is of version {VERSION + 1}, this tminus knows version {VERSION}"),
        (make_newer_in_the_wal, f"is of version {VERSION + 1}"),
        (header(68, 0x12345678), "the database of another program"),
        (lambda file: file.write_text("these are no jobs\n" * 100), "not a database"),
        (truncate(5 * PAGE), "damaged"),
        (truncate(50), "not a database, or is damaged"),
        (scramble, "damaged"),
        (make_somebody_elses, "version 0"),
        (truncate(0), "it is empty, but jobs.sqlite3-wal is not"),
        (Path.unlink, "it is empty, but jobs.sqlite3-wal is not"),
    ],
)
def test_a_file_that_cannot_be_used_gets_a_clear_line_and_all_is_left_as_it_is(
    file: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(file)
    before = found(file.parent)
    with pytest.raises(ValueError, match="nothing was changed") as caught:
        SqliteStore(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert found(file.parent) == before


def test_of_two_servers_the_second_is_kept_out(file: Path) -> None:
    script = f"""
import sqlite3
connection = sqlite3.connect({str(file)!r}, timeout=0, isolation_level=None)
connection.execute("PRAGMA locking_mode = EXCLUSIVE").fetchall()
connection.execute("BEGIN IMMEDIATE")
print("has it", flush=True)
input()
"""
    ask = [sys.executable, "-c", script]
    with subprocess.Popen(ask, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"has it\n"
        with pytest.raises(ValueError, match="in use by another server; give this one a --state-dir of its own"):
            SqliteStore(file)
        other.communicate(b"\n")
    with closing(SqliteStore(file)):
        assert "database is locked" in subprocess.run(ask, capture_output=True, text=True, check=False).stderr


def test_a_file_whose_jobs_cannot_be_read_is_told_when_it_is_opened(file: Path) -> None:
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("DROP TABLE jobs")
    with pytest.raises(ValueError, match=r"cannot be used .*no such table: jobs"):
        SqliteStore(file)


def test_a_file_so_large_that_the_check_takes_too_long_is_let_through(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(sqlite3.connect(file)) as connection, connection:
        connection.execute(
            """INSERT INTO jobs (id, spec, created_us, outcome, finished_us, crashes, bytes)
            WITH RECURSIVE numbers (k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM numbers WHERE k < 1000)
            SELECT 'j' || k, '{}', k, 'failed', k, 0, 1024 FROM numbers"""
        )
    monkeypatch.setattr(sqlite_file, "CHECK_S", -1.0)
    assert jobs_of(file) == IN_FILE + IN_WAL
    assert "not all of it was checked for damage" in caplog.text


# --- first starts that were cut off ---


def test_an_empty_file_is_a_start_that_was_cut_off(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite3").touch()
    assert jobs_of(tmp_path / "jobs.sqlite3") == []


def test_a_first_start_that_was_cut_off_while_it_wrote_is_rolled_back(tmp_path: Path) -> None:
    script = """
import os, signal, sqlite3
connection = sqlite3.connect("jobs.sqlite3", isolation_level=None)
for pragma in ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "journal_mode = DELETE", "cache_size = 1"):
    connection.execute(f"PRAGMA {pragma}").fetchall()
connection.execute("BEGIN")
connection.execute("CREATE TABLE t (x)")
for _ in range(100):
    connection.execute("INSERT INTO t VALUES (zeroblob(5000))")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=False).returncode == -9
    assert all((tmp_path / name).stat().st_size for name in ("jobs.sqlite3", "jobs.sqlite3-journal"))
    assert jobs_of(tmp_path / "jobs.sqlite3") == []


# --- damage to the WAL that a killed server has left: SQLite ignores all from a bad frame on ---


def flip(wal: Path, at: int) -> None:
    data = bytearray(wal.read_bytes())
    data[at] ^= 1
    wal.write_bytes(data)


IN_A_FRAME = [
    HEADER + frame * (FRAME + PAGE) + at
    for frame in (4, 8)
    for at in (7, 9, 13, 18, FRAME + 100)  # size, both salts, checksum, page
]


@pytest.mark.parametrize("at", [0, 3, 5, 10, 15, 17, 21, 25, 31, *IN_A_FRAME])
def test_one_damaged_byte_is_told_with_the_jobs_in_doubt_and_what_to_do(file: Path, at: int) -> None:
    flip(wal_of(file), at)
    before = found(file.parent)
    with pytest.raises(ValueError, match=r"is damaged: \d+ transactions cannot be read") as caught:
        SqliteStore(file)
    assert found(file.parent) == before, "nothing was changed"
    in_doubt = str(caught.value).partition("Jobs in doubt: ")[2].partition(".")[0].split(", ")
    assert IN_WAL[-1] in in_doubt
    subprocess.run(f"truncate {str(caught.value).rpartition('truncate ')[2]}", shell=True, check=True)
    left = jobs_of(file)
    assert IN_WAL[-1] not in left
    assert {*left, *in_doubt} >= {*IN_FILE, *IN_WAL}, "each is there or in doubt"


def test_a_torn_last_transaction_is_no_damage(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept(file).write_text(str(len(IN_FILE + IN_WAL) - 1))  # its job was not accepted
    flip(wal_of(file), wal_of(file).stat().st_size - 100)
    assert jobs_of(file) == IN_FILE + IN_WAL[:-1]
    assert told(caplog) == []


@pytest.mark.parametrize("cut", [1, FRAME, PAGE + FRAME + 1])
def test_a_log_that_ends_inside_a_frame_is_told_in_one_line(
    file: Path, cut: int, caplog: pytest.LogCaptureFixture
) -> None:
    wal = wal_of(file)
    os.truncate(wal, wal.stat().st_size - cut)
    left = jobs_of(file)
    (line,) = told(caplog)
    assert line.startswith(f"{wal} ends inside a frame: its last ")
    assert line.endswith(lacking(file, len(IN_FILE + IN_WAL) - len(left)))
    assert left == (IN_FILE + IN_WAL)[: len(left)]
    assert len(IN_FILE) < len(left) < len(IN_FILE + IN_WAL)


def lacking(file: Path, count: int) -> str:
    return f"{file} lacks jobs that were accepted, the last {count}"


def test_a_log_that_is_cut_between_two_frames_is_told_once_with_the_number_of_jobs_that_were_lost(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frames = (wal_of(file).stat().st_size - HEADER) // (FRAME + PAGE)
    for left in (1, frames // 2, frames - 1):
        copy = tmp_path / str(left) / file.name
        shutil.copytree(file.parent, copy.parent)
        os.truncate(wal_of(copy), HEADER + left * (FRAME + PAGE))
        lost = len(IN_FILE + IN_WAL) - len(jobs_of(copy))
        assert lost > 0
        assert told(caplog) == [lacking(copy, lost)]
        caplog.clear()
        SqliteStore(copy).close()
        assert told(caplog) == []


def test_a_file_that_is_gone_with_its_log_is_told_once(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    for each in file.parent.glob("jobs*"):
        each.unlink()
    assert jobs_of(file) == []
    assert told(caplog) == [lacking(file, len(IN_FILE + IN_WAL))]
    caplog.clear()
    SqliteStore(file).close()
    assert told(caplog) == []


def test_a_file_that_is_moved_away_after_a_server_has_ended_well_lacks_nothing(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    SqliteStore(file).close()
    file.unlink()
    assert jobs_of(file) == []
    assert told(caplog) == []


@pytest.mark.parametrize("left", [None, 0, HEADER])
def test_a_log_that_is_gone_is_told_once(file: Path, left: int | None, caplog: pytest.LogCaptureFixture) -> None:
    wal = wal_of(file)
    wal.unlink() if left is None else os.truncate(wal, left)
    assert jobs_of(file) == IN_FILE
    gone = f"the last server left {wal}, and it is gone: jobs that were only in it are missing"
    assert told(caplog) == [f"{gone}; {lacking(file, len(IN_WAL))}"]
    caplog.clear()
    SqliteStore(file).close()
    assert told(caplog) == []


def test_whenever_a_server_is_killed_no_log_is_said_to_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By copies of its folder between any two statements, as a kill would leave it, or a backup of a paused server."""
    # Begun anew with each job.
    monkeypatch.setattr("tminus.service.jobs.store.sqlite_store.WAL_BYTES", 3 * (FRAME + PAGE))
    (tmp_path / "state").mkdir()
    store = SqliteStore(tmp_path / "state" / "jobs.sqlite3")
    copies = iter(range(1000))
    store._driver.set_trace_callback(lambda _: shutil.copytree(tmp_path / "state", tmp_path / str(next(copies))))
    for name in IN_WAL[:3]:
        store.add(JobRecord(name, make_spec(), 1))
    store.close()
    shutil.copytree(tmp_path / "state", tmp_path / str(next(copies)))
    for copy in (tmp_path / str(k) for k in range(next(copies))):
        SqliteStore(copy / "jobs.sqlite3").close()
    assert told(caplog) == []


def test_a_backup_that_was_checked_by_sqlite3_lacks_no_log(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As docs/operations.md has it: sqlite3 copies the log into the file, and deletes it."""
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert not wal_of(file).exists()
    assert jobs_of(file) == IN_FILE + IN_WAL
    assert told(caplog) == []


def test_frames_that_an_earlier_log_has_left_are_no_damage(
    file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(RESTART)")
        for crashes in (1, 2):
            with connection:
                connection.execute(f"UPDATE jobs SET crashes = {crashes} WHERE id = '{IN_FILE[0]}'")
        shutil.copytree(file.parent, copy)
    data = wal_of(copy / file.name).read_bytes()
    salts = {data[at + 8 : at + 16] for at in range(HEADER, len(data) - FRAME - PAGE + 1, FRAME + PAGE)}
    assert len(salts) == 2
    assert jobs_of(copy / file.name) == IN_FILE + IN_WAL
    assert told(caplog) == []


# --- upgrades ---


@pytest.fixture(params=range(1, VERSION))
def earlier(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A file of an earlier version, that version 1 made: a job that is done, one that is not, and a snapshot of it."""
    file = tmp_path / "earlier.sqlite"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript((Path(__file__).parent / "version_1.sql").read_text())
        for version in range(1, request.param):
            connection.executescript(";".join(sqlite_file.UPGRADES[version]))
        connection.execute(f"PRAGMA user_version = {request.param}")
    return file


def test_a_file_of_an_earlier_version_is_brought_to_this_one(earlier: Path) -> None:
    done, left = "a" * 32, "b" * 32
    for _ in range(2):  # and stays so
        store = SqliteStore(earlier)
        record = store.get(done)
        assert record == ended(job(done), fingerprint="f")
        images = store.images(done)
        assert isinstance(images, bytes)
        assert np.array_equal(unpack_images(images), PIXELS)
        assert store.find(Key("k", "h")) == (record, True)
        assert store.claim_all().jobs == [job(left, SPECS[1], 2)]
        assert same(store.snapshot(left, "build"), snapshot(3))
        assert [record.id for record in store.page(None, OUTCOMES, 9, "")] == [done]
        store.close()


def test_it_then_has_the_tables_of_a_new_file(earlier: Path, tmp_path: Path) -> None:
    found = []
    for file in (earlier, tmp_path / "new.sqlite"):
        SqliteStore(file).close()
        with closing(sqlite3.connect(file)) as connection:
            tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            columns = {table: connection.execute(f"PRAGMA table_info({table})").fetchall() for table in tables}
            indices = connection.execute("SELECT name FROM sqlite_master WHERE type = 'index'").fetchall()
            version = connection.execute("PRAGMA user_version").fetchone()
        # By name: what was added later stands last.
        found.append(({table: sorted(row[1:] for row in rows) for table, rows in columns.items()}, {*indices}, version))
    assert found[0] == found[1]


def test_an_upgrade_that_is_cut_off_has_not_happened(earlier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tables() -> list[tuple[object, ...]]:
        with closing(sqlite3.connect(earlier)) as connection:
            tables = connection.execute("SELECT sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
            return [*tables, connection.execute("PRAGMA user_version").fetchone()]

    before, last = tables(), VERSION - 1
    statements = (*sqlite_file.UPGRADES[last], "SELECT no_such_function()")
    monkeypatch.setattr(sqlite_file, "UPGRADES", {**sqlite_file.UPGRADES, last: statements})
    with pytest.raises(ValueError, match="no such function"):
        SqliteStore(earlier)
    monkeypatch.undo()
    assert tables() == before
    assert len(jobs_of(earlier)) == 1
