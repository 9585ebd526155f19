"""GET /jobs, GET and DELETE /jobs/{id}, deadlines, and durable edits, through the app."""

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from tests.service.api.asgi import call, scope_of
from tests.service.api.pictures import CAT, EDIT, INPUTS, MASK, MASK_PIXELS, PICTURE, b64, encode, noise, same
from tests.service.conftest import MakeSite, Restarts, Site, pixels, problem
from tests.service.fakes import INFO, PATIENCE_S, fake_pixels, make_spec, wait_until
from tminus.service.access.access import ANYBODY, AT_ONCE
from tminus.service.api.jobs import COPIES
from tminus.service.images.encoder import encode_result
from tminus.service.jobs.jobs import FORECAST_S
from tminus.service.jobs.store.arrays import unpack_images
from tminus.service.jobs.store.records import StoredObject
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.spec import Pixels
from tminus.service.work import JobStatus
from tminus.service.worker.running_job import AcceptedJobs

SECOND = 1.0
EVERY_TICK_A_SECOND = (
    (1, SECOND),
    (8, SECOND),
)  # says the measurement; the fake's ticks take as long as the test likes


@dataclass
class Asked:
    """A site on which requests wait in threads."""

    site: Site
    pool: ThreadPoolExecutor

    def post(self, **parameters: object) -> "Future[Any]":
        return self.pool.submit(self.site.post, json=parameters)

    def jobs(self) -> list[dict[str, Any]]:
        response = self.site.client.get("/jobs")
        assert response.status_code == 200
        document = response.json()
        assert document.keys() == {"jobs", "next"}
        found: list[dict[str, Any]] = document["jobs"]
        return found[::-1]  # in order of arrival

    def wait_for(self, count: int) -> list[dict[str, Any]]:
        wait_until(lambda: len(self.jobs()) == count)
        return self.jobs()


@pytest.fixture
def asked(make_site: MakeSite) -> Any:
    site = make_site(max_batch=2, tick_times=((1, SECOND), (2, SECOND)))
    site.engine.gate.shut()
    with ThreadPoolExecutor(8) as pool:
        yield Asked(site, pool)
        site.engine.gate.open()


# --- jobs that wait and run ---


def test_waiting_and_running_jobs_are_listed_with_position_and_time(asked: Asked) -> None:
    first = asked.post(n=2, steps=4, seed=7, sampler="ddim")
    asked.site.engine.next_begun()
    asked.wait_for(1)
    second = asked.post(n=2, steps=10, seed=8)
    asked.wait_for(2)
    asked.site.engine.gate.let()
    asked.site.engine.next_begun()
    one, two = asked.jobs()
    members = {"id", "model", "state", "durable", "position", "eta_s", "n", "steps", "step", "sampler", "seed", "age_s"}
    members |= {"created", "finished", "fingerprint", "parameters", "problem", "webhook"}
    assert one.keys() == two.keys() == members
    assert not one["durable"]
    assert (one["state"], one["position"], one["n"], one["steps"]) == ("running", 0, 2, 4)
    assert (one["step"], one["sampler"], one["seed"]) == (1, "ddim", 7)
    assert (two["state"], two["position"], two["n"], two["steps"]) == ("waiting", 1, 2, 10)
    assert (two["step"], two["sampler"], two["seed"]) == (0, "ddpm", 8)
    assert 0 < one["eta_s"] < two["eta_s"]
    assert one["age_s"] >= two["age_s"] >= 0
    assert asked.site.client.get(f"/jobs/{one['id']}").json().keys() == members
    asked.site.engine.gate.open()
    answers = [future.result(PATIENCE_S) for future in (first, second)]
    assert [answer.headers["x-job-id"] for answer in answers] == [one["id"], two["id"]]
    assert [answer.headers["x-queue-position"] for answer in answers] == ["0", "1"]
    etas = [float(answer.headers["x-eta-seconds"]) for answer in answers]
    assert etas == [4 * SECOND, 14 * SECOND]
    timings = [dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", ")) for answer in answers]
    for timing in timings:
        queue, first_step, denoise = (float(timing[name]) for name in ("queue", "first_step", "denoise"))
        assert queue <= first_step <= queue + denoise + 0.2
    assert asked.jobs() == []


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("job_id", ["0" * 32, "%00", "%F0%9F%98%80", "a" * 3000])
def test_an_unknown_job_is_a_problem(one_site: Site, method: str, job_id: str) -> None:
    response = one_site.client.request(method, f"/jobs/{job_id}")
    document = problem(response, 404, "job_not_found")
    assert document["field"] == "job_id"
    assert len(response.content) < 1500


