"""GET /openapi.json, the page made of it, and what programs make of it: a client and a fuzzer."""

import importlib
import json
import pkgutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from fastapi.openapi.models import OpenAPI

from tests.service.conftest import Site, pixels
from tests.service.fakes import INFO, LIMITS, wait_until
from tests.trials import openapi
from tminus.model.catalogue import TABLE, Recommended
from tminus.model.sampler_tables import Table
from tminus.model.timesteps import SPACINGS
from tminus.service.api.answers.openapi import Contract
from tminus.service.api.answers.operations import OPERATIONS
from tminus.service.api.answers.problems import as_error_text, error_form
from tminus.service.api.request.schemas import (
    JobCall,
    SampleCall,
    SampleRequest,
    StreamCall,
    bounds_of,
)
from tminus.service.api.request.specs import spec_of
from tminus.service.images.encoder import JSON


def test_openapi_is_valid_and_has_every_parameter(site: Site) -> None:
    document = site.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    OpenAPI.model_validate(document)
    assert {"/jobs", "/jobs/{job_id}"} <= document["paths"].keys()
    assert {"/sample", "/model", "/healthz", "/readyz", "/metrics"} <= document["paths"].keys()
    for method in ("get", "post"):
        operation = document["paths"]["/sample"][method]
        parameters = {each["name"]: each for each in operation["parameters"] if each.get("in") == "query"}
        assert parameters.keys() == SampleCall.model_fields.keys() - {"image", "mask"}
        for name, parameter in parameters.items():
            assert parameter["description"], name
            assert parameter["schema"], name
        content = operation["responses"]["200"]["content"]
        assert {"image/png", "application/zip", "application/json"} <= content.keys()
    assert "requestBody" not in document["paths"]["/sample"]["get"]
    for path, call in (("/sample", SampleCall), ("/jobs", JobCall)):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        for kind in ("application/json", "multipart/form-data"):
            component = content[kind]["schema"]["$ref"].rpartition("/")[2]
            properties = document["components"]["schemas"][component]["properties"]
            assert properties.keys() == call.model_fields.keys()
        assert properties["image"]["format"] == properties["mask"]["format"] == "binary"


COMPANIONS: dict[str, dict[str, Any]] = {
    "to_seed": {"mix": 0.5},
    "mix": {"to_seed": 7},
    "eta": {"sampler": "ddim"},
    "guidance": {"class_label": "cat"},
    "guidance_rescale": {"class_label": "cat", "guidance": 2},
}


def test_the_bounds_in_openapi_are_those_that_hold(site: Site) -> None:
    document = site.client.get("/openapi.json").json()
    bounded = set()
    for parameter in document["paths"]["/jobs"]["post"]["parameters"]:
        if parameter.get("in") != "query":
            continue
        name, schema = parameter["name"], parameter["schema"]
        if "maximum" not in schema or "exclusiveMinimum" in schema:
            continue
        bounded.add(name)
        companions = COMPANIONS.get(name, {})
        for value, status in (
            (schema["minimum"], 202),
            (schema["maximum"], 202),
            (schema["minimum"] - 1, 422),
            (schema["maximum"] + 1, 422),
        ):
            answer = site.client.post("/jobs", params=companions | {name: value})
            assert answer.status_code == status, (name, value, answer.text)
            if status == 202:
                site.client.post(f"{answer.headers['location']}/cancel")
    assert bounded == {"n", "steps", "eta", "seed", "to_seed", "mix", "index", "guidance", "guidance_rescale"}


