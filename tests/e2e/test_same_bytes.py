"""One image, asked for in every way there is: each client's own library or program, and the bytes they bring home."""

import base64
import io
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
import websockets.sync.client
from huggingface_hub import InferenceClient
from openai import OpenAI
from PIL import Image

from tests.e2e.conftest import RunningServer
from tests.tools import needs

SPEC: dict[str, Any] = {
    "steps": 20, "sampler": "ddpm", "class_label": "ankle-boot", "guidance": 1.5, "seed": 2**64 - 1, "index": 3,
    "to_seed": 2**64 - 2, "mix": 0.25,
}  # fmt: skip
OURS = ("sampler", "index", "to_seed", "mix")  # which other protocols have no field of their own for
EXTENSIONS = {name: value for name, value in SPEC.items() if name != "class_label"}  # what OpenAI has no member for
Way = Callable[[RunningServer, Path], bytes | np.ndarray]


def by_curl(server: RunningServer, folder: Path) -> bytes:
    body = ["-H", "Content-Type: application/json", "-d", json.dumps(SPEC)]
    command = [needs("curl"), "-sS", "--fail-with-body", f"{server.url}/sample", *body, "-o", "it.png"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return (folder / "it.png").read_bytes()


def as_a_job(server: RunningServer, _folder: Path) -> bytes:
    with server.api() as tminus:
        job = tminus.submit(**SPEC)
        job.wait()
        return job.image().data


def by_our_client(server: RunningServer, _folder: Path) -> bytes:
    with server.api() as tminus:
        (image,) = tminus.sample(**SPEC).pngs
    return image


def by_websocket(server: RunningServer, _folder: Path) -> bytes:
    url = server.url.replace("http", "ws") + "/sample/stream"
    with websockets.sync.client.connect(url) as socket:
        socket.send(json.dumps(SPEC))
        for message in socket:
            if isinstance(message, bytes):
                continue
            if json.loads(message)["type"] == "done":
                return bytes(socket.recv())
    raise AssertionError("it ended without an image")


def by_openai(server: RunningServer, _folder: Path) -> bytes:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.images.generate(prompt=SPEC["class_label"], extra_body=EXTENSIONS)
    told = answer.data[0].model_dump()
    assert {name: told[name] for name in ("seed", *OURS)} == {name: SPEC[name] for name in ("seed", *OURS)}
    return base64.b64decode(told["b64_json"])


def by_openai_as_a_job(server: RunningServer, _folder: Path) -> bytes:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.images.generate(prompt=SPEC["class_label"], response_format="url", extra_body=EXTENSIONS)
    return httpx.get(answer.data[0].url).content


def by_openai_streaming(server: RunningServer, _folder: Path) -> bytes:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        *_, last = client.images.generate(
            prompt=SPEC["class_label"], stream=True, partial_images=2, extra_body=EXTENSIONS
        )
    return base64.b64decode(last.b64_json)


def by_hugging_face(server: RunningServer, _folder: Path) -> np.ndarray:
    client = InferenceClient(model=server.url)
    more = {name: SPEC[name] for name in OURS}
    image = client.text_to_image(
        SPEC["class_label"], num_inference_steps=20, guidance_scale=1.5, seed=SPEC["seed"], extra_body=more
    )
    return np.asarray(image)


def by_hugging_face_without_its_client(server: RunningServer, _folder: Path) -> bytes:
    parameters = {"num_inference_steps": 20, "guidance_scale": 1.5} | {k: SPEC[k] for k in ("seed", *OURS)}
    answer = httpx.post(server.url, json={"inputs": SPEC["class_label"], "parameters": parameters}, timeout=60)
    return answer.raise_for_status().content


def by_triton(server: RunningServer, _folder: Path) -> np.ndarray:
    inputs = []
    for name, values, datatype in (
        ("class_label", np.array([SPEC["class_label"]], np.object_), "BYTES"),
        ("steps", np.array([SPEC["steps"]], np.int32), "INT32"),
        ("seed", np.array([SPEC["seed"]], np.uint64), "UINT64"),
        ("guidance", np.array([SPEC["guidance"]], np.float32), "FP32"),
    ):
        inputs.append(triton.InferInput(name, [1], datatype))
        inputs[-1].set_data_from_numpy(values)
    parameters = {name: SPEC[name] for name in OURS}
    with triton.InferenceServerClient(server.url.removeprefix("http://"), network_timeout=60) as client:
        return client.infer("small", inputs, parameters=parameters).as_numpy("images")[0, ..., 0]


def by_command_line(server: RunningServer, folder: Path) -> bytes:
    options = ((f"--{name.replace('_', '-')}", str(value)) for name, value in SPEC.items())
    command = [sys.executable, "-m", "tminus", "sample", "--url", server.url, *itertools.chain(*options)]
    subprocess.run([*command, "--out", str(folder / "it.png")], check=True, timeout=120, capture_output=True)
    return (folder / "it.png").read_bytes()


WAYS: list[Way] = [
    by_curl, as_a_job, by_our_client, by_websocket, by_openai, by_openai_as_a_job, by_openai_streaming, by_hugging_face,
    by_hugging_face_without_its_client, by_triton, by_command_line,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_client_is_given_the_same_bytes(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    wanted, got = server.post(json=SPEC).content, way(server, tmp_path)
    if isinstance(got, np.ndarray):  # a client that decodes the file, or is given none
        with Image.open(io.BytesIO(wanted)) as image:
            np.testing.assert_array_equal(got, np.asarray(image))
    else:
        assert got == wanted
