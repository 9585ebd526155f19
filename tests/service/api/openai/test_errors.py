"""Errors in OpenAI's form."""

from tests.service.api.openai.asking import error_of
from tests.service.conftest import MakeSite, Site
from tests.service.keys import access_of, key_line
from tests.service.test_imports import service_errors
from tminus.service.api.answers.problems import as_openai

MEMBERS = ["message", "type", "param", "code"]


def test_every_error_has_the_form_and_no_status_that_clients_misread() -> None:
    for error in service_errors():
        problem = {"status": error.status, "code": error.code, "detail": "why", "field": "n"}
        status, body = as_openai(problem)
        assert status not in (409, 422)
        assert (status < 500) == (error.status < 500) or error.status == 409
        assert list(body) == ["error"]
        assert list(body["error"]) == MEMBERS
        assert body["error"] | {"type": ""} == {"message": "why", "type": "", "param": "n", "code": error.code}
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        assert body["error"]["type"] == kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")


def test_every_error_below_v1_has_it(site: Site) -> None:
    for method, path, status, code in (
        ("GET", "/v1", 404, "not_found"),
        ("POST", "/v1/chat/completions", 404, "not_found"),
        ("GET", "/v1/images/generations", 405, "method_not_allowed"),
        ("GET", "/v1/models?limit=1", 400, "unknown_field"),
        ("GET", "/v1/models/nobody", 404, "model_not_found"),
    ):
        answer = site.client.request(method, path)
        error_of(answer, status, code)
        assert ("allow" in answer.headers) == (status == 405)


def test_what_the_middleware_refuses_has_it_too(make_site: MakeSite) -> None:
    site = make_site(app={"access": access_of(key_line("ann", "tm_ann"))}, max_body_bytes=4096)
    unknown = site.client.get("/v1/models")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (401, "authentication_error")
    assert unknown.headers["www-authenticate"]
    assert site.client.get("/v1/models", headers={"Authorization": "Bearer tm_ann"}).status_code == 200
    key = {"Authorization": "Bearer tm_ann"}
    large = site.client.post("/v1/images/generations", content=b"{" + b" " * 5000, headers=key)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    foreign = site.client.post("/v1/images/generations", headers=key | {"Origin": "http://evil.example"})
    assert (foreign.status_code, foreign.json()["error"]["type"]) == (403, "permission_error")
    assert site.client.get("/v1x").json()["code"] == "unauthorized", "which is no path of that API"
