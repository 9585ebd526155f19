"""Who may write a job, whatever its replicas do: stores beside a model of leases, fences and trials."""

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from tests.postgres import Postgres
from tests.service.jobs.conftest import DatabaseShelf
from tests.service.jobs.kept import SPECS, claim, ended, job, same, snapshot
from tminus.service.jobs.store.job_store import JobStore
from tminus.service.jobs.store.records import OUTCOMES, Key, LeaseLost, Outcome, ReplicaPace
from tminus.service.jobs.store.shared_store import SharedStore
from tminus.service.jobs.store.sqlite_store import SqliteStore

LEASE_S = 120.0  # no lease ends by itself
REPLICAS = st.integers(0, 2)


@dataclass
class Kept:
    """A job as the store should have it."""

    name: str
    n: int
    key: str | None
    holder: int | None  # has the lease, even one that has ended
    writer: int | None  # has the newest fence
    begun: bool
    expired: bool = False
    suspect: bool = False
    on_trial: bool = False
    seed: int | None = None  # of the last snapshot
    outcome: Outcome | None = None


class Stores(RuleBasedStateMachine):
    """One replica on a file, or three on a database."""

    def __init__(self, openers: Sequence[Callable[[str], JobStore]], expire: Callable[[], None] | None = None) -> None:
        super().__init__()
        self.openers, self.end_leases, self.shared = openers, expire, expire is not None
        self.prefix, self.jobs = uuid.uuid4().hex, list[Kept]()
        self.stores = [open_store(self.prefix) for open_store in openers]

    def teardown(self) -> None:
        for store in self.stores:
            store.close()

    def replica(self, number: int) -> tuple[int, JobStore]:
        return (number, self.stores[number]) if self.shared else (0, self.stores[0])

    def shared_replica(self, number: int) -> SharedStore:
        store = self.stores[number]
        assert isinstance(store, SharedStore)
        return store

    @rule(number=REPLICAS, n=st.integers(1, 3), key=st.sampled_from([None, None, "k"]), held=st.booleans())
    def add(self, number: int, n: int, key: str | None, held: bool) -> None:
        number, store = self.replica(number)
        held |= not self.shared
        kept = Kept(f"{self.prefix}{len(self.jobs)}", n, key, number if held else None, number if held else None, held)
        is_new = key is None or all(each.key != key for each in self.jobs)
        record = job(kept.name, replace(SPECS[0], n=n))
        assert store.add(record, Key(key, "h") if key is not None else None, held=held) == is_new
        if is_new:
            self.jobs.append(kept)

    @rule(number=REPLICAS)
    def claim(self, number: int) -> None:
        number, store = self.replica(number)
        open_jobs = [each for each in self.jobs if each.outcome is None]
        free = [each for each in open_jobs if each.holder is None or each.expired or not self.shared]
        suspects = [each for each in free if self.shared and (each.suspect or each.holder is not None)]
        due = sorted((each for each in suspects if each.holder != number), key=lambda each: each.n)
        is_trying = any(each.on_trial and each.holder == number for each in open_jobs)
        chosen = [each for each in free if each not in suspects] + ([] if is_trying else due[:1])
        assert {record.id for record in claim(store).jobs} == {each.name for each in chosen}
        for each in chosen:
            each.suspect = each.on_trial = each in suspects
            each.holder, each.writer, each.begun, each.expired = number, number, True, False

    @rule(number=REPLICAS, data=st.data())
    @precondition(lambda self: self.shared)
    def renew(self, number: int, data: st.DataObject) -> None:
        own = [each for each in self.jobs if each.holder == number and each.outcome is None]
        known = {each.name for each in own if data.draw(st.booleans())}
        assert self.shared_replica(number).renew("build", ReplicaPace(1.0, 0.0), known) == known
        for each in self.jobs:
            if each.name in known:
                each.expired = False
            elif number in (each.holder, each.writer):
                each.holder = None if each.holder == number else each.holder
                each.writer = None if each.writer == number else each.writer

    @rule()
    @precondition(lambda self: self.shared)
    def expire(self) -> None:
        assert self.end_leases is not None
        self.end_leases()
        for each in self.jobs:
            each.expired = each.holder is not None

    @rule(number=REPLICAS, data=st.data(), seed=st.integers(0, 9))
    @precondition(lambda self: self.jobs)
    def save(self, number: int, data: st.DataObject, seed: int) -> None:
        number, store = self.replica(number)
        each = data.draw(st.sampled_from(self.jobs))
        store.save({each.name: snapshot(seed=seed)}, "build")
        if each.writer == number and each.outcome is None:
            each.seed = seed
        found = store.snapshot(each.name, "build")
        assert found is None if each.seed is None else same(found, snapshot(seed=each.seed))

    @rule(number=REPLICAS, data=st.data(), outcome=st.sampled_from(OUTCOMES))
    @precondition(lambda self: self.jobs)
    def finish(self, number: int, data: st.DataObject, outcome: Outcome) -> None:
        number, store = self.replica(number)
        each = data.draw(st.sampled_from(self.jobs))
        record = ended(job(each.name, replace(SPECS[0], n=each.n)), outcome)
        if each.writer == number and each.outcome is None:
            store.finish(record)
            each.outcome, each.seed = outcome, None
        elif each.outcome is None:
            with pytest.raises(LeaseLost):
                store.finish(record)

    @rule(number=REPLICAS, data=st.data(), gives=st.sampled_from(["release", "cancel"]))
    @precondition(lambda self: self.shared and self.jobs)
    def give_up(self, number: int, data: st.DataObject, gives: str) -> None:
        each, store = data.draw(st.sampled_from(self.jobs)), self.shared_replica(number)
        if gives == "cancel":
            assert store.cancel(each.name) == (each.outcome is None)
            if each.outcome is None:
                each.outcome, each.seed = "cancelled", None
        else:
            store.release(each.name)
            if each.writer == number and each.outcome is None:
                each.holder, each.expired = None, False

    @rule(number=REPLICAS)
    def restart(self, number: int) -> None:
        number, store = self.replica(number)
        store.close()
        self.stores[number] = self.openers[number](self.prefix)
        for each in self.jobs if self.shared else ():
            each.writer = None if each.writer == number else each.writer
            if each.holder == number:
                each.holder, each.expired = None, False

    @invariant()
    def every_replica_reads_the_same(self) -> None:
        found = {record.id: record for record in self.stores[-1].page(None, [None, *OUTCOMES], 99)}
        expected = {each.name: each.outcome for each in self.jobs}
        assert {name: record.outcome for name, record in found.items()} == expected
        if self.shared:
            free = [each for each in self.jobs if each.outcome is None and (each.holder is None or each.expired)]
            assert self.shared_replica(0).load().jobs == len(free)
            held = {record.id for record in found.values() if record.held and record.outcome is None}
            assert held == {each.name for each in self.jobs if each.outcome is None and each not in free}


