"""The store for asyncio: a disk that does not answer is not waited for, and whether jobs can be kept is known."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tests.service.fakes import PATIENCE_S, make_spec
from tminus.service.errors import StorageFailed
from tminus.service.jobs import async_store
from tminus.service.jobs.async_store import AsyncStore
from tminus.service.jobs.sqlite_store import SqliteStore
from tminus.service.jobs.store import JobRecord, Key
from tminus.service.scheduling.intake import Intake
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


def job(name: str) -> JobRecord:
    return JobRecord(name, make_spec(), 1)


def test_a_disk_that_does_not_answer_is_not_waited_for(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(async_store, "CALL_S", 0.05)

    async def ask() -> None:
        store = AsyncStore(disk)
        disk.thaw.clear()
        for call in (store.add(job("a"), None, None), store.get("a"), store.claim("build", Intake(1.0), 1.0, 64)):
            with pytest.raises(StorageFailed, match=r"has not answered for 0\.05 s"):
                await call
        assert store.failure is not None
        disk.thaw.set()
        monkeypatch.setattr(async_store, "CALL_S", PATIENCE_S)
        assert await store.get("a") is None, "who was told that it is not kept finds no such job later"
        assert await store.add(job("b"), None, None)
        assert store.failure is None
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
        assert await store.get("a") is None
        assert store.failure is not None, "reading says nothing of it"
        with pytest.raises(StorageFailed):
            await store.check()
        disk.full = False
        await store.check()
        assert store.failure is None
        store.close()

    asyncio.run(ask())
