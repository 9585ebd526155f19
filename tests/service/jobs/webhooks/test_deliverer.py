"""Attempts, waits and giving up, on a real store; what a receiver answers is the test's, and waits are short."""

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest

from tests.receivers import SECRET
from tests.service.fakes import INFO, PATIENCE_S
from tests.service.jobs.kept import PIXELS, ended, job
from tminus.service.errors import JobNotFound, StorageFailed
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import JobRecord
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.jobs.views import JobView, kept_view
from tminus.service.jobs.webhooks import deliverer as module
from tminus.service.jobs.webhooks import slots
from tminus.service.jobs.webhooks.deliverer import Deliverer, Rules, wait_s
from tminus.service.jobs.webhooks.names import Names
from tminus.service.jobs.webhooks.receivers import Allowed
from tminus.service.jobs.webhooks.sender import NotDelivered, Sender
from tminus.service.jobs.webhooks.signing import read_secrets
from tminus.service.jobs.webhooks.slots import AT_ONCE_EACH
from tminus.service.jobs.webhooks.webhook import Delivery, Webhook
from tminus.service.metrics import Metrics

Send = Callable[[str, str, bytes, str], Awaitable[None]]


def told(name: str, url: str = "https://hooks.example/x", owner: str = "") -> JobRecord:
    return replace(job(name), webhook=Webhook(url, ("completed",)), owner=owner)


class Running:
    """A deliverer on a store in memory, with a sender of the test's."""

    def __init__(self, send: Send, retry_s: float = 3600.0) -> None:
        self.kept = SqliteStore(None)
        self.store = AsyncStore(self.kept)
        self.metrics = Metrics()
        self.gone: set[str] = set()
        sender: Any = type("FakeSender", (), {"send": staticmethod(send)})
        rules = Rules(sender, Allowed(), retry_s)
        self.deliverer = Deliverer(self.store, rules, self.view, lambda view: {"id": view.record.id}, self.metrics)

    async def view(self, job_id: str) -> JobView:
        record = await self.store.call(JobStore.get, job_id)
        if record is None or job_id in self.gone:
            raise JobNotFound("no such job")
        return kept_view(record, 0, INFO.name)

    async def end(self, *records: JobRecord) -> None:
        for record in records:
            await self.store.add(record, None, None)
            await self.store.finish(ended(record), PIXELS)

    async def deliveries(self, names: Sequence[str]) -> list[Delivery]:
        found = await self.store.call(JobStore.deliveries, names)
        return [found[name][0] for name in names if name in found]

    async def until(self, names: Sequence[str], *states: str) -> list[Delivery]:
        """Run until all are in these states."""
        running = asyncio.create_task(self.deliverer.run(asyncio.sleep))
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not all(  # noqa: ASYNC110  the store tells nobody
                    each.state in states for each in await self.deliveries(names)
                ):
                    await asyncio.sleep(0.01)
                return await self.deliveries(names)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            self.store.close()

    def counted(self, name: str) -> dict[str, float]:
        samples = [sample for family in self.metrics.registry.collect() for sample in family.samples]
        return {each.labels["outcome"]: each.value for each in samples if each.name == f"tminus_{name}"}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(module, "LOOK_S", 0.02)
    return


def test_waits_grow_to_a_bound_and_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 5.0)
    assert [wait_s(attempts, lambda: 0.5) for attempts in range(1, 8)] == [5, 20, 80, 320, 1280, 3600, 3600]
    assert wait_s(10**6, lambda: 0.5) == 3600
    assert (wait_s(1, lambda: 0.0), wait_s(1, lambda: 1.0)) == (3.75, 6.25)
    assert len({wait_s(3) for _ in range(20)}) > 1


