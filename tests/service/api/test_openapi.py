"""What GET /openapi.json says."""

from collections.abc import Iterator
from typing import Any

from fastapi.openapi.models import OpenAPI

from service.api.schemas import SampleRequest
from tests.service.conftest import Site


def test_openapi_is_valid_and_has_every_parameter(site: Site) -> None:
    document = site.client.get("/openapi.json").json()
    assert document["openapi"].startswith("3.")
    OpenAPI.model_validate(document)
    assert {"/jobs", "/jobs/{job_id}"} <= document["paths"].keys()
    assert {"/sample", "/model", "/healthz", "/readyz", "/metrics"} <= document["paths"].keys()
    for method in ("get", "post"):
        operation = document["paths"]["/sample"][method]
        parameters = {parameter["name"]: parameter for parameter in operation["parameters"]}
        assert parameters.keys() == SampleRequest.model_fields.keys() - {"image", "mask"} | {"every", "show"}
        for name, parameter in parameters.items():
            assert parameter["in"] == "query"
            assert parameter["description"], name
            assert parameter["schema"], name
        content = operation["responses"]["200"]["content"]
        assert {"image/png", "application/zip", "application/json"} <= content.keys()
    assert "requestBody" not in document["paths"]["/sample"]["get"]
    for path in ("/sample", "/jobs"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        for kind in ("application/json", "multipart/form-data"):
            assert content[kind]["schema"]["properties"].keys() == SampleRequest.model_fields.keys()
        files = content["multipart/form-data"]["schema"]["properties"]
        assert files["image"]["format"] == files["mask"]["format"] == "binary"


def test_every_reference_in_openapi_leads_somewhere_and_operations_have_ids_of_their_own(site: Site) -> None:
    document = site.client.get("/openapi.json").json()

    def walk(node: Any) -> Iterator[str]:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                yield node["$ref"]
            for value in node.values():
                yield from walk(value)
        elif isinstance(node, list):
            for value in node:
                yield from walk(value)

    for reference in walk(document):
        target = document
        for part in reference.removeprefix("#/").split("/"):
            target = target[part]
    ids = [operation["operationId"] for path in document["paths"].values() for operation in path.values()]
    assert len(set(ids)) == len(ids)
