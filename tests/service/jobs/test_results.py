"""Large results as objects: a process that dies, and an object store or a database that is away, at each point."""

import asyncio
import threading
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pytest

from tests import s3 as s3_server
from tests.service.conftest import MakeSite, problem
from tests.service.durable import SPEC, post, wait_for
from tests.service.fakes import PATIENCE_S, wait_until
from tests.service.jobs.conftest import Bucket, DatabaseShelf
from tests.service.jobs.kept import PIXELS, claim, ended, job
from tminus.service.errors import StorageFailed
from tminus.service.jobs.store import job_store
from tminus.service.jobs.store.async_store import AsyncStore, Results, ResultStore
from tminus.service.jobs.store.objects import S3Objects
from tminus.service.jobs.store.records import LeaseLost, ReplicaPace
from tminus.service.jobs.store.sqlite_store import SqliteStore

pytestmark = pytest.mark.slow

Q = TypeVar("Q")


class Breakable(S3Objects):
    """A real object store, of which the answer may be lost, before or after it has done what was asked."""

    def __init__(self, bucket: Bucket) -> None:
        super().__init__(bucket.url, "")
        self.before: set[str] = set()
        self.after: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.written: list[str] = []

    async def put(self, key: str, data: bytes) -> None:
        await asyncio.to_thread(self.gate.wait, PATIENCE_S)
        self._fail("put", self.before)
        await super().put(key, data)
        self.written.append(key)
        self._fail("put", self.after)

    async def get(self, key: str, size: int) -> bytes | None:
        self._fail("get", self.before)
        return await super().get(key, size)

    async def delete(self, keys: Sequence[str]) -> None:
        self._fail("delete", self.before)
        await super().delete(keys)
        self._fail("delete", self.after)

    @staticmethod
    def _fail(what: str, when: Collection[str]) -> None:
        if what in when:
            raise StorageFailed(f"no {what}")


class Replica:
    """One that shares the database, and the bucket."""

    def __init__(self, database: DatabaseShelf, bucket: Bucket, above_bytes: int = 0) -> None:
        self.below, self.objects = database.open(), Breakable(bucket)
        self.store = ResultStore(self.below, Results(self.objects, above_bytes), "folder")

    def run(self, *calls: Coroutine[Any, Any, Q]) -> list[Q]:
        async def all_of_them() -> list[Q]:
            return list(await asyncio.gather(*calls))

        return asyncio.run(all_of_them())

    def finish(self, at_us: int = 2) -> None:
        self.run(self.store.finish(ended(job("a"), at_us=at_us), PIXELS))

    def images(self) -> Any:
        return self.run(self.store.images("a"))[0]

    def sweep(self, before_us: int = 0) -> None:
        while self.run(self.store.sweep(before_us, 10**12))[0]:
            pass


MakeReplica = Callable[..., Replica]


@pytest.fixture
def replica(database: DatabaseShelf, bucket: Bucket) -> Iterator[MakeReplica]:
    made: list[Replica] = []

    def make(above_bytes: int = 0) -> Replica:
        made.append(Replica(database, bucket, above_bytes))
        return made[-1]

    yield make
    for each in made:
        each.objects.gate.set()
        each.store.close()


def an_hour_later(database: DatabaseShelf) -> None:
    database.change(f"UPDATE objects SET since_us = since_us - {job_store.ORPHAN_US + 10**6}")


def states(database: DatabaseShelf) -> list[object]:
    return [state for (state,) in database.read("SELECT state FROM objects ORDER BY since_us")]


# --- what is kept where ---