def test_however_often_jobs_are_looked_up_one_forecast_a_second_is_made(
    asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = asked.post(steps=3, seed=1)
    asked.site.engine.next_begun()
    forecast, forecasts, began_s = AcceptedJobs.statuses, [], time.monotonic()

    def counted(jobs: AcceptedJobs) -> list[JobStatus]:
        forecasts.append(time.monotonic())
        return forecast(jobs)

    monkeypatch.setattr(AcceptedJobs, "statuses", counted)
    (job,) = asked.wait_for(1)
    for _ in range(20):
        one = asked.site.client.get(f"/jobs/{job['id']}").json()
        assert one | {"age_s": 0, "eta_s": 0} == job | {"age_s": 0, "eta_s": 0}
        asked.jobs()
    assert 1 <= len(forecasts) <= 1 + (time.monotonic() - began_s) / FORECAST_S
    asked.site.engine.gate.open()
    assert running.result(PATIENCE_S).status_code == 200


# --- giving one up ---


def test_deleting_a_waiting_job_frees_it_and_answers_its_client(asked: Asked) -> None:
    running = asked.post(n=2, steps=4, seed=7)
    asked.site.engine.next_begun()
    asked.wait_for(1)
    waiting = asked.post(n=2, steps=10, seed=8)
    (_, cancelled) = asked.wait_for(2)
    response = asked.site.client.delete(f"/jobs/{cancelled['id']}")
    assert (response.status_code, response.content) == (204, b"")
    asked.site.engine.gate.let()
    document = problem(waiting.result(PATIENCE_S), 499, "cancelled")
    assert "deleted" in document["detail"]
    assert [job["seed"] for job in asked.jobs()] == [7]
    problem(asked.site.client.delete(f"/jobs/{cancelled['id']}"), 404, "job_not_found")
    asked.site.engine.gate.open()
    answer = running.result(PATIENCE_S)
    assert answer.status_code == 200
    metrics = asked.site.metrics()
    assert metrics['tminus_jobs_aborted_total{"reason": "deleted"}'] == 1
    assert metrics["tminus_row_steps_saved_total"] == 20
    rejected = {name for name in metrics if name.startswith("tminus_rejected_total")}
    assert rejected <= {'tminus_rejected_total{"reason": "job_not_found"}'}, "a job given up is no refusal"


# --- deadlines ---


def test_a_deadline_too_short_for_the_work_is_a_bad_parameter(make_site: MakeSite) -> None:
    site = make_site(tick_times=EVERY_TICK_A_SECOND)
    document = problem(site.post(json={"steps": 100, "deadline_s": 99}), 422, "invalid_field")
    assert (document["field"], document["value"]) == ("deadline_s", 99)
    assert document["bound"] == "at least 100 s for this work"
    assert site.engine.batches[1:] == []


def test_a_deadline_that_the_load_forbids_says_when_it_would_be_met(make_site: MakeSite) -> None:
    site = make_site(max_batch=2, tick_times=((1, SECOND), (2, SECOND)))
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.post, json={"n": 2, "steps": 20})
        site.engine.next_begun()
        response = site.post(json={"n": 2, "steps": 20, "deadline_s": 30})
        document = problem(response, 429, "deadline_unmeetable")
        assert (document["field"], document["value"]) == ("deadline_s", 30)
        assert document["bound"].startswith("at least ")
        assert "retry-after" not in response.headers, "the bound says how much time to allow, not when to ask again"
        assert len(site.client.get("/jobs").json()["jobs"]) == 1, "a refused job is not here"
        site.engine.gate.open()
        assert running.result(PATIENCE_S).status_code == 200
    assert site.metrics()['tminus_rejected_total{"reason": "deadline_unmeetable"}'] == 1


