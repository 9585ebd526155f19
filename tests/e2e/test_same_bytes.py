"""One image, asked for by each client's own library or program, with every setting and with as few as can be."""

import base64
import io
import itertools
import json
import subprocess
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

from tests.e2e.conftest import BUNDLED, RunningServer, run_cli
from tests.tools import needs

Spec = dict[str, Any]
SHORTEST: Spec = {"class_label": "ankle-boot", "seed": 2**64 - 1}  # the rest is as the model recommends
OURS = {"sampler": "ddpm", "index": 3, "to_seed": 2**64 - 2, "mix": 0.25}  # no other protocol has fields for these
SPEC = SHORTEST | {"steps": 20, "guidance": 1.5} | OURS
Way = Callable[[RunningServer, Path, Spec], bytes | np.ndarray]
TENSORS = {"class_label": "BYTES", "seed": "UINT64", "steps": "INT32", "guidance": "FP32"}
DTYPES = {"BYTES": np.object_, "UINT64": np.uint64, "INT32": np.int32, "FP32": np.float32}
HUGGING_FACE = {"steps": "num_inference_steps", "guidance": "guidance_scale"}


def without_label(spec: Spec, names: dict[str, str] | None = None) -> Spec:
    """A spec for a protocol whose prompt is the class, by the names that it has for settings."""
    return {(names or {}).get(name, name): value for name, value in spec.items() if name != "class_label"}


def by_curl(server: RunningServer, folder: Path, spec: Spec) -> bytes:
    body = ["-H", "Content-Type: application/json", "-d", json.dumps(spec)]
    command = [needs("curl"), "-sS", "--fail-with-body", f"{server.url}/sample", *body, "-o", "it.png"]
    subprocess.run(command, cwd=folder, check=True, timeout=60)
    return (folder / "it.png").read_bytes()


def by_get(server: RunningServer, _folder: Path, spec: Spec) -> bytes:
    return httpx.get(f"{server.url}/sample", params=spec, timeout=60).content


def by_form(server: RunningServer, _folder: Path, spec: Spec) -> bytes:
    return server.post(files={name: (None, str(value)) for name, value in spec.items()}).content


def as_a_job(server: RunningServer, _folder: Path, spec: Spec) -> bytes:
    with server.api() as tminus:
        job = tminus.submit(**spec)
        job.wait()
        return job.image().data


def by_our_client(server: RunningServer, _folder: Path, spec: Spec) -> bytes:
    with server.api() as tminus:
        (image,) = tminus.sample(**spec).pngs
    return image


def by_websocket(server: RunningServer, _folder: Path, spec: Spec) -> bytes:
    url = server.url.replace("http", "ws") + "/sample/stream"
    with websockets.sync.client.connect(url) as socket:
        socket.send(json.dumps(spec))
        for message in socket:
            if isinstance(message, str) and json.loads(message)["type"] == "done":
                return bytes(socket.recv())
    raise AssertionError("it ended without an image")


def by_openai(server: RunningServer, _folder: Path, spec: Spec) -> bytes:
    extensions = without_label(spec)
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.images.generate(prompt=spec["class_label"], extra_body=extensions)
    told = answer.data[0].model_dump()
    assert extensions.items() <= told.items()
    return base64.b64decode(told["b64_json"])


def by_openai_as_a_job(server: RunningServer, _folder: Path, spec: Spec) -> bytes:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.images.generate(
            prompt=spec["class_label"], response_format="url", extra_body=without_label(spec)
        )
    return httpx.get(answer.data[0].url).content


def by_openai_streaming(server: RunningServer, _folder: Path, spec: Spec) -> bytes:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        *_, last = client.images.generate(
            prompt=spec["class_label"], stream=True, partial_images=2, extra_body=without_label(spec)
        )
    return base64.b64decode(last.b64_json)


def by_hugging_face(server: RunningServer, _folder: Path, spec: Spec) -> np.ndarray:
    extra = {name: spec[name] for name in OURS if name in spec}
    own = {name: value for name, value in without_label(spec, HUGGING_FACE).items() if name not in OURS}
    return np.asarray(InferenceClient(model=server.url).text_to_image(spec["class_label"], **own, extra_body=extra))


def by_hugging_face_without_its_client(server: RunningServer, _folder: Path, spec: Spec) -> bytes:
    body = {"inputs": spec["class_label"], "parameters": without_label(spec, HUGGING_FACE)}
    return httpx.post(server.url, json=body, timeout=60).raise_for_status().content


def by_triton(server: RunningServer, _folder: Path, spec: Spec) -> np.ndarray:
    inputs = []
    for name in TENSORS.keys() & spec.keys():
        inputs.append(triton.InferInput(name, [1], TENSORS[name]))
        inputs[-1].set_data_from_numpy(np.array([spec[name]], DTYPES[TENSORS[name]]))
    parameters = {name: spec[name] for name in OURS if name in spec}
    with triton.InferenceServerClient(server.url.removeprefix("http://"), network_timeout=60) as client:
        return client.infer("small", inputs, parameters=parameters).as_numpy("images")[0, ..., 0]


def by_command_line(server: RunningServer, folder: Path, spec: Spec) -> bytes:
    return by_command(folder, spec, "--url", server.url)


def by_command(folder: Path, spec: Spec, *where: str) -> bytes:
    options = itertools.chain(*((f"--{name.replace('_', '-')}", str(value)) for name, value in spec.items()))
    done = run_cli("sample", *where, *options, "--out", str(folder / "it.png"))
    assert done.returncode == 0, done.stderr
    return (folder / "it.png").read_bytes()


WAYS: list[Way] = [
    by_curl, by_get, by_form, as_a_job, by_our_client, by_websocket, by_openai, by_openai_as_a_job, by_openai_streaming,
    by_hugging_face, by_hugging_face_without_its_client, by_triton, by_command_line,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_client_is_given_the_same_bytes(
    server: RunningServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Way
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    for spec in (SPEC, SHORTEST):
        wanted, got = server.post(json=recommended(server) | spec).content, way(server, tmp_path, spec)
        if isinstance(got, np.ndarray):  # the client decodes the file
            with Image.open(io.BytesIO(wanted)) as image:
                np.testing.assert_array_equal(got, np.asarray(image))
        else:
            assert got == wanted


def recommended(server: RunningServer) -> Spec:
    found: Spec = httpx.get(f"{server.url}/model").json()["recommended"]
    return found


def test_what_the_bundled_model_recommends_is_taken_and_told(bundled_server: RunningServer, tmp_path: Path) -> None:
    """It recommends a table, and the small one a sampler with guidance."""
    wanted = recommended(bundled_server)
    made = bundled_server.post(json=SHORTEST | wanted).content
    answer = bundled_server.post(json=SHORTEST)
    assert answer.content == made
    told = {name: answer.headers[f"x-{name}"] for name in wanted}
    assert told == {name: str(value) for name, value in wanted.items()}
    here = ("--checkpoint", str(BUNDLED), "--device", "cpu")
    assert by_command(tmp_path, SHORTEST, *here) == by_command(tmp_path, SHORTEST | wanted, *here)
    # Steps alone are those of the checkpoint's own scheduler.
    scheduled = {"sampler": "ddpm", "steps": 12, "guidance": 1.0}
    by_steps = bundled_server.post(params=SHORTEST | {"steps": 12}).content
    assert by_steps == bundled_server.post(json=SHORTEST | scheduled).content
