"""The store of durable jobs in a file: what is not of every store, as test_stores.py has it."""

import errno
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.service.jobs.kept import PIXELS, SPECS, ended, job, same, snapshot
from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import sqlite_file
from tminus.service.jobs.store.job_store import SWEEP_JOBS
from tminus.service.jobs.store.opening import open_store
from tminus.service.jobs.store.records import OUTCOMES, Key
from tminus.service.jobs.store.sqlite_file import VERSION
from tminus.service.jobs.store.sqlite_store import SPARE_BYTES, WAL_BYTES, SqliteStore

pytestmark = pytest.mark.slow


def sweep(store: SqliteStore, before_us: int, max_bytes: int) -> int:
    """Sweep to the end; how many went."""
    before = count(store)
    while store.sweep(before_us, max_bytes):
        pass
    return before - count(store)


def count(store: SqliteStore) -> int:
    return int(store._driver.execute("SELECT count(*) FROM jobs").fetchone()[0])


def in_the_file(file: Path, statement: str, *values: object) -> None:
    """Change what a store has kept behind its back."""
    with sqlite3.connect(file) as connection:
        assert connection.execute(statement, values).rowcount == 1
    connection.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "jobs.sqlite3"


@pytest.fixture
def open_file(file: Path) -> Iterator[Callable[[], SqliteStore]]:
    """Opens the file; what is open at the end is closed."""
    opened: list[SqliteStore] = []

    def make() -> SqliteStore:
        opened.append(SqliteStore(file))
        return opened[-1]

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(open_file: Callable[[], SqliteStore]) -> SqliteStore:
    return open_file()


# --- what goes ---


def test_a_great_many_go_a_few_at_a_time(store: SqliteStore) -> None:
    store._driver.execute(
        """INSERT INTO jobs (id, spec, created_us, outcome, finished_us, crashes, bytes)
        WITH RECURSIVE numbers (k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM numbers WHERE k < 260000)
        SELECT 'j' || k, '{}', k, 'failed', k, 0, 1024 FROM numbers"""
    )
    assert store.sweep(260_000 - 2 * SWEEP_JOBS, 1 << 40)
    assert count(store) == 260_000 - SWEEP_JOBS, "no more than that in one call"
    store._driver.execute("DELETE FROM jobs WHERE finished_us < 258000")
    assert sweep(store, 0, 1200 * 1024) == 801
    oldest = store._driver.execute("SELECT min(finished_us) FROM jobs").fetchone()
    assert oldest == (260_000 - 1200 + 1,)