def test_a_deadline_that_passes_in_flight_ends_the_job_with_504(site: Site) -> None:
    site.engine.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(site.post, json={"n": 2, "steps": 900, "seed": 1, "deadline_s": 0.2})
        site.engine.next_begun()
        patient = pool.submit(site.post, json={"steps": 5, "seed": 2, "deadline_s": 1000})
        wait_until(lambda: any(job["age_s"] > 0.2 for job in site.client.get("/jobs").json()["jobs"]))
        site.engine.gate.let()
        document = problem(late.result(PATIENCE_S), 504, "deadline_passed")
        assert (document["field"], document["value"], document["bound"]) == ("deadline_s", 0.2, "a longer time")
        site.engine.gate.open()
        answer = patient.result(PATIENCE_S)
    np.testing.assert_array_equal(pixels(answer.content), fake_pixels(make_spec(seed=2), 5)[0, :, :, 0])
    metrics = site.metrics()
    assert metrics['tminus_jobs_aborted_total{"reason": "deadline"}'] == 1
    assert metrics["tminus_backlog_seconds"] == 0
    assert metrics['tminus_request_duration_seconds_count{"route": "/sample", "status": "504"}'] == 1


def test_a_network_that_gives_nan_is_told_to_its_own_client_only(site: Site) -> None:
    site.engine.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        sick = pool.submit(site.post, json={"n": 2, "steps": 9, "seed": 1})
        well = pool.submit(site.post, json={"steps": 9, "seed": 2})
        wait_until(lambda: len(site.client.get("/jobs").json()["jobs"]) == 2)
        site.engine.on_step = lambda batch: site.engine.nan.update(
            rows[1] for spec, rows in site.engine.jobs.values() if spec.seed == 1
        )
        site.engine.gate.open()
        document = problem(sick.result(PATIENCE_S), 500, "not_finite")
        assert "NaN" in document["detail"]
        assert well.result(PATIENCE_S).status_code == 200
    assert json.loads(json.dumps(document)) == document
    assert site.metrics()['tminus_jobs_aborted_total{"reason": "not_finite"}'] == 1


# --- durable edits ---


def accepted(site: Site, key: str | None = None, **kwargs: Any) -> Any:
    response = site.client.post("/jobs", headers={"Idempotency-Key": key} if key else {}, **kwargs)
    assert response.status_code == 202, response.text
    return response


def ended(site: Site, job_id: str) -> dict[str, Any]:
    wait_until(lambda: site.client.get(f"/jobs/{job_id}").json()["state"] == "done")
    found: dict[str, Any] = site.client.get(f"/jobs/{job_id}").json()
    return found


def test_a_durable_edit_is_asked_for_told_and_fetched(site: Site) -> None:
    body = EDIT | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    job_id = accepted(site, json=body).json()["id"]
    document = ended(site, job_id)
    assert (document["step"], document["steps"]) == (3, 3)
    told = document["parameters"]
    assert (told["steps"], told["strength"], told["image_sha256"]) == (5, 0.6, INPUTS.image_sha256)
    assert told["mask_sha256"] == INPUTS.mask_sha256
    assert "image" not in told
    image = site.client.get(f"/jobs/{job_id}/image")
    direct = site.post(json=body)
    assert (image.content, image.headers["etag"]) == (direct.content, direct.headers["etag"])
    again = site.post(json=told | {"image": b64(CAT), "mask": b64(MASK)})
    assert again.content == direct.content, "the parameters and the pictures make it again"
    assert problem(site.post(json=told), 422, "invalid_field")["field"] == "image"


