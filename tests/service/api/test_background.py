"""`background`: on every way to ask for images, what is told of it, and what it changes: nothing of the images."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from tests.service.api.openai.asking import CAT, error_of, generate
from tests.service.conftest import MakeSite, Site, problem
from tests.service.fakes import PATIENCE_S, wait_until

ASKED: dict[str, Any] = {"steps": 6, "seed": 5, "n": 2, "class_label": "cat", "sampler": "ddpm"}
LONG: dict[str, Any] = {"steps": 500, "seed": 1, "n": 8, "background": True}


@contextmanager
def posting(site: Site) -> Iterator[ThreadPoolExecutor]:
    """Its gate is opened at the end, or a test that fails would wait for ever."""
    with ThreadPoolExecutor(4) as pool:
        try:
            yield pool
        finally:
            site.engine.gate.open()


def job_of(site: Site) -> dict[str, Any]:
    wait_until(lambda: site.client.get("/jobs?state=waiting,running").json()["jobs"] != [])
    found: dict[str, Any] = site.client.get("/jobs?state=waiting,running").json()["jobs"][0]
    return found


def test_the_bytes_and_all_that_names_them_are_the_same(make_site: MakeSite) -> None:
    site = make_site(result_cache_bytes=2**20)
    plain = site.post(json=ASKED)
    steps = len(site.engine.batches)
    again = site.post(json=ASKED | {"background": True}, headers={"Cache-Control": "no-cache"})
    assert len(site.engine.batches) > steps, "it was made, and does not come from the cache"
    assert again.content == plain.content
    assert again.headers["etag"] == plain.headers["etag"]
    kept = site.client.get("/sample?background=true", params=ASKED)
    assert (kept.headers["cache-status"], kept.content) == ("tminus; hit", plain.content)
    document = site.post(json=ASKED | {"background": True}, headers={"Accept": "application/json"}).json()
    assert "background" not in json.dumps(document), "it is no part of the recipe"


@pytest.mark.parametrize("way", ["sample", "jobs", "openai", "url", "kserve", "hugging face"])
def test_each_way_to_ask_for_images_takes_it(held: Site, way: str) -> None:
    with posting(held) as pool:
        asked = {
            "sample": lambda: held.post(json=LONG),
            "jobs": lambda: held.client.post("/jobs", json=LONG),
            "openai": lambda: generate(held, **CAT, service_tier="flex"),
            "url": lambda: generate(held, **CAT, service_tier="flex", response_format="url"),
            "kserve": lambda: held.client.post(
                "/v2/models/fake/infer", json={"inputs": [], "parameters": {"background": True}}
            ),
            "hugging face": lambda: held.client.post("/", json={"inputs": "cat", "parameters": {"background": True}}),
        }[way]
        answer = pool.submit(asked)
        job = job_of(held)
        assert job["background"]
        assert "background" not in job["parameters"]
        (shown,) = held.client.get("/batch").json()["jobs"]
        assert shown["background"]
        assert held.metrics()["tminus_background_rows"] == job["n"]
        held.engine.gate.open()
        assert answer.result(PATIENCE_S).status_code in (200, 202)
    wait_until(lambda: held.metrics()["tminus_background_rows"] == 0)
    assert held.metrics()["tminus_queue_wait_seconds_count"] == 0, "what it waits says nothing of others"


def test_other_tiers_of_openai_are_no_background_and_none_goes_first(held: Site) -> None:
    for tier in ("auto", "default"):
        held.engine.gate.open()
        assert generate(held, **CAT, service_tier=tier).status_code == 200
    error = error_of(generate(held, **CAT, service_tier="priority"), 400, "invalid_field")
    assert error["param"] == "service_tier"
    assert "flex" in error["message"]
    assert error_of(generate(held, **CAT, background=True), 400, "invalid_field")["param"] == "background"


def test_a_stream_says_that_it_is_accepted_so(site: Site) -> None:
    for given, told in (({}, False), ({"background": True}, True), ({"background": False}, False)):
        with site.client.websocket_connect("/sample/stream") as socket:
            socket.send_json({"steps": 2, **given})
            assert socket.receive_json()["background"] is told
            while socket.receive()["type"] != "websocket.close":  # or leaving it cancels the app
                pass


@pytest.mark.parametrize("value", ["maybe", "1", 1, None, [True], "True", ""])
def test_another_value_is_refused_with_the_values_that_there_are(site: Site, value: object) -> None:
    for path in ("/sample", "/jobs"):
        document = problem(site.client.post(path, json={"background": value}), 422, "invalid_field")
        assert (document["field"], document["value"], document["bound"]) == ("background", value, "true or false")
    if isinstance(value, str):
        assert problem(site.client.get(f"/sample?background={value}"), 422, "invalid_field")["field"] == "background"


def test_two_values_are_refused_and_the_same_one_twice_is_not(site: Site) -> None:
    document = problem(
        site.client.post("/sample?background=true", json={"background": False}), 422, "conflicting_field"
    )
    assert document["field"] == "background"
    assert site.client.post("/sample?background=true&steps=2", json={"background": True}).status_code == 200


def test_other_jobs_go_first_and_a_background_job_can_be_given_up(held: Site) -> None:
    with posting(held) as pool:
        job_id = held.client.post("/jobs", json=LONG).json()["id"]
        held.engine.next_begun()
        short = pool.submit(held.post, json={"steps": 4, "seed": 2})
        wait_until(lambda: held.metrics()["tminus_rows_waiting"] >= 1)
        stepped = []
        for _ in range(5):
            held.engine.gate.let()
            stepped.append(held.engine.seeds(held.engine.next_begun()))
        assert stepped == [{2}, {2}, {2}, {2}, {1}], "no tick has rows of both"
        assert short.result(PATIENCE_S).status_code == 200
        gone = pool.submit(held.client.delete, f"/jobs/{job_id}")
        held.engine.gate.open()
        assert gone.result(PATIENCE_S).status_code == 204
        wait_until(lambda: held.metrics()["tminus_background_rows"] == 0)
        assert held.engine.jobs == {}


def test_a_server_full_of_background_jobs_takes_any_other(make_site: MakeSite) -> None:
    site = make_site(max_jobs=4, max_rows=8)
    site.engine.gate.shut()
    with posting(site) as pool:
        small = LONG | {"n": 2}
        for _ in range(4):
            assert site.client.post("/jobs", json=small).status_code == 202
        document = problem(site.client.post("/jobs", json=small), 429, "overloaded")
        assert (document["field"], document["bound"]) == ("jobs", "at most 4")
        assert "in the background" in document["detail"]
        others = [pool.submit(site.post, json={"steps": 2, "seed": k, "n": 2}) for k in range(4)]
        wait_until(lambda: len(site.worker.jobs) == 8)
        problem(site.post(json={"steps": 2}), 429, "overloaded")
        site.engine.gate.open()
        assert [other.result(PATIENCE_S).status_code for other in others] == [200] * 4
        for job in site.client.get("/jobs").json()["jobs"]:
            site.client.delete(f"/jobs/{job['id']}")


def test_the_key_of_a_job_is_of_one_class(site: Site) -> None:
    def post(**more: object) -> Any:
        return site.client.post("/jobs", json=ASKED | more, headers={"Idempotency-Key": "k"})

    first = post(background=True).json()
    assert first["background"]
    assert post(background=True).json()["id"] == first["id"]
    problem(post(), 422, "idempotency_key_reused")
