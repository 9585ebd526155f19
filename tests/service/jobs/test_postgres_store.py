"""What replicas that share a PostgreSQL do beside what every store does: leases, fences, and a database that goes."""

import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import sqlalchemy as sa

from tests import postgres as postgres_server
from tests.service.fakes import wait_until
from tests.service.jobs.conftest import WEIGHTS, DatabaseShelf
from tests.service.jobs.kept import MANY, PIXELS, SPECS, ended, job, snapshot
from tminus.model.catalogue import SAMPLER_FACTS
from tminus.service.errors import NewerJob, StorageFailed
from tminus.service.jobs.store import postgres_store
from tminus.service.jobs.store.job_store import RECORD_BYTES
from tminus.service.jobs.store.postgres_store import (
    GONE,
    JOB_FORMAT,
    PostgresStore,
    connect,
    format_of,
    open_postgres,
    own_address,
)
from tminus.service.jobs.store.records import Key, LeaseLost, ReplicaPace, StoredObject
from tminus.service.jobs.webhooks.delivery_store import kept_bytes
from tminus.service.jobs.webhooks.webhook import Webhook
from tminus.service.scheduling.room import ClusterLoad, Intake
from tminus.service.spec import Inputs, SampleSpec

pytestmark = pytest.mark.slow

LEASE_S = 1.0
ROWS = 64
PACE = ReplicaPace(places_per_s=100.0, backlog_s=2.0)
TABLE = "ab" * 8
SPEC_OF_TABLE = replace(SPECS[0], sampler="tuned", table=TABLE)


def renew(store: PostgresStore, fingerprint: str, pace: ReplicaPace) -> frozenset[str]:
    """Of all that it holds."""
    return store.renew(fingerprint, pace, tuple(store._fences))


def taken(
    store: PostgresStore, intake: Intake | None = None, build: str = "build", tables: Sequence[str] = ()
) -> list[str]:
    """The jobs that it claims."""
    return [record.id for record in store.claim(build, intake or Intake(MANY), MANY, ROWS, tables).jobs]


@pytest.fixture
def soon(database: DatabaseShelf) -> DatabaseShelf:
    """Its leases end soon."""
    database.lease_s = LEASE_S
    return database


# --- leases ---


def test_what_one_holds_no_other_claims_until_its_lease_ends(soon: DatabaseShelf) -> None:
    one, other = soon.open(), soon.open()
    one.add(job("a"))
    assert taken(other) == []
    for _ in range(3):
        time.sleep(LEASE_S / 2)
        assert renew(one, "build", PACE) == {"a"}
        assert taken(other) == []
    wait_until(lambda: taken(other) == ["a"])
    assert renew(one, "build", PACE) == frozenset()
    assert renew(other, "build", PACE) == {"a"}


