"""Errors as problem documents, through the app: what they say, and what they keep to themselves."""

import json
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from typing import Any

import pytest
from starlette.routing import Route

from tests.service.api.test_classes import WAYS
from tests.service.conftest import MakeSite, Site, problem
from tests.service.fakes import INFO, PATIENCE_S, wait_until
from tminus.service.api.request.schemas import SampleRequest
from tminus.service.errors import MOST_FAULTS
from tminus.service.work import Batch

QUICK = {"steps": 2, "seed": 5, "class_label": "cat"}
# --- what was asked for is wrong ---


def test_one_answer_tells_all_that_is_wrong(one_site: Site) -> None:
    for ask in (one_site.post, partial(one_site.client.post, "/jobs")):
        body = {
            "n": 0,
            "smapler": "ddim",
            "steps": 5.5,
            "guidance": 99,
            "table": "x",
            "image": "@",
            "mask": 5,
            "seed": 1,
        }
        document = problem(
            ask(json=body, params={"eta": [0, 1], "seed": 2, "webhook": "https://a.b"}), 422, "conflicting_field"
        )
        found = {each["field"]: each["code"] for each in document["errors"]}
        conflicts = dict.fromkeys(("eta", "seed"), "conflicting_field")
        invalid = dict.fromkeys(("webhook", "steps", "guidance", "table", "mask", "n"), "invalid_field")
        assert found == conflicts | invalid | {"smapler": "unknown_field", "image": "invalid_image"}
        first = document["errors"][0]
        assert {name: document.get(name) for name in ("code", "detail", "field", "value", "bound")} == {
            "bound": None
        } | first
    # What the model says is looked at once the types are right, all at once again.
    body = {"n": 0, "steps": 2000, "class_label": "zebra", "to_seed": 7, "strength": 0.5, "guidance_interval": [5, 1]}
    document = problem(one_site.post(json=body), 422, "invalid_field")
    assert {each["field"] for each in document["errors"]} == {"n", "steps", "mix", "image", "guidance_interval"}
    body = {"sampler": "euler", "eta": 0.5, "timestep_spacing": "odd", "guidance": 2, "table": "0" * 16}
    document = problem(one_site.post(json=body), 422, "invalid_field")
    assert [each["field"] for each in document["errors"]] == ["table", "timestep_spacing", "eta", "guidance"]


def test_what_an_answer_takes_beside_the_images_is_told_together_with_the_rest(one_site: Site) -> None:
    document = problem(one_site.post(json={"every": 0, "show": "x", "n": 0, "keep": [3]}), 422, "invalid_field")
    assert [each["field"] for each in document["errors"]] == ["every", "show", "keep", "n"]
    document = problem(
        one_site.post(json={"keep": [3], "clip_output": False, "webhook": "x", "eta": 2}), 422, "unknown_field"
    )
    assert [each["field"] for each in document["errors"]] == ["webhook", "eta", "clip_output", "keep"]
    document = problem(
        one_site.client.get("/jobs?limit=0&state=odd&more=1&before=x&before=y"), 422, "conflicting_field"
    )
    assert [each["field"] for each in document["errors"]] == ["before", "more", "state", "limit"]
    document = problem(
        one_site.client.get("/jobs/x/image?index=-1&clip_output=false&x=1&x=2"), 422, "conflicting_field"
    )
    assert [each["field"] for each in document["errors"]] == ["x", "clip_output", "index"]
    document = problem(one_site.client.post("/noise?t=1&t=2&seed=-1&x=1", content=b""), 422, "conflicting_field")
    assert [each["field"] for each in document["errors"]] == ["t", "x", "seed"]
    document = problem(one_site.client.get("/model?a=1&b=2"), 422, "unknown_field")
    assert [each["field"] for each in document["errors"]] == ["a", "b"]


def test_an_overloaded_server_tells_every_caller_when_to_come_back(make_site: MakeSite) -> None:
    site = make_site(max_jobs=1)
    site.engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(site.post, json=QUICK)
        site.engine.next_begun()
        for way, ask in WAYS.items():
            answer = ask(site, "cat")
            if way == "WebSocket":
                assert json.loads(answer)["retry_after_s"] >= 1
            else:
                assert (answer.status_code, '"overloaded"' in answer.text) == (429, True), way
                assert int(answer.headers["retry-after"]) >= 1
        document = problem(site.post(json=QUICK), 429, "overloaded")
        assert (document["field"], document["value"], document["bound"]) == ("jobs", 2, "at most 1")
        site.engine.gate.open()
        assert running.result(PATIENCE_S).status_code == 200


