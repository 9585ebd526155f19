"""The client libraries of others against the real server: OpenAI's, LiteLLM, Hugging Face's and Triton's."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.http as triton
from google.protobuf.json_format import ParseDict
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from openai import OpenAI
from PIL import Image
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig
from tritonclient.utils import InferenceServerException

from tests.documents import code_blocks
from tests.e2e.conftest import RunningServer, SlowDown, pixels, png_of
from tests.service.keys import bearer, key_line
from tests.tools import needs

NODE = Path(__file__).with_name("node")
# Where `make test` installs OpenAI's library for Node.js.
PACKAGES = Path(sys.prefix) / "node_modules"
SAME: dict[str, Any] = {"seed": 7, "steps": 10, "class_label": "sneaker", "sampler": "dpmpp_2m", "guidance": 1.5}
KEY = "tm_the-key-of-ann"


def of_base64(text: str | None) -> bytes:
    assert text is not None
    return base64.b64decode(text)


def alone(server: RunningServer, **parameters: Any) -> bytes:
    answer = server.post(json=SAME | parameters)
    assert answer.status_code == 200, answer.text
    return answer.content


# --- OpenAI's ---


def test_a_key_is_asked_for_and_its_quota_waited_for(own_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = own_server(TMINUS_KEYS=key_line("ann", KEY, row_steps_per_minute=600))
    url = f"{server.url}/v1"
    with pytest.raises(openai.AuthenticationError), OpenAI(base_url=url, api_key="none") as stranger:
        stranger.models.list()
    with server.client(headers=bearer(KEY)) as http, OpenAI(base_url=url, api_key=KEY) as client:
        assert [model.id for model in client.models.list()] == ["small"]
        assert http.post("/jobs", json={"n": 10, "steps": 60}).status_code == 202  # all of the quota
        answer = client.images.generate(prompt="bag", extra_body={"steps": 20, "guidance": 1})
        assert answer.data is not None
        assert 'tminus_rejected_total{reason="quota_exceeded"}' in http.get("/metrics").text
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(HfHubHTTPError, match="send one: Authorization: Bearer KEY"):
        InferenceClient(model=server.url).text_to_image("bag", num_inference_steps=2)
    time.sleep(1)
    made = InferenceClient(model=server.url, token=KEY).text_to_image("bag", num_inference_steps=2)
    assert made.size == (32, 32)


def test_the_requests_of_vllm_omnis_benchmark(server: RunningServer) -> None:
    """As its diffusion_benchmark_serving.py sends them with `--backend openai`, without and with `--seed`."""
    assert httpx.get(f"{server.url}/health").status_code == 200
    headers = {"Content-Type": "application/json", "Authorization": "Bearer EMPTY"}
    body = {"model": "default", "prompt": "sneaker", "n": 1, "size": "32x32", "response_format": "b64_json"}
    for more in ({"num_inference_steps": 50}, {"seed": 7, "num_inference_steps": 1}):
        content = json.dumps(body | more)
        answer = httpx.post(f"{server.url}/v1/images/generations", content=content, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        (made,) = answer.json()["data"]
        assert made["seed"] == more.get("seed", made["seed"])
        wanted = {"seed": made["seed"], "steps": more["num_inference_steps"], "class_label": "sneaker"}
        assert of_base64(made["b64_json"]) == server.post(json=wanted).content


def node(program: str, folder: Path, *arguments: str) -> str:
    """Run a module of a folder, which gets a link to OpenAI's library; or skip."""
    needs("npm")
    assert (PACKAGES / "openai").is_dir(), "npm came after .venv: rm .venv/.installed-test, and `make test` installs it"
    link = folder / "node_modules"
    if not link.exists():
        link.symlink_to(PACKAGES)
    done = subprocess.run(["node", program, *arguments], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_openais_library_for_javascript_and_a_client_that_leaves_its_stream(
    server: RunningServer, tmp_path: Path, slow_down: SlowDown
) -> None:
    shutil.copy(NODE / "openai.mjs", tmp_path)
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    image.write_bytes(alone(server))
    # What OpenAI's mask has transparent, ours has white.
    upper = np.where(np.arange(32)[:, None] < 16, 255, 0).astype(np.uint8).repeat(32, 1)
    mask.write_bytes(png_of(np.dstack([np.full((32, 32, 3), 90, np.uint8), 255 - upper])))
    data = SAME | {"guidance": "2", "guidance_interval": ["100", "900"]}
    edited = server.post(data=data, files={"image": image.read_bytes(), "mask": png_of(upper)}).content
    gone = server.metric("tminus_jobs_aborted_total")
    slow_down(server, between_ticks_s=0.02)
    said = json.loads(node("openai.mjs", tmp_path, f"{server.url}/v1", str(image), str(mask)))
    assert [of_base64(each) for each in said["images"]] == [alone(server), alone(server, index=1)]
    assert said["indices"] == [0, 1]
    partial, completed = "image_generation.partial_image", "image_generation.completed"
    assert said["events"] == [[partial, 0], [partial, 1], [completed, None]]
    assert of_base64(said["streamed"]) == alone(server)
    assert of_base64(said["edited"]) == edited
    assert (said["models"], said["model"]) == (["small"], "tminus")
    assert said["refusals"] == [
        ["BadRequestError", 400, "invalid_field", "prompt", True],
        ["NotFoundError", 404, "model_not_found", "model", True],
    ]
    assert said["stopped"] == partial
    server.wait_until(lambda: server.metric("tminus_jobs_aborted_total") == gone + 1)
    server.wait_until(lambda: server.metric("tminus_rows_active") == 0)


def test_the_example_in_javascript_runs(server: RunningServer, tmp_path: Path) -> None:
    (example,) = code_blocks("docs/openai.md", "js")
    (tmp_path / "example.mjs").write_text(example.replace("http://localhost:8000", server.url))
    assert node("example.mjs", tmp_path).splitlines() == ["ankle-boot 20"] * 2
    made = [(tmp_path / f"boot-{k}.png").read_bytes() for k in range(2)]
    assert made == [alone(server, class_label="ankle-boot", steps=20, index=k) for k in range(2)]


LITELLM = """
import json, sys
import litellm
made = litellm.image_generation(
    prompt="sneaker", n=2, size="32x32", model="openai/small", api_base=sys.argv[1], api_key="none",
    extra_body={"seed": 7, "steps": 10, "sampler": "dpmpp_2m", "guidance": 1.5},
)
try:
    litellm.image_generation(prompt="a red shoe", model="openai/small", api_base=sys.argv[1], api_key="none")
except litellm.BadRequestError as error:
    refusal = str(error)
print(json.dumps({"images": [each["b64_json"] for each in made.data], "refusal": refusal}))
"""


@pytest.mark.long
def test_litellm(server: RunningServer) -> None:
    # It asks for the prices of models in the internet, unless it is told not to.
    env = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"}
    command = [sys.executable, "-c", LITELLM, f"{server.url}/v1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr + done.stdout
    said = json.loads(done.stdout.splitlines()[-1])
    assert [of_base64(each) for each in said["images"]] == [alone(server), alone(server, index=1)]
    assert "0..9 or t-shirt" in said["refusal"]


# --- Hugging Face's ---


@pytest.mark.parametrize("place", ["", "/models/small/"])
def test_hugging_faces_client_is_given_the_images_and_edits_of_post_sample(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    hub, theirs = (
        InferenceClient(model=server.url + place),
        {"num_inference_steps": 10, "guidance_scale": 1.5, "seed": 7},
    )

    def is_same(made: Image.Image, wanted: bytes) -> bool:
        """Whether the pixels are those, and so is what the file says of itself."""
        with Image.open(io.BytesIO(wanted)) as image:
            return (made.info, made.tobytes()) == (image.info, image.tobytes())

    assert is_same(hub.text_to_image("sneaker", **theirs, width=32, height=32), alone(server, sampler="ddpm"))
    extra = {"eta": 0.5, "num_images_per_prompt": 4}
    made = hub.text_to_image("7", **theirs, scheduler="DDIMScheduler", extra_body=extra)
    assert is_same(made, alone(server, sampler="ddim", eta=0.5, n=4))
    file = tmp_path / "bag.png"
    file.write_bytes(alone(server, class_label="bag"))
    edit = server.post(data=SAME | {"sampler": "ddpm", "strength": 0.6}, files={"image": file.read_bytes()}).content
    assert is_same(hub.image_to_image(file, "sneaker", **theirs, strength=0.6), edit)
    with pytest.raises(HfHubHTTPError, match="strength must be given with an image"):
        hub.image_to_image(file, "sneaker")


# --- Triton's, whose protocol KServe's is ---


@pytest.fixture
def tensors(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.url.removeprefix("http://"), network_timeout=60) as made:
        yield made


def tensor(name: str, values: np.ndarray, datatype: str, *, binary: bool = True) -> triton.InferInput:
    made = triton.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values, binary_data=binary)
    return made


@pytest.mark.parametrize(("binary_in", "binary_out"), [(True, False), (False, True)])
def test_tensors_are_the_pixels_of_post_sample(
    server: RunningServer, tensors: triton.InferenceServerClient, binary_in: bool, binary_out: bool
) -> None:
    given = [
        ("class_label", np.array(["bag", "ankle boot", "T-shirt", "9"], np.object_), "BYTES"),
        ("steps", np.array([10], np.int32), "INT32"),
        ("seed", np.array([2**64 - 1], np.uint64), "UINT64"),
        ("guidance", np.array([7.3], np.float32), "FP32"),
        ("guidance_interval", np.array([100, 900], np.int32), "INT32"),
    ]
    inputs = [tensor(*each, binary=binary_in) for each in given]
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("images", "seed")]
    parameters = {"sampler": "dpmpp_2m", "guidance_rescale": 0.5}
    result = tensors.infer("small", inputs, outputs=outputs, parameters=parameters, request_id="42")
    images = result.as_numpy("images")
    assert (images.shape, images.dtype) == ((4, 32, 32, 1), np.uint8)
    labels = ["bag", "ankle-boot", "t-shirt", 9]
    wanted = alone(
        server, n=4, seed=2**64 - 1, class_label=labels, guidance=7.3, **parameters, guidance_interval=[100, 900]
    )
    np.testing.assert_array_equal(images.reshape(2, 2, 32, 32).swapaxes(1, 2).reshape(64, 64), pixels(wanted))
    assert result.as_numpy("seed").tolist() == [2**64 - 1]
    assert result.get_response()["id"] == "42"


def test_the_client_finds_the_server_and_its_model_and_a_configuration_as_triton_defines_them(
    tensors: triton.InferenceServerClient,
) -> None:
    assert tensors.is_server_live()
    assert tensors.is_server_ready()
    assert not tensors.is_model_ready("nobody")
    assert tensors.get_server_metadata()["extensions"] == ["binary_tensor_data", "model_configuration"]
    metadata = tensors.get_model_metadata("small")
    (version,) = metadata["versions"]
    assert tensors.is_model_ready("small", version)
    assert {each["name"]: each["datatype"] for each in metadata["inputs"]} == {
        "class_label": "INT64", "seed": "UINT64", "steps": "INT32", "guidance": "FP32", "guidance_interval": "INT32",
    }  # fmt: skip
    assert metadata["outputs"][0] == {"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 1]}
    index = [{"name": "small", "version": version, "state": "READY", "reason": ""}]
    assert tensors.get_model_repository_index() == index
    # It refuses a member or a value that Triton's message lacks.
    config = ParseDict(tensors.get_model_config("small", version), ModelConfig())
    assert (config.name, config.max_batch_size) == ("small", 0)
    inputs = {each.name: (DataType.Name(each.data_type), list(each.dims), each.optional) for each in config.input}
    assert inputs["class_label"] == ("TYPE_INT64", [-1], True)
    assert inputs["guidance"] == ("TYPE_FP32", [1], True)
    assert [(each.name, list(each.dims)) for each in config.output] == [("images", [-1, 32, 32, 1]), ("seed", [1])]
    with pytest.raises(InferenceServerException, match=r"\[404\]"):
        tensors.get_model_config("nobody")
