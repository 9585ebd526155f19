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
from tminus.service.jobs.jobs import NewJobs
from tminus.service.jobs.store.records import JobRecord, Key
from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.work import Outlook, Ticket, work_of
from tminus.service.worker.running_job import NewJob


class FakeStore:
    """A store that several share, each call of which is answered at the moment that the test says."""

    shared, failure = True, None

    def __init__(self) -> None:
        self.kept: dict[str, str] = {}  # keys, by the job
        self.may_find, self.may_look = asyncio.Event(), asyncio.Event()
        self.may_look.set()

    async def call(self, method: Callable[..., Any], *args: Any) -> Any:
        return await getattr(self, method.__name__)(*args)

    def now_us(self) -> int:
        return 1

    async def find(self, key: Key) -> tuple[JobRecord, bool] | None:
        if key.name == "slow":
            await self.may_find.wait()
        found = [job_id for job_id, kept_as in self.kept.items() if kept_as == key.kept_as]
        return (JobRecord(found[0], make_spec(), 1), True) if found else None

    async def number_owed(self, *_: object) -> int:
        await asyncio.sleep(0.01)
        return 0

    async def add(self, record: JobRecord, *_: object) -> bool:
        await asyncio.sleep(0.01)
        return True

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
    """Jobs of one key, which may have so many, in such a store: they are left to others, or taken on here."""

    def __init__(self, most: int = 99, *, takes: bool = False) -> None:
        self.store, self.most, self.charged_for = FakeStore(), most, 0
        live: list[Any] = []
        leases = SimpleNamespace(takes=lambda _spec: takes, leave_to_any=self.store.leave_to_any)
        runner = SimpleNamespace(
            is_unloaded=False, accept=lambda record, _ticket: live.append(SimpleNamespace(record=record))
        )
        own = SimpleNamespace(
            store=self.store, leases=leases, runner=runner, served=SimpleNamespace(number=0, name="m")
        )
        own.retention = SimpleNamespace(cannot_keep=False)
        jobs = SimpleNamespace(
            of_model=lambda _model: own, all_held=lambda: live, by_store=lambda: [own], view=self.view
        )
        worker = SimpleNamespace(
            jobs=SimpleNamespace(number_of=lambda *_, **__: 0),
            submit=lambda *_: Ticket(Future(), Outlook(0, 0.0)),
            cancel=lambda *_: None,
        )
        self.new = NewJobs(cast(Any, worker), cast(Any, jobs))

    async def view(self, record: JobRecord, _lifecycle: object) -> Any:
        return SimpleNamespace(record=record)

    async def create(self, name: str | None = None, webhook: Webhook | None = None) -> tuple[str, bool]:
        key = Key(name, "hash", "key") if name is not None else None
        new = NewJob(uuid.uuid4().hex, make_spec(), work_of(make_spec(), INFO), owner="key")
        view, again = await self.new.create(new, key, webhook, charged=self.charged)
        return view.record.id, again

    @asynccontextmanager
    async def charged(self) -> AsyncIterator[None]:
        if await self.new.open_jobs("key", self.most) >= self.most:
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
    async def ask() -> None:
        shared = Shared(most=1, takes=True)
        answers = await asyncio.gather(*(shared.create(webhook=webhook) for _ in range(20)), return_exceptions=True)
        assert sorted(isinstance(answer, QuotaExceeded) for answer in answers) == [False] + [True] * 19

    asyncio.run(ask())