def test_no_more_than_some_errors_are_told(one_site: Site) -> None:
    document = problem(one_site.post(json={f"x{k}": k for k in range(300)}), 422, "unknown_field")
    assert len(document["errors"]) == MOST_FAULTS


def test_an_error_of_something_else_has_no_list(one_site: Site) -> None:
    assert "errors" not in problem(one_site.client.get("/jobs/x"), 404, "job_not_found")
    assert "errors" not in problem(one_site.post(headers={"Accept": "text/html"}), 406, "not_acceptable")


def test_a_body_of_json_may_not_say_that_it_is_something_else(site: Site) -> None:
    body = b'{"steps": 2}'
    for path in ("/sample", "/jobs"):
        for kind in ("text/plain", "application/x-www-form-urlencoded", "image/png", "application/octet-stream", "x"):
            response = site.client.post(path, content=body, headers={"Content-Type": kind})
            document = problem(response, 415, "unsupported_media_type")
            assert (document["field"], document["value"]) == ("Content-Type", kind)
            assert response.headers["accept"] == "application/json, multipart/form-data"
        for kind in ("application/json", "Application/JSON; charset=utf-8", None):
            headers = {} if kind is None else {"Content-Type": kind}
            assert site.client.post(path, content=body, headers=headers).status_code in (200, 202), kind
        empty = site.client.post(f"{path}?steps=2", headers={"Content-Type": "text/plain"})
        assert empty.status_code in (200, 202), "without a body there is nothing to be of a type"
    login = site.client.post("/login", content=b'{"key": "k"}', headers={"Content-Type": "text/plain"})
    assert problem(login, 415, "unsupported_media_type")["bound"] == "application/json"
    openai = site.client.post(
        "/v1/images/generations", content=b'{"prompt": ""}', headers={"Content-Type": "text/plain"}
    )
    assert (openai.status_code, openai.json()["error"]["code"]) == (415, "unsupported_media_type")
    for path, given in (("/v2/repository/index", b'{"ready": true}'), ("/", b'{"inputs": ""}')):  # defined by others
        assert site.client.post(path, content=given, headers={"Content-Type": "text/plain"}).status_code == 200


def test_head_is_answered_as_get_is_without_a_body(site: Site) -> None:
    job = site.client.post("/jobs", json={"steps": 2, "seed": 1}).json()["id"]
    wait_until(lambda: site.client.get(f"/jobs/{job}").json()["state"] == "done")
    varies = {"x-request-id", "date"}
    gets = [route.path for route in site.app.routes if isinstance(route, Route) and "GET" in (route.methods or ())]
    filled = {"{model}": INFO.name, "{job_id}": job, "{name}": "page.js", "{version}": INFO.weights_hash[:16]}
    for path in gets:
        if path.endswith(("/sample", "/events")):
            continue
        if path.startswith("/docs/"):
            path = path.replace("{name}", "swagger-ui.css")
        for name, value in filled.items():
            path = path.replace(name, value)
        get, head = (site.client.request(method, path) for method in ("GET", "HEAD"))
        assert (get.status_code, head.status_code, head.content) == (200, 200, b""), path
        of_get = {name: value for name, value in get.headers.items() if name not in varies}
        of_head = {name: value for name, value in head.headers.items() if name not in varies}
        if path.endswith("/key") or "metrics" in path or "batch" in path or "/jobs" in path or "/v1" in path:
            of_get.pop("content-length", None)  # what is told changes from call to call
            of_head.pop("content-length", None)
        if "content-encoding" in of_get:
            del of_get["content-length"]
        assert of_head == of_get, path


def test_head_of_sample_checks_the_request_and_runs_nothing(site: Site) -> None:
    before = len(site.engine.batches)
    asked = {"steps": 3, "seed": 5, "class_label": "cat"}
    head = site.client.head("/sample", params=asked)
    assert len(site.engine.batches) == before
    get = site.client.get("/sample", params=asked)
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", get.headers["etag"])
    of_job = {
        "x-job-id",
        "x-queue-position",
        "x-eta-seconds",
        "server-timing",
        "content-length",
        "x-request-id",
        "date",
    }
    assert head.headers.items() >= {(name, value) for name, value in get.headers.items() if name not in of_job}
    assert not head.headers.keys() & {"x-job-id", "content-length"}
    assert site.client.head("/sample?steps=0").status_code == 422
    assert site.client.head("/sample", headers={"Accept": "text/html"}).status_code == 406


