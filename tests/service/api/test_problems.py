"""Errors as problem documents, through the app: what they say, and what they keep to themselves."""

from typing import Any

import pytest

from tests.service.conftest import MakeSite, Site, problem
from tminus.service.api.request.schemas import SampleRequest
from tminus.service.work import Batch

QUICK = {"steps": 2, "seed": 5, "class_label": "cat"}
GUIDED = {"guidance": 2, "class_label": 1}


# --- what was asked for is wrong ---


@pytest.mark.parametrize(
    ("parameters", "field", "value"),
    [
        ({"class_label": [0, 1]}, "class_label", [0, 1]),
        (GUIDED | {"guidance_interval": [800, 100]}, "guidance_interval", [800, 100]),
        (GUIDED | {"guidance_interval": [0, 1000]}, "guidance_interval", [0, 1000]),
        (GUIDED | {"guidance_interval": [False, True]}, "guidance_interval", [False, True]),
        ({"to_seed": 7}, "mix", None),
        ({"seed": 7, "to_seed": 7, "mix": 0.5}, "to_seed", 7),
        ({"to_seed": 7, "mix": 1.1}, "mix", 1.1),
        (GUIDED | {"guidance_rescale": "much"}, "guidance_rescale", "much"),
        ({"deadline_s": -1.5}, "deadline_s", -1.5),
        ({"deadline_s": [5]}, "deadline_s", [5]),
    ],
)
def test_a_bad_parameter_is_a_problem_with_its_field_value_and_bound(
    one_site: Site, parameters: dict[str, Any], field: str, value: object
) -> None:
    document = problem(one_site.post(json=parameters), 422, "invalid_field")
    assert (document["field"], document["value"]) == (field, value)
    assert document["bound"]
    assert field in document["detail"]
    assert one_site.engine.batches[1:] == [], "no work was done"


def test_a_wrong_path_or_method_is_a_problem_and_the_right_methods_are_told(site: Site) -> None:
    for method, path in (("GET", "/nowhere"), ("POST", "/sample/more")):
        problem(site.client.request(method, path), 404, "not_found")
    for method, path, allowed in (
        ("DELETE", "/sample", "GET, POST"),
        ("POST", "/jobs/y", "DELETE, GET, PUT"),
        ("PUT", "/healthz", "GET, HEAD"),
        ("DELETE", "/", "GET, HEAD, POST"),
    ):
        response = site.client.request(method, path)
        problem(response, 405, "method_not_allowed")
        assert {*response.headers["allow"].split(", ")} == {*allowed.split(", ")}


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


@pytest.mark.parametrize("name", ["Accept", "Content-Encoding"])
@pytest.mark.parametrize("value", [BIG, "image/webp;" * 2000, "multipart/form-data; boundary=" + BIG])
def test_no_problem_echoes_a_large_header(one_site: Site, name: str, value: str) -> None:
    for path in ("/sample", "/jobs", "/noise?t=5", f"/jobs/{BIG}/cancel", f"/{BIG}"):
        response = one_site.client.post(path, headers={name: value}, content=b'{"n": 0}')
        assert 400 <= response.status_code < 500
        check_echo(response)


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
