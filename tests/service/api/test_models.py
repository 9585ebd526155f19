"""Each model has the whole API below /models/NAME."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.service.conftest import MakeSite, pixels, problem
from tests.service.fakes import INFO, wait_until
from tests.service.several import COLOUR, QUICK, Several, make_several


@pytest.fixture
def several(make_site: MakeSite) -> Several:
    return make_several(make_site)


def test_a_request_is_of_the_model_that_its_path_names(several: Several) -> None:
    plain, named, colour = (
        several.post(f"{path}/sample", json=QUICK) for path in ("", "/models/fake", "/models/colour")
    )
    assert pixels(plain.content).shape == (INFO.height_px, INFO.width_px)
    assert named.content == plain.content
    assert named.headers["etag"] == plain.headers["etag"]
    assert pixels(colour.content).shape == (COLOUR.height_px, COLOUR.width_px, 3)
    assert colour.headers["x-fingerprint"] == COLOUR.fingerprint
    assert len(several.colour.batches) == 2 + 1, "and a warm-up"


def test_an_unknown_model_is_a_problem_that_names_those_there_are_and_a_path_trick_leads_nowhere(
    several: Several,
) -> None:
    for method, path in (
        ("GET", "/models/nobody/model"),
        ("POST", "/models/nobody/sample"),
        ("POST", "/models/nobody/jobs"),
        ("GET", "/models/nobody/openapi.json"),
        ("GET", f"/models/{'x' * 5000}/sample"),
    ):
        document = problem(several.site.client.request(method, path), 404, "model_not_found")
        assert document["field"] == "model"
        assert document["bound"] == "one of colour, fake"
        assert len(json.dumps(document)) < 1500
    for path in ("/models/%2e%2e%2fetc/sample", "/models//sample", "/models/a/b/sample"):
        problem(several.post(path), 404, "not_found")


def test_each_model_has_its_own_bounds(several: Several) -> None:
    assert problem(several.post("/models/colour/sample", json={"steps": 101}), 422, "invalid_field")["field"] == "steps"
    assert several.post("/sample", json={"steps": 101}).status_code == 200
    refused = problem(several.post("/models/colour/sample", json={"class_label": "cat"}), 422, "invalid_field")
    assert "red" in refused["bound"]
    assert several.post("/models/colour/sample", json={"class_label": "red"}).status_code == 200


def test_each_model_is_described_with_its_own_bounds(several: Several) -> None:
    def steps_of(path: str) -> Any:
        document = several.get(path).json()
        parameters = document["paths"]["/sample"]["post"]["parameters"]
        return document, next(each["schema"]["maximum"] for each in parameters if each["name"] == "steps")

    default, most = steps_of("/openapi.json")
    assert (most, "servers" in default, "/models" in default["paths"]) == (1000, False, True)
    colour, most = steps_of("/models/colour/openapi.json")
    assert (most, "/models" in colour["paths"]) == (100, False)
    assert colour["servers"] == [{"url": "/models/colour"}]


def test_a_stream_is_of_its_model(several: Several) -> None:
    with several.site.client.websocket_connect("/models/colour/sample/stream") as ws:
        ws.send_json(QUICK | {"every": 1})
        assert ws.receive_json()["fingerprint"] == COLOUR.fingerprint
        messages = []
        while (message := ws.receive())["type"] != "websocket.close":
            messages.append(message)
    picture = next(each["bytes"] for each in reversed(messages) if each.get("bytes"))
    assert pixels(picture).shape == (COLOUR.height_px, COLOUR.width_px, 3)
    assert several.site.metrics()['tminus_images_total{"model": "colour"}'] == 1


def test_jobs_of_all_models_are_listed_together_and_by_model(several: Several) -> None:
    ids = {}
    for name in ("fake", "colour"):
        accepted = several.post(f"/models/{name}/jobs", json=QUICK | {"n": 2})
        assert accepted.status_code == 202
        assert accepted.json()["model"] == name
        ids[name] = accepted.json()["id"]
    wait_until(lambda: all(job["state"] == "done" for job in several.get("/jobs").json()["jobs"]))
    assert {job["id"]: job["model"] for job in several.get("/jobs").json()["jobs"]} == {v: k for k, v in ids.items()}
    assert [job["id"] for job in several.get("/models/colour/jobs").json()["jobs"]] == [ids["colour"]]
    for prefix in ("", "/models/fake", "/models/colour"):
        image = several.get(f"{prefix}/jobs/{ids['colour']}/image")
        assert pixels(image.content).shape == (COLOUR.height_px, 2 * COLOUR.width_px, 3)
        assert image.headers["x-fingerprint"] == COLOUR.fingerprint
        events = several.get(f"{prefix}/jobs/{ids['colour']}/events").text
        assert '"model": "colour"' in events
    assert several.site.client.delete(f"/jobs/{ids['colour']}").status_code == 204
    problem(several.get(f"/jobs/{ids['colour']}"), 404, "job_not_found")


def test_a_page_of_the_list_goes_on_over_models(several: Several) -> None:
    ids = [several.post(f"/models/{('fake', 'colour')[k % 2]}/jobs", json=QUICK).json()["id"] for k in range(7)]
    wait_until(lambda: all(job["state"] == "done" for job in several.get("/jobs").json()["jobs"]))
    found, before = [], None
    while True:
        page = several.get("/jobs", params={"limit": 2} | ({"before": before} if before else {})).json()
        found += [job["id"] for job in page["jobs"]]
        if (before := page["next"]) is None:
            break
    assert found == ids[::-1]


def test_an_idempotency_key_is_one_for_all_models(several: Several) -> None:
    headers = {"Idempotency-Key": "once"}
    first = several.post("/models/colour/jobs", json=QUICK, headers=headers)
    again = several.post("/models/colour/jobs", json=QUICK, headers=headers)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["idempotent-replayed"] == "true"
    for path, body in (("/models/colour/jobs", QUICK | {"seed": 6}), ("/models/fake/jobs", QUICK), ("/jobs", QUICK)):
        problem(several.post(path, json=body, headers=headers), 422, "idempotency_key_reused")


def test_of_two_requests_with_one_key_at_once_one_is_accepted(several: Several) -> None:
    for number in range(4):
        headers = {"Idempotency-Key": f"key {number}"}
        with ThreadPoolExecutor(2) as pool:
            paths = ("/models/colour/jobs", "/models/fake/jobs")
            answers = [pool.submit(several.post, path, json=QUICK, headers=headers) for path in paths]
            assert sorted(each.result().status_code for each in answers) == [202, 422]
