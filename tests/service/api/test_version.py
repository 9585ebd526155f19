"""The version of the native API, through the app."""

import json
import re

from tests.documents import ROOT
from tests.service.conftest import MakeSite, Site, problem
from tests.service.keys import access_of, key_line
from tminus.service.api.answers.operations import API_VERSION
from tminus.service.client.transport import HEADERS

OTHER = {"API-Version": "2"}
NATIVE = [
    ("GET", "/model"),
    ("POST", "/sample"),
    ("GET", "/jobs/x"),
    ("POST", "/jobs"),
    ("GET", "/nothing"),
    ("GET", "/"),
]


def test_every_native_answer_names_the_version_errors_too(site: Site) -> None:
    for method, path in NATIVE:
        for headers in ({}, {"API-Version": API_VERSION}, OTHER):
            answer = site.client.request(method, path, headers=headers)
            assert answer.headers["api-version"] == API_VERSION
        document = problem(answer, 400, "unsupported_api_version")
        assert (document["field"], document["value"], document["bound"]) == ("API-Version", "2", API_VERSION)


def test_another_version_is_refused_before_anything_is_done(site: Site) -> None:
    for count, value in enumerate(("2", "0", "", "v1", "1.0", "1, 2", "x" * 5000), 1):
        answer = site.post(json={"steps": 3}, headers={"API-Version": value})
        problem(answer, 400, "unsupported_api_version")
        assert len(answer.content) < 2000
        assert site.metrics()['tminus_rejected_total{"reason": "unsupported_api_version"}'] == count
    assert site.engine.batches[1:] == []


def test_other_apis_probes_and_the_websocket_know_no_version(site: Site) -> None:
    for method, path in (
        ("GET", "/v1/models"), ("GET", "/v2"), ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/health"),
        ("GET", "/metrics"),
    ):  # fmt: skip
        assert site.client.request(method, path, headers=OTHER).status_code == 200, path
    assert site.client.post("/", json={"inputs": ""}, headers=OTHER).status_code == 200
    assert "api-version" not in site.client.get("/v1/models").headers
    with site.client.websocket_connect("/sample/stream", headers=OTHER) as ws:
        ws.send_text(json.dumps({"steps": 1}))
        assert ws.receive_json()["type"] == "accepted"


def test_the_version_is_told_to_whoever_has_no_key_too(make_site: MakeSite) -> None:
    site = make_site(app={"access": access_of(key_line("ann", "secret-of-ann", "sample"))})
    answer = site.client.get("/model")
    assert (answer.status_code, answer.headers["api-version"]) == (401, API_VERSION)
    problem(site.client.get("/model", headers=OTHER), 400, "unsupported_api_version")


def test_the_page_about_it_and_the_client_name_the_same_version() -> None:
    page = (ROOT / "docs" / "api-version.md").read_text("utf-8")
    assert {*re.findall("API-Version: ([0-9]+)", page)} == {API_VERSION} == {HEADERS["API-Version"]}
