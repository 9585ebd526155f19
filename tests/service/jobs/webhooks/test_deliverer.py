"""Attempts, waits and giving up, on a real store; what a receiver answers is the test's, and waits are short."""

import asyncio
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest

from tests.receivers import SECRET
from tests.service.fakes import INFO, LIMITS, PATIENCE_S
from tests.service.jobs.kept import PIXELS, ended, job
from tminus.service.errors import JobNotFound, StorageFailed
from tminus.service.jobs.held_job import ModelOfJobs
from tminus.service.jobs.jobs import JobView, kept_view
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import JobRecord
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.jobs.webhooks import deliverer as module
from tminus.service.jobs.webhooks.deliverer import (
    AT_ONCE,
    FAILING_AT_ONCE,
    MOST_FAILING,
    Deliverer,
    Rules,
    Slots,
    wait_s,
)
from tminus.service.jobs.webhooks.delivery_store import AT_ONCE_EACH, Delivery, Room, Whose
from tminus.service.jobs.webhooks.sender import Names, NotDelivered, Sender, read_secrets
from tminus.service.jobs.webhooks.webhook import AllowedReceivers, Webhook
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
        rules = Rules(sender, AllowedReceivers(), retry_s)
        self.deliverer = Deliverer(self.store, rules, self.view, lambda view: {"id": view.record.id}, self.metrics)

    async def view(self, job_id: str) -> JobView:
        record = await self.store.call(JobStore.get, job_id)
        if record is None or job_id in self.gone:
            raise JobNotFound("no such job")
        return kept_view(record, ModelOfJobs(0, INFO, LIMITS))

    async def end(self, *records: JobRecord) -> None:
        for record in records:
            await self.store.add(record, None, None)
            await self.store.finish(ended(record), PIXELS)

    async def deliveries(self, names: Sequence[str]) -> list[Delivery]:
        found = await self.store.call(JobStore.deliveries, names)
        return [found[name][0] for name in names if name in found]

    @asynccontextmanager
    async def started(self) -> AsyncIterator[None]:
        running = asyncio.create_task(self.deliverer.run())
        try:
            async with asyncio.timeout(PATIENCE_S):
                yield
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    async def until(self, names: Sequence[str], *states: str) -> list[Delivery]:
        """Run until all are in these states."""
        try:
            async with self.started():
                while not all(  # noqa: ASYNC110  the store tells nobody
                    each.state in states for each in await self.deliveries(names)
                ):
                    await asyncio.sleep(0.01)
                return await self.deliveries(names)
        finally:
            self.store.close()

    def counted(self, name: str) -> dict[str, float]:
        samples = [sample for family in self.metrics.registry.collect() for sample in family.samples]
        return {each.labels["outcome"]: each.value for each in samples if each.name == f"tminus_{name}"}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(module, "NOT_THERE_S", 0.01)
    monkeypatch.setattr(module, "POLL_INTERVAL_S", 0.02)


def test_waits_grow_to_a_bound_and_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_WAIT_S", 5.0)
    assert [wait_s(attempts, lambda: 0.5) for attempts in (*range(1, 8), 10**6)] == [5, 20, 80, 320, 1280, *[3600] * 3]
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
    assert running.counted("webhook_attempt_duration_seconds_count") == {"delivered": 1, "failed": 2}
    assert running.counted("webhook_events_total") == {"delivered": 1}
    lines = [record.getMessage() for record in caplog.records]
    assert sum("failed, the next in" in line for line in lines) == 2
    assert sum("delivered to https://hooks.example in" in line for line in lines) == 1
    assert "s3cret" not in caplog.text