def test_every_refusal_is_described_as_a_problem_document_or_in_the_form_of_its_api(site: Site) -> None:
    document = site.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            for status, response in operation["responses"].items():
                if int(status) >= 400:
                    form = error_form(method.upper(), path)
                    media_type = JSON if form is not None else "application/problem+json"
                    assert response["content"].keys() == {media_type}, (path, method, status)
                    assert form is not as_error_text or status != "422"
    statuses = {
        (method, path): set(operation["responses"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert {"200", "400", "406", "412", "413", "415", "422", "429", "503", "504"} <= statuses["post", "/sample"]
    assert "304" not in statuses["post", "/sample"]
    assert "412" not in statuses["get", "/sample"]
    assert {"400", "401", "403"} <= statuses["get", "/model"]
    assert {"204", "404"} <= statuses["delete", "/jobs/{job_id}"]
    assert "200" not in statuses["delete", "/jobs/{job_id}"]
    assert {"404", "406", "409", "410"} <= statuses["get", "/jobs/{job_id}/image"]


# --- what a reference page is made of ---


def test_each_call_has_a_readable_id_a_tag_that_is_explained_and_words(site: Site) -> None:
    document = site.client.get("/openapi.json").json()
    tags = {each["name"]: each["description"] for each in document["tags"]}
    operations = [each for methods in document["paths"].values() for each in methods.values()]
    assert {each["operationId"] for each in operations} == OPERATIONS.keys() - {"stream_samples"}
    assert {tag for each in operations for tag in each["tags"]} == tags.keys()
    for each in operations:
        assert each["summary"], each
        assert each["description"], each
        for parameter in each.get("parameters", ()):
            assert "$ref" in parameter or parameter["description"].endswith("."), parameter
            if "x-default" in parameter:
                assert parameter["description"].endswith(f" Default: {parameter['x-default']}.")


def test_each_answer_names_its_headers_and_each_is_explained_once(site: Site) -> None:
    document = site.client.get("/openapi.json").json()
    explained = document["components"]["headers"]
    used = set()
    for methods in document["paths"].values():
        for operation in methods.values():
            for response in operation["responses"].values():
                names = response.get("headers", {})
                used |= names.keys()
                assert all(each == {"$ref": f"#/components/headers/{name}"} for name, each in names.items())
    assert used == explained.keys()
    assert all(each["description"].endswith(".") for each in explained.values())
    sample = document["paths"]["/sample"]["post"]["responses"]
    assert {"ETag", "X-Seed", "X-Job-ID", "Server-Timing", "API-Version", "RateLimit"} <= sample["200"][
        "headers"
    ].keys()
    assert "Retry-After" in sample["429"]["headers"]
    assert "WWW-Authenticate" in sample["401"]["headers"]


def test_the_headers_that_are_sent_are_those_that_are_described(site: Site) -> None:
    paths = site.client.get("/openapi.json").json()["paths"]
    job = site.client.post("/jobs", json={"steps": 2, "seed": 1}, headers={"Idempotency-Key": "a"})
    path = job.headers["location"]
    wait_until(lambda: site.client.get(path).json()["state"] == "done")
    floats = {"Accept": "application/x-npy"}
    for method, url, key, options in (
        ("post", "/sample", "/sample", {"json": {"steps": 1, "n": 2}}),
        ("post", "/sample", "/sample", {"json": {"seed": 1}, "headers": floats}),
        ("get", "/sample?seed=1", "/sample", {}),
        ("post", "/jobs", "/jobs", {"json": {"steps": 2, "seed": 1}, "headers": {"Idempotency-Key": "a"}}),
        ("get", "/sample?seed=1", "/sample", {"headers": floats | {"If-None-Match": "*"}}),
        ("get", f"{path}/image", "/jobs/{job_id}/image", {}),
        ("get", f"{path}/image", "/jobs/{job_id}/image", {"headers": {"If-None-Match": "*"}}),
        ("get", path, "/jobs/{job_id}", {}),
        ("get", "/model/schedule", "/model/schedule", {}),
        ("post", "/v1/images/generations", "/v1/images/generations", {"json": {"prompt": ""}}),
        ("post", "/sample", "/sample", {"json": {"steps": 0}}),
        ("post", "/sample", "/sample", {"headers": {"Content-Encoding": "gzip"}}),
    ):
        answer = site.client.request(method, url, **options)
        described = paths[key][method]["responses"][str(answer.status_code)]["headers"]
        sent = answer.headers.keys() - {"content-type", "content-length", "content-encoding"}
        assert sent <= {name.lower() for name in described}, (method, url, sent)


def test_the_examples_are_what_is_asked_and_answered(site: Site) -> None:
    schemas = site.client.get("/openapi.json").json()["components"]["schemas"]
    (wrong,) = schemas["Problem"]["examples"]
    assert site.post(json={each["field"]: each["value"] for each in wrong["errors"]}).json() == wrong
    (job,) = schemas["JobAnswer"]["examples"]
    asked = {name: job[name] for name in ("n", "steps", "sampler", "seed")} | {"class_label": "dog"}
    made = site.client.post("/jobs", json=asked).json()
    assert job.keys() == {name for name, value in made.items() if value is not None}
    assert job["parameters"].keys() == made["parameters"].keys()


def test_the_example_of_a_body_is_one_that_the_model_takes() -> None:
    table = Table("consistency", 4, 1.0, (999.0, 700.0, 400.0, 100.0), ((0.5, 0.5, 0.1, 0.0, 0.0),) * 4)
    student = replace(INFO, samplers=("consistency",), tables=(table,), default_sampler="consistency")
    student = replace(student, recommended=Recommended("consistency", 4), timestep_spacings={"consistency": TABLE})
    without_null = replace(INFO, null_class=None)
    for model in (INFO, student, without_null, replace(without_null, class_names=(), conditional=False)):
        (example,) = Contract(model, LIMITS).components()["SampleRequest"]["examples"]
        spec_of(SampleRequest.parse(example, bounds_of(model, LIMITS)), model, LIMITS)


def test_messages_that_openapi_cannot_express_are_in_extensions(site: Site) -> None:
    document = site.client.get("/openapi.json").json()
    stream = document["x-websockets"]["/sample/stream"]
    fields = document["components"]["schemas"]["StreamRequest"]["properties"]
    assert fields.keys() == StreamCall.model_fields.keys()
    with site.client.websocket_connect("/sample/stream") as ws:
        ws.send_json({"steps": 2, "every": 1, "keep_open": True})
        seen = {}
        while "done" not in seen:
            message = ws.receive()
            if message.get("text") is not None:
                members = json.loads(message["text"])
                seen[members["type"]] = members
        ws.receive_bytes()
        ws.send_json({"steps": 0, "eta": 2})
        seen["error"] = ws.receive_json()
    assert seen.keys() == stream["server"].keys() - {"cancelled"}
    for kind, members in seen.items():
        jsonschema.validate(members, stream["server"][kind]["schema"] | {"additionalProperties": False})
    events = document["paths"]["/jobs/{job_id}/events"]["get"]["responses"]["200"]["x-events"]
    assert events.keys() == {"waiting", "progress", "frame", "done", "failed", "cancelled"}


# --- a client that is generated from it ---


# The generator knows bytes by this one type.
GENERATOR_SETTINGS = """
post_hooks: []
content_type_overrides:
  image/png: application/octet-stream
  image/jpeg: application/octet-stream
  image/webp: application/octet-stream
"""


@pytest.fixture
def generated(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A client of the site, made by openapi-python-client."""
    document, config = tmp_path / "openapi.json", tmp_path / "config.yml"
    document.write_text(site.client.get("/openapi.json").text)
    config.write_text(GENERATOR_SETTINGS)
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none", "--fail-on-warning"]
    command += ["--path", str(document), "--config", str(config), "--output-path", str(tmp_path / "generated")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("generated")


def test_a_generated_client_knows_the_samplers_the_problems_and_every_call(site: Site, generated: ModuleType) -> None:
    for module in pkgutil.walk_packages(generated.__path__, "generated."):
        importlib.import_module(module.name)
    models = importlib.import_module("generated.models")
    assert {each.value for each in models.Sampler} == {*INFO.samplers}
    assert {each.value for each in models.TimestepSpacing} == {*SPACINGS}
    client = generated.Client(base_url="http://testserver")
    client.set_httpx_client(site.client)

    sample = importlib.import_module("generated.api.sample.sample_images")
    wanted = models.SampleRequest(n=2, steps=2, seed=2**64 - 1, sampler=models.Sampler.DDIM, class_label=["cat", 1])
    answer = sample.sync(client=client, body=wanted)
    assert pixels(answer.payload.getvalue()).shape == (INFO.height_px, 2 * INFO.width_px)
    as_json = models.SampleAnswer.from_dict(site.post(json=wanted.to_dict(), headers={"Accept": JSON}).json())
    assert [image.class_name for image in as_json.images] == ["cat", "dog"]
    refused = sample.sync(client=client, body=models.SampleRequest(steps=0))
    assert isinstance(refused, models.Problem)
    assert (refused.code, refused.field, refused.value) == ("invalid_field", "steps", 0)

    submit = importlib.import_module("generated.api.jobs.submit_job")
    job = submit.sync(client=client, body=models.JobRequest(steps=2))
    assert isinstance(job, models.JobAnswer)
    find = importlib.import_module("generated.api.jobs.get_job")
    assert find.sync(job.id, client=client).seed == job.seed
    assert find.sync("x", client=client).code == "job_not_found"


# --- a client that tries everything it allows, and what it does not ---


@pytest.mark.slow
@pytest.mark.long
def test_a_fuzzer_finds_no_answer_that_openapi_does_not_allow() -> None:
    found = openapi.trial(12)
    assert found.passed, found.output
    assert f"{found.operations} selected / {found.operations} total" in found.output
    assert found.cases > 500
