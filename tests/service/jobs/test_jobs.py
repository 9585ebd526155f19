"""POST /jobs and what clients ask of jobs, through the app on a fake engine."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.service.conftest import MakeSite, Restarts, Site, problem
from tests.service.durable import SPEC, post, state, wait_for
from tests.service.fakes import INFO, PATIENCE_S, wait_until
from tminus.model.catalogue import Recommended
from tminus.service.spec import Images

SHORTEST: dict[str, Any] = {"seed": 5, "class_label": "cat"}

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


def test_one_image_of_a_job_is_had_alone_by_its_index(site: Site) -> None:
    job_id = post(site, SPEC | {"n": 3, "index": 7}).json()["id"]
    wait_for(site, job_id)
    path = f"/jobs/{job_id}/image"
    for accept in ("image/png", "application/zip", "application/json"):
        headers = {"Accept": accept}
        image, alone = site.client.get(f"{path}?index=8", headers=headers), SPEC | {"n": 1, "index": 8}
        made = site.post(json=alone, headers=headers)
        assert (image.content, image.headers["etag"]) == (made.content, made.headers["etag"])
    for index in ("6", "10", "-1", "x", "1.5"):
        refused = problem(site.client.get(path, params={"index": index}), 422, "invalid_field")
        assert refused["field"] == "index"
    assert "7..9" in problem(site.client.get(f"{path}?index=0"), 422, "invalid_field")["bound"]
    problem(site.client.get(f"{path}?number=8"), 422, "unknown_field")


def test_a_job_whose_network_gives_nan_has_failed_and_says_why(held: Site) -> None:
    job_id = post(held).json()["id"]
    batch = held.engine.next_begun()
    held.engine.nan.add(batch.rows[0])
    held.engine.gate.open()
    failed = wait_for(held, job_id, "failed")
    assert failed["problem"]["code"] == "not_finite"
    document = problem(held.client.get(f"/jobs/{job_id}/image"), 410, "no_images")
    assert document["cause"] == failed["problem"]


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


def test_the_store_is_called_while_images_are_still_copied_from_a_gpu(held: Site) -> None:
    images, copied, reading = held.engine.images, threading.Event(), threading.Event()

    def images_later(rows: Sequence[int], *depth: Any) -> Callable[[], Images]:
        read = images(rows, *depth)

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
    drawn = [post(held, {"steps": 3}, **{"Idempotency-Key": key}).headers["x-seed"] for key in ("d", "d", "e")]
    assert (drawn[0] == drawn[1], drawn[0] == drawn[2]) == (True, False), "so is a seed that is drawn"


def test_a_key_knows_guidance_1_from_none_only_where_another_may_be_recommended(site: Site) -> None:
    def ids(key: str, **settings: int) -> list[Any]:
        requests = [SHORTEST | settings, SHORTEST | settings | {"guidance": 1}]
        answers = [site.client.post("/jobs", json=each, headers={"Idempotency-Key": key}) for each in requests]
        return [each.json().get("id") or each.json()["code"] for each in answers]

    with_steps, without = ids("a", steps=3), ids("b")
    assert with_steps[0] == with_steps[1]
    assert without[1] == "idempotency_key_reused"


def test_a_key_finds_its_job_where_another_is_recommended_by_now(restarts: Restarts) -> None:
    own = {"recommended": Recommended("ddim", 4)}
    site = restarts.start(info=own)
    first = site.client.post("/jobs", json=SHORTEST, headers={"Idempotency-Key": "k"}).json()
    wait_for(site, first["id"])
    restarts.stop()
    site = restarts.start()
    again = site.client.post("/jobs", json=SHORTEST, headers={"Idempotency-Key": "k"})
    assert (again.json()["id"], again.headers["x-sampler"], again.headers["x-steps"]) == (first["id"], "ddim", "4")
    new = site.client.post("/jobs", json=SHORTEST)
    assert (new.headers["x-sampler"], new.headers["x-steps"]) == ("dpmpp_2m", "20")


def test_a_malformed_key_is_refused(site: Site) -> None:
    for key in ("", " ", "a" * 256, "a\tb", '"'):
        answer = site.client.post("/jobs", json=SPEC, headers={"Idempotency-Key": key})
        assert problem(answer, 422, "invalid_field")["field"] == "Idempotency-Key"


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


def test_a_bad_page_is_refused_with_its_field(site: Site) -> None:
    for query in ("state=gone", "state=done,", "limit=0", "limit=201", "limit=x", "before=x", "before=1-2"):
        document = problem(site.client.get(f"/jobs?{query}"), 422, "invalid_field")
        assert document["field"] == query.partition("=")[0]
        assert document["bound"]


# --- giving one up ---


def test_delete_cancels_a_running_job_and_deletes_it_in_one_call(held: Site) -> None:
    job_id = post(held, SPEC | {"steps": 1000, "guidance": 1}).json()["id"]
    held.engine.next_begun()
    with ThreadPoolExecutor(1) as pool:
        deleting = pool.submit(held.client.delete, f"/jobs/{job_id}")
        wait_until(lambda: not held.worker._commands.empty())
        held.engine.gate.open()
        assert deleting.result(PATIENCE_S).status_code == 204
    problem(held.client.get(f"/jobs/{job_id}"), 404, "job_not_found")
    problem(held.client.get(f"/jobs/{job_id}/image"), 404, "job_not_found")
    assert held.client.get("/jobs").json()["jobs"] == []
    wait_until(lambda: held.engine.jobs == {})
    assert held.metrics()['tminus_jobs_aborted_total{"reason": "deleted"}'] == 1
    problem(held.client.delete(f"/jobs/{job_id}"), 404, "job_not_found")


def test_cancel_gives_a_job_up_and_leaves_one_that_has_ended_as_it_is(held: Site) -> None:
    job_id = post(held, SPEC | {"steps": 1000, "guidance": 1}).json()["id"]
    held.engine.next_begun()
    with ThreadPoolExecutor(1) as pool:
        cancelling = pool.submit(held.client.post, f"/jobs/{job_id}/cancel")
        wait_until(lambda: not held.worker._commands.empty())
        held.engine.gate.open()
        assert cancelling.result(PATIENCE_S).json()["state"] == "cancelled"
    again = held.client.post(f"/jobs/{job_id}/cancel")
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")
    done = post(held).json()["id"]
    wait_for(held, done)
    assert held.client.post(f"/jobs/{done}/cancel").json()["state"] == "done"
    assert held.client.get(f"/jobs/{done}/image").status_code == 200
    assert held.client.delete(f"/jobs/{done}").status_code == 204
    problem(held.client.get(f"/jobs/{done}/image"), 404, "job_not_found")
    problem(held.client.post(f"/jobs/{'0' * 32}/cancel"), 404, "job_not_found")
