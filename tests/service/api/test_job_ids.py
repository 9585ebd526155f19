"""PUT /jobs/{id}: a job under a UUID that its client chose, through the app."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.service.api.pictures import CAT, b64
from tests.service.conftest import MakeSite, Restarts, Site, problem
from tests.service.durable import SPEC, wait_for
from tests.service.keys import access_of, bearer, key_line
from tests.service.several import ADMIN, make_several

CHOSEN = "6f9619ff-8b86-4011-b42d-00c04fc964ff"


def put(site: Site, chosen: str = CHOSEN, spec: dict[str, Any] = SPEC, **kwargs: Any) -> Any:
    return site.client.put(f"/jobs/{chosen}", json=spec, **kwargs)


def test_the_same_id_and_parameters_are_the_same_job_as_it_stands(held: Site) -> None:
    first = put(held)
    assert first.status_code == 202, first.text
    job_id = first.json()["id"]
    assert first.headers["location"] == f"/jobs/{job_id}"
    assert first.headers["x-job-id"] == job_id
    assert len(job_id) == 32
    assert "idempotent-replayed" not in first.headers
    again = put(held)
    assert (again.status_code, again.json()["id"]) == (200, job_id)
    assert again.headers["idempotent-replayed"] == "true"
    held.engine.gate.open()
    wait_for(held, job_id)
    done = put(held)
    assert (done.status_code, done.json()["state"]) == (200, "done")
    assert len(held.client.get("/jobs").json()["jobs"]) == 1


def test_every_call_of_a_job_takes_the_chosen_id(held: Site) -> None:
    job_id = put(held).json()["id"]
    assert held.client.get(f"/jobs/{CHOSEN}").json()["id"] == job_id
    problem(held.client.get(f"/jobs/{CHOSEN}/image"), 409, "job_not_done")
    held.engine.gate.open()
    wait_for(held, CHOSEN)
    image = held.client.get(f"/jobs/{CHOSEN}/image")
    assert image.content == held.client.get(f"/jobs/{job_id}/image").content
    assert "event: done" in held.client.get(f"/jobs/{CHOSEN}/events").text
    assert held.client.post(f"/jobs/{CHOSEN}/cancel").json()["state"] == "done"
    assert held.client.delete(f"/jobs/{CHOSEN}").status_code == 204
    problem(held.client.get(f"/jobs/{CHOSEN}"), 404, "job_not_found")
    assert put(held, spec=SPEC | {"steps": 7}).status_code == 202, "an id lives as long as its job"


def test_the_same_id_with_other_parameters_is_a_conflict_and_changes_nothing(site: Site) -> None:
    assert put(site).status_code == 202
    wait_for(site, CHOSEN)
    for other in (SPEC | {"steps": 7}, {}, SPEC | {"image": b64(CAT), "strength": 0.5}):
        document = problem(put(site, spec=other), 409, "job_exists")
        assert (document["field"], document["value"]) == ("job_id", CHOSEN)
    assert site.client.get(f"/jobs/{CHOSEN}").json()["seed"] == SPEC["seed"]
    assert put(site, str(uuid.uuid4()), SPEC | {"steps": 7}).status_code == 202


def test_what_is_wrong_with_the_id_or_the_request_is_refused(site: Site) -> None:
    for chosen in ("x", "0" * 32, CHOSEN.upper(), f"{{{CHOSEN}}}", "%00"):
        document = problem(put(site, chosen), 422, "invalid_field")
        assert document["field"] == "job_id"
        assert "a UUID" in document["bound"]
    assert problem(put(site, spec={"steps": 0}), 422, "invalid_field")["field"] == "steps"
    document = problem(put(site, headers={"Idempotency-Key": "k"}), 422, "invalid_field")
    assert document["field"] == "Idempotency-Key"
    problem(site.client.put(f"/jobs/{CHOSEN}", content=b"{"), 400, "malformed_body")
    problem(site.client.get(f"/jobs/{CHOSEN}"), 404, "job_not_found")
    problem(site.client.put(f"/jobs/{CHOSEN}", content=b" " * 5000), 413, "body_too_large")
    answer = site.client.put(f"/jobs/{CHOSEN}?n=2&steps=3&seed=5")
    assert (answer.status_code, answer.json()["n"]) == (202, 2)


def test_of_many_at_once_one_makes_the_job(held: Site) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: put(held), range(16)))
    assert sorted({answer.status_code for answer in answers}) == [200, 202]
    assert [answer.status_code for answer in answers].count(202) == 1
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(held.client.get("/jobs").json()["jobs"]) == 1


def test_a_restart_knows_the_chosen_ids(restarts: Restarts) -> None:
    site = restarts.start(shut=True)
    job_id = put(site).json()["id"]
    site.engine.next_begun()
    restarts.stop()
    site = restarts.start()
    answer = put(site)
    assert (answer.status_code, answer.json()["id"]) == (200, job_id)
    problem(put(site, spec={"steps": 3}), 409, "job_exists")
    assert wait_for(site, CHOSEN)["id"] == job_id


def test_the_same_uuid_of_two_keys_is_two_jobs_and_neither_learns_of_the_other(make_site: MakeSite) -> None:
    lines = [
        key_line("studio", "one-secret"),
        key_line("other", "other-secret"),
        key_line("ops", "admin-secret", "admin"),
    ]
    site = make_site(app={"access": access_of(*lines)})
    one, other, admin = bearer("one-secret"), bearer("other-secret"), bearer("admin-secret")
    first = put(site, headers=one)
    problem(site.client.get(f"/jobs/{CHOSEN}", headers=other), 404, "job_not_found")
    problem(site.client.delete(f"/jobs/{CHOSEN}", headers=other), 404, "job_not_found")
    second = put(site, spec=SPEC | {"steps": 9}, headers=other)
    assert (first.status_code, second.status_code) == (202, 202), "as if nobody had it"
    assert first.json()["id"] != second.json()["id"]
    assert put(site, headers=one).json()["id"] == first.json()["id"]
    for headers, mine in ((one, first), (other, second)):
        assert site.client.get(f"/jobs/{CHOSEN}", headers=headers).json()["id"] == mine.json()["id"]
        assert site.client.get(f"/jobs/{mine.json()['id']}", headers=admin).status_code == 200
    problem(site.client.get(f"/jobs/{first.json()['id']}", headers=other), 404, "job_not_found")


def test_an_id_of_another_model_is_a_conflict_and_every_model_has_the_call(make_site: MakeSite) -> None:
    several = make_several(make_site)
    answer = several.site.client.put(f"/models/colour/jobs/{CHOSEN}", json={"steps": 2})
    assert (answer.status_code, answer.json()["model"]) == (202, "colour")
    problem(put(several.site, spec={"steps": 2}), 409, "job_exists")
    assert several.get(f"/jobs/{CHOSEN}", headers=ADMIN).status_code == 404, "it is not the admin's choice"
    assert several.get(f"/jobs/{CHOSEN}").json()["model"] == "colour"
