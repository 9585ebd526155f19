"""The store of durable jobs, on real files."""

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
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.service.fakes import make_spec
from tminus.service.errors import StorageFailed
from tminus.service.jobs import arrays, sqlite_file
from tminus.service.jobs.opening import open_store
from tminus.service.jobs.sqlite_file import VERSION
from tminus.service.jobs.sqlite_store import RECORD_BYTES, SWEEP_JOBS, WAL_BYTES, SqliteStore
from tminus.service.jobs.store import OUTCOMES, JobRecord, Key, Outcome
from tminus.service.spec import Inputs, SampleSpec, Snapshot

pytestmark = pytest.mark.slow

PIXELS = np.arange(2 * 4 * 6, dtype=np.uint8).reshape(2, 4, 6, 1)
SPECS = [
    make_spec(),
    make_spec(
        n=3, class_labels=(0, None, 2), guidance=2.5, guidance_interval=(10, 900), seed=2**64 - 1, index=2**32 - 3
    ),
    make_spec(class_labels=None, sampler="ddim", eta=0.1 + 0.2, clip=False),
]


def job(name: str, spec: SampleSpec = SPECS[0], created_us: int = 1) -> JobRecord:
    return JobRecord(name, spec, created_us)


def ended(record: JobRecord, outcome: Outcome = "done", at_us: int = 2, **fields: object) -> JobRecord:
    return replace(record, outcome=outcome, finished_us=at_us, **fields)  # type: ignore[arg-type]


def snapshot(n: int = 2, seed: int = 0) -> Snapshot:
    x, x0 = np.random.default_rng(seed).normal(size=(2, n, 1, 4, 6)).astype(np.float32)
    registers = np.random.default_rng(seed + 1).normal(size=(n, 2, 1, 4, 6)).astype(np.float32)
    return Snapshot(tuple(range(n)), x, x0, registers)


def same(a: Snapshot | None, b: Snapshot) -> bool:
    return (
        a is not None
        and a.steps == b.steps
        and all(
            one.dtype == other.dtype and one.tobytes() == other.tobytes()
            for one, other in ((a.x, b.x), (a.x0_previous, b.x0_previous), (a.registers, b.registers))
        )
    )


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


# --- what is kept ---


@pytest.mark.parametrize("spec", SPECS)
def test_a_job_comes_back_as_it_was(open_file: Callable[[], SqliteStore], spec: SampleSpec) -> None:
    store, record = open_file(), replace(job("a", spec, 123_456_789_012_345), deadline_us=2**60)
    assert store.add(record)
    assert (store.get("a"), store.unfinished(), store.get("b")) == (record, [record], None)
    store.close()
    assert open_file().get("a") == record, "another process reads the same"


def test_the_end_of_a_job_is_kept_with_its_images_and_takes_its_snapshot_away(store: SqliteStore) -> None:
    record = job("a")
    store.add(record)
    store.save({"a": snapshot()}, "build")
    done = ended(record, fingerprint="build")
    store.finish(done, PIXELS)
    assert store.get("a") == done
    images = store.images("a")
    assert images is not None
    np.testing.assert_array_equal(images, PIXELS)
    assert store.snapshot("a", "build") is None
    assert store.unfinished() == []


def test_a_failed_job_keeps_why(store: SqliteStore) -> None:
    store.add(job("a"))
    failed = ended(job("a"), "failed", problem={"code": "not_finite", "status": 500})
    store.finish(failed)
    assert store.get("a") == failed
    assert store.images("a") is None


def test_snapshots_are_of_one_build_and_of_jobs_that_have_not_ended(store: SqliteStore) -> None:
    for name in "ab":
        store.add(job(name))
    first, second = snapshot(seed=1), snapshot(seed=2)
    store.save({"a": first, "b": first, "never was": first}, "build")
    store.save({"a": second}, "build")
    assert same(store.snapshot("a", "build"), second), "the newer in place of the older"
    assert same(store.snapshot("b", "build"), first)
    assert store.snapshot("a", "another build") is None
    assert store.snapshot("never was", "build") is None
    store.finish(ended(job("b")), PIXELS)
    store.save({"b": second}, "build")
    assert store.snapshot("b", "build") is None, "one that comes late is let be"


