"""GET /openapi.json, the page made of it, and what programs make of it: a client and a fuzzer."""

import importlib
import pkgutil
import subprocess
import sys
import uuid
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fastapi.openapi.models import OpenAPI

from tests.service.conftest import Site, pixels
from tests.service.fakes import INFO
from tests.trials import openapi
from tminus.model.timesteps import SPACINGS
from tminus.service.api.answers.problems import as_error_text, form_of
from tminus.service.api.request.schemas import (
    AnimationRequest,
    FloatsRequest,
    SampleRequest,
    TrajectoryRequest,
    WebhookRequest,
)
from tminus.service.images.encoder import JSON


def test_openapi_is_valid_and_has_every_parameter(site: Site) -> None:
    document = site.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    OpenAPI.model_validate(document)
    assert {"/jobs", "/jobs/{job_id}"} <= document["paths"].keys()
    assert {"/sample", "/model", "/healthz", "/readyz", "/metrics"} <= document["paths"].keys()
    of_answers = (AnimationRequest, TrajectoryRequest, FloatsRequest)
    of_sample = {name for each in of_answers for name in each.model_fields}
    for method in ("get", "post"):
        operation = document["paths"]["/sample"][method]
        parameters = {each["name"]: each for each in operation["parameters"] if each["in"] == "query"}
        assert parameters.keys() == SampleRequest.model_fields.keys() - {"image", "mask"} | of_sample
        for name, parameter in parameters.items():
            assert parameter["description"], name
            assert parameter["schema"], name
        content = operation["responses"]["200"]["content"]
        assert {"image/png", "application/zip", "application/json"} <= content.keys()
    assert "requestBody" not in document["paths"]["/sample"]["get"]
    of_webhooks = WebhookRequest.model_fields.keys()
    for path, method, more in (
        ("/sample", "post", of_webhooks | of_sample),
        ("/jobs", "post", of_webhooks),
        ("/jobs/{job_id}", "put", of_webhooks),
    ):
        content = document["paths"][path][method]["requestBody"]["content"]
        for kind in ("application/json", "multipart/form-data"):
            component = content[kind]["schema"]["$ref"].rpartition("/")[2]
            properties = document["components"]["schemas"][component]["properties"]
            assert properties.keys() == SampleRequest.model_fields.keys() | more
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
                    form = form_of(method.upper(), path)
                    media_type = JSON if form is not None else "application/problem+json"
                    assert response["content"].keys() == {media_type}, (path, method, status)
                    assert form is not as_error_text or status != "422"
    statuses = {
        (method, path): set(operation["responses"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert {"200", "202", "400", "406", "413", "415", "422", "429", "503", "504", "507"} <= statuses["post", "/sample"]
    assert "202" not in statuses["get", "/sample"]
    assert {"204", "404"} <= statuses["delete", "/jobs/{job_id}"]
    assert "200" not in statuses["delete", "/jobs/{job_id}"]
    assert {"200", "202", "409", "422", "507"} <= statuses["put", "/jobs/{job_id}"]
    assert {"404", "406", "409", "410"} <= statuses["get", "/jobs/{job_id}/image"]


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

    sample = importlib.import_module("generated.api.sample.sample_sample_post")
    wanted = models.SampleRequest(n=2, steps=2, seed=2**64 - 1, sampler=models.Sampler.DDIM, class_label=["cat", 1])
    answer = sample.sync(client=client, body=wanted)
    assert pixels(answer.payload.getvalue()).shape == (INFO.height_px, 2 * INFO.width_px)
    as_json = models.SampleAnswer.from_dict(site.post(json=wanted.to_dict(), headers={"Accept": JSON}).json())
    assert [image.class_name for image in as_json.images] == ["cat", "dog"]
    refused = sample.sync(client=client, body=models.SampleRequest(steps=0))
    assert isinstance(refused, models.Problem)
    assert (refused.code, refused.field, refused.value) == ("invalid_field", "steps", 0)

    submit = importlib.import_module("generated.api.jobs.post_job_jobs_post")
    job = submit.sync(client=client, body=models.JobRequest(steps=2))
    assert isinstance(job, models.JobAnswer)
    put = importlib.import_module("generated.api.jobs.put_job_jobs_job_id_put")
    chosen = uuid.uuid4()
    made, again = (put.sync(chosen, client=client, body=models.JobRequest(steps=2)) for _ in range(2))
    assert isinstance(made, models.JobAnswer)
    assert made.id == again.id
    conflict = put.sync(chosen, client=client, body=models.JobRequest(steps=3))
    assert conflict.code == "job_exists"
    find = importlib.import_module("generated.api.jobs.get_job_jobs_job_id_get")
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
