"""What every store of durable jobs does: the same tests on a SQLite file and a real PostgreSQL."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.jobs.conftest import Shelf
from tests.service.jobs.kept import PIXELS, SPECS, claim, ended, job, same, snapshot
from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import arrays
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import RECORD_BYTES, JobStore
from tminus.service.jobs.store.records import OUTCOMES, JobRecord, Key, LeaseLost, Outcome
from tminus.service.spec import Inputs, SampleSpec

pytestmark = pytest.mark.slow


@pytest.fixture
def store(shelf: Shelf) -> JobStore:
    return shelf.open()


def claimed(shelf: Shelf, store: JobStore) -> list[JobRecord]:
    """What the next process takes on when this one has ended."""
    store.close()
    return claim(shelf.open()).jobs


# --- what is kept ---


@pytest.mark.parametrize("spec", SPECS)
def test_a_job_comes_back_as_it_was(shelf: Shelf, store: JobStore, spec: SampleSpec) -> None:
    record = replace(job("a", spec, 123_456_789_012_345), deadline_us=2**60, owner="studio")
    assert store.add(record)
    assert (store.get("a"), store.get("b")) == (record, None)
    assert claimed(shelf, store) == [record]


def test_the_end_of_a_job_is_kept_once_with_its_images_and_takes_its_snapshot_away(
    shelf: Shelf, store: JobStore
) -> None:
    store.add(job("a"))
    store.save({"a": snapshot()}, "build")
    done = ended(job("a"), fingerprint="build")
    store.finish(done, PIXELS)
    store.finish(done)  # as when the answer was lost
    with pytest.raises(LeaseLost):
        store.finish(ended(job("a"), "cancelled", at_us=7))
    assert store.get("a") == done
    images = store.images("a")
    assert isinstance(images, bytes)
    np.testing.assert_array_equal(arrays.unpack_images(images), PIXELS)
    assert store.snapshot("a", "build") is None
    assert claimed(shelf, store) == []


def test_a_failed_job_keeps_why(store: JobStore) -> None:
    store.add(job("a"))
    failed = ended(job("a"), "failed", problem={"code": "not_finite", "status": 500})
    store.finish(failed)
    assert store.get("a") == failed
    assert store.images("a") is None


def test_snapshots_are_of_one_build_and_of_jobs_that_have_not_ended(store: JobStore) -> None:
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
    store.save({}, "build")


@pytest.mark.parametrize("made_as", [None, arrays.SNAPSHOT_FORMAT + 1])
def test_a_snapshot_of_another_version_is_recognised_and_the_job_begins_anew(
    store: JobStore, made_as: int | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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


def test_jobs_are_claimed_in_order_of_arrival_whatever_the_clock_says(shelf: Shelf, store: JobStore) -> None:
    for name, created_us in (("late", 9), ("early", 1), ("middle", 5)):
        store.add(job(name, created_us=created_us))
    assert [record.id for record in claimed(shelf, store)] == ["late", "early", "middle"]


def test_an_end_of_the_server_counts_again_only_for_a_job_that_was_alone(shelf: Shelf, store: JobStore) -> None:
    for name in "abcd":
        store.add(job(name))
    store.crashed(["a"])
    store.crashed(["a", "b", "one that is not durable"])
    store.crashed(["a"])
    store.crashed(["b", "c"])
    store.crashed([])
    assert [record.crashes for record in claimed(shelf, store)] == [2, 1, 1, 0]


@pytest.mark.parametrize("mask", [None, PIXELS[1, :, :, 0] > 20], ids=["whole", "masked"])
def test_the_inputs_of_an_edit_are_kept_until_it_ends(shelf: Shelf, store: JobStore, mask: np.ndarray | None) -> None:
    inputs = Inputs(PIXELS[0], mask)
    spec = replace(SPECS[0], strength=0.5, image_sha256=inputs.image_sha256, mask_sha256=inputs.mask_sha256)
    store.add(job("a", spec), Key("k", "h"), inputs)
    store.add(job("b"))
    store.close()
    store = shelf.open()
    found, _ = claim(store).jobs
    assert found.spec == spec
    kept = store.inputs("a")
    assert kept is not None
    assert (kept.image_sha256, kept.mask_sha256) == (inputs.image_sha256, inputs.mask_sha256)
    assert kept.image.dtype == np.uint8
    assert mask is None or (kept.mask is not None and kept.mask.dtype == bool)
    assert store.inputs("b") is None
    store.finish(ended(found), PIXELS)
    assert store.inputs("a") is None


# --- keys ---


def test_a_key_finds_its_job_and_lets_no_other_in(store: JobStore) -> None:
    key = Key("mine", "request 1")
    assert store.find(key) is None
    store.add(job("a"), key)
    assert not store.add(job("b"), key)
    assert not store.add(job("b"), Key("mine", "request 2"))
    assert store.get("b") is None
    assert store.find(key) == (job("a"), True)
    assert store.find(Key("mine", "request 2")) == (job("a"), False)
    assert store.add(job("c"), Key("mine", "request 1", "studio")), "another owner's"
    store.delete("a")
    assert store.add(job("b"), key), "a key lives as long as its job"


# --- pages ---


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from((*OUTCOMES, None))), max_size=12),
    st.integers(1, 5),
    st.data(),
)
def test_pages_are_the_jobs_newest_first(
    store: JobStore, jobs: list[tuple[int, Outcome | None]], limit: int, data: st.DataObject
) -> None:
    records = [
        ended(job(f"{k:02d}", created_us=us), outcome) if outcome is not None else job(f"{k:02d}", created_us=us)
        for k, (us, outcome) in enumerate(jobs)
    ]
    order = data.draw(st.permutations(records))
    outcomes = data.draw(st.sets(st.sampled_from((*OUTCOMES, None)), min_size=1))
    found: list[JobRecord] = []
    try:
        for record in order:
            store.add(replace(record, outcome=None, finished_us=None))
            if record.outcome is not None:
                store.finish(record)
        while page := store.page(found[-1].place if found else None, outcomes, limit):
            assert len(page) <= limit
            found += page
    finally:
        for record in records:
            store.delete(record.id)
    assert found == sorted((r for r in records if r.outcome in outcomes), key=lambda r: r.place, reverse=True)


# --- what goes ---


def test_jobs_are_forgotten_when_they_are_old_and_when_they_are_too_much(shelf: Shelf, store: JobStore) -> None:
    for k in range(6):
        store.add(job(f"j{k}"))
        store.finish(ended(job(f"j{k}"), at_us=100 + k), PIXELS)
    store.add(job("running"))

    def left() -> list[str]:
        return sorted(record.id for record in store.page(None, OUTCOMES, 99))

    def sweep(before_us: int, max_bytes: int) -> int:
        before = len(left())
        while store.sweep(before_us, max_bytes):
            pass
        return before - len(left())

    assert sweep(102, 10**9) == 2
    assert left() == ["j2", "j3", "j4", "j5"]
    assert store.images("j1") is None
    assert sweep(0, 2 * (RECORD_BYTES + 200)) == 2, "the oldest go"
    assert left() == ["j4", "j5"]
    assert sweep(0, 1) == 1
    assert left() == ["j5"], "the newest stays, whatever it takes"
    assert sweep(0, 1) == 0
    assert [record.id for record in claimed(shelf, store)] == ["running"]


def test_a_job_is_deleted_with_all_it_has_and_by_its_owner_only(store: JobStore) -> None:
    store.add(replace(job("a"), owner="studio"), inputs=Inputs(PIXELS[0]))
    store.save({"a": snapshot()}, "build")
    assert not store.delete("a", "")
    assert store.delete("a", "studio")
    assert not store.delete("a")
    assert store.add(job("a")), "its name is free"
    assert store.snapshot("a", "build") is None
    assert store.inputs("a") is None


# --- what cannot be read ---


def test_one_that_cannot_be_read_and_is_ended_elsewhere_keeps_no_other_from_going_on(
    shelf: Shelf, store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        store.add(job(name))
    store.close()
    assert shelf.change("UPDATE jobs SET spec = 'damaged' WHERE id = 'b'") == 1
    store = shelf.open()
    monkeypatch.setattr(store, "_held", lambda _ids: [sa.false()])
    assert [record.id for record in claim(store).jobs] == ["a", "c"]


@pytest.mark.parametrize("spec", ['{"n":1}', "[]"])
def test_an_unfinished_job_that_cannot_be_read_is_ended_and_the_others_go_on(
    shelf: Shelf, store: JobStore, spec: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "abc":
        store.add(job(name))
    store.close()
    assert shelf.change("UPDATE jobs SET spec = :spec WHERE id = 'b'", spec=spec) == 1
    store = shelf.open()
    claimed = claim(store)
    assert ([record.id for record in claimed.jobs], claimed.damaged) == (["a", "c"], 1)
    assert "the record of job b cannot be read" in caplog.text
    store.close()
    ((outcome, finished_us, problem),) = shelf.read("SELECT outcome, finished_us, problem FROM jobs WHERE id = 'b'")
    assert outcome == "failed"
    assert finished_us
    told = json.loads(str(problem))
    assert (told["code"], told["detail"]) == ("storage_failed", "the record of job b cannot be read")
    assert shelf.open().delete("b")


@pytest.mark.parametrize("column", ["spec", "problem"])
def test_an_ended_job_that_cannot_be_read_is_left_out_and_said_when_it_is_asked_for(
    shelf: Shelf, store: JobStore, column: str
) -> None:
    for k in range(5):
        store.add(job(f"j{k}", created_us=k), Key(f"k{k}", "h"))
        store.finish(ended(job(f"j{k}", created_us=k)), PIXELS)
    store.close()
    assert shelf.change(f"UPDATE jobs SET {column} = '{{' WHERE id = 'j3'") == 1
    store = shelf.open()
    assert [record.id for record in store.page(None, OUTCOMES, 3)] == ["j4", "j2", "j1"], "a page is as full as ever"
    assert [record.id for record in store.page((1, "j1"), OUTCOMES, 3)] == ["j0"]
    for ask in (lambda: store.get("j3"), lambda: store.find(Key("k3", "h"))):
        with pytest.raises(StorageFailed, match="the record of job j3 cannot be read"):
            ask()


@pytest.mark.parametrize("data", [b"", b"x\x9c" + bytes(100)], ids=["empty", "zlib"])
def test_arrays_that_cannot_be_read(
    shelf: Shelf, store: JobStore, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    store.add(job("a"), inputs=Inputs(PIXELS[0]))
    store.save({"a": snapshot()}, "build")
    store.add(job("b"))
    store.finish(ended(job("b")), PIXELS)
    store.close()
    for table in ("snapshots", "inputs", "images"):
        assert shelf.change(f"UPDATE {table} SET data = :data", data=data) == 1
    store = shelf.open()
    assert store.snapshot("a", "build") is None
    assert "the snapshot of job a, which begins anew, cannot be read" in caplog.text
    with pytest.raises(StorageFailed, match="the inputs of job a cannot be read"):
        store.inputs("a")

    async def read_images() -> None:
        shelf.opened.remove(store)
        above = AsyncStore(store)
        with pytest.raises(StorageFailed, match="the images of job b cannot be read"):
            await above.images("b")
        above.close()

    asyncio.run(read_images())