@pytest.mark.parametrize("made_as", [None, 1, arrays.SNAPSHOT_FORMAT + 1])
def test_a_snapshot_of_another_version_is_recognised_and_the_job_begins_anew(
    store: SqliteStore, made_as: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    taken = snapshot()
    parts = {"steps": np.array(taken.steps), "x": taken.x, "x0_previous": taken.x0_previous}  # as format 1 had them
    if made_as is not None:
        parts |= {"format": np.array([made_as]), "registers": taken.registers}
    monkeypatch.setattr(arrays, "pack_snapshot", lambda _snapshot: safetensors.numpy.save(parts))
    store.add(job("a"))
    store.save({"a": taken}, "build")
    assert store.snapshot("a", "build") is None
    assert f"a snapshot of format {made_as or 1}, and this version reads format" in caplog.text


def test_unfinished_jobs_come_in_order_of_arrival_whatever_the_clock_says(store: SqliteStore) -> None:
    for name, created_us in (("late", 9), ("early", 1), ("middle", 5)):
        store.add(job(name, created_us=created_us))
    assert [record.id for record in store.unfinished()] == ["late", "early", "middle"]


def test_crashes_are_counted(store: SqliteStore) -> None:
    for name in "ab":
        store.add(job(name))
    store.crashed("a")
    store.crashed("a")
    assert [record.crashes for record in store.unfinished()] == [2, 0]


# --- keys ---


def test_a_key_finds_its_job_and_lets_no_other_in(store: SqliteStore) -> None:
    key = Key("mine", "request 1")
    assert store.find(key) is None
    store.add(job("a"), key)
    assert not store.add(job("b"), key)
    assert not store.add(job("b"), Key("mine", "request 2"))
    assert store.get("b") is None
    assert store.find(key) == (job("a"), True)
    assert store.find(Key("mine", "request 2")) == (job("a"), False)
    store.delete("a")
    assert store.add(job("b"), key), "a key lives as long as its job"


def test_jobs_without_a_key_are_all_different(store: SqliteStore) -> None:
    assert all(store.add(job(name)) for name in "abc")


# --- pages ---


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(OUTCOMES)), max_size=12), st.integers(1, 5), st.data())
def test_pages_are_the_ended_jobs_newest_first(
    jobs: list[tuple[int, Outcome]], limit: int, data: st.DataObject
) -> None:
    records = [ended(job(f"{k:02d}", created_us=us), outcome) for k, (us, outcome) in enumerate(jobs)]
    order = data.draw(st.permutations(records))
    outcomes = data.draw(st.sets(st.sampled_from(OUTCOMES), min_size=1))
    found: list[JobRecord] = []
    with closing(SqliteStore(None)) as store:
        for record in order:
            store.add(replace(record, outcome=None, finished_us=None))
            store.finish(record)
        while page := store.finished(found[-1].place if found else None, outcomes, limit):
            assert len(page) <= limit
            found += page
    assert found == sorted((r for r in records if r.outcome in outcomes), key=lambda r: r.place, reverse=True)


# --- what goes ---


def test_jobs_are_forgotten_when_they_are_old_and_when_they_are_too_much(store: SqliteStore) -> None:
    for k in range(6):
        store.add(job(f"j{k}"))
        store.finish(ended(job(f"j{k}"), at_us=100 + k), PIXELS)
    store.add(job("running"))

    def left() -> list[str]:
        return sorted(record.id for record in store.finished(None, OUTCOMES, 99))

    assert sweep(store, 102, 10**9) == 2
    assert left() == ["j2", "j3", "j4", "j5"]
    assert store.images("j1") is None
    assert sweep(store, 0, 2 * (RECORD_BYTES + 200)) == 2, "the oldest go"
    assert left() == ["j4", "j5"]
    assert sweep(store, 0, 1) == 1
    assert left() == ["j5"], "the newest stays, whatever it takes"
    assert sweep(store, 0, 1) == 0
    assert [record.id for record in store.unfinished()] == ["running"]


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
    assert [record.id for record in store.finished(None, OUTCOMES, 99)] == ["j11"]
    assert on_the_disk(file) < full / 12 + WAL_BYTES + 2**21, "while it is open"
    store.close()
    assert on_the_disk(file) < full / 12 + 2**21