def test_small_results_stay_in_the_database_and_large_ones_become_objects(
    replica: MakeReplica, database: DatabaseShelf, bucket: Bucket
) -> None:
    one = replica(above_bytes=PIXELS.nbytes)
    large = np.concatenate([PIXELS, PIXELS])
    for name, images in (("a", PIXELS), ("b", large)):
        one.below.add(job(name))
        one.run(one.store.finish(ended(job(name)), images))
        np.testing.assert_array_equal(one.run(one.store.images(name))[0], images)
    assert database.read("SELECT job_id FROM images") == [("a",)]
    ((key, job_id, size),) = database.read("SELECT key, job_id, bytes FROM objects")
    assert bucket.keys() == [key]
    assert str(key).startswith("folder/b/")
    assert job_id == "b"
    assert len(bucket.get(str(key))) == size
    assert b"pickle" not in bucket.get(str(key))
    assert database.read("SELECT count(*) FROM jobs WHERE bytes > 1024") == [(2,)], "the sweep counts it"
    one.sweep(before_us=10**18)
    assert (bucket.keys(), states(database)) == ([], [])


def test_a_server_without_an_object_store_says_so(replica: MakeReplica, database: DatabaseShelf) -> None:
    one = replica()
    one.below.add(job("a"))
    one.finish()

    async def ask() -> None:
        store = AsyncStore(database.open())
        try:
            with pytest.raises(StorageFailed, match="in an object store, which this server was not told of"):
                await store.images("a")
        finally:
            store.close()

    asyncio.run(ask())


def test_a_result_is_read_by_every_replica_and_two_never_write_one_object(
    replica: MakeReplica, database: DatabaseShelf, bucket: Bucket
) -> None:
    """One sleeps past its lease in the middle of its upload, and another ends the job meanwhile."""
    asleep, awake = replica(), replica()
    asleep.below.add(job("a"))
    asleep.objects.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        finishing = pool.submit(asleep.finish)
        wait_until(lambda: states(database) == ["pending"])
        database.expire()
        assert claim(awake.below).jobs == [job("a")]
        awake.finish(at_us=3)
        asleep.objects.gate.set()
        with pytest.raises(LeaseLost):
            finishing.result(PATIENCE_S)
    assert len(bucket.keys()) == 2
    awake.sweep()
    assert bucket.keys() == awake.objects.written
    for each in (asleep, awake):
        np.testing.assert_array_equal(each.images(), PIXELS)


def test_while_an_upload_hangs_leases_are_renewed(replica: MakeReplica) -> None:
    one = replica()
    one.below.add(job("a"))

    async def both() -> frozenset[str]:
        one.store.holders.append(lambda: ["a"])
        one.objects.gate.clear()
        finishing = asyncio.create_task(one.store.finish(ended(job("a")), PIXELS))
        held = frozenset[str]()
        for _ in range(3):
            held = await asyncio.wait_for(one.store.renew("build", ReplicaPace(1.0, 1.0)), PATIENCE_S)
        assert not finishing.done()
        one.objects.gate.set()
        await finishing
        return held

    assert asyncio.run(both()) == {"a"}


# --- who dies, and when ---


class Died(Exception):
    """The process is gone: nothing that comes after this is done by it."""


def dies_at(one: Replica, name: str, monkeypatch: pytest.MonkeyPatch, *, done: bool) -> None:
    """Die at a call of the database. done: when that has done what it was told, not before."""
    really = getattr(one.below, name)

    def die(*arguments: object) -> None:
        if done:
            really(*arguments)
        raise Died

    monkeypatch.setattr(one.below, name, die)


