"""The store of durable jobs, on real files."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import StorageFailed
from service.job import Inputs, SampleSpec, Snapshot
from service.sqlite_store import RECORD_BYTES, VERSION, SqliteStore, open_store
from service.store import OUTCOMES, JobRecord, Key, Outcome
from tests.service.fakes import make_spec

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
    return Snapshot(tuple(range(n)), x, x0)


def same(a: Snapshot | None, b: Snapshot) -> bool:
    return (
        a is not None
        and a.steps == b.steps
        and all(
            one.dtype == other.dtype and one.tobytes() == other.tobytes()
            for one, other in ((a.x, b.x), (a.x0_previous, b.x0_previous))
        )
    )


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
    assert store.add(record) == record
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
    assert store.add(job("b"), key) is None
    assert store.add(job("b"), Key("mine", "request 2")) is None
    assert store.get("b") is None
    assert store.find(key) == (job("a"), True)
    assert store.find(Key("mine", "request 2")) == (job("a"), False)
    store.delete("a")
    assert store.add(job("b"), key) == job("b"), "a key lives as long as its job"


def test_jobs_without_a_key_are_all_different(store: SqliteStore) -> None:
    assert all(store.add(job(name)) for name in "abc")


# --- pages ---


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(OUTCOMES)), max_size=12), st.integers(1, 5), st.data())
def test_pages_are_the_ended_jobs_newest_first(
    jobs: list[tuple[int, Outcome]], limit: int, data: st.DataObject
) -> None:
    store = SqliteStore(None)
    records = [ended(job(f"{k:02d}", created_us=us), outcome) for k, (us, outcome) in enumerate(jobs)]
    for record in data.draw(st.permutations(records)):
        store.add(replace(record, outcome=None, finished_us=None))
        store.finish(record)
    outcomes = data.draw(st.sets(st.sampled_from(OUTCOMES), min_size=1))
    wanted = sorted((r for r in records if r.outcome in outcomes), key=lambda r: r.place, reverse=True)
    found: list[JobRecord] = []
    while page := store.finished(found[-1].place if found else None, outcomes, limit):
        assert len(page) <= limit
        found += page
    assert found == wanted
    store.close()


# --- what goes ---


def test_jobs_are_forgotten_when_they_are_old_and_when_they_are_too_much(store: SqliteStore) -> None:
    for k in range(6):
        store.add(job(f"j{k}"))
        store.finish(ended(job(f"j{k}"), at_us=100 + k), PIXELS)
    store.add(job("running"))

    def left() -> list[str]:
        return sorted(record.id for record in store.finished(None, OUTCOMES, 99))

    assert store.sweep(102, 10**9) == 2
    assert left() == ["j2", "j3", "j4", "j5"]
    assert store.images("j1") is None
    assert store.sweep(0, 2 * (RECORD_BYTES + 200)) == 2, "the oldest go"
    assert left() == ["j4", "j5"]
    assert store.sweep(0, 1) == 1
    assert left() == ["j5"], "the newest stays, whatever it takes"
    assert store.sweep(0, 1) == 0
    assert [record.id for record in store.unfinished()] == ["running"]


def test_the_file_shrinks_when_jobs_go(store: SqliteStore, file: Path, open_file: Callable[[], SqliteStore]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 64, 3), dtype=np.uint8)
    for k in range(8):
        store.add(job(f"j{k}"))
        store.finish(ended(job(f"j{k}"), at_us=k), noise)
    store.close()
    full = file.stat().st_size
    assert full > 8 * noise.size
    store = open_file()
    store.sweep(7, 10**9)
    store.close()
    assert file.stat().st_size < full / 4


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
    other = f"from service.sqlite_store import SqliteStore; from pathlib import Path; SqliteStore(Path({str(file)!r}))"
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
from service.sqlite_store import SqliteStore
from service.store import JobRecord
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


def test_an_empty_file_is_a_start_that_was_cut_off(file: Path, open_file: Callable[[], SqliteStore]) -> None:
    file.touch()
    assert open_file().add(job("a"))


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
    assert store.add(job("b"), Key("k", "h"), inputs) is None
    assert store.inputs("b") is None
    assert store.delete("a")
    assert store.inputs("a") is None
    store.close()


def test_a_plain_spec_is_kept_as_it_always_was(file: Path) -> None:
    store = SqliteStore(file)
    store.add(job("a", SPECS[0]))
    store.close()
    (spec,) = sqlite3.connect(file).execute("SELECT spec FROM jobs").fetchone()
    assert not {"strength", "image_sha256", "mask_sha256"} & json.loads(spec).keys()
