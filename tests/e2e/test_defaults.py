"""By every door of a real server the shortest request makes the images of one that names what is recommended."""

import asyncio
import base64
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient
from openai import OpenAI

from tests.e2e.conftest import BUNDLED, RunningServer, pixels, run_cli
from tminus.service.client import Accepted, AsyncClient, Client, Done

SHORTEST: dict[str, Any] = {"class_label": "sneaker", "seed": 7}
HEADERS = {"sampler": "x-sampler", "steps": "x-steps", "guidance": "x-guidance"}


def told(response: httpx.Response) -> dict[str, Any]:
    """What a response says was taken."""
    texts = {name: response.headers[header] for name, header in HEADERS.items()}
    return {"sampler": texts["sampler"], "steps": int(texts["steps"]), "guidance": float(texts["guidance"])}


Taken = tuple[bytes, dict[str, Any]]


def by_get(server: RunningServer, _folder: Path) -> Taken:
    answer = httpx.get(f"{server.url}/sample", params=SHORTEST, timeout=60)
    return answer.content, told(answer)


def by_query(server: RunningServer, _folder: Path) -> Taken:
    answer = server.post(params=SHORTEST)
    return answer.content, told(answer)


def by_json(server: RunningServer, _folder: Path) -> Taken:
    answer = server.post(json=SHORTEST)
    return answer.content, told(answer)


def by_form(server: RunningServer, _folder: Path) -> Taken:
    answer = server.post(files={name: (None, str(value)) for name, value in SHORTEST.items()})
    return answer.content, told(answer)


def by_durable_job(server: RunningServer, _folder: Path) -> Taken:
    accepted = httpx.post(f"{server.url}/jobs", json=SHORTEST)
    url = f"{server.url}{accepted.headers['location']}"
    server.wait_until(lambda: httpx.get(url).json()["state"] == "done")
    image = httpx.get(f"{url}/image")
    assert told(image) == told(accepted)
    return image.content, told(image)


def by_openais_client(server: RunningServer, _folder: Path) -> Taken:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        answer = client.images.with_raw_response.generate(prompt="sneaker", extra_body={"seed": 7})
        data = answer.parse().data
    assert data is not None
    assert data[0].b64_json is not None
    return base64.b64decode(data[0].b64_json), told(answer.http_response)


def by_the_client(server: RunningServer, _folder: Path) -> Taken:
    with Client(server.url) as tminus:
        sampled = tminus.sample(**SHORTEST)
    return sampled.data, {name: getattr(sampled, name) for name in HEADERS}


def by_the_asynchronous_client(server: RunningServer, _folder: Path) -> Taken:
    async def ask() -> Taken:
        async with AsyncClient(server.url) as tminus:
            sampled = await tminus.sample(**SHORTEST)
        return sampled.data, {name: getattr(sampled, name) for name in HEADERS}

    return asyncio.run(ask())


def by_websocket(server: RunningServer, _folder: Path) -> Taken:
    with Client(server.url) as tminus, tminus.watch(**SHORTEST) as messages:
        seen = list(messages)
    (accepted,) = [each for each in seen if isinstance(each, Accepted)]
    (done,) = [each for each in seen if isinstance(each, Done)]
    return done.images[0], {name: getattr(accepted, name) for name in HEADERS}


def by_command(folder: Path, *where: str) -> Taken:
    out = folder / "out.png"
    done = run_cli("sample", "--class-label", "sneaker", "--seed", "7", "--out", str(out), *where)
    assert done.returncode == 0, done.stdout
    _, said, *guidance, seed = done.stdout.splitlines()[0].removeprefix(f"{out}: ").split(", ")
    assert seed == "seed 7"
    steps, _, _, sampler = said.split()
    taken = {"sampler": sampler, "steps": int(steps), "guidance": float(guidance[0].split()[1]) if guidance else 1.0}
    return out.read_bytes(), taken


def by_command_from_a_server(server: RunningServer, folder: Path) -> Taken:
    return by_command(folder, "--url", server.url)


def by_command_that_watches(server: RunningServer, folder: Path) -> Taken:
    return by_command(folder, "--url", server.url, "--watch", str(folder / "way.webp"))


DOORS: Mapping[str, Callable[[RunningServer, Path], Taken]] = {
    name.removeprefix("by_"): made
    for name, made in [*globals().items()]
    if name.startswith("by_") and name != "by_command"
}


@pytest.fixture(params=["bundled_server", "server"])
def either(request: pytest.FixtureRequest) -> RunningServer:
    """A server of the bundled model, which recommends a table; and one of a model that recommends guidance."""
    running: RunningServer = request.getfixturevalue(request.param)
    return running


def recommended(server: RunningServer) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/model").json()["recommended"]
    return found


@pytest.mark.parametrize("door", DOORS)
def test_the_shortest_request_is_as_recommended(either: RunningServer, tmp_path: Path, door: str) -> None:
    wanted = either.post(json=SHORTEST | recommended(either))
    assert wanted.status_code == 200
    made, taken = DOORS[door](either, tmp_path)
    assert made == wanted.content
    assert taken == recommended(either)


def test_hugging_faces_client_is_given_what_is_recommended(
    either: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "")
    wanted = either.post(json=SHORTEST | recommended(either)).content
    made = InferenceClient(model=either.url).text_to_image("sneaker", seed=7)  # decoded
    np.testing.assert_array_equal(np.asarray(made), pixels(wanted))


def test_tritons_client_is_given_what_is_recommended(either: RunningServer) -> None:
    name = httpx.get(f"{either.url}/model").json()["name"]
    label = triton.InferInput("class_label", [1], "BYTES")
    label.set_data_from_numpy(np.array(["sneaker"], np.object_))
    seed = triton.InferInput("seed", [1], "UINT64")
    seed.set_data_from_numpy(np.array([7], np.uint64))
    with triton.InferenceServerClient(either.url.removeprefix("http://"), network_timeout=60) as client:
        result = client.infer(name, [label, seed])
    wanted = either.post(json=SHORTEST | recommended(either)).content
    np.testing.assert_array_equal(result.as_numpy("images")[0, :, :, 0], pixels(wanted))
    parameters = result.get_response()["parameters"]
    assert {key: parameters[key] for key in HEADERS} == recommended(either)


def test_the_command_without_a_server_is_as_recommended(bundled_server: RunningServer, tmp_path: Path) -> None:
    here = ("--checkpoint", str(BUNDLED), "--device", "cpu")
    made, taken = by_command(tmp_path, *here)
    wanted = recommended(bundled_server)
    assert taken == wanted
    named = tmp_path / "named.png"
    settings = ("--sampler", wanted["sampler"], "--steps", str(wanted["steps"]), "--guidance", str(wanted["guidance"]))
    run_cli("sample", "--class-label", "sneaker", "--seed", "7", "--out", str(named), *settings, *here)
    assert made == named.read_bytes()


def test_steps_alone_are_those_of_the_checkpoints_own_scheduler(bundled_server: RunningServer) -> None:
    scheduled = {"sampler": "ddpm", "steps": 12, "guidance": 1.0}
    answer = bundled_server.post(params=SHORTEST | {"steps": 12})
    assert told(answer) == scheduled
    assert answer.content == bundled_server.post(json=SHORTEST | scheduled).content