def test_a_key_covers_the_pictures_in_json_and_form_alike(site: Site) -> None:
    fields = EDIT | {"strength": 0.6}
    body = fields | {"image": b64(CAT), "mask": b64(MASK)}
    first = accepted(site, "k", json=body).json()["id"]
    files = {"image": ("a.png", CAT), "mask": ("b.png", MASK)}
    for retry in ({"json": body}, {"files": files, "data": {k: str(v) for k, v in fields.items()}}):
        response = accepted(site, "k", **retry)
        assert response.json()["id"] == first
        assert response.headers["idempotent-replayed"] == "true"
    for other in ({"image": b64(encode(noise(4, 6, seed=9)))}, {"mask": b64(CAT)}, {"strength": 0.7}, {"mask": None}):
        answer = site.client.post("/jobs", json=body | other, headers={"Idempotency-Key": "k"})
        problem(answer, 422, "idempotency_key_reused")


def test_two_idempotency_keys_are_refused(one_site: Site) -> None:
    twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    answer = one_site.client.post("/jobs", json={"steps": 2}, headers=twice)
    assert problem(answer, 400, "malformed_request")["field"] == "Idempotency-Key"
    answer = one_site.client.post("/v1/images/generations", json={"prompt": ""}, headers=twice)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_request")
    assert one_site.client.get("/jobs").json()["jobs"] == []