def test_a_wal_that_has_grown_is_cut(store: SqliteStore, file: Path) -> None:
    wal, noise = Path(f"{file}-wal"), np.random.default_rng(0).integers(0, 256, (64, 256, 256, 3), dtype=np.uint8)
    store.add(job("a"))
    store.finish(ended(job("a")), noise)
    assert wal.stat().st_size > noise.nbytes > WAL_BYTES
    assert not store.sweep(0, 10**9)
    assert wal.stat().st_size == 0


def test_what_is_in_the_wal_is_in_the_file_soon_after_the_last_write(store: SqliteStore, file: Path) -> None:
    """By a copy of the file alone: what is in the WAL only, one bad byte may lose."""
    store.add(job("a"))
    for _ in range(2):  # the second finds it idle
        assert not store.sweep(0, 10**9)
    copy = file.with_name("copy.sqlite3")
    copy.write_bytes(file.read_bytes())
    alone = SqliteStore(copy)
    assert [record.id for record in alone.unfinished()] == ["a"]
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


def test_a_job_is_deleted_with_all_it_has(store: SqliteStore) -> None:
    store.add(job("a"))
    store.save({"a": snapshot()}, "build")
    assert store.delete("a")
    assert not store.delete("a")
    assert store.add(job("a")), "its name is free"
    assert store.snapshot("a", "build") is None


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
    assert store.unfinished() == [job("a")], "all of it, or nothing"
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
        f"from service.jobs.sqlite_store import SqliteStore; from pathlib import Path; SqliteStore(Path({str(file)!r}))"
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
from tminus.service.jobs.sqlite_store import SqliteStore
from tminus.service.jobs.store import JobRecord
from tests.service.fakes import make_spec
store = SqliteStore(Path({str(file)!r}))
for k in range(20):
    store.add(JobRecord(f"j{{k}}", make_spec(), k))
