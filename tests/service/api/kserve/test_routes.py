"""The calls below /v2, through the app."""

import json
from typing import Any

import numpy as np
import pytest

from tests.service.api.kserve.requests import SPEC, as_bytes, body, numbers, plain, tensor, texts
from tests.service.conftest import MakeSite, Site, pixels
from tests.service.fakes import INFO, LIMITS
from tests.service.keys import access_of, bearer, key_line
from tests.service.several import COLOUR, make_several
from tminus.service.startup.app import VERSION as OF_SERVER

VERSION = INFO.weights_hash[:16]


def infer(site: Site, *more: dict[str, Any], path: str = "/v2/models/fake/infer", **members: Any) -> Any:
    return site.client.post(path, json={"inputs": plain(*more), **members})


def images_of(response: Any) -> np.ndarray:
    """The pixels of an answer in JSON."""
    assert response.status_code == 200, response.text
    (images,) = (each for each in response.json()["outputs"] if each["name"] == "images")
    return np.array(images["data"], np.uint8).reshape(images["shape"])


def refused(response: Any, status: int, code: str, field: str | None = None) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    document = response.json()
    assert (document["code"], document.get("field")) == (code, field)
    assert isinstance(document["error"], str)
    return str(document["error"])


def test_images_are_the_pixels_of_post_sample(site: Site) -> None:
    answer = infer(site, tensor("class_label", "INT64", 1), tensor("guidance", "FP32", 2.5), id="a")
    png = site.post(json=SPEC | {"class_label": 1, "guidance": 2.5})
    np.testing.assert_array_equal(images_of(answer)[0, :, :, 0], pixels(png.content))
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-seed"] == "7"
    assert "vary" not in answer.headers
    assert "inference-header-content-length" not in answer.headers
    document = answer.json()
    assert (document["id"], document["model_name"], document["model_version"]) == ("a", "fake", VERSION)
    assert document["outputs"][1] == {"name": "seed", "datatype": "UINT64", "shape": [1], "data": [7]}


