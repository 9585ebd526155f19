"""Replicas on one PostgreSQL: apps on fake engines, and what their clients see at each of them."""

import asyncio
import gc
import math
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.postgres import Postgres
from tests.service.api.test_tables import TUNED
from tests.service.conftest import INSTANT, Site, problem
from tests.service.durable import SPEC, events, post, state, wait_for
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, make_spec, wait_until
from tests.service.jobs.conftest import DatabaseShelf
from tests.service.keys import access_of, bearer, key_line
from tminus.service.access.access import Access
from tminus.service.errors import StorageFailed
from tminus.service.jobs import leases, lifecycle, retention
from tminus.service.jobs.held_job import HeldJobs, ModelOfJobs
from tminus.service.jobs.store.async_store import AsyncStore
from tminus.service.jobs.store.postgres_store import PostgresStore
from tminus.service.jobs.store.records import Claimed, JobRecord, ReplicaPace
from tminus.service.model_info import ModelInfo
from tminus.service.scheduling.forecast import Speed
from tminus.service.scheduling.room import ClusterLoad, Intake
from tminus.service.work import work_of

pytestmark = pytest.mark.slow

SHORT_S = 1.5  # a lease that a test waits for; on a busy machine it may end under who only was kept waiting


@pytest.fixture
def lease_s() -> float:
    return 15.0


@pytest.fixture
def shared(postgres: Postgres, lease_s: float, monkeypatch: pytest.MonkeyPatch) -> DatabaseShelf:
    """A database of which everybody looks often what there is to do."""
    monkeypatch.setattr(leases, "CLAIM_S", 0.05)
    monkeypatch.setattr(leases, "RENEWALS", 30)
    monkeypatch.setattr(retention, "RETRY_S", 0.05)
    monkeypatch.setattr("tminus.service.jobs.job_runner.READ_RETRY_S", 0.05)
    monkeypatch.setattr("tminus.service.api.events.POLL_S", 0.05)
    return DatabaseShelf(postgres.url(), lease_s)


class Replicas:
    """Those that run; the last are shut down at the end."""

    def __init__(self, shared: DatabaseShelf) -> None:
        self._shared, self._running = shared, list[Site]()

    def start(
        self,
        *,
        shut: bool = False,
        tick_times: tuple[tuple[int, float], ...] = INSTANT,
        info: ModelInfo = INFO,
        access: Access | None = None,
        **limits: object,
    ) -> Site:
        """One more, that is ready."""
        limits_ = replace(LIMITS, **limits)  # type: ignore[arg-type]
        site = Site(info, limits_, tick_times, state_file=self._shared.opener(), access=access)
        site.client.__enter__()
        site.wait_until_ready()
        if shut:
            site.engine.gate.shut()
        self._running.append(site)
        return site

    def stop(self, site: Site) -> None:
        """As SIGTERM does."""
        site.worker.drain()
        site.engine.gate.open()
        site.client.__exit__(None, None, None)
        self._running.remove(site)

    def stop_all(self) -> None:
        for site in list(self._running):
            self.stop(site)


@pytest.fixture
def replicas(shared: DatabaseShelf) -> Iterator[Replicas]:
    made = Replicas(shared)
    yield made
    made.stop_all()


@pytest.fixture
def pair(replicas: Replicas) -> tuple[Site, Site]:
    """Two whose ticks wait for the test."""
    return replicas.start(shut=True), replicas.start(shut=True)


def test_a_job_is_seen_at_every_replica_and_ends_the_same_at_each(pair: tuple[Site, Site]) -> None:
    one, other = pair
    job_id = post(one, **{"Idempotency-Key": "k"}).json()["id"]
    assert state(other, job_id) == "running"
    assert [job["id"] for job in other.client.get("/jobs?state=running").json()["jobs"]] == [job_id]
    assert [job["id"] for job in one.client.get("/jobs").json()["jobs"]] == [job_id]
    assert other.client.get(f"/jobs/{job_id}/image").status_code == 409
    again = post(other, **{"Idempotency-Key": "k"})
    assert again.json()["id"] == job_id, "a retry at another replica is the same job"
    one.engine.gate.open()
    wait_for(one, job_id)
    assert wait_for(other, job_id)["step"] == SPEC["steps"]
    image, there = (site.client.get(f"/jobs/{job_id}/image") for site in pair)
    assert (image.content, image.headers["etag"]) == (there.content, there.headers["etag"])
    assert [job["id"] for job in other.client.get("/jobs").json()["jobs"]] == [job_id]
    assert other.client.delete(f"/jobs/{job_id}").status_code == 204
    assert one.client.get(f"/jobs/{job_id}").status_code == 404
    for ask in (one.client.get, one.client.delete):  # an id that no database takes
        problem(ask("/jobs/%00"), 404, "job_not_found")


