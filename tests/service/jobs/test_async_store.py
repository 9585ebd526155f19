"""The store for asyncio: a disk that does not answer is not waited for, and whether jobs can be kept is known."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest
import sqlalchemy as sa

from tests.service.fakes import PATIENCE_S
from tests.service.jobs.conftest import DatabaseShelf
from tests.service.jobs.kept import job
from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import async_store
from tminus.service.jobs.store.async_store import AsyncStore, Stores
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.postgres_store import PostgresStore
from tminus.service.jobs.store.records import JobRecord, Key, Outcome, ReplicaPace
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.scheduling.room import Intake
from tminus.service.spec import Inputs


class Disk(SqliteStore):
    """A store whose disk may freeze or be full."""

    def __init__(self) -> None:
        super().__init__(None)
        self.thaw, self.full = threading.Event(), False
        self.thaw.set()

    def add(self, job: JobRecord, key: Key | None = None, inputs: Inputs | None = None, *, held: bool = True) -> bool:
        assert self.thaw.wait(PATIENCE_S)
        if self.full:
            raise StorageFailed("the disk is full")
        return super().add(job, key, inputs, held=held)

    def check(self, *, write: bool) -> None:
        if write and self.full:
            raise StorageFailed("the disk is full")
        super().check(write=write)


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    yield made
    made.thaw.set()


def test_a_disk_that_does_not_answer_is_not_waited_for(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_store, "CALL_S", 0.05)
    made: list[list[str]] = []
    monkeypatch.setattr(disk, "crashed", made.append)

    async def ask() -> None:
        store = AsyncStore(disk)
        disk.thaw.clear()
        claim = store.call(SqliteStore.claim_all)
        for call in (store.add(job("a"), None, None), store.call(JobStore.crashed, ["b"]), claim):
            with pytest.raises(StorageFailed, match=r"has not answered for 0\.05 s"):
                await call
        assert store.failure is not None
        disk.thaw.set()
        monkeypatch.setattr(async_store, "CALL_S", PATIENCE_S)
        assert await store.call(JobStore.get, "a") is None, "who was told that it is not kept finds no such job later"
        assert await store.add(job("b"), None, None)
        assert store.failure is None
        assert made == [], "a call that nobody waits for any more is not made when its turn comes"
        store.close()

    asyncio.run(ask())


@pytest.mark.slow
def test_leases_are_renewed_while_what_clients_read_takes_long(
    database: DatabaseShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = threading.Event()
    get = PostgresStore.get

    def slow(store: PostgresStore, job_id: str) -> JobRecord | None:
        with store._transaction() as run:  # has one of its connections
            run(sa.select(1))
            assert goes_on.wait(PATIENCE_S)
        return get(store, job_id)

    monkeypatch.setattr(PostgresStore, "get", slow)

    async def ask() -> None:
        below = database.open()
        database.opened.remove(below)
        store = AsyncStore(below)
        assert await store.add(job("a"), Key("k", "h"), None)
        no_places: list[Outcome | None] = []
        reads: list[Coroutine[Any, Any, object]] = [
            store.call(JobStore.get, "a"),
            store.call(JobStore.find, Key("k", "h")),
            store.call(SharedStore.holder, "a"),
            store.call(JobStore.page, None, no_places, 1),
            store.call(JobStore.number_owed, "", "https://x.example", 1),
            store.call(JobStore.deliveries, ["a"]),
            store.call(SharedStore.open_jobs, ""),
        ]
        asked = [asyncio.create_task(read) for read in reads]
        await asyncio.sleep(0)
        store.holders.append(lambda: ["a"])
        async with asyncio.timeout(PATIENCE_S / 2):
            assert await store.renew("build", ReplicaPace(1.0, 1.0)) == {"a"}
            await store.call(SharedStore.claim, "build", Intake(1.0), 1.0, 64)
            assert await store.images("a") is None, "pixels have a thread of their own"
        assert not any(each.done() for each in asked), "each waits for the first"
        goes_on.set()
        found = await asyncio.gather(*asked)
        assert found == [job("a"), (job("a"), True), None, [], 0, {}, {"a"}]
        store.close()

    monkeypatch.setattr(async_store, "QUICK_S", PATIENCE_S)
    try:
        asyncio.run(ask())
    finally:
        goes_on.set()


def test_what_nobody_waits_to_read_any_more_is_not_read(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(disk, "images", made.append)

    async def ask() -> None:
        store = AsyncStore(disk)
        disk.thaw.clear()
        adding = asyncio.create_task(store.add(job("a"), None, None))
        await asyncio.sleep(0)
        reading = asyncio.create_task(store.images("b"))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
        disk.thaw.set()
        assert await adding
        assert await store.call(JobStore.get, "b") is None
        assert made == []
        store.close()

    asyncio.run(ask())


def test_whether_jobs_can_be_kept_is_known_from_the_last_attempt_to_write(disk: Disk) -> None:
    async def ask() -> None:
        store = AsyncStore(disk)
        assert store.failure is None
        disk.full = True
        await store.check()
        assert store.failure is None, "nothing was to be written"
        with pytest.raises(StorageFailed):
            await store.add(job("a"), None, None)
        assert await store.call(JobStore.get, "a") is None
        assert store.failure is not None, "reading says nothing of it"
        with pytest.raises(StorageFailed):
            await store.check()
        disk.full = False
        await store.check()
        assert store.failure is None
        store.close()

    asyncio.run(ask())


def test_a_store_that_a_load_opens_as_all_are_closed_is_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the server ends: the load's thread goes on."""
    stores, closed = Stores(lambda _weights: SqliteStore(None)), list[AsyncStore]()
    first, second = stores.take_first("aa"), stores.take_first("bb")
    close = AsyncStore.close

    def opening(store: AsyncStore) -> None:
        stores.take_first(f"of {len(closed)}")
        closed.append(store)
        close(store)

    monkeypatch.setattr(AsyncStore, "close", opening)
    stores.close()
    assert closed == [first, second]