def test_bytes_are_taken_and_given(site: Site) -> None:
    content, headers = body(
        [
            as_bytes("class_label", "BYTES", texts(b"cat", b"3D print"), [2]),
            as_bytes("steps", "INT32", numbers("INT32", 4), [1]),
            as_bytes("seed", "UINT64", numbers("UINT64", 7), [1]),
        ],
        parameters={"binary_data_output": True},
    )
    for _ in range(2):  # the second is from the cache where there is one, and is the same
        answer = site.client.post("/v2/models/fake/infer", content=content, headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/octet-stream"
        head = int(answer.headers["inference-header-content-length"])
        images, seed = json.loads(answer.content[:head])["outputs"]
        size = images["parameters"]["binary_data_size"]
        assert (images["shape"], size, seed["parameters"]) == ([2, 4, 6, 1], 48, {"binary_data_size": 8})
        behind = answer.content[head:]
        wanted = images_of(infer(site, tensor("class_label", "INT64", 0, 2)))
        np.testing.assert_array_equal(np.frombuffer(behind[:48], np.uint8).reshape(2, 4, 6, 1), wanted)
        assert int.from_bytes(behind[48:], "little") == 7


# InferRequest("fake", [...]).to_rest() of kserve 0.21, written out: a dict, or JSON and the bytes behind it.
KSERVE = (
    b'{"id":"0c2b5a3e-9d1f-4f9b-8f0e-6d6a5e0f7c11","model_name":"fake","inputs":['
    b'{"name":"steps","shape":[1],"datatype":"INT32","data":[4]},{"name":"seed","shape":[1],"datatype":"UINT64","data":[7]}]}'
)
KSERVE_HEAD = (
    b'{"id":"5be8ff7a-30f8-47c8-8f0c-0d1f3e0a9a52","model_name":"fake","inputs":['
    b'{"name":"steps","shape":[1],"datatype":"INT32","parameters":{"binary_data_size":4}},'
    b'{"name":"seed","shape":[1],"datatype":"UINT64","parameters":{"binary_data_size":8}}],'
    b'"parameters":{"binary_data_output":false}}'
)


def test_what_kserves_own_client_writes_is_taken(site: Site) -> None:
    wanted, length = images_of(infer(site)), {"Inference-Header-Content-Length": str(len(KSERVE_HEAD))}
    behind = numbers("INT32", 4) + numbers("UINT64", 7)
    for content, headers in ((KSERVE, {}), (KSERVE_HEAD + behind, length)):
        answer = site.client.post("/v2/models/fake/infer", content=content, headers=headers)
        np.testing.assert_array_equal(images_of(answer), wanted)
        assert answer.json()["id"] in content.decode()
    elsewhere = KSERVE.replace(b'"fake"', b'"other"')
    answer = site.client.post("/v2/models/fake/infer", content=elsewhere)
    assert "fake, got 'other'" in refused(answer, 400, "invalid_field", "model_name")


@pytest.mark.parametrize("binary", [False, True])
def test_an_id_is_told_and_keeps_nothing_from_the_cache(make_site: MakeSite, binary: bool) -> None:
    site = make_site(result_cache_bytes=2**20)
    parameters = {"binary_data_output": binary}
    plainly = infer(site, parameters=parameters)
    for request_id in ("a", 'ä "b"', ""):
        answer = infer(site, parameters=parameters, id=request_id)
        assert answer.headers["cache-status"] == "tminus; hit"
        assert answer.headers["etag"] == f"W/{plainly.headers['etag']}"
        head = int(answer.headers.get("inference-header-content-length", len(answer.content)))
        bare = int(plainly.headers.get("inference-header-content-length", len(plainly.content)))
        document = json.loads(answer.content[:head])
        assert document.pop("id") == request_id
        assert document == json.loads(plainly.content[:bare])
        assert answer.content[head:] == plainly.content[bare:]
    body = {"inputs": plain(), "parameters": parameters, "id": "c"}
    known = site.client.post("/v2/models/fake/infer", json=body, headers={"If-None-Match": answer.headers["etag"]})
    assert (known.status_code, known.json()["code"]) == (412, "precondition_failed")
    assert "inference-header-content-length" not in known.headers
    other = infer(site, parameters={"binary_data_output": not binary})
    assert other.headers["etag"] != plainly.headers["etag"]


def test_the_server_and_its_models_say_what_they_are(site: Site) -> None:
    server = site.client.get("/v2").json()
    assert server == {
        "name": "tminus",
        "version": OF_SERVER,
        "extensions": ["binary_tensor_data", "model_configuration"],
    }
    for path in ("/v2/models/fake", f"/v2/models/fake/versions/{VERSION}"):
        metadata = site.client.get(path).json()
        assert (metadata["name"], metadata["versions"]) == ("fake", [VERSION])
        assert metadata["inputs"][0] == {"name": "class_label", "datatype": "INT64", "shape": [-1]}
        assert metadata["outputs"][0] == {"name": "images", "datatype": "UINT8", "shape": [-1, 4, 6, 1]}
        assert site.client.get(f"{path}/ready").json() == {"name": "fake", "ready": True}
        np.testing.assert_array_equal(images_of(infer(site, path=f"{path}/infer")), images_of(infer(site)))


def test_each_model_is_asked_by_its_name_and_version(make_site: MakeSite) -> None:
    several = make_several(make_site)
    site, version = several.site, COLOUR.weights_hash[:16]
    answer = infer(site, tensor("class_label", "BYTES", "green"), path="/v2/models/colour/infer")
    assert images_of(answer).shape == (1, COLOUR.height_px, COLOUR.width_px, 3)
    assert site.client.get("/v2/models/colour").json()["versions"] == [version]
    config = several.get("/v2/models/colour/config").json()
    assert config == several.get(f"/v2/models/colour/versions/{version}/config").json()
    assert config["output"][0] == {"name": "images", "data_type": "TYPE_UINT8", "dims": [-1, 8, 8, 3]}
    for path, field in (("nobody", "model"), ("fake/versions/1", "version")):
        for method, call in (("GET", ""), ("GET", "/ready"), ("GET", "/config"), ("POST", "/infer")):
            answer = site.client.request(method, f"/v2/models/{path}{call}", json={"inputs": []})
            text = refused(answer, 404, "model_not_found", field)
            assert field == "model" or VERSION in text


def test_the_index_has_every_model_loaded_or_not_and_drops_what_is_not_ready_where_that_is_asked(
    make_site: MakeSite,
) -> None:
    several = make_several(make_site)
    ready = [
        {"name": info.name, "version": info.weights_hash[:16], "state": "READY", "reason": ""}
        for info in (INFO, COLOUR)
    ]
    unloaded = {"name": "third", "state": "UNAVAILABLE", "reason": "unloaded"}
    assert several.post("/v2/repository/index", content=b"").json() == [*ready, unloaded]
    assert several.post("/v2/repository/index", json={"ready": False}).json() == [*ready, unloaded]
    assert several.post("/v2/repository/index", json={"ready": True}).json() == ready
    refused(several.post("/v2/repository/index", json={"ready": 1}), 400, "invalid_field", "ready")
    refused(several.post("/v2/repository/index", json={"name": "fake"}), 400, "unknown_field", "name")
    several.site.worker.drain()
    index = several.post("/v2/repository/index").json()
    assert [each["state"] for each in index] == ["UNAVAILABLE"] * 3
    assert all(each["reason"] for each in index)
    assert several.post("/v2/repository/index", json={"ready": True}).json() == []


def test_probes_say_how_the_server_does_without_a_key(make_site: MakeSite) -> None:
    site = make_site(app={"access": access_of(key_line("ann", "tm_ann"))})
    assert site.client.get("/v2/health/live").json() == {"live": True}
    assert site.client.get("/v2/health/ready").json() == {"live": True, "ready": True}
    assert site.client.head("/v2/health/ready").status_code == 200
    for method, path in (("GET", "/v2"), ("GET", "/v2/models/fake"), ("POST", "/v2/models/fake/infer")):
        refused(site.client.request(method, path), 401, "unauthorized")
    assert site.client.get("/v2", headers=bearer("tm_ann")).status_code == 200
    site.worker.drain()
    refused(site.client.get("/v2/health/ready"), 503, "draining")
    refused(site.client.get("/v2/models/fake/ready", headers=bearer("tm_ann")), 503, "draining")
    assert site.client.get("/v2/health/live").json() == {"live": True}


def test_what_is_not_there_is_told_in_the_form_of_the_protocol(site: Site) -> None:
    refused(site.client.get("/v2/models/fake/weights"), 404, "not_found")
    refused(site.client.delete("/v2"), 405, "method_not_allowed")
    refused(site.client.get("/v2?x=1"), 400, "unknown_field", "x")
    assert site.client.get("/v22").headers["content-type"] == "application/problem+json"


def test_time_that_is_too_short_is_refused(make_site: MakeSite) -> None:
    site = make_site(tick_times=((1, 1.0), (LIMITS.max_batch, 1.0)))
    refused(infer(site, parameters={"deadline_s": 1}), 400, "invalid_field", "deadline_s")
    for timeout in (1, 1_000_000):
        text = refused(infer(site, parameters={"timeout": timeout}), 400, "invalid_field", "timeout")
        assert text == f"timeout must be at least 4 s for this work, in microseconds, got {timeout}"