def test_a_job_whose_holder_went_in_a_transaction_is_claimed_though_the_database_heard_of_no_end(
    database: DatabaseShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when packets are dropped, or the process is stopped: its connection is there, and has locked the row."""
    monkeypatch.setattr(postgres_store, "STATEMENT_S", 1.0)
    gone, other = database.open(), database.open()
    gone.add(job("a"))
    database.expire()
    with suppress(StorageFailed), gone._transaction() as run:  # whose connection is closed
        run(sa.update(gone._tables.jobs).values(bytes=1))
        assert taken(other) == [], "it is locked"
        wait_until(lambda: taken(other) == ["a"])


def test_a_replica_claims_one_suspect_at_a_time_the_shortest_first(database: DatabaseShelf) -> None:
    gone, gone_too, other, open_store = database.open(), database.open("cd" * 32), database.open(), database.opener()
    one, of_other_weights = open_store(WEIGHTS), open_store("cd" * 32)
    database.opened += [one, of_other_weights]
    for name, n in (("long", 3), ("short", 1), ("middle", 2)):
        gone.add(job(name, replace(SPECS[0], n=n)))
    gone_too.add(job("of other weights"))
    database.expire()
    assert taken(one) == ["short"]
    for store in (one, of_other_weights):
        assert taken(store) == [], "if the first ends this replica, it is the only suspect that was lost again"
    assert taken(other) == ["middle"]
    one.finish(ended(job("short")), PIXELS)
    assert taken(one) == ["long"]
    one.finish(ended(job("long")), PIXELS)
    assert taken(of_other_weights) == ["of other weights"]


def test_a_suspect_that_has_run_for_a_lease_holds_up_no_other(soon: DatabaseShelf) -> None:
    gone, one = soon.open(), soon.open()
    for name in "ab":
        gone.add(job(name))
    soon.expire()
    assert taken(one) == ["a"]
    wait_until(lambda: renew(one, "build", PACE) == {"a"} and taken(one) == ["b"])


def test_a_job_that_was_left_behind_again_waits_twice_as_long_each_time(database: DatabaseShelf) -> None:
    def left_for(leases: float) -> None:
        database.change(f"UPDATE jobs SET lease_until = now() - interval '{leases * database.lease_s} seconds'")

    database.open().add(job("a"))
    for waited in (0, 4, 8, 16):
        left_for(waited - 0.1)
        assert taken(database.open()) == []
        left_for(waited + 0.1)
        assert taken(database.open()) == ["a"]
    assert database.read("SELECT takeovers, crashes, outcome FROM jobs") == [(4, 0, None)]


def test_many_who_claim_at_once_get_each_job_once(database: DatabaseShelf) -> None:
    first = database.open()
    names = [f"j{k:02d}" for k in range(40)]
    for name in names:
        first.add(job(name))
    first.close()
    stores = [database.open() for _ in range(6)]

    def take(store: PostgresStore) -> list[str]:
        found = []
        while records := store.claim("build", Intake(0.0), 3 * SPECS[0].num_passes, ROWS).jobs:
            assert len(records) <= 3
            found += [record.id for record in records]
        return found

    with ThreadPoolExecutor(len(stores)) as pool:
        taken = list(pool.map(take, stores))
    assert sorted(name for each in taken for name in each) == names


@pytest.mark.parametrize("begun", [False, True])
def test_no_more_is_claimed_than_there_is_room_for_but_one_job_always(database: DatabaseShelf, begun: bool) -> None:
    first = database.open()
    for name in "abc":
        first.add(job(name, SPECS[1]), held=begun)  # three guided rows
    first.close()
    store = database.open()

    def claimed(places: float, rows: int = ROWS) -> int:
        intake = Intake(0.0 if begun else places, [0.0], oldest_us=0)
        return len(store.claim("build", intake, places if begun else 0.0, rows).jobs)

    assert claimed(MANY, rows=2) == 0, "none of more rows than it takes"
    assert claimed(0.0) == 0
    assert claimed(1.0) == 1, "a job may be larger than all the room"
    assert claimed(2 * 3 * 2 * SPECS[1].num_passes) == 2


def test_what_was_begun_comes_first_and_takes_the_room_of_new_jobs(database: DatabaseShelf) -> None:
    first, store = database.open(), database.open()
    for name, held in (("new", False), ("begun", True), ("begun later", True)):
        first.add(job(name), held=held)
    first.close()
    of_one = SPECS[0].num_passes
    assert taken(store, Intake(2.0 * of_one)) == ["begun", "begun later"]
    assert taken(store, Intake(1.0)) == ["new"]


def test_the_shortest_of_the_new_jobs_are_claimed_and_the_oldest_by_who_has_none_that_is_older(
    database: DatabaseShelf,
) -> None:
    first, store = database.open(), database.open()
    for name, n in (("long", 3), ("short", 1), ("middle", 2), ("short later", 1)):
        first.add(job(name, replace(SPECS[0], n=n)), held=False)
    first.close()
    length = float(SPECS[0].num_passes)
    busy = Intake(length, [length], oldest_us=0)
    assert store.claim("build", busy, MANY, ROWS).jobs == []
    assert busy.refused == length
    with_longer = Intake(length, [9 * length], oldest_us=0)
    assert taken(store, with_longer) == ["short"]
    assert with_longer.refused == length
    newer = Intake(length, [length], oldest_us=2**60)
    assert taken(store, newer) == ["long"]
    assert taken(store) == ["short later", "middle"]


def test_a_page_of_those_that_wait_or_of_those_that_run_is_full(database: DatabaseShelf) -> None:
    store = database.open()
    for number in range(9):
        store.add(job(f"j{number}", created_us=number), held=number % 3 == 0)
    assert [record.id for record in store.page(None, [None], 3, held=True)] == ["j6", "j3", "j0"]
    assert [record.id for record in store.page(None, [None], 3, held=False)] == ["j8", "j7", "j5"]
    assert len(store.page(None, [None], 99)) == 9


# --- what all have to do ---


def _but_least(load: ClusterLoad) -> ClusterLoad:
    return replace(load, least_s=math.inf)


def test_the_load_is_that_of_all_who_live_and_of_what_nobody_holds(database: DatabaseShelf) -> None:
    one, other = database.open(), database.open()
    assert one.load() == ClusterLoad()
    renew(one, "build", ReplicaPace(100.0, 40.0))
    renew(other, "build", ReplicaPace(300.0, 80.0))
    renew(other, "another build", ReplicaPace(200.0, 80.0))
    one.add(job("held"))
    for name in ("a", "b"):
        assert one.add(job(name, SPECS[1]), held=False)
    places = 2 * 3 * 2 * SPECS[1].num_passes
    assert _but_least(other.load()) == ClusterLoad(2, 400.0, 60.0, 2, places)
    assert [store.load().least_s for store in (one, other)] == pytest.approx([80.0, 40.0], abs=10.0), "of the others"
    assert taken(other, Intake(1.0)) == ["a"]
    assert _but_least(one.load()) == ClusterLoad(2, 400.0, 60.0, 1, places / 2)
    database.expire()
    database.change("UPDATE replicas SET lease_until = now() - interval '1 second'")
    assert one.load() == ClusterLoad(0, 0.0, 0.0, 3, places + SPECS[0].num_passes), "all are gone"


def test_of_many_who_add_with_one_key_at_once_one_is_kept(database: DatabaseShelf) -> None:
    stores = [database.open() for _ in range(6)]
    for number in range(6):
        key = Key(f"key {number}", "h")

        def add(numbered: tuple[int, PostgresStore], key: Key = key) -> bool:
            return numbered[1].add(job(f"{key.name} {numbered[0]}"), key, Inputs(PIXELS[0]))

        with ThreadPoolExecutor(len(stores)) as pool:
            assert sorted(pool.map(add, enumerate(stores))) == [False] * 5 + [True]
        assert len({store.find(key)[0].id for store in stores}) == 1  # type: ignore[index]
    assert database.read("SELECT (SELECT count(*) FROM jobs), (SELECT count(*) FROM inputs)") == [(6, 6)]
    assert sum(len(renew(store, "build", PACE)) for store in stores) == 6


# --- builds ---


def test_a_job_that_was_begun_is_left_to_its_build_while_one_of_it_lives(soon: DatabaseShelf) -> None:
    begun, same_build, another = soon.open(), soon.open(), soon.open()
    begun.add(job("a"))
    begun.add(job("not begun"))
    begun.save({"a": snapshot()}, "build")
    renew(same_build, "build", PACE)
    renew(another, "another build", PACE)
    soon.expire()
    assert taken(another, build="another build") == ["not begun"]
    assert taken(same_build) == ["a"]
    soon.expire()
    same_build.close()
    time.sleep(LEASE_S)
    assert taken(another, build="another build") == ["a"], "it starts over"
    assert renew(another, "another build", PACE) == {"a", "not begun"}


def test_a_job_of_a_table_is_left_to_servers_that_have_it_for_as_long_as_one_may_be_starting(
    soon: DatabaseShelf,
) -> None:
    has, lacks = soon.open(), soon.open()
    has.add(job("tuned", SPEC_OF_TABLE), held=False)
    has.add(job("plain"), held=False)
    renew(has, "with the table", PACE)
    renew(lacks, "without", PACE)
    assert taken(lacks, build="without", tables=["another"]) == ["plain"]
    assert taken(has, build="with the table", tables=["another", TABLE]) == ["tuned"]
    soon.expire()
    assert taken(lacks, build="without", tables=["another"]) == [], "nor one that was begun"
    has.close()
    assert taken(lacks, build="without") == [], "it may be starting again"
    soon.change("UPDATE replicas SET lease_until = lease_until - interval '5 minutes' WHERE fingerprint <> 'without'")
    assert taken(lacks, build="without") == ["tuned"]


def test_weights_and_namespaces_do_not_see_each_other(
    database: DatabaseShelf, postgres: postgres_server.Postgres
) -> None:
    one, other = database.open(), database.open("cd" * 32)
    neighbour = DatabaseShelf(postgres.url())
    third = neighbour.open()
    key = Key("k", "h")
    assert all(store.add(job(f"j{k}"), key) for k, store in enumerate((one, other, third)))
    one.close()
    assert other.get("j0") is None
    assert taken(other) == []
    assert not other.delete("j0")
    assert third.get("j0") is None
    assert [record.id for record in third.page(None, [None], 9)] == ["j2"]
    third.close()


# --- swept ---


def test_what_has_ended_of_weights_that_nobody_serves_is_swept_by_its_age(database: DatabaseShelf) -> None:
    one, other = database.open(), database.open("cd" * 32)
    renew(other, "build", PACE)
    hook = Webhook("https://hooks.example/x", ("completed",))
    for name, at_us in (("old", 100), ("owed", 100), ("new", 300)):
        told = replace(job(name), webhook=hook if name == "owed" else None)
        other.add(told)
        other.finish(ended(told, at_us=at_us), PIXELS)
    other.add(job("large"))
    other.note_object("large", "object")
    other.finish(ended(job("large"), at_us=100), StoredObject("object", 10**6, "sha"))
    other.add(job("waits"))
    one.add(job("here"))
    one.finish(ended(job("here"), at_us=100), PIXELS)

    def swept(max_bytes: int = 10**9) -> set[object]:
        while one.sweep(200, max_bytes):
            pass
        return {name for (name,) in database.read("SELECT id FROM jobs")}

    assert swept() == {"old", "owed", "new", "large", "waits"}, "who serves them sweeps them"
    other.close()
    assert swept(1) == {"old", "owed", "new", "large", "waits"}, "who has just gone may be starting again"
    with one._transaction() as run:
        run(sa.update(one._replicas).values(lease_until=one._replicas.c.lease_until - GONE))
    assert swept(1) == {"owed", "new", "waits"}, "how much may stay is not for others to say"
    assert database.read("SELECT key, state FROM objects") == [("object", "unneeded")]
    assert database.read("SELECT job_id FROM images ORDER BY 1") == [("new",), ("owed",)]
    assert not one.sweep(200, 10**9, one.now_us() - 60 * 10**6)
    one.sweep(200, 10**9, one.now_us() + 10**6)  # nobody tries what is owed any more
    assert swept() == {"new", "waits"}


def test_weights_are_swept_by_one_replica_at_a_time_whoever_serves_them(database: DatabaseShelf) -> None:
    one, third, other = (database.open(each * 32) for each in ("ab", "ef", "cd"))
    other.add(job("old"))
    other.finish(ended(job("old"), at_us=100), PIXELS)
    with third._transaction() as run:
        assert third._may_sweep(run, ("cd" * 32)[:16])
        assert not one.sweep(200, 10**9)
        assert not other.sweep(200, 10**9)
    assert one.sweep(200, 10**9)
    assert other.get("old") is None


# --- cancelled elsewhere ---


def test_a_job_that_is_cancelled_at_another_replica_is_lost_to_its_holder_and_takes_little_room(
    database: DatabaseShelf,
) -> None:
    holder, asked = database.open(), database.open()
    hook = Webhook("https://hooks.example/x")
    picture = np.random.default_rng(1).integers(0, 256, (200, 200, 3), np.uint8)
    told = replace(job("a"), webhook=hook)
    holder.add(ended(job("other"), at_us=1))
    holder.add(told, None, Inputs(picture))
    holder.add(job("b"))
    holder.save({"a": snapshot()}, "build")
    record = asked.get("a")
    assert record is not None
    assert record.held
    assert asked.cancel("a")
    assert not asked.cancel("a")
    assert not asked.cancel("never was")
    assert renew(holder, "build", PACE) == {"b"}
    with pytest.raises(LeaseLost):
        holder.finish(ended(told), PIXELS)
    record = holder.get("a")
    assert record is not None
    assert record.outcome == "cancelled"
    assert holder.snapshot("a", "build") is None
    assert database.read("SELECT bytes FROM jobs WHERE id = 'a'") == [(RECORD_BYTES + kept_bytes(hook),)]
    assert not asked.sweep(0, picture.nbytes), "there is room for both"
    assert asked.get("other") is not None


# --- servers of other versions ---


def test_a_job_that_a_newer_version_made_is_left_to_such_ones(
    database: DatabaseShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = database.open(), database.open()
    with monkeypatch.context() as newer:
        newer.setattr(postgres_store, "format_of", lambda _job: JOB_FORMAT + 1)
        for name, held in (("begun", True), ("new", False)):
            new.add(job(name), Key(name, "hash"), held=held)
        new.close()
    old.add(job("old"), held=False)
    for read in (old.get, lambda name: old.find(Key(name, "hash"))):
        with pytest.raises(NewerJob, match="a newer server"):
            read("begun")
    assert [record.id for record in old.page(None, [None], 10)] == ["old"]
    assert old.load().jobs == 1
    assert taken(old) == ["old"]
    monkeypatch.setattr(postgres_store, "JOB_FORMAT", JOB_FORMAT + 1)
    assert taken(database.open()) == ["begun", "new"]


def test_a_job_is_of_the_format_that_it_needs() -> None:
    plain = job("a")
    walk = replace(plain, spec=replace(plain.spec, to_seed=9, mix=0.5))
    told = replace(plain, webhook=Webhook("https://hooks.example/x"))
    start = replace(plain, spec=replace(plain.spec, sampler="pndm"))
    deep = replace(told, spec=replace(plain.spec, bit_depth=32))
    assert [format_of(each) for each in (plain, told, walk, start, deep)] == [1, 2, 3, 4, 4]


def test_the_format_of_jobs_is_another_where_they_can_ask_for_more() -> None:
    """If this fails, JOB_FORMAT must be raised: servers of the version before would end jobs as failed."""
    fields = "n steps sampler eta seed index class_labels guidance guidance_interval timestep_spacing clip strength"
    fields += " image_sha256 mask_sha256 table guidance_rescale to_seed mix bit_depth"
    samplers = "ddpm ddim dpmpp_2m dpmpp_3m dpmpp_2m_sde unipc deis plms pndm euler heun tuned consistency"
    assert (JOB_FORMAT, sorted(SampleSpec.__dataclass_fields__)) == (4, sorted(fields.split()))
    assert (JOB_FORMAT, sorted(SAMPLER_FACTS)) == (4, sorted(samplers.split()))


# --- clocks ---


def test_the_time_is_the_databases_however_this_machines_clock_is_set(
    database: DatabaseShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    true_us, hour_us = time.time_ns() // 1000, 3_600_000_000
    for module in ("records", "shared_store", "postgres_store"):
        monkeypatch.setattr(f"tminus.service.jobs.store.{module}.now_us", lambda: true_us + hour_us)
    store = database.open()
    assert abs(store.now_us() - true_us) < 10_000_000
    store.add(replace(job("a"), created_us=true_us))
    kept = store.get("a")
    assert kept is not None
    assert kept.age_s < 10
    for module in ("shared_store", "postgres_store"):
        monkeypatch.setattr(f"tminus.service.jobs.store.{module}.now_us", lambda: true_us - hour_us)
    assert abs(store.now_us() - true_us) < 10_000_000, "also between two renewals"
    renew(store, "build", PACE)
    assert abs(store.now_us() - true_us) < 10_000_000


# --- a database that goes ---


def test_a_database_that_restarts_is_there_again_without_a_new_store() -> None:
    with postgres_server.running() as server:
        store = open_postgres(server.url(), "tminus", 15.0)(WEIGHTS)
        assert store.add(job("a"))
        for signal in ("INT", "KILL"):
            server.stop(signal)
            for call in (lambda: store.get("a"), lambda: renew(store, "build", PACE), lambda: store.check(write=True)):
                with pytest.raises(StorageFailed, match="the job store cannot do it"):
                    call()
            server.start()
            assert store.get("a") == job("a")
            assert renew(store, "build", PACE) == {"a"}, "nobody could take it meanwhile"
        store.finish(ended(job("a")), PIXELS)
        server.stop()
        store.close()


@pytest.mark.parametrize("key", [None, Key("k", "h")], ids=["no key", "a key"])
def test_a_job_whose_commit_nobody_saw_goes_with_the_next_renewal_or_is_found_by_its_key(
    database: DatabaseShelf, monkeypatch: pytest.MonkeyPatch, key: Key | None
) -> None:
    """The connection breaks after the commit, and before the answer to it."""
    store = database.open()
    commit = sa.engine.default.DefaultDialect.do_commit

    def commit_and_break(dialect: object, connection: object) -> None:
        commit(dialect, connection)  # type: ignore[arg-type]
        connection.driver_connection.close()  # type: ignore[attr-defined]
        raise sa.exc.OperationalError("COMMIT", {}, Exception("the connection is gone"))

    monkeypatch.setattr(type(store._engine.dialect), "do_commit", commit_and_break)
    with pytest.raises(StorageFailed):
        store.add(job("a"), key)
    monkeypatch.undo()
    assert database.read("SELECT count(*) FROM jobs") == [(1,)]
    assert renew(store, "build", PACE) == frozenset()
    if key is None:
        assert database.read("SELECT count(*) FROM jobs") == [(0,)]
        return
    other = database.open()
    assert other.find(key) == (job("a"), True)
    assert taken(other) == ["a"], "and it is done"


def test_a_database_that_may_only_be_read_is_told(database: DatabaseShelf) -> None:
    store = database.open()
    with store._engine.begin() as connection:
        connection.execute(sa.text("SET SESSION CHARACTERISTICS AS TRANSACTION READ ONLY"))
    store.check(write=False)
    for call in (lambda: store.check(write=True), lambda: store.add(job("a"))):
        with pytest.raises(StorageFailed, match="read-only transaction"):
            call()


def test_what_the_url_sets_holds_and_our_time_limits_hold_beside_it(postgres: postgres_server.Postgres) -> None:
    def shown(url: str, *names: str) -> list[str]:
        engine = connect(url, "space")
        try:
            with engine.connect() as connection:
                return [str(connection.execute(sa.text(f"SHOW {name}")).scalar_one()) for name in names]
        finally:
            engine.dispose()

    url = postgres.url()
    assert shown(url, "application_name", "statement_timeout") == ["tminus space", "10s"]
    mine = f"{url}?application_name=mine&options=-c%20work_mem%3D5MB"
    assert shown(mine, "application_name", "work_mem", "statement_timeout") == ["mine", "5MB", "10s"]


def test_jobs_of_weights_that_nobody_serves_are_found(soon: DatabaseShelf) -> None:
    one, other = soon.open(), soon.open("cd" * 32)
    for store, name in ((one, "own"), (other, "left"), (other, "ended")):
        assert store.add(job(name))
    other.finish(ended(job("ended")))
    renew(other, "build", PACE)
    assert one.left_behind([WEIGHTS]) == {}, "another server serves them"
    soon.change("UPDATE replicas SET lease_until = now() - interval '1 second'")
    assert one.left_behind([WEIGHTS]) == {"cd" * 8: ["left"]}


# --- what cannot be opened ---


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("nonsense", "it is no URL"),
        ("mysql://127.0.0.1/x", "must begin with postgresql://"),
        ("postgresql://tminus:s3cret@no-such-host.invalid/postgres", "resolve host"),
        ("{url}/no_such_database", 'database "no_such_database" does not exist'),
    ],
)
def test_a_database_that_cannot_be_used_is_told_in_one_line(
    postgres: postgres_server.Postgres, url: str, why: str
) -> None:
    with pytest.raises(ValueError, match=why) as told:
        open_postgres(url.format(url=postgres.url().rpartition("/")[0]), "tminus", 15.0)
    assert "\n" not in str(told.value)
    assert "s3cret" not in str(told.value)


def test_tables_of_a_newer_version_are_left_as_they_are(database: DatabaseShelf) -> None:
    database.open().add(job("a"))
    database.change("UPDATE alembic_version SET version_num = '99'")
    with pytest.raises(ValueError, match="of version 99, and this tminus knows version 4; nothing was changed"):
        database.opener()
    database.change("UPDATE alembic_version SET version_num = '4'")
    assert database.open().get("a") == job("a")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_tables_of_an_earlier_version_are_brought_to_this_one_with_their_jobs(
    database: DatabaseShelf, version: int
) -> None:
    database.open().add(job("a"), Key("k", "hash"))

    def made() -> list[list[tuple[object, ...]]]:
        space = database.namespace
        return [
            database.read(f"{query} ORDER BY 1, 2")
            for query in (
                "SELECT table_name, column_name, data_type, is_nullable FROM information_schema.columns "
                f"WHERE table_schema = '{space}'",
                f"SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = '{space}'",
                "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
                f"WHERE connamespace = '{space}'::regnamespace",
            )
        ]

    new = made()
    added = {  # by the version that has added it
        4: ("ALTER TABLE jobs DROP COLUMN takeovers", "ALTER TABLE jobs DROP COLUMN on_trial_at"),
        3: ("ALTER TABLE jobs DROP COLUMN background", "ALTER TABLE replicas DROP COLUMN background_s"),
        2: ("DROP TABLE deliveries", "ALTER TABLE jobs DROP COLUMN webhook", "DROP INDEX jobs_by_key"),
    }
    for number, statements in added.items():
        for statement in statements if number > version else ():
            database.change(statement)
    database.change(f"UPDATE alembic_version SET version_num = '{version}'")
    told = replace(job("b"), webhook=Webhook("https://hooks.example/x"))
    for _ in range(2):  # and stays so
        store = database.open()
        assert store.find(Key("k", "hash")) == (job("a"), True)
    assert made() == new, "as a new database has them"
    assert store.add(told)
    store.finish(ended(told), PIXELS)
    assert len(store.deliveries("ab")["b"]) == 3
    assert database.read("SELECT version_num FROM alembic_version") == [("4",)]


def test_a_namespace_may_be_a_word_of_sql(postgres: postgres_server.Postgres) -> None:
    for namespace in ("user", "select"):
        store = open_postgres(postgres.url(), namespace, 15.0)(WEIGHTS)
        assert store.add(job(namespace))
        assert store.get(namespace) == job(namespace)
        store.close()


def test_many_can_start_at_once_on_a_new_database(postgres: postgres_server.Postgres) -> None:
    shelf = DatabaseShelf(postgres.url())
    with ThreadPoolExecutor(6) as pool:
        stores = list(pool.map(lambda _: shelf.open(), range(6)))
    assert stores[0].add(job("a"))
    assert all(store.get("a") == job("a") for store in stores)
    for store in stores:
        store.close()


@pytest.mark.parametrize(
    ("host", "address"),
    [("10.1.2.3", "http://10.1.2.3:8000"), ("0.0.0.0", "http://127.0.0.1:8000"), ("::1", "http://[::1]:8000")],
)
def test_a_replica_is_reached_by_the_address_it_listens_on_or_has_towards_the_database(host: str, address: str) -> None:
    assert own_address("postgresql://tminus@127.0.0.1/jobs", host, 8000) == address
    assert own_address("postgresql://tminus@no-such-host.invalid/jobs", "0.0.0.0", 8000) is None


def test_the_holder_is_found_by_its_address_while_it_lives(soon: DatabaseShelf) -> None:
    holder, asked = soon.open(), soon.open()
    holder._address = "http://10.0.0.5:8000"
    holder.add(job("a"))
    assert asked.holder("a") is None, "it has not told it"
    renew(holder, "build", PACE)
    assert asked.holder("a") == "http://10.0.0.5:8000"
    assert asked.holder("never was") is None
    soon.expire()
    assert asked.holder("a") is None
