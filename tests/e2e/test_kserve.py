"""Triton's own client, whose protocol KServe's is, against the real server."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from google.protobuf.json_format import ParseDict
from PIL import Image
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from tritonclient.utils import InferenceServerException

from tests.e2e.conftest import RunningServer

NAMES = ["bag", "ankle boot", "T-shirt", ""]


@pytest.fixture
def client(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://"), network_timeout=60) as made:
        yield made


def tensor(name: str, values: np.ndarray, datatype: str, *, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


def inputs(*, binary: bool = True, seed: int = 7) -> list[triton.InferInput]:
    labels = np.array(NAMES, np.object_)
    return [
        tensor("class_label", labels, "BYTES", binary=binary),
        tensor("steps", np.array([20], np.int32), "INT32", binary=binary),
        tensor("seed", np.array([seed], np.uint64), "UINT64", binary=binary),
    ]


def sampled(server: RunningServer, **spec: Any) -> np.ndarray:
    """The pixels of POST /sample, one image each."""
    answer = server.post(json={"steps": 20, "seed": 7} | spec, headers={"Accept": "application/json"}).json()

    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(each["png"])))) for each in answer["images"]])


@pytest.mark.parametrize(("binary_in", "binary_out"), [(True, False), (False, True)])
def test_tensors_are_the_pixels_of_post_sample(
    server: RunningServer, client: triton.InferenceServerClient, binary_in: bool, binary_out: bool
) -> None:
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("images", "seed")]
    result = client.infer("small", inputs(binary=binary_in, seed=2**64 - 1), outputs=outputs, request_id="42")
    images = result.as_numpy("images")
    assert (images.shape, images.dtype) == ((4, 32, 32, 1), np.uint8)
    wanted = sampled(server, n=4, seed=2**64 - 1, class_label=["bag", "ankle-boot", "t-shirt", None])
    np.testing.assert_array_equal(images[..., 0], wanted)
    assert result.as_numpy("seed").tolist() == [2**64 - 1]
    assert result.get_response()["id"] == "42"


def test_what_the_client_does_by_default_is_bytes_both_ways(
    server: RunningServer, client: triton.InferenceServerClient
) -> None:
    more = [
        tensor("class_label", np.array([8, 9]), "INT64"),
        tensor("guidance", np.array([7.3], np.float32), "FP32"),
        tensor("guidance_interval", np.array([100, 900], np.int32), "INT32"),
    ]
    result = client.infer("small", [*more, *inputs()[1:]], parameters={"sampler": "dpmpp_2m", "guidance_rescale": 0.5})
    guided = {"guidance": 7.3, "guidance_interval": [100, 900], "guidance_rescale": 0.5, "sampler": "dpmpp_2m"}
    wanted = sampled(server, n=2, class_label=[8, 9], **guided)
    np.testing.assert_array_equal(result.as_numpy("images")[..., 0], wanted)


def test_the_client_finds_the_server_and_its_model(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("small")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["extensions"] == ["binary_tensor_data", "model_configuration"]
    metadata = client.get_model_metadata("small")
    (version,) = metadata["versions"]
    assert client.is_model_ready("small", version)
    assert client.infer("small", inputs(), version).as_numpy("images").shape == (4, 32, 32, 1)
    assert {each["name"]: each["datatype"] for each in metadata["inputs"]} == {
        "class_label": "INT64", "seed": "UINT64", "steps": "INT32", "guidance": "FP32", "guidance_interval": "INT32",
    }  # fmt: skip
    assert metadata["outputs"][0] == {"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 1]}


def test_the_client_gets_the_repository_index_and_a_configuration_as_triton_defines_them(
    client: triton.InferenceServerClient,
) -> None:
    (version,) = client.get_model_metadata("small")["versions"]
    assert client.get_model_repository_index() == [
        {"name": "small", "version": version, "state": "READY", "reason": ""}
    ]
    for document in (client.get_model_config("small"), client.get_model_config("small", version)):
        config = ParseDict(document, ModelConfig())  # refuses a member or a value that Triton's message lacks
        assert (config.name, config.max_batch_size) == ("small", 0)
        of_inputs = {
            each.name: (DataType.Name(each.data_type), list(each.dims), each.optional) for each in config.input
        }
        assert of_inputs["class_label"] == ("TYPE_INT64", [-1], True)
        assert of_inputs["guidance"] == ("TYPE_FP32", [1], True)
        assert [(each.name, list(each.dims)) for each in config.output] == [("images", [-1, 32, 32, 1]), ("seed", [1])]
    with pytest.raises(InferenceServerException, match=r"\[404\]"):
        client.get_model_config("nobody")