os.kill(os.getpid(), signal.SIGKILL)
"""
    result = subprocess.run([sys.executable, "-c", script], check=False)
    assert result.returncode == -9
    assert [record.id for record in open_file().unfinished()] == [f"j{k}" for k in range(20)]


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
from tminus.service.jobs.sqlite_store import SqliteStore
from tminus.service.jobs.store import JobRecord
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
    assert len(open_file().unfinished()) == 450
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
    monkeypatch.setattr("tminus.service.jobs.sqlite_file.CHECK_S", -1.0)
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


# --- what an edit starts from ---


@pytest.mark.parametrize("mask", [None, PIXELS[1, :, :, 0] > 20], ids=["whole", "masked"])
def test_the_inputs_of_an_edit_are_kept_until_it_ends(file: Path, mask: np.ndarray | None) -> None:
    inputs = Inputs(PIXELS[0], mask)
    spec = replace(SPECS[0], strength=0.5, image_sha256=inputs.image_sha256, mask_sha256=inputs.mask_sha256)
    store = SqliteStore(file)
    store.add(job("a", spec), Key("k", "h"), inputs)
    store.add(job("b"))
    store.close()
    store = SqliteStore(file)
    (found, _) = store.unfinished()
    assert found.spec == spec
    kept = store.inputs("a")
    assert kept is not None
    assert (kept.image_sha256, kept.mask_sha256) == (inputs.image_sha256, inputs.mask_sha256)
    assert kept.image.dtype == np.uint8
    assert mask is None or (kept.mask is not None and kept.mask.dtype == bool)
    assert store.inputs("b") is None
    store.finish(ended(found), PIXELS)
    assert store.inputs("a") is None
    store.close()


def test_a_key_that_is_taken_keeps_no_inputs_and_a_job_that_goes_takes_its_own(file: Path) -> None:
    store, inputs = SqliteStore(file), Inputs(PIXELS[0])
    store.add(job("a"), Key("k", "h"), inputs)
    assert not store.add(job("b"), Key("k", "h"), inputs)
    assert store.inputs("b") is None
    assert store.delete("a")
    assert store.inputs("a") is None
    store.close()


def test_a_plain_spec_is_kept_as_it_always_was(file: Path) -> None:
    store = SqliteStore(file)
    store.add(job("a", SPECS[0]))
    store.close()
    with closing(sqlite3.connect(file)) as connection:
        (spec,) = connection.execute("SELECT spec FROM jobs").fetchone()
    assert not {"strength", "image_sha256", "mask_sha256"} & json.loads(spec).keys()


# --- what cannot be read ---

DAMAGED = ['{"n":1}', '{"n":', "[]", "null", b"\xff\xfe"]


@pytest.mark.parametrize("spec", DAMAGED)
def test_an_unfinished_job_that_cannot_be_read_is_ended_and_the_others_go_on(
    file: Path, spec: object, caplog: pytest.LogCaptureFixture
) -> None:
    store = SqliteStore(file)
    for name in "abc":
        store.add(job(name))
    store.close()
    in_the_file(file, "UPDATE jobs SET spec = CAST(? AS TEXT) WHERE id = 'b'", spec)
    store = SqliteStore(file)
    assert [record.id for record in store.unfinished()] == ["a", "c"]
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
    assert store.unfinished() == [job("b")]
    store.close()


@pytest.mark.parametrize("column", ["spec", "problem"])
def test_an_ended_job_that_cannot_be_read_is_left_out_and_said_when_it_is_asked_for(file: Path, column: str) -> None:
    store = SqliteStore(file)
    for k in range(5):
        store.add(job(f"j{k}", created_us=k), Key(f"k{k}", "h"))
        store.finish(ended(job(f"j{k}", created_us=k)), PIXELS)
    store.close()
    in_the_file(file, f"UPDATE jobs SET {column} = '{{' WHERE id = 'j3'")
    store = SqliteStore(file)
    assert [record.id for record in store.finished(None, OUTCOMES, 3)] == ["j4", "j2", "j1"], (
        "a page is as full as ever"
    )
    assert [record.id for record in store.finished((1, "j1"), OUTCOMES, 3)] == ["j0"]
    for ask in (lambda: store.get("j3"), lambda: store.find(Key("k3", "h"))):
        with pytest.raises(StorageFailed, match="the record of job j3 cannot be read"):
            ask()
    store.close()


@pytest.mark.parametrize("data", [b"", b"\xa5" * 5000, b"x\x9c" + bytes(100)], ids=["empty", "noise", "zlib"])
def test_arrays_that_cannot_be_read(file: Path, data: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store = SqliteStore(file)
    store.add(job("a"), inputs=Inputs(PIXELS[0]))
    store.save({"a": snapshot()}, "build")
    store.add(job("b"))
    store.finish(ended(job("b")), PIXELS)
    store.close()
    for table in ("snapshots", "inputs", "images"):
        in_the_file(file, f"UPDATE {table} SET data = ?", data)
    store = SqliteStore(file)
    assert store.snapshot("a", "build") is None
    assert "the snapshot of job a, which begins anew, cannot be read" in caplog.text
    with pytest.raises(StorageFailed, match="the inputs of job a cannot be read"):
        store.inputs("a")
    with pytest.raises(StorageFailed, match="the images of job b cannot be read"):
        store.images("b")
    store.close()


def test_a_folder_where_nothing_can_be_removed_is_no_reason_by_itself(
    file: Path, open_file: Callable[[], SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only folder lets no -shm be removed, which was not made either; the line is then SQLite's own."""

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    open_file().close()
    monkeypatch.setattr(Path, "unlink", refuse)
    assert open_file().unfinished() == []


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
        assert store.unfinished() == [job(left, SPECS[1], 2)]
        assert same(store.snapshot(left, "build"), snapshot(3))
        store.close()
    store = SqliteStore(earlier)
    store.add(replace(job("c" * 32), owner="studio"))
    store.finish(ended(replace(job("c" * 32), owner="studio")))
    assert [record.id for record in store.finished(None, OUTCOMES, 9, "studio")] == ["c" * 32]
    assert [record.id for record in store.finished(None, OUTCOMES, 9, "")] == [done]
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
    monkeypatch.setattr(sqlite_file, "UPGRADES", {1: statements})
    with pytest.raises(ValueError, match="no such function"):
        SqliteStore(earlier)
    monkeypatch.undo()
    with closing(sqlite3.connect(earlier)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    store = SqliteStore(earlier)
    assert len(store.unfinished()) == 1
    store.close()
