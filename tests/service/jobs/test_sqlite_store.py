"""The store of durable jobs in a file: what is not of every store, as test_stores.py has it."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from tests.service.conftest import MakeSite, problem
from tests.service.durable import SPEC, post, wait_for
from tests.service.jobs.conftest import FileShelf
from tests.service.jobs.kept import SPECS, ended, job
from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import sqlite_file
from tminus.service.jobs.store.job_store import SWEEP_JOBS
from tminus.service.jobs.store.records import OUTCOMES
from tminus.service.jobs.store.sqlite_store import SPARE_BYTES, WAL_BYTES, SqliteStore, open_store

pytestmark = pytest.mark.slow


@pytest.fixture
def store(file: FileShelf) -> SqliteStore:
    return file.open()


# --- what goes ---


def test_a_great_many_go_a_few_at_a_time(file: FileShelf) -> None:
    file.open().close()
    insert = """INSERT INTO jobs (id, spec, created_us, outcome, finished_us, crashes, bytes)
        WITH RECURSIVE numbers (k) AS (SELECT 1 UNION ALL SELECT k + 1 FROM numbers WHERE k < 2000)
        SELECT 'j' || k, :spec, k, 'failed', k, 0, 1024 FROM numbers"""
    file.change(insert, spec=json.dumps(SPECS[0].to_json()))
    store = file.open()

    def left() -> list[int | None]:
        return [record.finished_us for record in store.page(None, OUTCOMES, 9999)]

    assert store.sweep(2 * SWEEP_JOBS, 1 << 40)
    assert len(left()) == 2000 - SWEEP_JOBS, "no more than that in one call"
    while store.sweep(0, 700 * 1024):
        pass
    assert left() == [*range(2000, 1300, -1)]


def fill(store: SqliteStore, jobs: int) -> int:
    """Ended jobs of 3 MiB each; how much that is."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 128, 128, 3), dtype=np.uint8)
    for k in range(jobs):
        store.add(job(f"j{k}"))
        store.finish(ended(job(f"j{k}"), at_us=k), noise)
    return jobs * noise.nbytes


def on_the_disk(file: FileShelf) -> int:
    return sum(each.stat().st_size for each in file.path.parent.iterdir())


def test_the_disk_gets_the_room_back_when_jobs_go(store: SqliteStore, file: FileShelf) -> None:
    full = fill(store, 6)
    assert on_the_disk(file) > full
    for k in range(2):
        assert store.delete(f"j{k}")
    calls = 1
    while store.sweep(5, 10**9):
        calls += 1
    assert calls > 3, "a slice in each"
    assert [record.id for record in store.page(None, OUTCOMES, 99)] == ["j5"]
    assert on_the_disk(file) < full / 6 + SPARE_BYTES + 2**21, "while it is open"
    store.close()
    assert on_the_disk(file) < full / 6 + 2**21


def test_a_wal_that_has_grown_is_cut(store: SqliteStore, file: FileShelf) -> None:
    wal, noise = Path(f"{file.path}-wal"), np.random.default_rng(0).integers(0, 256, (64, 160, 160, 3), dtype=np.uint8)
    store.add(job("a"))
    store.finish(ended(job("a")), noise)
    assert wal.stat().st_size <= WAL_BYTES < noise.nbytes