def test_500_twice_and_then_200_is_delivered_under_one_id_with_the_reason_in_between(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sent: list[tuple[str, str, bytes, str]] = []

    async def send(*request: Any) -> None:
        sent.append(request)
        if len(sent) < 3:
            raise NotDelivered("the receiver answered 500")

    async def run() -> Running:
        running = Running(send)
        await running.end(told("a", "https://hooks.example/x?token=s3cret"))
        (delivery,) = await running.until("a", "delivered", "given_up")
        assert (delivery.state, delivery.attempts, delivery.error) == ("delivered", 3, None)
        return running

    with caplog.at_level("INFO"):
        running = asyncio.run(run())
    assert len({delivery_id for _, delivery_id, *_ in sent}) == 1
    assert [body for _, _, body, _ in sent] == [b'{"id": "a"}'] * 3
    assert running.counted("webhook_duration_seconds_count") == {"delivered": 1, "failed": 2}
    assert running.counted("webhooks_total") == {"delivered": 1}
    lines = [record.getMessage() for record in caplog.records]
    assert sum("failed, the next in" in line for line in lines) == 2
    assert sum("delivered to https://hooks.example in" in line for line in lines) == 1
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    ("failure", "error", "attempts"),
    [
        (NotDelivered("the receiver answered 410", is_final=True), "the receiver answered 410", 1),
        (NotDelivered("the receiver answered 503"), "the receiver answered 503", None),
        (RuntimeError("a mistake of ours"), "something went wrong on the server; its log has the details", None),
    ],
    ids=["gone", "time is up", "a mistake"],
)
def test_it_is_given_up_when_the_receiver_wants_no_more_or_its_time_has_passed(
    failure: Exception, error: str, attempts: int | None
) -> None:
    async def send(*_: Any) -> None:
        raise failure

    async def run() -> None:
        running = Running(send, retry_s=1.0)
        await running.end(told("a"))
        (delivery,) = await running.until("a", "given_up")
        assert delivery.error == error
        assert delivery.attempts == attempts if attempts is not None else delivery.attempts > 1
        assert running.counted("webhooks_total") == {"given_up": 1}

    asyncio.run(run())