def test_head_of_events_is_answered_at_once(site: Site) -> None:
    site.engine.gate.shut()
    job = site.client.post("/jobs", json={"steps": 2}).json()["id"]
    head = site.client.head(f"/jobs/{job}/events")
    assert (head.status_code, head.headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    assert site.client.head("/jobs/x/events").status_code == 404
    site.engine.gate.open()


def test_a_wrong_path_or_method_is_a_problem_and_the_right_methods_are_told(site: Site) -> None:
    for method, path in (("GET", "/nowhere"), ("POST", "/sample/more")):
        response = site.client.request(method, path)
        problem(response, 404, "not_found")
        assert path in response.json()["detail"]
    for method, path, allowed in (
        ("DELETE", "/sample", "GET, HEAD, POST"),
        ("POST", "/jobs/y", "DELETE, GET, HEAD"),
        ("PUT", "/healthz", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD, POST"),
    ):
        response = site.client.request(method, path)
        problem(response, 405, "method_not_allowed")
        assert {*response.headers["allow"].split(", ")} == {*allowed.split(", ")}
        assert response.headers["allow"] in response.json()["detail"]


def test_text_that_no_encoding_knows_is_a_problem_and_no_crash(site: Site) -> None:
    for body in (b'{"sampler": "\\ud800"}', b'{"\\ud800": 1}', b'{"class_label": "\\udfff"}', b'{"steps": "\\ud800"}'):
        response = site.post(content=body)
        assert response.status_code in (400, 422), (body, response.text)
        assert response.headers["content-type"] == "application/problem+json"


BIG = "x" * 10_000
QUERIES = [
    ("GET", "/sample"), ("POST", "/jobs"), ("POST", "/noise"), ("GET", "/jobs"), ("GET", "/model"), ("GET", "/jobs/y"),
    ("GET", "/jobs/y/image"), ("GET", "/jobs/y/events"), ("DELETE", "/jobs/y"), ("POST", "/jobs/y/cancel"),
]  # fmt: skip
NAMES = ["limit", "before", "state", "t", "seed", "every", "show", "frame_format", "class_label", "image", BIG]


@pytest.mark.parametrize(("method", "path"), QUERIES)
@pytest.mark.parametrize("value", [BIG, "\0" * 5_000], ids=lambda value: ascii(value[:1]))
def test_no_problem_echoes_a_large_query(one_site: Site, method: str, path: str, value: str) -> None:
    body = {"content": b""} if path == "/noise" else {}
    doubled = [{name: pair} for name in ("seed", BIG) for pair in ([value, value], [value, "y"])]
    for query in [*({name: value} for name in NAMES), *doubled]:
        response = one_site.client.request(method, path, params=query, **body)
        assert response.status_code in (422, 404), response.text[:300]
        check_echo(response)


def test_no_problem_echoes_a_large_header(one_site: Site) -> None:
    values = (BIG, "image/webp;" * 2000, "multipart/form-data; boundary=" + BIG)
    paths = ("/sample", "/jobs", "/noise?t=5", f"/jobs/{BIG}/cancel", f"/{BIG}")
    for name, value, path in product(("Accept", "Content-Encoding"), values, paths):
        check_echo(one_site.client.post(path, headers={name: value}, content=b'{"n": 0}'))


@pytest.mark.parametrize("value", [BIG, {BIG: BIG}, "\0" * 30_000, 10**4000], ids=lambda value: repr(value)[:9])
def test_no_problem_echoes_a_large_value(make_site: MakeSite, value: object) -> None:
    site = make_site(max_body_bytes=2**20)
    for name in (*SampleRequest.model_fields, "every", "show", "bogus", BIG):
        for path in ("/sample", "/jobs"):
            check_echo(site.client.post(path, json={"n": 0} | {name: value}))


def check_echo(response: Any) -> None:
    document = response.json()
    assert 400 <= document["status"] < 500
    for member in ("field", "value"):
        assert len(str(document.get(member, ""))) <= 201
    assert len(document["detail"]) < 1500
    assert response.headers["x-content-type-options"] == "nosniff"


# --- failures of ours ---


def test_a_failed_step_is_a_500_that_tells_no_secrets(site: Site) -> None:
    def fail(_batch: Batch) -> None:
        raise RuntimeError("secret")

    site.engine.on_step = fail
    response = site.post(json=QUICK)
    problem(response, 500, "engine_failed")
    assert "secret" not in response.text
    site.engine.on_step = lambda batch: None
    assert site.post(json=QUICK).status_code == 200


def test_an_unforeseen_error_is_a_500_that_tells_no_secrets(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_args: object) -> bytes:
        raise RuntimeError("secret")

    monkeypatch.setattr("tminus.service.api.sample.encode_result", fail)
    response = site.post(json=QUICK)
    assert response.status_code == 500
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["code"] == "internal"
    assert "secret" not in response.text
    assert "Traceback" not in response.text
