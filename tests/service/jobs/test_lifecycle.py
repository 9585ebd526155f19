"""Jobs to their end, over failures and restarts: a new site on the same file is a restart."""

import faulthandler
import sqlite3
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from tests.service.conftest import INSTANT, MakeSite, Restarts, Site, problem
from tests.service.durable import SPEC, events, post, state, wait_for
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, make_spec, wait_until
from tminus.service.errors import StorageFailed
from tminus.service.jobs import job_runner, retention
from tminus.service.jobs import jobs as jobs_module
from tminus.service.jobs.crash_report import CrashFile
from tminus.service.jobs.store.records import JobRecord, now_us
from tminus.service.jobs.store.sqlite_store import SqliteStore

# --- the store fails ---


def test_a_store_that_fails_refuses_new_jobs_and_nothing_else(held: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(*_: object, **__: object) -> None:
        raise StorageFailed("the job store cannot do it: database or disk is full")

    monkeypatch.setattr(SqliteStore, "add", add)
    refused = held.client.post("/jobs", json=SPEC)
    assert "disk is full" in problem(refused, 507, "storage_failed")["detail"]
    assert refused.headers["retry-after"] == "5"
    problem(held.client.get("/readyz"), 507, "storage_failed")
    assert held.metrics()["tminus_store_up"] == 0
    held.engine.gate.open()
    wait_until(lambda: held.engine.jobs == {})
    assert held.post(json=SPEC).status_code == 200
    monkeypatch.undo()
    assert wait_for(held, post(held).json()["id"])
    assert held.client.get("/readyz").status_code == 200
    assert held.metrics()["tminus_store_up"] == 1


@pytest.mark.parametrize("kept", [False, True])
def test_an_end_that_cannot_be_kept_or_too_late_for_its_answer_is_tried_until_it_can(
    held: Site, monkeypatch: pytest.MonkeyPatch, kept: bool
) -> None:
    finish, failures = SqliteStore.finish, []

    def fails(store: SqliteStore, job: JobRecord, images: object = None) -> None:
        if kept or len(failures) == 3:
            finish(store, job, images)  # type: ignore[arg-type]
        if len(failures) < 3:
            failures.append(job)
            raise StorageFailed("full")

    monkeypatch.setattr(SqliteStore, "finish", fails)
    monkeypatch.setattr(retention, "RETRY_S", 0.01)
    job_id = post(held).json()["id"]
    held.engine.gate.open()
    assert wait_for(held, job_id)
    assert len(failures) == 3
    assert held.client.get(f"/jobs/{job_id}/image").status_code == 200
    assert wait_for(held, post(held).json()["id"]), "and new jobs are taken"


# --- restarts ---


def test_a_restart_goes_on_where_the_job_was(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    running, waiting = post(site).json()["id"], post(site, {"steps": 900, "n": 2, "seed": 9}).json()["id"]
    site.engine.gate.let(3)
    for _ in range(4):
        site.engine.next_begun()
    restarts.stop()
    site = restarts.start()
    wait_for(site, running)
    assert site.client.get(f"/jobs/{running}/image").content == site.post(json=SPEC).content
    assert wait_for(site, waiting)["step"] == 900
    assert min(site.engine.batches[1].steps) > 0, "it did not begin anew"
    assert site.metrics()["tminus_jobs_resumed_total"] == 2


@pytest.mark.parametrize("for_ever", [False, True])
def test_a_file_that_cannot_be_read_for_a_while_ends_no_job(
    restarts: Restarts, monkeypatch: pytest.MonkeyPatch, for_ever: bool
) -> None:
    site = restarts.start(shut=True)
    job_id = post(site).json()["id"]
    restarts.stop()
    read, failures = SqliteStore.snapshot, []

    def stalls(store: SqliteStore, *which: str) -> object:
        if for_ever or len(failures) < 3:
            failures.append(which)
            raise StorageFailed("disk I/O error")
        return read(store, *which)

    monkeypatch.setattr(SqliteStore, "snapshot", stalls)
    monkeypatch.setattr(job_runner, "READ_RETRY_S", 0.01)
    monkeypatch.setattr(job_runner, "FILE_AWAY_S", 0.2 if for_ever else PATIENCE_S)
    site = restarts.start()
    if for_ever:
        wait_until(lambda: state(site, job_id) == "failed")
    else:
        wait_for(site, job_id)
        assert len(failures) == 3


def test_a_damaged_job_of_an_earlier_start_counts_as_failed(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    job_id = post(site).json()["id"]
    restarts.stop()
    with closing(sqlite3.connect(restarts.file)) as connection, connection:
        connection.execute("UPDATE jobs SET spec = '{'")
    site = restarts.start()
    damaged = site.client.get(f"/jobs/{job_id}")
    problem(damaged, 507, "storage_failed")
    assert "retry-after" not in damaged.headers, "it will be no better"
    assert site.metrics()['tminus_durable_jobs_ended_total{"outcome": "failed"}'] == 1


def test_another_build_begins_a_job_anew_and_signs_what_it_made(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    done = post(site, {"steps": 1, "seed": 1}).json()["id"]
    site.engine.gate.let()
    wait_for(site, done)
    old = site.client.get(f"/jobs/{done}/image")
    job_id = post(site).json()["id"]
    site.engine.gate.let(2)
    restarts.stop()
    site = restarts.start(info={"fingerprint": "another build"})
    wait_for(site, job_id)
    assert min(step for batch in site.engine.batches[1:] for step in batch.steps) == 0
    assert site.client.get(f"/jobs/{job_id}/image").headers["x-fingerprint"] == "another build"
    again = site.client.get(f"/jobs/{done}/image")
    assert again.headers["x-fingerprint"] == INFO.fingerprint, "it is the work of the build that made it"
    assert (again.content, again.headers["etag"]) == (old.content, old.headers["etag"])


def test_jobs_of_an_earlier_start_wait_for_room_in_order_and_can_be_cancelled_and_watched(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    *ids, cancelled = (post(site, {"steps": 500, "seed": k}).json()["id"] for k in range(4))
    restarts.stop()
    site = restarts.start(max_jobs=1)
    site.engine.gate.shut()
    assert site.client.delete(f"/jobs/{cancelled}").status_code == 204
    problem(site.client.get(f"/jobs/{cancelled}"), 404, "job_not_found")
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(site.client.get, f"/jobs/{ids[1]}/events?every=100")
        site.engine.gate.open()
        assert events(reading.result(PATIENCE_S).text)[-1][0] == "done"
    finished = [wait_for(site, job_id)["finished"] for job_id in ids]
    assert finished == sorted(finished)


def test_a_job_that_an_earlier_version_kept_as_a_background_job_is_done_like_any_other(restarts: Restarts) -> None:
    store = SqliteStore(restarts.file)
    store.add(JobRecord("a" * 32, make_spec(), now_us()))
    store.close()
    with closing(sqlite3.connect(restarts.file)) as connection, connection:
        connection.execute("UPDATE jobs SET background = 1")
    wait_for(restarts.start(), "a" * 32)


def test_a_deadline_goes_on_while_the_server_is_down(restarts: Restarts) -> None:
    store = SqliteStore(restarts.file)
    store.add(JobRecord("a" * 32, make_spec(), now_us() - 10_000_000, now_us() - 5_000_000))
    store.close()
    site = restarts.start()
    assert wait_for(site, "a" * 32, "failed")["problem"]["code"] == "deadline_passed"


def test_an_end_that_cannot_be_kept_lets_no_request_hang_whatever_the_reason(
    held: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[Exception] = [MemoryError("no room"), StorageFailed("full")]

    def fail(*_: object) -> None:
        raise reasons[0]

    monkeypatch.setattr(SqliteStore, "finish", fail)
    monkeypatch.setattr(retention, "RETRY_S", 0.01)
    monkeypatch.setattr(jobs_module, "CANCEL_S", 0.1)
    job_id = post(held).json()["id"]
    held.engine.gate.open()
    wait_until(lambda: held.engine.jobs == {})
    wait_until(lambda: held.client.post("/jobs", json=SPEC).status_code == 507)  # no more are taken than can be ended
    problem(held.client.delete(f"/jobs/{job_id}"), 507, "storage_failed")
    problem(held.client.post(f"/jobs/{job_id}/cancel"), 507, "storage_failed")
    reasons.pop(0)
    assert state(held, job_id) == "running"
    monkeypatch.undo()
    assert wait_for(held, job_id)["state"] == "done"
    assert post(held)


def test_a_slow_machine_or_tighter_limits_end_no_job_that_was_accepted(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    late = post(site, {"steps": 900, "deadline_s": 60}).json()["id"]
    large = post(site, {"steps": 5, "n": 4}).json()["id"]
    small = post(site, {"steps": 5, "n": 2}).json()["id"]
    restarts.stop()
    site = restarts.start(max_rows=3, max_n=3, max_backlog_s=0.001, tick_times=((1, 9.0), (8, 9.0)))
    assert wait_for(site, small)["state"] == "done"
    assert wait_for(site, late)["state"] == "done"
    assert state(site, large) == "waiting", "until a server has room for it"
    restarts.stop()
    assert wait_for(restarts.start(), large)["state"] == "done"


def test_jobs_behind_one_that_is_deleted_wait_no_longer_for_it(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    ids = [post(site, {"steps": steps, "seed": steps}).json()["id"] for steps in (1000, 999, 5, 6)]
    restarts.stop()
    site = restarts.start(max_jobs=1, tick_times=((1, 9.0), (8, 9.0)), shut=True)
    wait_until(lambda: site.worker.rows_active > 0)
    with ThreadPoolExecutor(2) as pool:
        deleting = [pool.submit(site.client.delete, f"/jobs/{job_id}") for job_id in ids[:2]]
        wait_until(lambda: not site.worker._commands.empty())
        site.engine.gate.open()
        assert [each.result(PATIENCE_S).status_code for each in deleting] == [204, 204]
    assert wait_for(site, ids[2])["state"] == "done"
    assert wait_for(site, ids[3])["state"] == "done"


def test_suspended_work_is_not_counted_as_saved(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    post(site, {"steps": 900})
    site.engine.next_begun()
    worker = site.worker
    worker.drain()
    site.engine.gate.open()
    wait_until(lambda: not worker.state.alive)
    metrics = site.metrics()
    assert metrics["tminus_row_steps_saved_total"] == 0
    assert 'tminus_jobs_aborted_total{"reason": "suspended"}' not in metrics


def test_of_the_jobs_of_a_crash_the_one_that_crashes_it_again_fails_and_the_others_are_done(
    restarts: Restarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    crashed, counted = SqliteStore.crashed, list[Collection[str]]()

    def fails_once(store: SqliteStore, job_ids: Collection[str]) -> None:
        counted.append(job_ids)
        if len(counted) == 1:
            raise StorageFailed("disk I/O error")
        crashed(store, job_ids)

    monkeypatch.setattr(SqliteStore, "crashed", fails_once)
    site = restarts.start(shut=True)
    poison_seed = 2
    ids = [post(site, {"steps": 3 if seed == poison_seed else 20, "seed": seed}).json()["id"] for seed in range(4)]

    def crash_with_poison(site: Site) -> None:
        def on_remove(rows: Sequence[int]) -> None:
            if site.engine.jobs[rows[0]][0].seed == poison_seed:
                raise RuntimeError("out of memory")

        site.engine.on_remove = on_remove

    wait_until(lambda: len(site.worker.jobs.statuses()) == 4)
    for _ in range(2):
        crash_with_poison(site)
        site.engine.gate.open()
        wait_until(lambda site=site: site.worker.state.crashed)  # type: ignore[misc]
        site.engine.jobs.clear()
        restarts.stop()
        site = restarts.start(shut=True)
    crash_with_poison(site)
    site.engine.gate.open()
    assert wait_for(site, ids[poison_seed], "failed")["problem"]["code"] == "engine_failed"
    assert {len(job_ids) for job_ids in counted} == {4}, "the first crash; the second convicts one"
    for seed in (0, 1, 3):
        assert wait_for(site, ids[seed])["state"] == "done"
    assert not site.worker.state.crashed


def test_a_job_that_ended_the_server_twice_fails_and_one_that_did_once_shares_no_tick(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    twice, once, never = (post(site, {"steps": 20, "seed": seed}).json()["id"] for seed in range(3))
    restarts.stop()
    store = SqliteStore(restarts.file)
    for ids in ([twice], [twice], [once]):
        store.crashed(ids)
    store.close()
    site = restarts.start()
    assert wait_for(site, twice, "failed")["problem"]["code"] == "engine_failed"
    for job_id in (once, never):
        assert wait_for(site, job_id)["state"] == "done"
    assert {len(batch.rows) for batch in site.engine.batches} == {1}


@pytest.mark.parametrize("hangs", [False, True])
def test_a_shutdown_in_a_step_counts_a_crash_against_its_jobs_if_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    monkeypatch.setattr("tminus.service.worker.worker.CLOSE_S", 0.05)
    file, folder = tmp_path / "jobs.sqlite3", tmp_path / "ends"
    folder.mkdir()
    site = Site(INFO, LIMITS, INSTANT, state_file=file, crash_file=CrashFile(folder, "server"))
    with site.client:
        site.wait_until_ready()
        site.engine.gate.shut()
        stepped = post(site, SPEC | {"seed": 1}).json()["id"]
        site.engine.next_begun()
        waiting = post(site, SPEC | {"seed": 2}).json()["id"]
        if hangs:
            monkeypatch.setattr("tminus.service.threads.STALL_S", 0.0)
    site.engine.gate.open()
    faulthandler.enable()  # for the other tests
    assert list(folder.iterdir()) == []
    with closing(SqliteStore(file)) as store:
        assert {each.id: each.crashes for each in store.claim_all().jobs} == {stepped: int(hangs), waiting: 0}


# --- what is deleted after its time ---


def test_jobs_are_deleted_when_their_time_is_over(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tminus.service.jobs.retention.SWEEP_S", 0.01)
    site = make_site(keep_jobs_s=0.05)
    job_id = post(site).json()["id"]
    wait_until(lambda: site.client.get(f"/jobs/{job_id}").status_code == 404)
    assert site.client.get("/jobs").json() == {"jobs": [], "next": None}
