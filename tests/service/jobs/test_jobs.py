"""POST /jobs and what follows, through the app on a fake engine; a new site on the same file is a restart."""

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.errors import StorageFailed
from service.jobs import jobs as jobs_module
from service.jobs import lifecycle
from service.jobs.sqlite_store import SqliteStore
from service.jobs.store import JobRecord, now_us
from service.spec import Images
from tests.service.conftest import INSTANT, MakeSite, Site, problem
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, make_spec, wait_until

SPEC = {"n": 2, "steps": 6, "seed": 5, "class_label": "cat", "guidance": 2}
HELD = {"tick_times": INSTANT}


def post(site: Site, spec: dict[str, Any] = SPEC, **headers: str) -> Any:
    response = site.client.post("/jobs", json=spec, headers=headers)
    assert response.status_code == 202, response.text
    return response


def state(site: Site, job_id: str) -> str:
    found: str = site.client.get(f"/jobs/{job_id}").json()["state"]
    return found


def wait_for(site: Site, job_id: str, wanted: str = "done") -> dict[str, Any]:
    wait_until(lambda: state(site, job_id) == wanted)
    document: dict[str, Any] = site.client.get(f"/jobs/{job_id}").json()
    return document


def events(text: str) -> list[tuple[str, dict[str, Any], str | None]]:
    """Name, data and id of each event."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if line and not line.startswith(":"))
        if "event" in fields:
            found.append((fields["event"], json.loads(fields["data"]), fields.get("id")))
    return found


def wait_for_viewer(site: Site) -> None:
    """The worker hears of who looks on before its next tick."""
    wait_until(lambda: site.app.state.streams._open.total() == 1)


@pytest.fixture
def held(make_site: MakeSite) -> Site:
    """A site that is ready, and whose next tick waits for the test."""
    site = make_site()
    site.engine.gate.shut()
    return site


class Restarts:
    """Sites on one file, one after the other. The last is shut down at the end."""

    def __init__(self, file: Path) -> None:
        self.file, self.site = file, None

    def start(
        self,
        *,
        shut: bool = False,
        info: dict[str, Any] | None = None,
        tick_times: tuple[tuple[int, float], ...] = INSTANT,
        **fields: Any,
    ) -> Site:
        limits = replace(LIMITS, **fields)
        self.site = Site(replace(INFO, **info or {}), limits, tick_times, state_file=self.file)
        if shut:
            self.site.engine.gate.shut()
            self.site.engine.gate.let()  # the warm-up
        self.site.client.__enter__()
        self.site.wait_until_ready()
        return self.site

    def stop(self) -> None:
        """As SIGTERM does, without the waiting: accepted jobs stay."""
        if self.site is not None:
            self.site.app.state.worker.drain()
            self.site.engine.gate.open()
            self.site.client.__exit__(None, None, None)
            assert self.site.engine.jobs == {}
            self.site = None


@pytest.fixture
def restarts(tmp_path: Path) -> Iterator[Restarts]:
    made = Restarts(tmp_path / "jobs.sqlite3")
    yield made
    made.stop()


# --- one job ---


def test_a_job_is_accepted_at_once_and_ends_in_the_bytes_of_sample(held: Site) -> None:
    response = post(held)
    job = response.json()
    assert response.headers["location"] == f"/jobs/{job['id']}"
    assert response.headers["x-job-id"] == job["id"]
    assert response.headers["x-seed"] == "5"
    assert (job["state"], job["durable"], job["step"], job["steps"], job["n"]) == ("waiting", True, 0, 6, 2)
    assert job["finished"] is None
    held.engine.next_begun()
    early = held.client.get(f"/jobs/{job['id']}/image")
    problem(early, 409, "job_not_done")
    assert int(early.headers["retry-after"]) >= 1
    held.engine.gate.open()
    done = wait_for(held, job["id"])
    assert (done["step"], done["problem"], done["fingerprint"]) == (6, None, INFO.fingerprint)
    assert done["finished"] >= done["created"]
    for accept in ("image/png", "application/zip", "application/json"):
        image = held.client.get(response.headers["location"] + "/image", headers={"Accept": accept})
        assert image.status_code == 200
        assert image.headers["content-type"] == accept
        assert image.content == held.post(json=SPEC, headers={"Accept": accept}).content
        tag = {"Accept": accept, "If-None-Match": image.headers["etag"]}
        assert held.client.get(f"/jobs/{job['id']}/image", headers=tag).status_code == 304
    again = held.post(json=done["parameters"]).content
    assert again == held.client.get(f"/jobs/{job['id']}/image").content, "its parameters make it again"


def test_sample_with_respond_async_is_a_durable_job(site: Site) -> None:
    response = site.post(json=SPEC, headers={"Prefer": "wait=5, respond-async; x=1"})
    assert response.status_code == 202
    assert response.headers["preference-applied"] == "respond-async"
    job_id = response.headers["location"].rpartition("/")[2]
    assert wait_for(site, job_id)["durable"]
    assert site.post(json=SPEC, headers={"Prefer": "respond-asynchronously"}).status_code == 200
    assert site.client.get("/sample?steps=2", headers={"Prefer": "respond-async"}).status_code == 200


def test_a_bad_spec_is_refused_and_nothing_is_kept(site: Site) -> None:
    problem(site.client.post("/jobs", json={"steps": 0}), 422, "invalid_field")
    problem(site.client.post("/jobs", json={"stops": 1}), 422, "unknown_field")
    problem(site.client.post("/jobs", content=b"{"), 400, "malformed_body")
    assert site.client.get("/jobs").json() == {"jobs": [], "next": None}


def test_work_over_the_limits_is_refused_as_anywhere(make_site: MakeSite) -> None:
    site = make_site(max_jobs=1)
    site.engine.gate.shut()
    post(site)
    refused = site.client.post("/jobs", json=SPEC)
    problem(refused, 429, "overloaded")
    assert refused.headers["retry-after"]
    assert len(site.client.get("/jobs").json()["jobs"]) == 1


def test_a_job_whose_network_gives_nan_has_failed_and_says_why(held: Site) -> None:
    job_id = post(held).json()["id"]
    batch = held.engine.next_begun()
    held.engine.nan.add(batch.rows[0])
    held.engine.gate.open()
    failed = wait_for(held, job_id, "failed")
    assert failed["problem"]["code"] == "not_finite"
    document = problem(held.client.get(f"/jobs/{job_id}/image"), 410, "no_images")
    assert document["cause"] == failed["problem"]


def test_a_deadline_that_passes_fails_the_job(held: Site) -> None:
    job_id = post(held, SPEC | {"deadline_s": 0.1}).json()["id"]
    held.engine.next_begun()
    wait_until(lambda: held.client.get(f"/jobs/{job_id}").json()["age_s"] > 0.15)
    held.engine.gate.let()
    assert wait_for(held, job_id, "failed")["problem"]["code"] == "deadline_passed"


def test_a_job_is_told_by_its_id_as_soon_as_it_is_accepted(make_site: MakeSite) -> None:
    site = make_site(max_batch=2, tick_times=((1, 1.0), (2, 1.0)))
    site.engine.gate.shut()
    first = post(site, {"n": 2, "steps": 50}).json()
    site.engine.next_begun()
    assert len(site.client.get("/jobs").json()["jobs"]) == 1  # makes the forecast that is told for a second
    accepted = post(site, {"n": 2, "steps": 90}).json()
    assert (accepted["state"], accepted["position"], accepted["eta_s"]) == ("waiting", 1, 140.0)
    told = site.client.get(f"/jobs/{accepted['id']}").json()
    assert (told["state"], told["step"], told["position"]) == ("waiting", 0, 1)
    assert accepted["eta_s"] - 10 < told["eta_s"] <= accepted["eta_s"]
    assert [job["id"] for job in site.client.get("/jobs").json()["jobs"]] == [accepted["id"], first["id"]]


def test_each_step_is_told_at_once_though_forecasts_are_a_second_apart(held: Site) -> None:
    job_id = post(held, {"steps": 30}).json()["id"]
    held.engine.next_begun()
    for step in range(1, 20):
        held.engine.gate.let()
        held.engine.next_begun()
        told = held.client.get(f"/jobs/{job_id}").json()
        assert (told["state"], told["step"]) == ("running", step)


def test_the_store_is_called_while_images_are_still_copied_from_a_gpu(held: Site) -> None:
    images, copied, reading = held.engine.images, threading.Event(), threading.Event()

    def images_later(rows: Sequence[int]) -> Callable[[], Images]:
        read = images(rows)

        def read_later() -> Images:
            reading.set()
            assert copied.wait(PATIENCE_S)
            return read()

        return read_later

    held.engine.images = images_later  # type: ignore[method-assign]
    job_id = post(held).json()["id"]
    held.engine.gate.open()
    assert reading.wait(PATIENCE_S)
    assert held.client.get("/jobs?state=done").json()["jobs"] == []
    assert state(held, job_id) == "running"
    copied.set()
    assert wait_for(held, job_id)


# --- ids, keys, pages ---


@pytest.mark.parametrize("path", ["", "/image", "/events"])
@pytest.mark.parametrize("job_id", ["0" * 32, "x", "%00", "%F0%9F%98%80", "a" * 3000])
def test_a_job_that_is_none_is_not_found(site: Site, job_id: str, path: str) -> None:
    document = problem(site.client.get(f"/jobs/{job_id}{path}"), 404, "job_not_found")
    assert document["field"] == "job_id"


def test_a_job_that_is_not_durable_has_no_image_to_come_back_for(held: Site) -> None:
    with ThreadPoolExecutor(1) as pool:
        passing = pool.submit(held.post, json=SPEC)
        held.engine.next_begun()
        wait_until(lambda: len(held.client.get("/jobs").json()["jobs"]) == 1)
        (job,) = held.client.get("/jobs").json()["jobs"]
        assert not job["durable"]
        for path in ("/image", "/events"):
            problem(held.client.get(f"/jobs/{job['id']}{path}"), 404, "job_not_found")
        held.engine.gate.open()
        assert passing.result(PATIENCE_S).status_code == 200


def test_the_same_key_is_the_same_job_while_it_runs_and_after(held: Site) -> None:
    first = post(held, **{"Idempotency-Key": "k"})
    again = post(held, **{"Idempotency-Key": '"k"'})
    assert again.json()["id"] == first.json()["id"]
    assert "idempotent-replayed" not in first.headers
    assert again.headers["idempotent-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    other = held.client.post("/jobs", json=SPEC | {"seed": 6}, headers={"Idempotency-Key": "k"})
    assert problem(other, 422, "idempotency_key_reused")["field"] == "Idempotency-Key"
    assert len(held.client.get("/jobs").json()["jobs"]) == 1
    held.engine.gate.open()
    wait_for(held, first.json()["id"])
    assert post(held, **{"Idempotency-Key": "k"}).json()["state"] == "done"
    assert post(held, **{"Idempotency-Key": "another"}).json()["id"] != first.json()["id"]


def test_a_drawn_seed_is_the_same_for_the_same_key(site: Site) -> None:
    unseeded = {"steps": 3}
    seeds = {post(site, unseeded, **{"Idempotency-Key": "k"}).headers["x-seed"] for _ in range(3)}
    assert len(seeds) == 1
    assert post(site, unseeded).headers["x-seed"] not in seeds


def test_many_at_once_with_one_key_are_one_job(held: Site) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: post(held, **{"Idempotency-Key": "k"}), range(16)))
    assert len({answer.json()["id"] for answer in answers}) == 1
    held.engine.gate.open()
    wait_for(held, answers[0].json()["id"])
    assert len(held.client.get("/jobs").json()["jobs"]) == 1
    assert held.engine.jobs == {}


@pytest.mark.parametrize("key", ["", " ", "a" * 256, "a\tb", '"'])
def test_a_key_that_is_none_is_refused(site: Site, key: str) -> None:
    document = problem(site.client.post("/jobs", json=SPEC, headers={"Idempotency-Key": key}), 422, "invalid_field")
    assert document["field"] == "Idempotency-Key"


def test_pages_go_from_the_newest_to_the_oldest_and_hold_each_once(held: Site) -> None:
    held.engine.gate.open()
    ids = [post(held, {"steps": 1, "seed": k}).json()["id"] for k in range(5)]
    for job_id in ids:
        wait_for(held, job_id)
    held.engine.gate.shut()
    ids += [post(held, {"steps": 9, "seed": k}).json()["id"] for k in range(2)]
    found: list[str] = []
    query = "limit=2"
    while True:
        page = held.client.get(f"/jobs?{query}").json()
        assert len(page["jobs"]) <= 2
        found += [job["id"] for job in page["jobs"]]
        if page["next"] is None:
            break
        query = f"limit=2&before={page['next']}"
    assert found == ids[::-1]
    by_state = held.client.get("/jobs?state=done").json()["jobs"]
    assert [job["id"] for job in by_state] == ids[4::-1]
    assert len(held.client.get("/jobs?state=waiting,running").json()["jobs"]) == 2


@pytest.mark.parametrize(
    "query",
    ["state=gone", "state=", "state=done,", "limit=0", "limit=201", "limit=x", "limit=-1", "before=x", "before=1-2"],
)
def test_a_bad_page_is_refused_with_its_field(site: Site, query: str) -> None:
    document = problem(site.client.get(f"/jobs?{query}"), 422, "invalid_field")
    assert document["field"] == query.partition("=")[0]
    assert document["bound"]


# --- giving one up ---


def test_delete_cancels_a_running_job_and_then_forgets_it(held: Site) -> None:
    job_id = post(held, SPEC | {"steps": 1000, "guidance": 1}).json()["id"]
    held.engine.next_begun()
    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(held.client.delete, f"/jobs/{job_id}")
        wait_until(lambda: not held.app.state.worker._commands.empty())
        held.engine.gate.open()
        assert deleting.result(PATIENCE_S).status_code == 204
    assert state(held, job_id) == "cancelled"
    wait_until(lambda: held.engine.jobs == {})
    problem(held.client.get(f"/jobs/{job_id}/image"), 410, "no_images")
    assert held.client.delete(f"/jobs/{job_id}").status_code == 204
    problem(held.client.get(f"/jobs/{job_id}"), 404, "job_not_found")
    problem(held.client.delete(f"/jobs/{job_id}"), 404, "job_not_found")


def test_cancel_gives_a_job_up_and_leaves_one_that_has_ended_as_it_is(held: Site) -> None:
    job_id = post(held, SPEC | {"steps": 1000, "guidance": 1}).json()["id"]
    held.engine.next_begun()
    with ThreadPoolExecutor(1) as pool:
        cancelling = pool.submit(held.client.post, f"/jobs/{job_id}/cancel")
        wait_until(lambda: not held.app.state.worker._commands.empty())
        held.engine.gate.open()
        assert cancelling.result(PATIENCE_S).json()["state"] == "cancelled"
    again = held.client.post(f"/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")
    done = post(held).json()["id"]
    wait_for(held, done)
    assert held.client.post(f"/jobs/{done}/cancel").json()["state"] == "done"
    assert held.client.get(f"/jobs/{done}/image").status_code == 200
    problem(held.client.post(f"/jobs/{'0' * 32}/cancel"), 404, "job_not_found")


def test_delete_forgets_a_job_that_is_done(site: Site) -> None:
    job_id = post(site).json()["id"]
    wait_for(site, job_id)
    assert site.client.delete(f"/jobs/{job_id}").status_code == 204
    problem(site.client.get(f"/jobs/{job_id}/image"), 404, "job_not_found")


# --- events ---


def test_events_tell_of_each_step_and_the_end(held: Site) -> None:
    job_id = post(held).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(held.client.get, f"/jobs/{job_id}/events?every=2")
        wait_for_viewer(held)
        for _ in range(6):
            held.engine.gate.let()
            held.engine.next_begun()
        held.engine.gate.open()
        response = reading.result(PATIENCE_S)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    assert response.text.startswith("retry: 2000\n\n")
    found = [event for event in events(response.text) if event[0] != "waiting"]
    assert found[-1][0] == "done"
    assert found[-1][1]["id"] == job_id
    assert found[-1][2] == "end"
    steps = [data["step"] for name, data, _ in found if name == "progress"]
    assert steps == sorted(set(steps))
    assert set(steps) <= {2, 4, 6}, "newest wins"
    assert [event_id for _, _, event_id in found[:-1]] == [str(step) for step in steps]


def test_events_of_a_job_that_has_ended_are_its_end(site: Site) -> None:
    job_id = post(site).json()["id"]
    wait_for(site, job_id)
    (event,) = events(site.client.get(f"/jobs/{job_id}/events").text)
    assert (event[0], event[2]) == ("done", "end")
    known = site.client.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "end"})
    assert (known.status_code, known.content) == (204, b""), "an EventSource then stops"


def test_frames_come_as_pictures_when_they_are_asked_for(held: Site) -> None:
    job_id = post(held, SPEC | {"steps": 3}).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        query = "every=1&show=x_t&show=x_0&frame_format=webp&layout=images"
        reading = pool.submit(held.client.get, f"/jobs/{job_id}/events?{query}")
        wait_for_viewer(held)
        held.engine.gate.let(2)  # in the first of them the worker has not heard yet
        wait_until(lambda: held.metrics().get("tminus_frames_sent_total") == 1)
        held.engine.gate.open()
        found = events(reading.result(PATIENCE_S).text)
    first = [(data, event_id) for name, data, event_id in found if name == "frame" and data["step"] == 2]
    assert [(data["show"], data["image"]) for data, _ in first] == [("x_t", 0), ("x_t", 1), ("x_0", 0), ("x_0", 1)]
    assert [event_id for _, event_id in first] == [None, None, None, "2"], "with the last of them the step is known"
    assert {data["media_type"] for data, _ in first} == {"image/webp"}


@pytest.mark.parametrize(
    ("query", "field"),
    [("every=0", "every"), ("fps=61", "fps"), ("show=x", "show"), ("keep_open=1", "keep_open"), ("n=2", "n")],
)
def test_bad_ways_to_show_a_job_are_refused(held: Site, query: str, field: str) -> None:
    job_id = post(held).json()["id"]
    response = held.client.get(f"/jobs/{job_id}/events?{query}")
    assert response.status_code == 422
    assert response.json()["field"] == field


def test_too_many_who_look_on_are_refused(make_site: MakeSite) -> None:
    site = make_site(max_streams_per_address=1)
    site.engine.gate.shut()
    job_id = post(site).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(site.client.get, f"/jobs/{job_id}/events")
        wait_for_viewer(site)
        problem(site.client.get(f"/jobs/{job_id}/events"), 429, "too_many_streams")
        site.engine.gate.open()
        assert reading.result(PATIENCE_S).status_code == 200
    assert site.client.get(f"/jobs/{job_id}/events").status_code == 200, "there is room again"


# --- the store fails ---


def test_a_store_that_fails_refuses_new_jobs_and_nothing_else(held: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(*_: object) -> None:
        raise StorageFailed("the job store cannot do it: database or disk is full")

    monkeypatch.setattr(SqliteStore, "add", add)
    document = problem(held.client.post("/jobs", json=SPEC), 507, "storage_failed")
    assert "disk is full" in document["detail"]
    held.engine.gate.open()
    wait_until(lambda: held.engine.jobs == {})
    assert held.post(json=SPEC).status_code == 200
    monkeypatch.undo()
    assert wait_for(held, post(held).json()["id"])


def test_an_end_that_cannot_be_kept_is_tried_until_it_can(held: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, failures = SqliteStore.finish, []

    def full(store: SqliteStore, job: JobRecord, images: object = None) -> None:
        if len(failures) < 3:
            failures.append(job)
            raise StorageFailed("full")
        finish(store, job, images)  # type: ignore[arg-type]

    monkeypatch.setattr(SqliteStore, "finish", full)
    monkeypatch.setattr(lifecycle, "RETRY_S", 0.01)
    job_id = post(held).json()["id"]
    held.engine.gate.open()
    assert wait_for(held, job_id)
    assert len(failures) == 3
    assert held.client.get(f"/jobs/{job_id}/image").status_code == 200


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


def test_what_has_ended_is_there_after_a_restart_key_and_all(restarts: Restarts) -> None:
    site = restarts.start()
    job_id = post(site, **{"Idempotency-Key": "k"}).json()["id"]
    before = wait_for(site, job_id)
    image = site.client.get(f"/jobs/{job_id}/image").content
    restarts.stop()
    site = restarts.start()
    assert site.client.get(f"/jobs/{job_id}").json() | {"age_s": 0} == before | {"age_s": 0}
    assert site.client.get(f"/jobs/{job_id}/image").content == image
    assert post(site, **{"Idempotency-Key": "k"}).json()["id"] == job_id


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


def test_jobs_of_an_earlier_start_wait_for_room_in_order_of_arrival(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    ids = [post(site, {"steps": 3, "seed": k}).json()["id"] for k in range(4)]
    restarts.stop()
    site = restarts.start(max_jobs=1)
    for job_id in ids:
        assert wait_for(site, job_id)["state"] == "done"
    records = [site.client.get(f"/jobs/{job_id}").json()["finished"] for job_id in ids]
    assert records == sorted(records)


def test_a_job_that_waits_for_room_can_be_cancelled_and_watched(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    ids = [post(site, {"steps": 500, "seed": k}).json()["id"] for k in range(3)]
    restarts.stop()
    site = restarts.start(max_jobs=1)
    site.engine.gate.shut()
    assert site.client.delete(f"/jobs/{ids[2]}").status_code == 204
    assert state(site, ids[2]) == "cancelled"
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(site.client.get, f"/jobs/{ids[1]}/events?every=100")
        site.engine.gate.open()
        assert events(reading.result(PATIENCE_S).text)[-1][0] == "done"
    wait_for(site, ids[0])


def test_a_deadline_goes_on_while_the_server_is_down(restarts: Restarts) -> None:
    store = SqliteStore(restarts.file)
    store.add(JobRecord("a" * 32, make_spec(), now_us() - 10_000_000, now_us() - 5_000_000))
    store.close()
    site = restarts.start()
    assert wait_for(site, "a" * 32, "failed")["problem"]["code"] == "deadline_passed"


def test_an_end_that_cannot_be_kept_for_whatever_reason_hangs_nobody(
    held: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[Exception] = [MemoryError("no room"), StorageFailed("full")]

    def fail(*_: object) -> None:
        raise reasons[0]

    monkeypatch.setattr(SqliteStore, "finish", fail)
    monkeypatch.setattr(lifecycle, "RETRY_S", 0.01)
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


def test_who_waits_behind_a_job_that_is_deleted_need_not_wait_longer(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    ids = [post(site, {"steps": steps, "seed": steps}).json()["id"] for steps in (1000, 999, 5, 6)]
    restarts.stop()
    site = restarts.start(max_jobs=1, tick_times=((1, 9.0), (8, 9.0)), shut=True)
    wait_until(lambda: not site.engine.begun.empty())
    with ThreadPoolExecutor(2) as pool:
        deleting = [pool.submit(site.client.delete, f"/jobs/{job_id}") for job_id in ids[:2]]
        wait_until(lambda: not site.app.state.worker._commands.empty())
        site.engine.gate.open()
        assert [each.result(PATIENCE_S).status_code for each in deleting] == [204, 204]
    assert wait_for(site, ids[2])["state"] == "done"
    assert wait_for(site, ids[3])["state"] == "done"


def test_a_crash_is_counted_only_for_those_that_were_in_hand(restarts: Restarts) -> None:
    def crash(rows: object) -> None:
        raise RuntimeError("out of memory")

    site = restarts.start(shut=True, max_batch=2)
    poison, innocent = post(site, {"steps": 1, "n": 2}).json()["id"], post(site, {"steps": 50, "n": 2}).json()["id"]
    for _ in range(3):
        site.engine.on_remove = crash
        site.engine.gate.open()
        wait_until(lambda site=site: site.app.state.worker.crashed)  # type: ignore[misc]
        site.engine.jobs.clear()
        restarts.stop()
        site = restarts.start(shut=True, max_batch=2)
    site.engine.gate.open()
    assert wait_for(site, poison, "failed")["problem"]["code"] == "engine_failed"
    assert wait_for(site, innocent)["state"] == "done"


def test_suspended_work_is_not_counted_as_saved(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    post(site, {"steps": 900})
    site.engine.next_begun()
    worker = site.app.state.worker
    worker.drain()
    site.engine.gate.open()
    wait_until(lambda: not worker.alive)
    metrics = site.metrics()
    assert metrics["tminus_row_steps_saved_total"] == 0
    assert 'tminus_cancelled_total{"reason": "suspended"}' not in metrics


def test_who_comes_back_ahead_of_the_job_is_told_where_it_stands(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    job_id = post(site, {"steps": 300}).json()["id"]
    site.engine.gate.let(3)
    for _ in range(4):
        site.engine.next_begun()
    with ThreadPoolExecutor(1) as pool:
        ahead = {"Last-Event-ID": "250"}
        reading = pool.submit(site.client.get, f"/jobs/{job_id}/events?every=100", headers=ahead)
        wait_for_viewer(site)
        site.engine.gate.open()
        found = events(reading.result(PATIENCE_S).text)
    steps = [data["step"] for name, data, _ in found if name == "progress"]
    assert 1 <= steps[0] <= 4, "at once, and without an id"
    assert found[0][2] is None
    assert steps[-1] in (100, 200), "what is done again is shown again"
    assert found[-1][0] == "done"


def test_a_worker_that_crashes_again_and_again_with_a_job_fails_it(restarts: Restarts) -> None:
    def crash(rows: object) -> None:
        raise RuntimeError("out of memory")

    site = restarts.start(shut=True)
    job_id = post(site).json()["id"]
    for attempt in range(3):
        assert state(site, job_id) in ("waiting", "running"), attempt
        site.engine.on_remove = crash  # in _deliver, which nothing catches
        site.engine.gate.open()
        wait_until(lambda site=site: site.app.state.worker.crashed)  # type: ignore[misc]
        site.engine.jobs.clear()
        restarts.stop()
        site = restarts.start(shut=True)
    assert wait_for(site, job_id, "failed")["problem"]["code"] == "engine_failed"


def test_those_who_look_on_are_let_go_when_the_server_stops(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    job_id = post(site).json()["id"]
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(site.client.get, f"/jobs/{job_id}/events?every=1")
        wait_for_viewer(site)
        site.app.state.worker.drain()
        site.engine.gate.open()
        text = reading.result(PATIENCE_S).text
    assert not {"done", "failed", "cancelled"} & {name for name, _, _ in events(text)}, "it has not ended"


# --- what goes ---


def test_jobs_go_when_their_time_is_over(make_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "SWEEP_S", 0.01)
    site = make_site(keep_jobs_s=0.05)
    job_id = post(site).json()["id"]
    wait_until(lambda: site.client.get(f"/jobs/{job_id}").status_code == 404)
    assert site.client.get("/jobs").json() == {"jobs": [], "next": None}