def test_a_durable_edit_of_an_earlier_process_has_its_pictures(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    body = EDIT | {"strength": 0.6, "image": b64(CAT), "mask": b64(MASK)}
    job_id = accepted(site, json=body).json()["id"]
    site.engine.next_begun()
    restarts.stop()
    again = restarts.start()
    document = ended(again, job_id)
    assert document["parameters"]["image_sha256"] == INPUTS.image_sha256
    assert same(again.engine.inputs[-1], PICTURE, MASK_PIXELS)
    assert again.engine.batches[-1].steps == (4, 4)


# --- a client that goes away ---


@pytest.mark.parametrize("where", ["store", "encoder"])
def test_who_asks_for_images_and_goes_away_is_not_waited_for(
    site: Site, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    job_id = accepted(site, json={"steps": 2, "seed": 5}).json()["id"]
    ended(site, job_id)
    begun, go = threading.Event(), threading.Event()

    def held(really: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*given: Any, **named: Any) -> Any:
            begun.set()
            assert go.wait(PATIENCE_S)
            return really(*given, **named)

        return wait

    if where == "store":
        monkeypatch.setattr(SqliteStore, "images", held(SqliteStore.images))
    else:
        monkeypatch.setattr("tminus.service.api.sample.encode_result", held(encode_result))
    scope = scope_of(f"/jobs/{job_id}/image") | {"method": "GET"}
    no_body = iter([{"type": "http.request", "body": b"", "more_body": False}])
    try:
        status, _, _ = call(site.app, no_body, scope, lambda: begun.wait(PATIENCE_S))
    finally:
        go.set()
    assert status in (0, 499)
    assert site.client.get(f"/jobs/{job_id}/image").status_code == 200


# --- images ---


class Readings:
    """The readings of images by the store, which wait for the test while it holds them."""

    def __init__(self, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.held_bytes: list[int] = []  # of answers, when each began
        self.unpacks = threading.Event()
        self.unpacks.set()
        read, unpack = SqliteStore.images, unpack_images

        def noted(store: SqliteStore, job_id: str) -> bytes | StoredObject | None:
            self.held_bytes.append(site.answers.held_bytes)
            self.begun.append(job_id)
            return read(store, job_id)

        def unpacked(data: bytes) -> Pixels:
            assert self.unpacks.wait(PATIENCE_S)
            return unpack(data)

        monkeypatch.setattr(SqliteStore, "images", noted)
        monkeypatch.setattr("tminus.service.jobs.store.arrays.unpack_images", unpacked)


@pytest.fixture
def readings(site: Site, monkeypatch: pytest.MonkeyPatch) -> Iterator[Readings]:
    made = Readings(site, monkeypatch)
    yield made
    made.unpacks.set()


def done(site: Site, **parameters: object) -> str:
    job_id: str = accepted(site, json={"steps": 2} | parameters).json()["id"]
    ended(site, job_id)
    return job_id


def test_another_job_is_accepted_while_images_are_unpacked(site: Site, readings: Readings) -> None:
    job_id = done(site)
    readings.unpacks.clear()
    with ThreadPoolExecutor(2) as pool:
        image = pool.submit(site.client.get, f"/jobs/{job_id}/image")
        wait_until(lambda: readings.begun == [job_id])
        other = pool.submit(accepted, site, json={"steps": 2})
        assert other.result(PATIENCE_S / 2).status_code == 202
        assert not image.done()
        readings.unpacks.set()
        assert image.result(PATIENCE_S).status_code == 200


def test_who_has_the_images_gets_304_by_the_record_alone(site: Site, readings: Readings) -> None:
    job_id = done(site, seed=5)
    of_sample = site.post(json={"steps": 2, "seed": 5}).headers["etag"]
    response = site.client.get(f"/jobs/{job_id}/image", headers={"If-None-Match": of_sample})
    assert (response.status_code, response.headers["etag"], readings.begun) == (304, of_sample, [])


def test_images_that_many_ask_for_at_once_are_read_once(site: Site, readings: Readings) -> None:
    job_id = done(site, n=8, seed=5)
    readings.unpacks.clear()
    with ThreadPoolExecutor(8) as pool:
        each = [pool.submit(site.client.get, f"/jobs/{job_id}/image?index={k}") for k in range(8)]
        wait_until(lambda: len(waiting_for_a_turn(site)) == 8 - AT_ONCE)
        readings.unpacks.set()
        answers = [one.result(PATIENCE_S) for one in each]
    assert readings.begun == [job_id]
    expected = fake_pixels(make_spec(n=8, seed=5), 2)
    for answer, image in zip(answers, expected, strict=True):
        np.testing.assert_array_equal(pixels(answer.content), image[:, :, 0])


def test_one_caller_has_the_images_of_a_few_jobs_read_at_a_time(site: Site, readings: Readings) -> None:
    job_ids = [done(site) for _ in range(AT_ONCE + 2)]
    readings.unpacks.clear()
    with ThreadPoolExecutor(len(job_ids)) as pool:
        each = [pool.submit(site.client.get, f"/jobs/{job_id}/image") for job_id in job_ids]
        wait_until(lambda: len(readings.begun) == AT_ONCE and len(waiting_for_a_turn(site)) == 2)
        readings.unpacks.set()
        assert [one.result(PATIENCE_S).status_code for one in each] == [200] * len(job_ids)
    assert sorted(readings.begun) == sorted(job_ids)


def waiting_for_a_turn(site: Site) -> Collection[object]:
    return site.application.served.access._usage[ANYBODY].turns._waiters or ()


def test_images_are_charged_before_they_are_read_and_refused_where_there_is_no_room(
    make_site: MakeSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = make_site(info=replace(INFO, height_px=64, width_px=64))
    readings, job_id = Readings(site, monkeypatch), done(site, n=8)
    size_bytes = COPIES * 8 * 64 * 64
    with site.answers.hold() as of_others:
        of_others.add(site.answers.limit_bytes - size_bytes + 1)
        document = problem(site.client.get(f"/jobs/{job_id}/image"), 429, "overloaded")
        assert (document["field"], document["value"], readings.begun) == ("job_id", size_bytes, [])
    assert site.client.get(f"/jobs/{job_id}/image").status_code == 200
    assert (readings.held_bytes, site.answers.held_bytes) == ([size_bytes], 0)