@pytest.mark.parametrize(
    ("failure", "most_attempts", "attempts"),
    [
        (NotDelivered("the receiver answered 410", is_final=True), 200, 1),
        (NotDelivered("the receiver answered 503"), 200, None),
        (NotDelivered("the receiver answered 503"), 3, 3),
        (RuntimeError("a mistake of ours"), 200, None),
    ],
    ids=["gone", "time is up", "too many attempts", "a mistake"],
)
def test_it_is_given_up_when_the_receiver_wants_no_more_or_its_time_has_passed(
    failure: Exception, most_attempts: int, attempts: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send(*_: Any) -> None:
        raise failure

    async def run() -> None:
        monkeypatch.setattr(module, "MOST_ATTEMPTS", most_attempts)
        running = Running(send, retry_s=1.0 if attempts is None else 3600.0)
        await running.end(told("a"))
        (delivery,) = await running.until("a", "given_up")
        ours = "something went wrong on the server; its log has the details"
        assert delivery.error == (str(failure) if isinstance(failure, NotDelivered) else ours)
        assert delivery.attempts == attempts if attempts is not None else delivery.attempts > 1
        assert running.counted("webhook_events_total") == {"given_up": 1}

    asyncio.run(run())


@pytest.mark.parametrize("url", ["https://localho\u017ft/x", "https://hooks.example/x"])
def test_an_attempt_that_cannot_be_made_is_one_line_of_the_log(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """Of a URL that an earlier version took, and of one that a library does not take."""

    async def look_up(name: str, _sharer: str) -> list[str]:
        raise UnicodeError(f"label of {name} too long")

    async def run() -> None:
        sender = Sender(read_secrets(SECRET), AllowedReceivers(), ssl.create_default_context(), look_up)
        running = Running(sender.send, retry_s=0.0)
        await running.end(told("a", url))
        await running.until("a", "given_up")

    with caplog.at_level("INFO"):
        asyncio.run(run())
    (line,) = [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert line.getMessage().startswith("webhook completed_")
    assert "given up after 1 attempts" in line.getMessage()
    assert line.exc_info is None


# --- receivers that do not answer ---


def test_receivers_that_never_answer_hold_up_no_other_and_each_has_few_attempts_at_a_time() -> None:
    open_now, most_open = Counter[str](), Counter[str]()

    async def send(url: str, *_: Any) -> None:
        open_now[url] += 1
        most_open[url] = max(most_open[url], open_now[url])
        try:
            await asyncio.sleep(3600 if "slow" in url else 0)
        finally:
            open_now[url] -= 1

    async def run() -> None:
        running = Running(send)
        await running.end(*(told(f"s{k}", f"https://slow{k}.example/", "studio") for k in range(100)))
        await running.end(*(told(f"t{k}", "https://slow.example/", "studio") for k in range(20)))
        quick = [told(f"q{k}", "https://quick.example/", ("studio", "other")[k % 2]) for k in range(20)]
        await running.end(*quick)
        await running.until([record.id for record in quick], "delivered")

    asyncio.run(run())
    assert len(most_open) == 102
    assert most_open["https://slow.example/"] == AT_ONCE_EACH
    assert max(most_open.values()) <= 2 * AT_ONCE_EACH, "of each of two owners"


def test_names_that_no_server_answers_for_hold_up_no_other_receiver(monkeypatch: pytest.MonkeyPatch) -> None:
    hangs, slow = threading.Event(), set[str]()
    names = Names()

    def getaddrinfo(name: str, *_: Any, **__: Any) -> Any:
        if name.startswith("slow"):
            slow.add(name)
            hangs.wait(PATIENCE_S)
        return [(None, None, None, "", ("192.0.2.1", 0))]

    monkeypatch.setattr("tminus.service.jobs.webhooks.sender.socket.getaddrinfo", getaddrinfo)
    monkeypatch.setattr("tminus.service.jobs.webhooks.sender.MOST_LOOKUPS", 32)

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


def test_without_a_slot_an_attempt_that_is_due_is_not_looked_for_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "AT_ONCE", 2)
    monkeypatch.setattr(module, "POLL_INTERVAL_S", 0.1)
    hanging = looks = 0
    room, failing = Slots.room, set[Whose]()

    async def send(url: str, *_: Any) -> None:
        nonlocal hanging
        if "bad" in url:
            raise NotDelivered("no")
        hanging += 1
        await asyncio.sleep(3600)

    def counted(slots: Slots) -> Room | None:
        nonlocal looks
        looks += 1
        found = room(slots)
        failing.update(found.failing if found is not None else ())
        return found

    async def run() -> None:
        nonlocal looks
        monkeypatch.setattr(Slots, "room", counted)
        running = Running(send)
        await running.end(told("bad", "https://bad.example/", "c"))
        async with running.started():
            while (await running.deliveries(["bad"]))[0].attempts < 1:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await running.end(told("a", "https://a.example/", "a"), told("b", "https://b.example/", "b"))
            while hanging < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            looks = 0
            await asyncio.sleep(0.5)  # in which there are five looks
        running.store.close()

    asyncio.run(run())
    assert looks < 20
    assert failing == {("c", "https://bad.example")}, "who failed has fewer slots"


def one(name: str, owner: str, error: str | None = None) -> Delivery:
    return Delivery(name, name, "completed", f"https://{name}.example", "pending", 1, 0, error, owner)


def fill(slots: Slots, owner: str, error: str | None = None) -> list[Delivery]:
    """Begin attempts of an owner, until it may have no more."""
    made: list[Delivery] = []
    while True:
        room = slots.room()
        assert room is not None
        if owner in room.full or (error is not None and (owner in room.full_of_failing or not room.most_failing)):
            return made
        made.append(one(f"{owner}{error}{len(made)}", owner, error))
        slots.take(made[-1])


def test_one_owner_has_half_of_the_slots_and_others_always_find_some() -> None:
    slots = Slots()
    empty, filled = slots.room(), [fill(slots, owner) for owner in "abcd"]
    assert [len(each) for each in filled] == [AT_ONCE // 2, AT_ONCE // 4, AT_ONCE // 8, AT_ONCE // 16]
    for delivery in [delivery for each in filled for delivery in each]:
        slots.give_back(delivery)
    assert slots.room() == empty


def test_receivers_that_failed_last_have_half_of_the_slots_of_all_and_of_their_owner() -> None:
    slots = Slots()
    failing = fill(slots, "a", "it failed")
    assert len(failing) == FAILING_AT_ONCE // 2
    assert len(fill(slots, "b", "it failed")) == FAILING_AT_ONCE // 4
    answering = fill(slots, "a")
    assert answering, "those that answer"
    assert slots.sharer(answering[0]) != slots.sharer(failing[0]), "nor do they share look-ups"


def test_a_receiver_that_failed_is_known_until_it_answers_and_not_too_many_are() -> None:
    slots = Slots()
    failed = [one(f"r{k}", "a") for k in range(MOST_FAILING + 1)]
    for each in failed:
        slots.failed(each)
    slots.answered(failed[5])
    room = slots.room()
    assert room is not None
    assert room.failing == {each.whose for each in failed[1:] if each is not failed[5]}


# --- the store, and the end ---


@pytest.mark.parametrize("retry_s", [3600.0, 0.1])
def test_a_store_that_is_away_for_a_while_costs_no_attempt_but_time(
    monkeypatch: pytest.MonkeyPatch, retry_s: float
) -> None:
    monkeypatch.setattr(module, "MOST_ATTEMPTS", 3)
    sent = []

    async def send(*request: Any) -> None:
        sent.append(request)

    async def run() -> Delivery:
        running = Running(send, retry_s)
        await running.end(told("a"))
        get, failures = SqliteStore.get, [1] * (5 if retry_s > 1 else 10**6)
        claim, looks = SqliteStore.claim_deliveries, [1] * 3

        def get_later(store: SqliteStore, job_id: str) -> JobRecord | None:
            if failures:
                failures.pop()
                raise StorageFailed("the database is away")
            return get(store, job_id)

        def claim_later(store: SqliteStore, *asked: Any) -> list[Delivery]:
            if looks:
                looks.pop()
                raise StorageFailed("the database is away")
            return claim(store, *asked)

        monkeypatch.setattr(SqliteStore, "get", get_later)
        monkeypatch.setattr(SqliteStore, "claim_deliveries", claim_later)
        (delivery,) = await running.until("a", "delivered", "given_up")
        return delivery

    delivery = asyncio.run(run())
    assert (delivery.state, delivery.attempts) == (("delivered", 1) if retry_s > 1 else ("given_up", 0))
    assert len(sent) == delivery.attempts


def test_of_a_job_that_is_gone_or_cannot_be_read_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    async def send(*_: Any) -> None:
        pytest.fail("there is nothing to send")

    async def run() -> None:
        running = Running(send)
        await running.end(told("gone"), told("damaged"))
        running.gone = {"gone"}
        get = SqliteStore.get

        def damaged(store: SqliteStore, job_id: str) -> JobRecord | None:
            if job_id == "damaged":
                raise StorageFailed("it cannot be read", damaged=True)
            return get(store, job_id)

        monkeypatch.setattr(SqliteStore, "get", damaged)
        gone, unreadable = await running.until(["gone", "damaged"], "given_up")
        assert (gone.error, unreadable.error) == ("There is no such job", "the job cannot be read")

    asyncio.run(run())


def test_when_the_server_ends_attempts_end_and_what_was_not_delivered_is_still_owed() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def send(*_: Any) -> None:
        begun.set()
        try:
            await asyncio.sleep(3600)
        finally:
            ended.set()

    async def run() -> None:
        running = Running(send)
        await running.end(told("a"))
        async with running.started():
            await begun.wait()
        assert ended.is_set()
        (delivery,) = await running.deliveries("a")
        assert (delivery.state, delivery.attempts) == ("pending", 1)
        running.store.close()

    asyncio.run(run())