@pytest.mark.parametrize("url", ["https://localho\u017ft/x", "https://hooks.example/x"])
def test_an_attempt_that_cannot_be_made_is_one_line_of_the_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of a URL that an earlier version took, and of one that a library does not take."""

    async def look_up(name: str, _sharer: str) -> list[str]:
        raise UnicodeError(f"label of {name} too long")

    async def run() -> None:
        sender = Sender(read_secrets(SECRET), Allowed(), ssl.create_default_context(), look_up)
        running = Running(sender.send, retry_s=0.0)
        await running.end(told("a", url))
        await running.until("a", "given_up")

    with caplog.at_level("INFO"):
        asyncio.run(run())
    (line,) = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert line.getMessage().startswith("webhook completed_")
    assert "given up after 1 attempts" in line.getMessage()
    assert line.exc_info is None


def test_attempts_are_bounded_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send(*_: Any) -> None:
        raise NotDelivered("no")

    async def run() -> None:
        monkeypatch.setattr(module, "MOST_ATTEMPTS", 3)
        running = Running(send)
        await running.end(told("a"))
        (delivery,) = await running.until("a", "given_up")
        assert delivery.attempts == 3

    asyncio.run(run())


def test_a_receiver_that_never_answers_holds_no_other_and_has_few_attempts_at_a_time() -> None:
    open_now, most_open = Counter[str](), Counter[str]()

    async def send(url: str, *_: Any) -> None:
        open_now[url] += 1
        most_open[url] = max(most_open[url], open_now[url])
        try:
            if "slow" in url:
                await asyncio.sleep(3600)
            await asyncio.sleep(0)
        finally:
            open_now[url] -= 1

    async def run() -> None:
        running = Running(send)
        slow = [told(f"s{k}", "https://slow.example/") for k in range(40)]
        quick = [told(f"q{k}", f"https://quick{k % 3}.example/") for k in range(40)]
        await running.end(*slow, *quick)
        await running.until([record.id for record in quick], "delivered")

    asyncio.run(run())
    assert most_open["https://slow.example/"] == AT_ONCE_EACH
    assert max(most_open.values()) <= AT_ONCE_EACH


def test_a_hundred_receivers_that_never_answer_hold_up_none_that_does_of_their_owner_or_another() -> None:
    hang = set[str]()

    async def send(url: str, *_: Any) -> None:
        if "slow" in url:
            hang.add(url)
            await asyncio.sleep(3600)

    async def run() -> None:
        running = Running(send)
        await running.end(*(told(f"s{k}", f"https://slow{k}.example/", "studio") for k in range(100)))
        quick = [told("same", "https://quick.example/", "studio"), told("other", "https://quick.example/", "other")]
        await running.end(*quick)
        await running.until([record.id for record in quick], "delivered")

    asyncio.run(run())
    assert len(hang) == 100


def test_names_that_no_server_answers_for_hold_up_no_other_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, slow = threading.Event(), set[str]()
    names = Names()

    def getaddrinfo(name: str, *_: Any, **__: Any) -> Any:
        if name.startswith("slow"):
            slow.add(name)
            hangs.wait(PATIENCE_S)
        return [(None, None, None, "", ("192.0.2.1", 0))]

    monkeypatch.setattr("tminus.service.jobs.webhooks.names.socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr("tminus.service.jobs.webhooks.names.MOST_LOOKUPS", 32)
    monkeypatch.setattr(module, "NOT_THERE_S", 0.01)

    async def send(url: str, _id: str, _body: bytes, sharer: str) -> None:
        try:
            async with asyncio.timeout(0.2):  # as ATTEMPT_S does
                await names.look_up(url.split("/")[2], sharer)
        except TimeoutError:
            raise NotDelivered("no answer") from None

    async def run() -> None:
        running = Running(send)
        await running.end(*(told(f"s{k}", f"https://slow{k}.example/", "studio") for k in range(24)))
        quick = [told("same", "https://quick.example/", "studio"), told("other", "https://fast.example/", "other")]
        await running.end(*quick)
        found = await running.until([record.id for record in quick], "delivered")
        assert [each.attempts for each in found] == [1, 1], "what was put off does not count"

    try:
        asyncio.run(run())
        assert not hangs.is_set()
        assert len(slow) >= 16, "the share of one owner"
    finally:
        hangs.set()


def test_receivers_that_failed_last_leave_slots_to_those_that_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "AT_ONCE", 16)
    monkeypatch.setattr(slots, "FAILING_AT_ONCE", 8)
    open_now, tried, most_open = set[str](), set[str](), 0

    async def send(url: str, *_: Any) -> None:
        nonlocal most_open
        if "bad" not in url:
            return
        if url not in tried:
            tried.add(url)
            raise NotDelivered("no answer")
        open_now.add(url)
        most_open = max(most_open, len(open_now))
        await asyncio.sleep(3600)

    async def run() -> None:
        running = Running(send)
        bad = [told(f"b{k}", f"https://bad{k}.example/", f"owner{k % 5}") for k in range(30)]
        await running.end(*bad)
        deliverer = asyncio.create_task(running.deliverer.run(asyncio.sleep))
        async with asyncio.timeout(PATIENCE_S):
            while len(open_now) < 6:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            good = [told(f"g{k}", f"https://good{k}.example/", "owner0") for k in range(10)]
            await running.end(*good)
            while not all(  # noqa: ASYNC110
                each.state == "delivered" for each in await running.deliveries([each.id for each in good])
            ):
                await asyncio.sleep(0.01)
        deliverer.cancel()
        with suppress(asyncio.CancelledError):
            await deliverer
        running.store.close()

    asyncio.run(run())
    assert 6 <= most_open <= 8


def test_without_a_slot_an_attempt_that_is_due_is_not_looked_for_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slots, "AT_ONCE", 2)
    monkeypatch.setattr(module, "LOOK_S", 0.1)
    hanging = 0

    async def send(url: str, *_: Any) -> None:
        nonlocal hanging
        if "bad" in url:
            raise NotDelivered("no")
        hanging += 1
        await asyncio.sleep(3600)

    async def run() -> int:
        running = Running(send)
        room, looks = running.deliverer._slots.room, 0

        def counted() -> slots.Room | None:
            nonlocal looks
            looks += 1
            return room()

        monkeypatch.setattr(running.deliverer._slots, "room", counted)
        await running.end(told("bad", "https://bad.example/", "c"))
        deliverer = asyncio.create_task(running.deliverer.run(asyncio.sleep))
        async with asyncio.timeout(PATIENCE_S):
            while (await running.deliveries(["bad"]))[0].attempts < 1:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await running.end(told("a", "https://a.example/", "a"), told("b", "https://b.example/", "b"))
            while hanging < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        looks = 0
        await asyncio.sleep(0.5)  # in which there are five looks
        deliverer.cancel()
        with suppress(asyncio.CancelledError):
            await deliverer
        running.store.close()
        return looks

    assert asyncio.run(run()) < 20


@pytest.mark.parametrize("retry_s", [3600.0, 0.1])
def test_a_store_that_cannot_read_a_job_for_a_while_costs_no_attempt_but_time(
    monkeypatch: pytest.MonkeyPatch, retry_s: float
) -> None:
    monkeypatch.setattr(module, "NOT_THERE_S", 0.01)
    monkeypatch.setattr(module, "MOST_ATTEMPTS", 3)
    sent = []

    async def send(*request: Any) -> None:
        sent.append(request)

    async def run() -> Delivery:
        running = Running(send, retry_s)
        await running.end(told("a"))
        get, failures = running.kept.get, [1] * (5 if retry_s > 1 else 10**6)

        def away(job_id: str) -> JobRecord | None:
            if failures:
                failures.pop()
                raise StorageFailed("the database is away")
            return get(job_id)

        running.kept.get = away  # type: ignore[method-assign]
        (delivery,) = await running.until("a", "delivered", "given_up")
        return delivery

    delivery = asyncio.run(run())
    assert (delivery.state, delivery.attempts) == (("delivered", 1) if retry_s > 1 else ("given_up", 0))
    assert len(sent) == delivery.attempts


def test_of_a_job_that_is_gone_or_cannot_be_read_nothing_is_sent() -> None:
    async def send(*_: Any) -> None:
        pytest.fail("there is nothing to send")

    async def run() -> None:
        running = Running(send)
        await running.end(told("gone"), told("damaged"))
        running.gone = {"gone"}
        get = running.kept.get

        def damaged(job_id: str) -> JobRecord | None:
            if job_id == "damaged":
                raise StorageFailed("it cannot be read", damaged=True)
            return get(job_id)

        running.kept.get = damaged  # type: ignore[method-assign]
        gone, unreadable = await running.until(["gone", "damaged"], "given_up")
        assert (gone.error, unreadable.error) == ("There is no such job", "the job cannot be read")

    asyncio.run(run())


def test_a_store_that_is_away_for_a_while_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    async def send(*request: Any) -> None:
        sent.append(request)

    async def run() -> None:
        running = Running(send)
        await running.end(told("a"))
        claim, failures = running.kept.claim_deliveries, [1, 2, 3]

        def away(*args: Any) -> list[Delivery]:
            if failures:
                failures.pop()
                raise StorageFailed("the database is away")
            return claim(*args)

        running.kept.claim_deliveries = away  # type: ignore[method-assign]
        await running.until("a", "delivered")

    asyncio.run(run())
    assert len(sent) == 1


def test_when_the_server_ends_attempts_end_and_what_was_not_delivered_is_still_owed() -> None:
    async def send(*_: Any) -> None:
        await asyncio.sleep(3600)

    async def run() -> None:
        running = Running(send)
        await running.end(told("a"))
        deliverer = asyncio.create_task(running.deliverer.run(asyncio.sleep))
        async with asyncio.timeout(PATIENCE_S):
            while not running.deliverer._attempts:  # noqa: ASYNC110
                await asyncio.sleep(0)
        deliverer.cancel()
        with suppress(asyncio.CancelledError):
            await deliverer
        assert running.deliverer._attempts == set()
        (delivery,) = await running.deliveries("a")
        assert (delivery.state, delivery.attempts) == ("pending", 1)
        running.store.close()

    asyncio.run(run())