@pytest.mark.parametrize("last", ["note_object", "put", "finish"])
def test_one_that_dies_as_it_keeps_a_result_leaves_a_job_that_goes_on_or_one_that_is_done(
    replica: MakeReplica, database: DatabaseShelf, bucket: Bucket, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """last: what it does last."""
    dying, other = replica(), replica()
    dying.below.add(job("a"))
    dies_at(dying, "finish" if last == "put" else last, monkeypatch, done=last != "put")
    with pytest.raises(Died):
        dying.finish()
    database.expire()
    found = claim(other.below).jobs
    assert found == ([] if last == "finish" else [job("a")])
    if found:
        other.finish()
    other.sweep()
    np.testing.assert_array_equal(other.images(), PIXELS)
    an_hour_later(database)
    other.sweep()
    assert states(database) == ["kept"]
    assert bucket.keys() == [key for (key,) in database.read("SELECT key FROM objects")]
    np.testing.assert_array_equal(other.images(), PIXELS)


@pytest.mark.parametrize("last", ["delete", "take_unneeded_objects", "the object"])
def test_one_that_dies_as_it_deletes_a_job_leaves_an_object_that_others_delete(
    replica: MakeReplica, database: DatabaseShelf, bucket: Bucket, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying, other = replica(), replica()
    dying.below.add(job("a"))
    dying.finish()
    in_between = last == "the object"
    dies_at(dying, "forget_objects" if in_between else last, monkeypatch, done=not in_between)

    def delete() -> None:
        dying.run(dying.store.delete("a"))
        dying.sweep()

    with pytest.raises(Died):
        delete()
    assert other.images() is None
    monkeypatch.setattr(job_store, "AGAIN_US", -60_000_000)  # a minute goes by
    other.sweep()
    assert (bucket.keys(), states(database)) == ([], [])


# --- what is away, and comes back ---


def test_tries_while_the_object_store_is_away_note_one_object_and_an_orphan_is_collected_later(
    replica: MakeReplica, database: DatabaseShelf, bucket: Bucket
) -> None:
    one, other = replica(), replica()
    for kept in (True, False):
        one.below.add(job("a"))
        one.objects.after = {"put"}  # it is written, and the answer is lost
        for _ in range(3):
            with pytest.raises(StorageFailed):
                one.finish()
        assert states(database) == ["pending"]
        if kept:
            one.objects.after = set()
            one.finish()
            assert states(database) == ["kept"]
            assert len(bucket.keys()) == 1
            assert one.run(one.store.delete("a")) == [True]
            one.sweep()
    assert one.below.delete("a")
    other.sweep()
    assert len(bucket.keys()) == 1, "who noted it may still come"
    an_hour_later(database)
    other.sweep()
    assert (bucket.keys(), states(database)) == ([], [])


def test_an_object_that_was_given_up_before_the_end_was_kept_is_written_again(
    replica: MakeReplica, database: DatabaseShelf, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database was away for over an hour, for this replica only."""
    one, other = replica(), replica()
    one.below.add(job("a"))

    def away(*_: object) -> None:
        raise StorageFailed("the database is away")

    with monkeypatch.context() as patch:
        patch.setattr(one.below, "finish", away)
        for _ in range(2):
            with pytest.raises(StorageFailed):
                one.finish()
    assert len(bucket.keys()) == 1
    an_hour_later(database)
    other.sweep()
    assert bucket.keys() == []
    one.finish()
    assert bucket.keys() == one.objects.written[1:]
    np.testing.assert_array_equal(other.images(), PIXELS)


def test_a_job_is_deleted_though_the_object_store_is_away_and_its_object_later(
    replica: MakeReplica, database: DatabaseShelf, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = replica()
    one.below.add(job("a"))
    one.finish()
    one.objects.before = {"delete"}
    assert one.run(one.store.delete("a")) == [True]
    one.sweep()
    assert len(bucket.keys()) == 1
    one.objects.before = set()
    one.sweep()
    assert len(bucket.keys()) == 1, "who took it has a minute"
    monkeypatch.setattr(job_store, "AGAIN_US", -60_000_000)
    one.sweep()
    assert (bucket.keys(), states(database)) == ([], [])


def test_two_that_collect_at_once_take_different_objects(replica: MakeReplica, database: DatabaseShelf) -> None:
    one, other = replica(), replica()
    one.below.add(job("a"))
    database.change(
        "INSERT INTO objects (key, job_id, state, since_us, bytes, sha256) "
        f"SELECT 'key ' || k, 'a', 'pending', {one.below.now_us()}, 0, '' "
        f"FROM generate_series(1, {job_store.MOST_KEYS + 20}) AS k"
    )
    assert one.below.take_unneeded_objects() == [], "they may be on their way"
    an_hour_later(database)
    first, second = one.below.take_unneeded_objects(), other.below.take_unneeded_objects()
    assert (len(first), len(second)) == (job_store.MOST_KEYS, 20)
    assert len({*first, *second}) == job_store.MOST_KEYS + 20


def test_whether_objects_can_be_written_is_known_from_the_last_attempt(replica: MakeReplica) -> None:
    one = replica()
    one.below.add(job("a"))
    one.objects.before = {"put"}
    with pytest.raises(StorageFailed):
        one.finish()
    one.run(one.store.check())
    assert one.store.failure is not None
    one.below.add(job("b"))
    one.run(one.store.finish(ended(job("b")), None))
    assert one.store.failure is not None, "the database says nothing of it"
    one.objects.before = set()
    one.run(one.store.check())
    assert one.store.failure is None


# --- what cannot be read ---


def test_an_object_that_is_damaged_exchanged_or_missing_is_said_and_not_served(
    replica: MakeReplica, bucket: Bucket, caplog: pytest.LogCaptureFixture
) -> None:
    one = replica()
    for name, images in (("a", PIXELS), ("b", PIXELS[::-1])):
        one.below.add(job(name))
        one.run(one.store.finish(ended(job(name)), images))
    key, key_of_b = one.objects.written
    whole, of_another = bucket.get(key), bucket.get(key_of_b)
    one.objects.before = {"get"}
    with pytest.raises(StorageFailed) as caught:
        one.images()
    assert not caught.value.damaged, "the object store is away"
    one.objects.before = set()
    assert len(of_another) == len(whole), "only the checksum tells"
    for data in (b"", b"\xa5" * 100, of_another, None):
        caplog.clear()
        bucket.delete(key) if data is None else bucket.put(key, data)
        with pytest.raises(StorageFailed, match="the images of job a cannot be read") as caught:
            one.images()
        assert caught.value.damaged
        assert f"the object {key} is" in caplog.text


def test_a_job_that_is_deleted_while_its_images_are_read_is_not_there(replica: MakeReplica, bucket: Bucket) -> None:
    one, other = replica(), replica()
    one.below.add(job("a"))
    one.finish()
    get = one.objects.get

    async def deleted_before(key: str, size: int) -> bytes | None:
        await other.store.delete("a")
        await other.store.sweep(0, 10**12)
        return await get(key, size)

    one.objects.get = deleted_before  # type: ignore[method-assign]
    assert one.images() is None


# --- a server ---


def test_a_server_whose_object_store_goes_keeps_all_ends_when_it_is_back(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.jobs.retention.RETRY_S", 0.05)
    monkeypatch.setattr("tminus.service.jobs.store.objects.RETRIES", 0)
    monkeypatch.setattr("tminus.service.jobs.jobs.RECENT_S", 0.0)  # each request reads the object
    with s3_server.running() as s3:
        for name, value in s3.env.items():
            monkeypatch.setenv(name, value)
        bucket = Bucket(s3)
        results = Results(bucket.objects(), 30)  # of two images, not of one
        site = make_site(state_file=lambda _: SqliteStore(None), app={"results": results})
        first = post(site).json()["id"]
        wait_for(site, first)
        image = site.client.get(f"/jobs/{first}/image").content
        assert len(bucket.keys()) == 1
        s3.stop()
        problem(site.client.get(f"/jobs/{first}/image"), 507, "storage_failed")
        site.engine.gate.shut()
        second, small = post(site).json()["id"], post(site, SPEC | {"n": 1}).json()["id"]
        site.engine.gate.open()
        wait_until(lambda: site.client.get("/readyz").status_code == 507)
        wait_for(site, small)
        for _ in range(5):
            problem(site.client.post("/jobs", json=SPEC), 507, "storage_failed")
        assert site.client.get(f"/jobs/{second}").json()["state"] == "running"
        s3.start()
        wait_for(site, second)
        assert site.client.get(f"/jobs/{second}/image").content == image
        assert site.client.get("/readyz").status_code == 200
        assert site.client.delete(f"/jobs/{second}").status_code == 204