def fill(store: SqliteStore, jobs: int) -> int:
    """Ended jobs of 3 MiB each; how much that is."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), dtype=np.uint8)
    for k in range(jobs):
        store.add(job(f"j{k}"))
        store.finish(ended(job(f"j{k}"), at_us=k), noise)
    return jobs * noise.nbytes


def on_the_disk(file: Path) -> int:
    return sum(each.stat().st_size for each in file.parent.iterdir())


@pytest.mark.parametrize("how", ["swept", "deleted"])
def test_the_disk_gets_the_room_back_when_jobs_go(store: SqliteStore, file: Path, how: str) -> None:
    full = fill(store, 12)
    assert on_the_disk(file) > full
    if how == "deleted":
        for k in range(11):
            assert store.delete(f"j{k}")
    calls = 1
    while store.sweep(11, 10**9):
        calls += 1
    assert calls > 3, "a slice in each"
    assert [record.id for record in store.page(None, OUTCOMES, 99)] == ["j11"]
    assert on_the_disk(file) < full / 12 + SPARE_BYTES + 2**21, "while it is open"
    store.close()
    assert on_the_disk(file) < full / 12 + 2**21


def test_a_wal_that_has_grown_is_cut(store: SqliteStore, file: Path) -> None:
    wal, noise = Path(f"{file}-wal"), np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), dtype=np.uint8)
    store.add(job("a"))
    store.finish(ended(job("a")), noise)
    assert wal.stat().st_size <= WAL_BYTES < noise.nbytes


def test_what_is_in_the_wal_is_in_the_file_soon_after_the_last_write(store: SqliteStore, file: Path) -> None:
    """By a copy of the file alone: what is in the WAL only, one bad byte may lose."""
    store.add(job("a"))
    for _ in range(2):  # the second finds it idle
        assert not store.sweep(0, 10**9)
    copy = file.with_name("copy.sqlite3")
    copy.write_bytes(file.read_bytes())
    alone = SqliteStore(copy)
    assert [record.id for record in alone.claim().jobs] == ["a"]
    alone.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_deleted_is_noticed_and_takes_no_more_jobs(
    store: SqliteStore, file: Path, replaced: bool
) -> None:
    store.add(job("a"))
    store.check(write=True)
    for each in file.parent.iterdir():
        each.unlink()
    if replaced:
        file.touch()
    with pytest.raises(StorageFailed, match=r"is gone: .* must be restarted"):
        store.check(write=False)
    with pytest.raises(StorageFailed, match="is gone"):
        store.add(job("b"))


# --- faults ---


def test_a_full_disk_refuses_and_keeps_what_was_accepted(file: Path, open_file: Callable[[], SqliteStore]) -> None:
    store = open_file()
    store.add(job("a"))
    pages = store._connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    store._connection.commit()
    store._connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")  # SQLite's own "disk is full"
    store._connection.commit()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(StorageFailed, match="full"):
        store.finish(ended(job("a")), noise)
    assert store.claim().jobs == [job("a")], "all of it, or nothing"
    with pytest.raises(StorageFailed, match="full"):
        [store.add(job(f"more {k}")) for k in range(1000)]
    store._connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    store._connection.commit()
    store.finish(ended(job("a")), noise)
    store.close()
    assert open_file().get("a") == ended(job("a"))


def test_a_second_server_is_kept_out(store: SqliteStore, file: Path) -> None:
    store.add(job("a"))
    other = (
        "from tminus.service.jobs.store.sqlite_store import SqliteStore\n"
        f"from pathlib import Path\nSqliteStore(Path({str(file)!r}))"
    )
    result = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "in use by another server; give this one a --state-dir of its own" in result.stderr
    assert store.get("a") == job("a")


def test_a_process_that_was_killed_leaves_what_it_had_committed(
    file: Path, open_file: Callable[[], SqliteStore]
) -> None:
    script = f"""
import os, signal
from pathlib import Path
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.jobs.store.records import JobRecord
from tests.service.fakes import make_spec
store = SqliteStore(Path({str(file)!r}))
for k in range(20):
    store.add(JobRecord(f"j{{k}}", make_spec(), k))
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", script], check=False)
    assert result.returncode == -9
    assert [record.id for record in open_file().claim().jobs] == [f"j{k}" for k in range(20)]


