"""Who is counted while a new job is let in."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.service.fakes import make_spec
from tminus.service.errors import QuotaExceeded
from tminus.service.jobs.new_jobs import NewJobs
from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.work import Outlook, Ticket


class SlowStore:
    shared = False

    def now_us(self) -> int:
        return 1

    async def number_owed(self, *_: object) -> int:
        await asyncio.sleep(0.01)
        return 0

    async def add(self, *_: object) -> bool:
        await asyncio.sleep(0.01)
        return True


async def accepted_at_once(webhook: Webhook | None) -> int:
    """Of twenty requests of a key that may have one job."""
    live: list[Any] = []
    own = SimpleNamespace(store=SlowStore(), leases=None, cannot_keep=False, model=0, model_name="m")
    own.accept = lambda record, _ticket: live.append(SimpleNamespace(record=record))
    jobs = SimpleNamespace(of_model=lambda _model: own, all_live=lambda: live, by_store=lambda: [own])
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

    asked = (new.create(make_spec(), None, None, owner="key", webhook=webhook, charged=charged) for _ in range(20))
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert {type(answer) for answer in answers if isinstance(answer, BaseException)} == {QuotaExceeded}
    return sum(not isinstance(answer, BaseException) for answer in answers)


@pytest.mark.parametrize("webhook", [None, Webhook("https://example.com/x", ("completed",))], ids=["plain", "webhook"])
def test_jobs_that_come_at_once_count_for_each_other(webhook: Webhook | None) -> None:
    assert asyncio.run(accepted_at_once(webhook)) == 1
