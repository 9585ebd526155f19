"""Snapshots on their way from the worker to the store."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.service.fakes import PATIENCE_S, wait_until
from tests.service.jobs.kept import job, same, snapshot
from tminus.service.errors import StorageFailed
from tminus.service.jobs.retention import LEAST_S, SHARE, SnapshotKeeper
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.metrics import Metrics
from tminus.service.spec import Snapshot

SNAPSHOT = snapshot(1)
BURNT_S = 0.05


def burn_cpu() -> None:
    until_s = time.thread_time() + BURNT_S
    while time.thread_time() < until_s:
        pass


class Kept:
    """A store on a file with one job in it, and its keeper."""

    def __init__(self, file: Path) -> None:
        self.file, self.metrics = file, Metrics()
        self.store = AsyncStore(SqliteStore(file))
        self.keeper = SnapshotKeeper(self.store, "build", self.metrics)
        asyncio.run(self.store.add(job("a"), None, None))

    def keep(self, read: Callable[[], Snapshot] = lambda: SNAPSHOT, cost_s: float = 0.0) -> None:
        self.keeper.keep({"a": read}, 100.0, cost_s)

    def wait_for_the_end_of_the_round(self) -> None:
        wait_until(lambda: self.keeper.due(1e9))

    def close(self) -> None:
        self.keeper.close()
        self.store.close()


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    made = Kept(tmp_path / "jobs.sqlite3")
    yield made
    made.close()


def test_a_call_of_the_store_does_not_wait_for_a_copy_from_a_gpu(kept: Kept) -> None:
    copied = threading.Event()

    def read() -> Snapshot:
        assert copied.wait(PATIENCE_S)
        return SNAPSHOT

    kept.keep(read)
    assert asyncio.run(kept.store.call(JobStore.snapshot, "a", "build")) is None
    assert not kept.keeper.due(1e9), "a round is under way"
    copied.set()
    kept.wait_for_the_end_of_the_round()
    found = asyncio.run(kept.store.call(JobStore.snapshot, "a", "build"))
    assert same(found, SNAPSHOT)


def test_what_was_taken_is_kept_before_the_store_is_closed(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "jobs.sqlite3")
    kept.keep()
    kept.close()
    store = SqliteStore(kept.file)
    assert store.snapshot("a", "build") is not None
    store.close()


def test_a_cheap_round_makes_the_next_due_after_the_least_interval(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tminus.service.jobs.retention.SHARE", 1.0)  # cheap on the slowest machine
    assert kept.keeper.due(100.0)
    kept.keep()
    kept.wait_for_the_end_of_the_round()
    assert not kept.keeper.due(100.0 + LEAST_S - 0.01)
    assert kept.keeper.due(100.0 + LEAST_S)
    assert kept.metrics.registry.get_sample_value("tminus_snapshots_total") == 1


@pytest.mark.parametrize("by_worker", [True, False])
def test_what_the_worker_spent_and_what_reading_takes_of_a_core_are_the_cost(kept: Kept, by_worker: bool) -> None:
    def read() -> Snapshot:
        burn_cpu()
        return SNAPSHOT

    kept.keep(cost_s=BURNT_S) if by_worker else kept.keep(read)
    kept.wait_for_the_end_of_the_round()
    assert not kept.keeper.due(100.0 + BURNT_S / SHARE - 0.01)


@pytest.mark.parametrize("error", [StorageFailed("full"), MemoryError("no room")])
def test_a_round_that_cannot_be_kept_costs_what_it_took_and_others_follow(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        burn_cpu()
        raise error

    monkeypatch.setattr(SqliteStore, "save", fail)
    kept.keep()
    kept.wait_for_the_end_of_the_round()
    assert not kept.keeper.due(100.0 + BURNT_S / SHARE - 0.01)
    monkeypatch.undo()
    kept.keep()
    kept.wait_for_the_end_of_the_round()
    assert asyncio.run(kept.store.call(JobStore.snapshot, "a", "build")) is not None


def test_a_round_that_cannot_be_read_is_left_out_and_others_follow(kept: Kept) -> None:
    def fail() -> Snapshot:
        raise RuntimeError("the copy failed")

    kept.keep(fail)
    kept.wait_for_the_end_of_the_round()
    kept.keep()
    kept.wait_for_the_end_of_the_round()
    assert asyncio.run(kept.store.call(JobStore.snapshot, "a", "build")) is not None