def header(file: Path, at: int, value: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(value.to_bytes(4, "big"))


def make_newer(file: Path) -> None:
    header(file, 60, VERSION + 1)


def make_foreign(file: Path) -> None:
    header(file, 68, 0x12345678)


def make_text(file: Path) -> None:
    file.write_text("these are no jobs\n" * 100)


def make_truncated(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def make_short(file: Path) -> None:
    os.truncate(file, 50)


def make_scrambled(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    file.write_bytes(data)


def make_somebody_elses(file: Path) -> None:
    file.unlink()
    with sqlite3.connect(file) as connection:
        connection.execute("CREATE TABLE cats (name TEXT)")
    connection.close()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (make_newer, f"is of version {VERSION + 1}, this tminus knows version {VERSION}"),
        (make_foreign, "a database of something else"),
        (make_text, "not a database"),
        (make_truncated, "damaged"),
        (make_short, "not a database, or is damaged"),
        (make_scrambled, "damaged"),
        (make_somebody_elses, "version 0"),
    ],
)
def test_a_file_that_cannot_be_used_gets_a_clear_line_and_is_left_as_it_is(
    open_file: Callable[[], SqliteStore], file: Path, spoil: Callable[[Path], None], words: str
) -> None:
    store = open_file()
    for k in range(50):
        store.add(job(f"j{k}", SPECS[1]))
    store.close()
    spoil(file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match="nothing was changed") as caught:
        open_file()
    assert words in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == before


def killed(file: Path, last_words: str = "") -> None:
    """Make a file of 400 jobs with 50 more in the WAL, by a process that does not come to its end."""
    script = f"""
import os, signal
from pathlib import Path
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.jobs.store.records import JobRecord
from tests.service.fakes import make_spec
store = SqliteStore(Path({str(file)!r}))
for k in range(400):
    store.add(JobRecord(f"j{{k}}", make_spec(), k))
store._driver.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
for k in range(50):
    store.add(JobRecord(f"more{{k}}", make_spec(), k))
{last_words}
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9


def damage_pages(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[4096 * 8 : 4096 * 20] = b"\xa5" * 4096 * 12
    file.write_bytes(data)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def lose(file: Path) -> None:
    file.unlink()


@pytest.mark.parametrize(
    ("last_words", "spoil", "words"),
    [
        ("", damage_pages, "damaged"),
        ("", empty, "it is empty, but jobs.sqlite3-wal is not"),
        ("", lose, "it is empty, but jobs.sqlite3-wal is not"),
        (f"store._driver.execute('PRAGMA user_version = {VERSION + 1}')", None, f"is of version {VERSION + 1}"),
    ],
    ids=["damaged", "empty", "lost", "newer"],
)
def test_what_a_killed_server_left_beside_a_file_that_is_refused_stays_too(
    file: Path, last_words: str, spoil: Callable[[Path], None] | None, words: str
) -> None:
    def found() -> dict[str, bytes]:
        return {each.name: each.read_bytes() for each in file.parent.iterdir()}

    killed(file, last_words)
    if spoil is not None:
        spoil(file)
    before = found()
    assert before["jobs.sqlite3-wal"]
    with pytest.raises(ValueError, match="nothing was changed") as caught:
        SqliteStore(file)
    assert words in str(caught.value)
    assert found() == before


def test_what_a_killed_server_left_is_taken_up(file: Path, open_file: Callable[[], SqliteStore]) -> None:
    killed(file)
    assert len(open_file().claim().jobs) == 450
    assert not Path(f"{file}-shm").exists()


def test_an_empty_file_is_a_start_that_was_cut_off(file: Path, open_file: Callable[[], SqliteStore]) -> None:
    file.touch()
    assert open_file().add(job("a"))


def test_a_first_start_that_was_cut_off_while_it_wrote_is_rolled_back(
    file: Path, open_file: Callable[[], SqliteStore]
) -> None:
    script = f"""
import os, signal, sqlite3
connection = sqlite3.connect({str(file)!r}, isolation_level=None)
for pragma in ("auto_vacuum = INCREMENTAL", "journal_mode = WAL", "journal_mode = DELETE", "cache_size = 1"):
    connection.execute(f"PRAGMA {{pragma}}").fetchall()
connection.execute("BEGIN")
connection.execute("CREATE TABLE t (x)")
for _ in range(100):
    connection.execute("INSERT INTO t VALUES (zeroblob(5000))")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert file.stat().st_size
    assert Path(f"{file}-journal").stat().st_size
    assert open_file().add(job("a"))


def test_a_file_so_large_that_the_check_takes_too_long_is_let_through(
    file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed(file)
    monkeypatch.setattr("tminus.service.jobs.store.sqlite_file.CHECK_S", -1.0)
    SqliteStore(file).close()
    assert "not all of it was checked for damage" in caplog.text


def test_only_its_user_may_read_the_file_whatever_its_folder_allows(file: Path) -> None:
    umask = os.umask(0)
    try:
        store = SqliteStore(file)
    finally:
        os.umask(umask)
    store.add(job("a"))
    assert {each.name: each.stat().st_mode & 0o777 for each in file.parent.iterdir()} == {
        "jobs.sqlite3": 0o600,
        "jobs.sqlite3-wal": 0o600,
    }
    store.close()


def test_a_file_whose_jobs_cannot_be_read_is_told_when_it_is_opened(file: Path) -> None:
    SqliteStore(file).close()
    connection = sqlite3.connect(file)
    connection.execute("DROP TABLE jobs")
    connection.close()
    with pytest.raises(ValueError, match=r"cannot be used .*no such table: jobs"):
        SqliteStore(file)


def test_a_folder_that_cannot_be_made_gets_a_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "state", Path("/proc/nowhere")):
        with pytest.raises(ValueError, match="no folder for durable jobs can be made") as caught:
            open_store(str(folder), "ab" * 32)
        assert str(folder) in str(caught.value)


def test_each_checkpoint_has_jobs_of_its_own_in_a_folder_for_nobody_else(tmp_path: Path) -> None:
    stores = [open_store(str(tmp_path / "state"), name * 32) for name in ("ab", "cd")]
    stores[0].add(job("a"))
    assert stores[1].get("a") is None
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
    for store in stores:
        store.close()


# --- what is written ---


def test_a_plain_spec_is_kept_as_it_always_was(file: Path) -> None:
    store = SqliteStore(file)
    store.add(job("a", SPECS[0]))
    store.close()
    with closing(sqlite3.connect(file)) as connection:
        (spec,) = connection.execute("SELECT spec FROM jobs").fetchone()
    assert not {"strength", "image_sha256", "mask_sha256"} & json.loads(spec).keys()


# --- what cannot be read ---


def test_an_unfinished_job_whose_text_is_not_utf_8_is_ended_and_the_others_go_on(
    file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(file)
    for name in "abc":
        store.add(job(name))
    store.close()
    in_the_file(file, "UPDATE jobs SET spec = CAST(? AS TEXT) WHERE id = 'b'", b"\xff\xfe")
    store = SqliteStore(file)
    assert [record.id for record in store.claim().jobs] == ["a", "c"]
    assert "the record of job b cannot be read" in caplog.text
    ending = store._driver.execute("SELECT outcome, finished_us > 0, problem FROM jobs WHERE id = 'b'").fetchone()
    assert ending[:2] == ("failed", 1)
    problem = json.loads(ending[2])
    assert (problem["code"], problem["detail"]) == ("storage_failed", "the record of job b cannot be read")
    assert store.delete("b")
    store.close()


def test_one_that_cannot_even_be_ended_is_passed_over(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StorageFailed("the job store cannot do it: the disk is full")

    store = SqliteStore(file)
    for name in "ab":
        store.add(job(name))
    store.close()
    in_the_file(file, "UPDATE jobs SET spec = '{}' WHERE id = 'a'")
    monkeypatch.setattr(SqliteStore, "_finish", refuse)
    store = SqliteStore(file)
    assert store.claim().jobs == [job("b")]
    store.close()


def test_a_folder_where_nothing_can_be_removed_is_no_reason_by_itself(
    file: Path, open_file: Callable[[], SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only folder lets no -shm be removed, which was not made either; the line is then SQLite's own."""

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    open_file().close()
    monkeypatch.setattr(Path, "unlink", refuse)
    assert open_file().claim().jobs == []


# --- upgrades ---


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A file that version 1 made: a job that is done, one that is not, and a snapshot of it."""
    file = tmp_path / "earlier.sqlite"
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript((Path(__file__).parent / "version_1.sql").read_text())
    return file


def test_a_file_of_an_earlier_version_is_brought_to_this_one(earlier: Path) -> None:
    done, left = "a" * 32, "b" * 32
    for _ in range(2):  # and stays so
        store = SqliteStore(earlier)
        record = store.get(done)
        assert record == ended(job(done), fingerprint="f")
        assert record.owner == ""
        assert np.array_equal(store.images(done), PIXELS)  # type: ignore[arg-type]
        assert store.find(Key("k", "h")) == (record, True)
        assert store.claim().jobs == [job(left, SPECS[1], 2)]
        assert same(store.snapshot(left, "build"), snapshot(3))
        store.close()
    store = SqliteStore(earlier)
    store.add(replace(job("c" * 32), owner="studio"))
    store.finish(ended(replace(job("c" * 32), owner="studio")))
    assert [record.id for record in store.page(None, OUTCOMES, 9, "studio")] == ["c" * 32]
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
    statements = (*sqlite_file.UPGRADES[1], "SELECT no_such_function()")
    monkeypatch.setattr(sqlite_file, "UPGRADES", {**sqlite_file.UPGRADES, 1: statements})
    with pytest.raises(ValueError, match="no such function"):
        SqliteStore(earlier)
    monkeypatch.undo()
    with closing(sqlite3.connect(earlier)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    store = SqliteStore(earlier)
    assert len(store.claim().jobs) == 1
    store.close()


def test_looking_for_jobs_that_were_left_makes_no_file_and_leaves_one_that_is_in_use(
    file: Path, open_file: Callable[[], SqliteStore]
) -> None:
    store = open_file()
    store.add(job("a"))
    beside = {each: each.stat().st_size for each in file.parent.iterdir()}
    assert sqlite_file.unended(file) == [], "a server has it"
    assert {each: each.stat().st_size for each in file.parent.iterdir()} == beside
    store.close()
    assert sqlite_file.unended(file) == ["a"]
    assert list(file.parent.iterdir()) == [file]
