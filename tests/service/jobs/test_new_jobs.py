"""Who is counted while a new job is let in."""

import asyncio
import gc
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.service.fakes import INFO, PATIENCE_S, make_spec
from tminus.service.errors import QuotaExceeded
from tminus.service.jobs.new_jobs import NewJobs
from tminus.service.jobs.store.records import JobRecord, Key
from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.work import Outlook, Ticket, work_of
from tminus.service.worker.running_job import NewJob


class FakeStore:
    async def call(self, method: Callable[..., Any], *args: Any) -> Any:
        return await getattr(self, method.__name__)(*args)


class SlowStore(FakeStore):
    shared = False

    def now_us(self) -> int:
        return 1

    async def number_owed(self, *_: object) -> int:
        await asyncio.sleep(0.01)
        return 0

    async def add(self, *_: object) -> bool:
        await asyncio.sleep(0.01)
        return True


def new_job() -> NewJob:
    return NewJob(uuid.uuid4().hex, make_spec(), work_of(make_spec(), INFO), owner="key")


async def accepted_at_once(webhook: Webhook | None) -> int:
    """Of twenty requests of a key that may have one job."""
    live: list[Any] = []
    own = SimpleNamespace(store=SlowStore(), leases=None, cannot_keep=False, model=0, model_name="m")
    own.accept = lambda record, _ticket: live.append(SimpleNamespace(record=record))
    jobs = SimpleNamespace(of_model=lambda _model: own, all_held=lambda: live, by_store=lambda: [own])
    worker = SimpleNamespace(
        submit=lambda *_, **__: Ticket(Future(), Outlook(0, 0.0)),
        cancel=lambda *_: None,
        jobs=SimpleNamespace(number_of=lambda *_, **__: 0),
    )
    new = NewJobs(cast(Any, worker), cast(Any, jobs))

    @asynccontextmanager
    async def charged() -> AsyncIterator[None]:
        if new.number_here("key") + await new.number_elsewhere("key") >= 1:
            raise QuotaExceeded("jobs", "below 1", 1, 1)
        yield

    asked = (new.create(new_job(), None, webhook, charged=charged) for _ in range(20))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(answer) for answer in answers if isinstance(answer, BaseException)} == {QuotaExceeded}
    return sum(not isinstance(answer, BaseException) for answer in answers)


class SharedStore(FakeStore):
    """Its jobs are left to others, each at the moment that the test says."""

    shared, failure = True, None

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}  # keys, by the job
        self.may_find, self.may_look = asyncio.Event(), asyncio.Event()
        self.may_look.set()

    def now_us(self) -> int:
        return 1

    async def find(self, key: Key) -> tuple[JobRecord, bool] | None:
        if key.name == "slow":
            await self.may_find.wait()
        found = [job_id for job_id, kept_as in self.kept.items() if kept_as == key.kept_as]
        return (JobRecord(found[0], make_spec(), 1), True) if found else None

    async def open_jobs(self, _owner: str) -> frozenset[str]:
        found = frozenset(self.kept)
        await self.may_look.wait()
        return found

    async def leave_to_any(self, record: JobRecord, key: Key | None, *_: object) -> Outlook | None:
        await asyncio.sleep(0.01)
        if key is not None and key.kept_as in self.kept.values():
            return None
        self.kept[record.id] = key.kept_as if key is not None else ""
        return Outlook(0, 0.0)


class Shared:
    """Jobs of one key, which may have so many, in such a store."""

    def __init__(self, most: int = 99) -> None:
        self.store, self.most, self.charged_for = SharedStore(), most, 0
        leases = SimpleNamespace(takes=lambda _spec: False, leave_to_any=self.store.leave_to_any)
        own = SimpleNamespace(store=self.store, leases=leases, cannot_keep=False, model=0, model_name="m")
        jobs = SimpleNamespace(of_model=lambda _model: own, all_held=list, by_store=lambda: [own], view=self.view)
        worker = SimpleNamespace(jobs=SimpleNamespace(number_of=lambda *_, **__: 0))
        self.new = NewJobs(cast(Any, worker), cast(Any, jobs))

    async def view(self, record: JobRecord, _lifecycle: object) -> Any:
        return SimpleNamespace(record=record)

    async def create(self, name: str | None = None) -> tuple[str, bool]:
        key = Key(name, "hash", "key") if name is not None else None
        view, again = await self.new.create(new_job(), key, charged=self.charged)
        return view.record.id, again

    @asynccontextmanager
    async def charged(self) -> AsyncIterator[None]:
        elsewhere = await self.new.number_elsewhere("key")
        if self.new.number_here("key") + elsewhere >= self.most:
            raise QuotaExceeded("jobs", "less", 1, 1)
        yield
        self.charged_for += 1


def test_a_key_of_which_the_store_does_not_answer_keeps_no_other_waiting() -> None:
    async def ask() -> None:
        shared = Shared()
        slow = [asyncio.create_task(shared.create("slow")) for _ in range(3)]
        await asyncio.sleep(0)
        async with asyncio.timeout(PATIENCE_S):
            await shared.create("other")
        assert not any(task.done() for task in slow)
        shared.store.may_find.set()
        answers = await asyncio.gather(*slow)
        assert len({job_id for job_id, _ in answers}) == 1
        assert [again for _, again in answers].count(False) == 1
        assert len(shared.store.kept) == shared.charged_for == 2
        gc.collect()
        assert not shared.new._keyed, "nothing is kept of keys that nobody uses"

    asyncio.run(ask())


def test_a_job_of_which_another_server_had_the_key_first_is_not_charged() -> None:
    async def ask() -> None:
        shared, key = Shared(), Key("k", "hash", "key")
        asked = asyncio.create_task(shared.create("k"))
        await asyncio.sleep(0)  # it has found none
        shared.store.kept["theirs"] = key.kept_as
        assert await asked == ("theirs", True)
        assert shared.charged_for == 0
        assert shared.new._entering == {}

    asyncio.run(ask())


@pytest.mark.parametrize("keyed", [False, True])
def test_a_job_that_is_left_to_others_while_a_count_is_made_counts(keyed: bool) -> None:
    async def ask() -> None:
        shared = Shared(most=1)
        first = asyncio.create_task(shared.create("a" if keyed else None))
        await asyncio.sleep(0)
        shared.store.may_look.clear()
        second = asyncio.create_task(shared.create("b" if keyed else None))
        await first
        shared.store.may_look.set()
        with pytest.raises(QuotaExceeded):
            await second
        assert not shared.new._counts

    asyncio.run(ask())


@pytest.mark.parametrize("webhook", [None, Webhook("https://example.com/x", ("completed",))], ids=["plain", "webhook"])
def test_jobs_that_come_at_once_count_for_each_other(webhook: Webhook | None) -> None:
    assert asyncio.run(accepted_at_once(webhook)) == 1
