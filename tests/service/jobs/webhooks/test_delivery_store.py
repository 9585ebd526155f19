"""What is owed to webhooks, on a SQLite file and a real PostgreSQL: the same tests on each."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest

from tests.service.jobs.conftest import DatabaseShelf, FileShelf, Shelf
from tests.service.jobs.kept import PIXELS, ended, job
from tests.service.jobs.kept import claim as claim_jobs
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import OUTCOMES, JobRecord
from tminus.service.jobs.webhooks.delivery_store import DELIVERY_BYTES, Delivery, Room
from tminus.service.jobs.webhooks.webhook import EVENTS, Event, Webhook

pytestmark = pytest.mark.slow

URL = "https://hooks.example/path?token=s3cret"
HELD_S = 60.0


@pytest.fixture
def store(shelf: Shelf) -> JobStore:
    return shelf.open()


def told(name: str, *events: Event, url: str = URL) -> JobRecord:
    """A job of which these events are told, or all."""
    return replace(job(name), webhook=Webhook(url, events or EVENTS))


def claim(
    store: JobStore,
    *busy: str,
    most: int = 99,
    most_failing: int = 99,
    each: int = 99,
    held_s: float = HELD_S,
    **of: Any,
) -> list[Delivery]:
    room = Room(most, most_failing, each, frozenset(("", receiver) for receiver in busy), **of)
    return store.claim_deliveries(room, held_s)


def owe(store: JobStore, name: str, url: str = URL, owner: str = "") -> None:
    """End a job whose end is to be told."""
    record = replace(told(name, "completed", url=url), owner=owner)
    store.add(record)
    store.finish(ended(record))


def states(store: JobStore, name: str) -> dict[str, str]:
    return {each.event: each.state for each in store.deliveries([name]).get(name, [])}


def test_a_webhook_comes_back_as_it_was(shelf: Shelf, store: JobStore) -> None:
    records = [told("a"), told("b", "completed"), job("c")]
    for record in records:
        store.add(record)
    store.close()
    store = shelf.open()
    assert [store.get(name) for name in "abc"] == records
    assert [record.webhook for record in claim_jobs(store).jobs] == [each.webhook for each in records]


@pytest.mark.parametrize(
    ("outcome", "owed"),
    [("done", ["start", "output", "completed"]), ("failed", ["completed"]), ("cancelled", ["completed"])],
)
def test_with_the_end_of_a_job_is_owed_what_has_happened(store: JobStore, outcome: str, owed: list[str]) -> None:
    store.add(told("a"))
    assert states(store, "a") == {}
    store.finish(ended(told("a"), outcome), PIXELS if outcome == "done" else None)  # type: ignore[arg-type]
    assert states(store, "a") == dict.fromkeys(owed, "pending")
    assert list(states(store, "a")) == owed, "in order"
    assert sorted(each.event for each in claim(store)) == sorted(owed)


def test_only_what_is_wanted_is_owed_and_nothing_without_a_webhook(store: JobStore) -> None:
    for record in (told("a", "output"), told("b", "start"), told("c", "completed"), job("d")):
        store.add(record)
        store.started(record)
        store.finish(ended(record), PIXELS)
    assert {name: list(states(store, name)) for name in "abcd"} == {
        "a": ["output"], "b": ["start"], "c": ["completed"], "d": [],
    }  # fmt: skip


def test_a_start_is_owed_once_and_while_the_job_runs(store: JobStore) -> None:
    store.add(told("a"))
    for _ in range(2):
        store.started(told("a"))
    (start,) = claim(store)
    assert (start.event, start.attempts, start.receiver) == ("start", 1, "https://hooks.example")
    assert start.id.startswith("start_")
    store.settle(replace(start, state="delivered"))
    store.finish(ended(told("a")), PIXELS)
    assert states(store, "a") == {"start": "delivered", "output": "pending", "completed": "pending"}
    store.add(told("b"))
    store.finish(ended(told("b"), "cancelled"))
    store.started(told("b"))
    assert list(states(store, "b")) == ["completed"], "one that has ended does not start"


def test_what_is_claimed_is_nobody_elses_until_it_is_settled(store: JobStore) -> None:
    owe(store, "a")
    (first,) = claim(store)
    assert claim(store) == []
    assert store.settle(replace(first, error="the receiver answered 500"), 0.0)
    (second,) = claim(store)
    assert (second.id, second.attempts, second.error) == (first.id, 2, "the receiver answered 500")
    assert second.since_us == first.since_us
    assert not store.settle(replace(first, state="delivered")), "that attempt is over"
    assert store.settle(replace(second, state="delivered"))
    assert not store.settle(replace(second, state="given_up")), "what is delivered stays so"
    assert claim(store) == []
    assert states(store, "a") == {"completed": "delivered"}


def test_a_claim_ends_and_what_waits_becomes_due_by_the_stores_clock(store: JobStore) -> None:
    owe(store, "a")
    (first,) = claim(store, held_s=0.0)
    (second,) = claim(store)
    assert (second.id, second.attempts) == (first.id, 2)
    assert not store.settle(replace(first, state="delivered")), "who slept past its claim keeps nothing"
    assert store.settle(second, 3600.0)
    assert claim(store) == []
    assert states(store, "a") == {"completed": "pending"}


def test_a_receiver_gets_no_more_than_its_share_of_a_claim_and_a_busy_one_nothing(store: JobStore) -> None:
    for k in range(5):
        owe(store, f"slow{k}", "https://slow.example/x")
    for k in range(3):
        owe(store, f"other{k}", f"https://other{k}.example/x")
    found = claim(store, "https://other2.example", most=4, each=2)
    assert [each.job_id for each in found] == ["slow0", "other0", "other1", "slow1"], "each receiver in turn"
    assert [each.job_id for each in claim(store, "https://slow.example")] == ["other2"]
    assert len(claim(store, most=2)) == 2


def test_what_a_receiver_is_owed_is_counted_up_to_a_number(store: JobStore) -> None:
    for k in range(3):
        owe(store, f"{k}")
    receiver = "https://hooks.example"
    assert [store.number_owed("", receiver, most) for most in (1, 3, 9)] == [1, 3, 3]
    assert store.number_owed("", "https://other.example", 9) == 0
    assert store.number_owed("other", receiver, 9) == 0, "what another's jobs have to tell it is another's"
    (first, *_) = claim(store)
    store.settle(replace(first, state="given_up"))
    assert store.number_owed("", receiver, 9) == 2


def test_owners_have_their_turns_and_those_that_are_full_none(store: JobStore) -> None:
    for k in range(6):
        owe(store, f"m{k}", f"https://m{k}.example/", "many")
    owe(store, "f0", "https://m0.example/", "few")
    owe(store, "f1", "https://f1.example/", "few")
    room = Room(3, 3, 4, full=frozenset({"many"}))
    assert [(each.owner, each.job_id) for each in store.claim_deliveries(room, 0.0)] == [("few", "f0"), ("few", "f1")]
    assert [each.job_id for each in claim(store, most=4, held_s=0.0)] == ["m0", "f0", "m1", "f1"]
    busy = Room(9, 9, 4, busy=frozenset({("many", "https://m0.example")}))
    assert [each.job_id for each in store.claim_deliveries(busy, 0.0)] == ["m1", "f0", "m2", "f1", "m3", "m4", "m5"]


def test_receivers_that_failed_last_have_a_part_of_a_claim(store: JobStore) -> None:
    for k in range(4):
        owe(store, f"failed{k}", f"https://failed{k}.example/")
    for each in claim(store):
        store.settle(replace(each, error="the receiver answered 500"))
    for k in range(3):
        owe(store, f"new{k}", f"https://new{k}.example/")
    found = claim(store, most=9, most_failing=2, held_s=0.0)
    assert sorted(each.job_id for each in found) == ["failed0", "failed1", "new0", "new1", "new2"]
    assert [each.error is not None for each in found].count(True) == 2
    known = {"failing": frozenset({("", "https://new0.example"), ("", "https://new1.example")})}
    found = claim(store, most=9, most_failing=0, held_s=0.0, **known)
    assert [each.job_id for each in found] == ["new2"]
    found = claim(store, most=9, held_s=0.0, full_of_failing=frozenset({""}))
    assert [each.job_id for each in found] == ["new0", "new1", "new2"]


def test_what_was_no_attempt_is_not_counted(store: JobStore) -> None:
    owe(store, "a")
    (first,) = claim(store)
    assert store.settle(first, 0.0, counts=False)
    assert [each.attempts for each in store.deliveries(["a"])["a"]] == [0]
    assert not store.settle(replace(first, state="delivered")), "it is over"
    (again,) = claim(store)
    assert again.attempts == 1
    assert store.settle(replace(again, state="delivered"))


def test_a_deleted_job_owes_nothing(store: JobStore) -> None:
    store.add(told("a"))
    store.finish(ended(told("a")), PIXELS)
    (held, *_) = claim(store, most=1)
    assert store.delete("a")
    assert store.deliveries(["a"]) == {}
    assert claim(store) == []
    assert not store.settle(replace(held, state="delivered"))


def test_a_sweep_waits_for_what_is_owed_but_not_where_room_is_short(store: JobStore) -> None:
    for name in "abc":
        store.add(told(name, "completed"))
        store.finish(ended(told(name, "completed"), at_us=100), PIXELS)
    store.add(job("plain"))
    store.finish(ended(job("plain"), at_us=100), PIXELS)

    def left() -> list[str]:
        while store.sweep(200, 10**9):
            pass
        return sorted(record.id for record in store.page(None, OUTCOMES, 9))

    assert left() == ["a", "b", "c"], "pending"
    assert not store.sweep(200, 10**9, store.now_us() - 60 * 10**6)
    for each in claim(store):
        if each.job_id != "c":
            store.settle(replace(each, state="delivered" if each.job_id == "a" else "given_up"))
    assert left() == ["c"]
    store.add(job("newest"))
    store.finish(ended(job("newest"), at_us=300), PIXELS)
    while store.sweep(0, 1):
        pass
    assert [record.id for record in store.page(None, OUTCOMES, 9)] == ["newest"]
    store.add(told("untried", "completed"))
    store.finish(ended(told("untried", "completed"), at_us=100), PIXELS)
    store.sweep(200, 10**9, store.now_us() + 10**6)  # its event lies before that, and nobody tries it any more
    assert [record.id for record in store.page(None, OUTCOMES, 9)] == ["newest"]


def test_a_webhook_counts_in_the_room_of_its_job(shelf: Shelf, store: JobStore) -> None:
    for record in (told("a"), job("b")):
        store.add(record)
        store.finish(ended(record), PIXELS)
    store.close()
    ((plain,), (with_webhook,)) = sorted(shelf.read("SELECT bytes FROM jobs"))
    assert with_webhook == plain + len(URL) + 3 * DELIVERY_BYTES


def test_of_a_damaged_webhook_nothing_is_told_and_of_a_damaged_job_that_it_failed(
    shelf: Shelf, store: JobStore
) -> None:
    for name in "abc":
        store.add(told(name))
    store.close()
    assert shelf.change("UPDATE jobs SET webhook = '{' WHERE id = 'a'") == 1
    assert shelf.change("UPDATE jobs SET spec = '{' WHERE id = 'c'") == 1
    store = shelf.open()
    assert [record.id for record in claim_jobs(store).jobs] == ["b"]
    assert (states(store, "a"), states(store, "c")) == ({}, {"completed": "pending"})


# --- a file ---


def test_what_a_killed_server_attempted_is_due_at_the_next_start(file: FileShelf) -> None:
    store = file.open()
    owe(store, "a")
    assert len(claim(store)) == 1
    store.close()
    (again,) = claim(file.open())
    assert again.attempts == 2


# --- a database ---


def test_of_two_servers_one_attempts_a_delivery_and_the_other_takes_over(database: DatabaseShelf) -> None:
    one, other = database.open(), database.open()
    for k in range(40):
        owe(one, f"{k}")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda store: [claim(store, most=3) for _ in range(10)], (one, other)))
    ids = [each.id for found in both for some in found for each in some]
    assert len(ids) == len(set(ids)) == 40
    assert all(any(some for some in found) for found in both)
    database.change("UPDATE deliveries SET held_until_us = 1")  # as when the time has passed
    assert len(claim(other)) == 40


def test_of_a_job_its_holder_says_that_it_has_begun_and_any_replica_of_its_weights_that_it_was_cancelled(
    database: DatabaseShelf,
) -> None:
    holder, other, of_other_weights = database.open(), database.open(), database.open("cd" * 32)
    holder.add(told("a"))
    other.started(told("a"))
    assert states(holder, "a") == {}
    holder.started(told("a"))
    assert states(other, "a") == {"start": "pending"}
    assert other.cancel("a")
    assert states(holder, "a") == {"start": "pending", "completed": "pending"}
    assert claim(of_other_weights) == []
    assert len(claim(holder)) == 2


def test_what_a_newer_server_owes_is_left_to_such_ones_and_what_it_deletes_owes_nothing(
    database: DatabaseShelf,
) -> None:
    store = database.open()
    owe(store, "a")
    database.change("UPDATE jobs SET format = 99")
    assert claim(store) == []
    assert [each.attempts for each in store.deliveries(["a"])["a"]] == [0]
    assert database.change("DELETE FROM jobs WHERE id = 'a'") == 1
    assert database.read("SELECT count(*) FROM deliveries") == [(0,)]