def test_a_job_is_cancelled_and_deleted_at_another_replica(pair: tuple[Site, Site]) -> None:
    holder, asked = pair
    ids = [post(holder).json()["id"] for _ in range(2)]
    assert asked.client.post(f"/jobs/{ids[0]}/cancel").json()["state"] == "cancelled"
    assert asked.client.delete(f"/jobs/{ids[1]}").status_code == 204
    assert state(asked, ids[0]) == "cancelled"
    wait_until(lambda: holder.metrics().get('tminus_durable_jobs_ended_total{"outcome": "lost"}') == 2)
    holder.engine.gate.open()  # only now can its worker do anything
    wait_until(lambda: holder.engine.jobs == {})
    assert state(holder, ids[0]) == "cancelled"
    for site in pair:
        problem(site.client.get(f"/jobs/{ids[1]}"), 404, "job_not_found")
    assert 'tminus_jobs_aborted_total{"reason": "lost"}' not in holder.metrics()
    assert 'tminus_durable_jobs_ended_total{"outcome": "cancelled"}' not in asked.metrics(), "its holder has counted it"
    assert asked.client.delete(f"/jobs/{ids[0]}").status_code == 204, "what has ended is deleted"
    assert holder.client.get(f"/jobs/{ids[0]}").status_code == 404


@pytest.mark.usefixtures("believed")
def test_a_job_that_nobody_holds_is_counted_where_it_is_cancelled(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "AHEAD_S", 0.1)
    full = replicas.start(shut=True, tick_times=SLOW)
    _, *left = (post(full, SPEC | {"seed": seed}).json()["id"] for seed in range(3))
    assert not any(job_id in full.worker.jobs for job_id in left)
    assert full.client.post(f"/jobs/{left[0]}/cancel").json()["state"] == "cancelled"
    assert full.client.delete(f"/jobs/{left[1]}").status_code == 204
    assert full.metrics()['tminus_durable_jobs_ended_total{"outcome": "cancelled"}'] == 2
    full.engine.gate.open()


@pytest.mark.parametrize("deleted", [False, True])
def test_events_at_another_replica_come_to_the_end_of_their_job(pair: tuple[Site, Site], deleted: bool) -> None:
    holder, asked = pair
    job_id = post(holder).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(asked.client.get, f"/jobs/{job_id}/events")
        wait_until(lambda: asked.streams._open.total() == 1)
        if deleted:
            assert asked.client.delete(f"/jobs/{job_id}").status_code == 204
        holder.engine.gate.open()
        found = events(reading.result(PATIENCE_S).text)
    if deleted:
        assert [name for name, _, _ in found] in ([], ["cancelled"]), "it may have seen the one or the other"
    else:
        assert (found[-1][0], found[-1][2]) == ("done", "end")
    wait_until(lambda: asked.streams._open.total() == 0)