SETTINGS = settings(max_examples=8, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))


def test_whatever_happens_one_store_on_a_file_keeps_its_jobs(tmp_path: Path) -> None:
    def open_file(name: str) -> JobStore:
        return SqliteStore(tmp_path / f"{name}.sqlite3")

    run_state_machine_as_test(lambda: Stores([open_file]), settings=SETTINGS)


@pytest.mark.slow
def test_whatever_replicas_do_one_at_most_may_write_a_job(postgres: Postgres) -> None:
    shelf = DatabaseShelf(postgres.url(), LEASE_S)
    openers = [shelf.opener() for _ in range(3)]
    run_state_machine_as_test(lambda: Stores(openers, shelf.expire), settings=SETTINGS)


def test_a_replica_writes_nothing_to_a_job_that_another_has_taken_over(database: DatabaseShelf) -> None:
    first, second = database.open(), database.open()
    first.add(record := job("a"))
    first.save({"a": snapshot(seed=1)}, "build")
    database.expire()
    assert [each.id for each in claim(second).jobs] == ["a"]

    first.save({"a": snapshot(seed=2)}, "build")
    first.release("a")
    with pytest.raises(LeaseLost):
        first.note_object("a", "an object")
    with pytest.raises(LeaseLost):
        first.finish(ended(record, "failed"))
    assert same(second.snapshot("a", "build"), snapshot(seed=1))
    second.finish(ended(record, "cancelled"))