def test_what_is_in_the_wal_is_in_the_file_soon_after_the_last_write(store: SqliteStore, file: FileShelf) -> None:
    """By a copy of the file alone: what is in the WAL only, one bad byte may lose."""
    store.add(job("a"))
    for _ in range(2):  # the second finds it idle
        assert not store.sweep(0, 10**9)
    copy = file.path.with_name("copy.sqlite3")
    copy.write_bytes(file.path.read_bytes())
    with closing(SqliteStore(copy)) as alone:
        assert [record.id for record in alone.claim_all().jobs] == ["a"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_deleted_is_noticed_and_takes_no_more_jobs(
    store: SqliteStore, file: FileShelf, replaced: bool
) -> None:
    store.add(job("a"))
    store.check(write=True)
    for each in file.path.parent.iterdir():
        each.unlink()
    if replaced:
        file.path.touch()
    with pytest.raises(StorageFailed, match=r"is gone: .* must be restarted"):
        store.check(write=False)
    with pytest.raises(StorageFailed, match="is gone"):
        store.add(job("b"))


# --- faults ---


def test_a_full_disk_refuses_and_keeps_what_was_accepted(store: SqliteStore, file: FileShelf) -> None:
    store.add(job("a"))
    pages = store._connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    store._connection.commit()
    store._connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")  # SQLite's own "disk is full"
    store._connection.commit()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(StorageFailed, match="full"):
        store.finish(ended(job("a")), noise)
    assert store.claim_all().jobs == [job("a")], "all of it, or nothing"
    with pytest.raises(StorageFailed, match="full"):
        [store.add(job(f"more {k}")) for k in range(1000)]
    store._connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    store._connection.commit()
    store.finish(ended(job("a")), noise)
    store.close()
    assert file.open().get("a") == ended(job("a"))


def test_only_its_user_may_read_the_file_whatever_its_folder_allows(file: FileShelf) -> None:
    umask = os.umask(0)
    try:
        store = file.open()
    finally:
        os.umask(umask)
    store.add(job("a"))
    assert {each.name: each.stat().st_mode & 0o777 for each in file.path.parent.iterdir()} == {
        "jobs.sqlite3": 0o600,
        "jobs.sqlite3-wal": 0o600,
        "kept-jobs": 0o600,
    }


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


# --- what cannot be read ---


def test_an_unfinished_job_whose_text_is_not_utf_8_is_ended_and_the_others_go_on(
    store: SqliteStore, file: FileShelf, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abc":
        store.add(job(name))
    store.close()
    assert file.change("UPDATE jobs SET spec = CAST(:spec AS TEXT) WHERE id = 'b'", spec=b"\xff\xfe") == 1
    assert [record.id for record in file.open().claim_all().jobs] == ["a", "c"]
    assert "the record of job b cannot be read" in caplog.text


def test_a_folder_where_nothing_can_be_removed_is_no_reason_by_itself(
    file: FileShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only folder lets no -shm be removed, which was not made either; the line is then SQLite's own."""

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    file.open().close()
    monkeypatch.setattr(Path, "unlink", refuse)
    assert file.open().claim_all().jobs == []


def test_looking_for_jobs_that_were_left_makes_no_file_and_leaves_one_that_is_in_use(
    store: SqliteStore, file: FileShelf
) -> None:
    store.add(job("a"))
    beside = {each: each.stat().st_size for each in file.path.parent.iterdir()}
    assert sqlite_file.unended(file.path) == [], "a server has it"
    assert {each: each.stat().st_size for each in file.path.parent.iterdir()} == beside
    store.close()
    assert sqlite_file.unended(file.path) == ["a"]
    assert list(file.path.parent.iterdir()) == [file.path]


# --- a start on a full disk serves all but durable jobs, and those as soon as there is room ---


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte, where the test may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.system(f"mount -t tmpfs -o size=1m tmpfs {folder} 2> /dev/null"):
        pytest.skip("needs the right to mount a disk")
    yield folder
    os.system(f"umount {folder}")


def fill_disk(folder: Path) -> Path:
    """Leave no byte free."""
    with (folder / "filler").open("wb") as filler:
        size = 2**16
        while size:
            try:
                os.write(filler.fileno(), bytes(size))
            except OSError:
                size //= 2
    return folder / "filler"


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """As of a full disk, for machines where none can be mounted. Called, it makes room."""

    def refuse(file: Path) -> None:
        raise sqlite_file.cannot_be_used(file, OSError(28, "No space left on device"))

    monkeypatch.setattr("tminus.service.jobs.store.sqlite_store.prepare", refuse)
    return lambda: monkeypatch.setattr("tminus.service.jobs.store.sqlite_store.prepare", sqlite_file.prepare)


@pytest.mark.parametrize("had_jobs", [False, True])
def test_a_full_disk_does_not_stop_a_start_and_is_tried_again(small_disk: Path, had_jobs: bool) -> None:
    if had_jobs:
        store = open_store(str(small_disk), "ab" * 32)
        store.add(job("old"))
        store.close()
    filler = fill_disk(small_disk)
    store = open_store(str(small_disk), "ab" * 32)
    with pytest.raises(StorageFailed):
        store.add(job("a"))
    filler.unlink()
    assert store.add(job("a"))
    assert [record.id for record in store.claim_all().jobs] == ["old", "a"][not had_jobs :]
    store.close()


def test_a_server_that_starts_on_a_full_disk_takes_durable_jobs_as_soon_as_there_is_room(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: Callable[[], None]
) -> None:
    monkeypatch.setattr("tminus.service.jobs.retention.RETRY_S", 0.05)
    site = make_site(state_file=lambda weights_hash: open_store(str(tmp_path), weights_hash))
    problem(site.client.post("/jobs", json=SPEC), 507, "storage_failed")
    assert site.post(json=SPEC).status_code == 200
    full()
    assert wait_for(site, post(site).json()["id"])["state"] == "done"