@pytest.mark.parametrize("lease_s", [SHORT_S])
def test_who_is_asleep_past_its_lease_loses_its_jobs_and_the_other_ends_them(
    pair: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGSTOP and SIGCONT: no renewal for longer than a lease, and then it goes on where it was."""
    asleep, awake = pair
    renew, slept = PostgresStore.renew, []

    def sleepy(store: PostgresStore, fingerprint: str, pace: ReplicaPace, known: Collection[str]) -> frozenset[str]:
        if store._replica == sleeper and len(slept) < 1:
            return frozenset(store._fences)
        return renew(store, fingerprint, pace, known)

    lives = asleep.worker.jobs
    sleeper = _replica_of(asleep)
    monkeypatch.setattr(PostgresStore, "renew", sleepy)
    job_id = post(asleep).json()["id"]
    asleep.engine.gate.let(2)
    awake.engine.gate.open()
    done = wait_for(awake, job_id)
    assert done["step"] == SPEC["steps"]
    image = awake.client.get(f"/jobs/{job_id}/image").content
    assert image == awake.post(json=SPEC).content
    slept.append(True)
    asleep.engine.gate.open()  # it ends the job too, and what it made is nothing
    wait_until(lambda: asleep.engine.jobs == {})
    assert len(list(lives.statuses())) == 0
    wait_until(lambda: asleep.metrics().get('tminus_durable_jobs_ended_total{"outcome": "lost"}') == 1)
    assert asleep.client.get(f"/jobs/{job_id}/image").content == image
    assert awake.metrics()['tminus_durable_jobs_ended_total{"outcome": "done"}'] == 1


def _replica_of(site: Site) -> str:
    found = (each for each in gc.get_objects() if isinstance(each, lifecycle.Lifecycle))
    store = next(each.store for each in found if each.held._worker is site.worker)
    return str(store._store._replica)  # type: ignore[attr-defined]


def test_a_job_is_waited_for_at_another_replica(pair: tuple[Site, Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tminus.service.jobs.jobs.POLL_INTERVAL_S", 0.05)
    one, other = pair
    asked = {"prompt": "cat", "steps": 3, "seed": 5, "response_format": "url"}

    def ask(site: Site) -> Any:
        return site.client.post("/v1/images/generations", json=asked, headers={"Idempotency-Key": "k"})

    with ThreadPoolExecutor(2) as pool:
        here = pool.submit(ask, one)
        one.engine.next_begun()
        there = pool.submit(ask, other)
        for site in pair:  # the other has it where the lease ended on a machine that is busy
            site.engine.gate.open()
        urls = [answer.result(PATIENCE_S).json()["data"][0]["url"] for answer in (here, there)]
    assert urls[0] == urls[1]
    assert other.client.get(urls[1]).content == one.client.get(urls[0]).content


def test_a_replica_that_drains_leaves_its_jobs_to_others_before_it_has_ended(replicas: Replicas) -> None:
    """What is not durable may take the rest of the grace period."""
    one, other = replicas.start(shut=True), replicas.start()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(one.client.post, "/sample?steps=500")
        wait_until(lambda: one.worker.jobs.number_of("") == 1)
        job_id = post(one).json()["id"]
        one.worker.drain()
        one.engine.gate.let(2)
        wait_for(other, job_id)
        assert not asked.done()
        one.engine.gate.open()
        assert asked.result(PATIENCE_S).status_code == 200


def test_what_a_lost_replica_held_is_taken_on_one_after_another_without_a_wait(
    replicas: Replicas, shared: DatabaseShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone, ids = shared.open(INFO.weights_hash), [f"j{number}" for number in range(4)]
    for number, job_id in enumerate(ids):
        gone.add(JobRecord(job_id, make_spec(n=number + 1, steps=3), gone.now_us()))
    shared.expire()
    site = replicas.start(shut=True)
    wait_until(lambda: len(site.worker.jobs.statuses()) == 1)
    monkeypatch.setattr(leases, "CLAIM_S", 3600.0)  # once the pause that it is in is over
    site.engine.gate.open()
    for job_id in ids:
        wait_for(site, job_id)
    assert [len(batch.rows) for batch in site.engine.batches[-12:]] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    gone.close()


SLOW = ((1, 0.01), (8, 0.08))  # 100 places a second, as admission believes


@pytest.fixture
def believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replicas go on believing in the times that they began with: their ticks take none."""
    monkeypatch.setattr(Speed, "observe", lambda self, *_, **__: self)


@pytest.mark.usefixtures("believed")
def test_a_job_that_would_wait_here_is_done_by_one_who_has_room(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "AHEAD_S", 0.1)
    full = replicas.start(shut=True, tick_times=SLOW)
    first = post(full).json()
    second = post(full, SPEC | {"seed": 6}).json()
    short = post(full, SPEC | {"n": 1, "steps": 2}).json()
    assert (second["state"], second["eta_s"] > 0) == ("waiting", True)
    found = [job["id"] in full.worker.jobs for job in (first, second, short)]
    assert found == [True, False, True], "a short one does not wait for long ones"
    other = replicas.start(tick_times=SLOW)
    wait_for(other, second["id"])
    assert state(full, first["id"]) == "waiting"
    assert wait_for(full, second["id"])["step"] == SPEC["steps"]


def test_a_new_job_goes_after_those_of_its_length_that_wait_in_the_table() -> None:
    spec, intakes = make_spec(steps=20), [Intake(0.0), Intake(math.inf), Intake(math.inf)]
    places, asked = work_of(spec, INFO).places, list[float]()

    async def call(
        _method: object, _build: str, intake: Intake, begun_places: float, _rows: int, tables: Collection[str]
    ) -> Claimed:
        assert set(tables) == {table.hash for table in TUNED.tables}, "jobs of other tables are for other servers"
        asked.append(begun_places)
        intake.offer(places)
        return Claimed()

    store = SimpleNamespace(holders=[], call=call, now_us=lambda: 0)
    worker = SimpleNamespace(state=SimpleNamespace(ready=True))
    model = ModelOfJobs(0, TUNED, LIMITS)
    held_jobs = HeldJobs(cast(Any, worker), model)
    admission = SimpleNamespace(places_per_s=lambda _model: 2.0, intake=lambda *_, **__: intakes.pop(0))
    parts: Any = store, worker, admission, model, held_jobs, None, None, None, None
    held = leases.Leases(*parts)
    asyncio.run(held.claim())
    assert asked == [2.0 * leases.AHEAD_S], "what others had begun is taken over up to this much"
    assert not held.takes(work_of(spec, INFO))
    assert held.takes(work_of(make_spec(steps=19), INFO))


@pytest.mark.usefixtures("believed")
def test_a_keys_jobs_are_counted_wherever_they_are(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "AHEAD_S", 0.1)
    lines = key_line("ann", "the-secret-of-ann", jobs=3), key_line("ben", "the-secret-of-ben", jobs=3)
    ann, ben = bearer("the-secret-of-ann"), bearer("the-secret-of-ben")
    one, other = (replicas.start(shut=True, tick_times=SLOW, access=access_of(*lines)) for _ in range(2))
    for site in (one, other, one):  # the last is left in the table
        assert post(site, **ann).status_code == 202
    for site in (one, other):
        assert problem(site.client.post("/jobs", json=SPEC, headers=ann), 429, "quota_exceeded")["field"] == "jobs"
        assert problem(site.post(json=SPEC, headers=ann), 429, "quota_exceeded")["field"] == "jobs"
    assert post(one, **ben).status_code == 202
    for site in (one, other):
        site.engine.gate.open()


@pytest.mark.usefixtures("believed")
def test_a_keys_jobs_are_counted_once_however_many_come_at_a_time(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "AHEAD_S", 0.1)  # most are left in the table
    site = replicas.start(shut=True, tick_times=SLOW, access=access_of(key_line("ann", "the-secret-of-ann", jobs=4)))
    with ThreadPoolExecutor(12) as pool:
        ask = partial(site.client.post, "/jobs", json=SPEC, headers=bearer("the-secret-of-ann"))
        statuses = [asked.result().status_code for asked in [pool.submit(ask) for _ in range(12)]]
    assert sorted(statuses) == [202] * 4 + [429] * 8
    site.engine.gate.open()


def test_what_is_not_durable_is_answered_though_the_database_hangs(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.jobs.store.async_store.QUICK_S", 0.1)
    site = replicas.start(access=access_of(key_line("ann", "the-secret-of-ann", jobs=4)))
    hangs = threading.Event()
    monkeypatch.setattr(PostgresStore, "open_jobs", lambda *_: frozenset[str]() if hangs.wait(PATIENCE_S) else None)
    try:
        answers = [site.post(json=SPEC | {"seed": seed}, headers=bearer("the-secret-of-ann")) for seed in range(2)]
        assert [answer.status_code for answer in answers] == [200, 200]
    finally:
        hangs.set()


def test_who_cannot_keep_what_it_made_claims_nothing(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replicas.start(shut=True)
    cannot = property(lambda kept: kept._held._worker is broken.worker)
    monkeypatch.setattr(retention.Retention, "cannot_keep", cannot)
    other = replicas.start(shut=True)
    job_id = post(other).json()["id"]
    replicas.stop(other)
    time.sleep(10 * leases.CLAIM_S)
    assert job_id not in broken.worker.jobs
    healthy = replicas.start()
    wait_for(healthy, job_id)


@pytest.fixture
def slow_finish(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Results are kept when it is set."""
    finish, may = AsyncStore.finish, threading.Event()

    async def finish_later(store: AsyncStore, *args: Any) -> None:
        await asyncio.to_thread(may.wait, PATIENCE_S)
        await finish(store, *args)

    monkeypatch.setattr(AsyncStore, "finish", finish_later)
    yield may
    may.set()


@pytest.mark.parametrize("lease_s", [SHORT_S])
def test_a_result_that_is_kept_while_its_server_ends_is_not_made_again(
    replicas: Replicas, slow_finish: threading.Event
) -> None:
    one, other = replicas.start(), replicas.start()
    job_id = post(one).json()["id"]
    wait_until(lambda: job_id not in one.worker.jobs)
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(replicas.stop, one)
        time.sleep(2 * SHORT_S)
        assert state(other, job_id) == "running"
        slow_finish.set()
        stopping.result(PATIENCE_S)
    wait_for(other, job_id)
    assert other.metrics().get("tminus_jobs_resumed_total", 0) == 0


def test_a_job_whose_result_takes_long_to_be_kept_can_be_cancelled(
    replicas: Replicas, slow_finish: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.jobs.jobs.CANCEL_S", 0.1)
    site = replicas.start()
    job_id = post(site).json()["id"]
    wait_until(lambda: job_id not in site.worker.jobs)
    assert site.client.post(f"/jobs/{job_id}/cancel").json()["state"] == "cancelled"
    slow_finish.set()
    wait_until(lambda: site.metrics().get('tminus_durable_jobs_ended_total{"outcome": "lost"}') == 1)
    assert state(site, job_id) == "cancelled"


@pytest.mark.usefixtures("believed")
def test_metrics_tell_what_waits_in_the_store_at_each_replica_unless_it_does_not_answer(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "AHEAD_S", 0.1)
    pair = [replicas.start(shut=True, tick_times=SLOW) for _ in range(2)]
    spec = SPEC | {"n": 1, "guidance": 1, "steps": 100}  # a second
    for site in pair:
        post(site, spec)
    for seed in range(3):
        post(pair[0], spec | {"seed": seed})
    waiting = ("tminus_store_jobs_waiting", "tminus_store_backlog_seconds")

    def told(site: Site) -> list[float | None]:
        metrics = site.metrics()
        return [metrics.get(name) for name in waiting]

    for site in pair:
        wait_until(lambda site=site: told(site) == [3, pytest.approx(3.0)])  # type: ignore[misc]

    def away(store: PostgresStore) -> ClusterLoad:
        raise StorageFailed("server closed the connection unexpectedly")

    with monkeypatch.context() as patch:
        patch.setattr(PostgresStore, "load", away)
        wait_until(lambda: told(pair[0]) == [None, None])
    for site in pair:
        site.engine.gate.open()
    wait_until(lambda: told(pair[0]) == [0, 0.0])


@pytest.mark.usefixtures("believed")
def test_a_job_is_refused_when_there_is_too_much_for_all(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "AHEAD_S", 0.1)
    one = replicas.start(shut=True, tick_times=SLOW, max_backlog_s=4.0)
    spec = SPEC | {"n": 1, "guidance": 1, "steps": 100}  # a second
    accepted = [post(one, spec | {"seed": 1}).json()["id"]]
    accepted.append(post(one, spec | {"seed": 2}).json()["id"])
    found = problem(one.client.post("/jobs", json=spec | {"seed": 3, "deadline_s": 1.5}), 429, "deadline_unmeetable")
    assert found["field"] == "deadline_s"
    while (answer := one.client.post("/jobs", json=spec | {"seed": 3})).status_code == 202:
        accepted.append(answer.json()["id"])
        assert len(accepted) < 9
    found = problem(answer, 429, "overloaded")
    assert found["field"] == "backlog_s"
    assert 1 <= int(answer.headers["retry-after"]) <= 3
    one.engine.gate.open()
    for job_id in accepted:
        wait_for(one, job_id)


@pytest.mark.usefixtures("believed")
def test_what_stays_where_it_came_in_is_refused_with_the_least_wait_of_all(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LOAD_S", 0.0)
    full = replicas.start(shut=True, tick_times=SLOW, max_backlog_s=20.0)
    spec = SPEC | {"n": 1, "guidance": 1, "steps": 1000}  # ten seconds

    def wait_s() -> int:
        answer = full.post(json=spec | {"seed": 3})
        detail = problem(answer, 429, "overloaded")["detail"]
        assert detail.endswith(f". Try again in {answer.headers['retry-after']} s")
        return int(answer.headers["retry-after"])

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(full.post, json=spec | {"seed": seed}) for seed in (1, 2)]
        wait_until(lambda: full.worker.jobs.number_of("") == 2)
        alone_s = wait_s()
        other = replicas.start(shut=True, tick_times=SLOW)
        assert wait_s() < alone_s, "the other has nothing to do"
        full.engine.gate.open()
        other.engine.gate.open()
        assert {answer.result(PATIENCE_S).status_code for answer in asked} == {200}
