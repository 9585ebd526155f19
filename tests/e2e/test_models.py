"""Several models on one server: bytes, kills, and a folder that is replaced while clients are being served."""

import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import RunningServer, SlowDown, start_server, stop_server
from tests.service.keys import key_line

KEY = "the-key-of-these-tests"
KEYS = {"TMINUS_KEYS": key_line("ops", KEY, "admin"), "TMINUS_OPEN": "yes"}
ADMIN = {"Authorization": f"Bearer {KEY}"}
WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
QUICK: dict[str, Any] = {"n": 2, "steps": 5, "seed": 7, "class_label": 1, "sampler": "ddim"}
LONG: dict[str, Any] = {"n": 4, "steps": 200, "seed": 9, "class_label": 0, "sampler": "ddpm"}

StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def two(small: Path, colour: Path) -> Iterator[RunningServer]:
    running = start_server(small, "--checkpoint", f"colour={colour}", "--result-cache-mb", "0", **KEYS)
    yield running
    assert stop_server(running) == 0, running.log
    assert "Traceback" not in running.log, running.log


def new_weights(folder: Path, by: float) -> None:
    """Replace a model's weights by others, in one step."""
    state = load_file(folder / WEIGHTS)
    state["conv_out.bias"] = state["conv_out.bias"] + by
    save_file(state, folder / "new")
    (folder / "new").replace(folder / WEIGHTS)


def sampled(server: RunningServer, path: str, **fields: Any) -> httpx.Response:
    response = httpx.post(f"{server.url}{path}/sample", json=QUICK | fields, timeout=120)
    assert response.status_code == 200, response.text
    return response


def change(server: RunningServer, name: str, what: str) -> httpx.Response:
    return httpx.post(f"{server.url}/models/{name}/{what}", headers=ADMIN, timeout=120)


def test_each_model_gives_the_bytes_that_it_gives_alone(two: RunningServer, small: Path, colour: Path) -> None:
    alone = {}
    for path, folder in (("", small), ("/models/colour", colour)):
        server = start_server(folder)
        alone[path] = [sampled(server, "", seed=seed).content for seed in range(4)]
        stop_server(server)
    with ThreadPoolExecutor(8) as pool:
        asked = {
            (path, seed): pool.submit(sampled, two, path, seed=seed, steps=5) for seed in range(4) for path in alone
        }
        for (path, seed), answer in asked.items():
            assert answer.result().content == alone[path][seed], (path, seed)


def test_a_short_job_of_one_model_overtakes_a_long_one_of_the_other(two: RunningServer, slow_down: SlowDown) -> None:
    slow_down(two)
    long = httpx.post(f"{two.url}/models/colour/jobs", json=LONG | {"n": 16, "steps": 1000}).json()
    two.wait_until(lambda: httpx.get(f"{two.url}/jobs/{long['id']}").json()["step"] > 2)
    sampled(two, "")
    job = httpx.get(f"{two.url}/jobs/{long['id']}").json()
    assert job["state"] == "running"
    assert job["model"] == "colour"
    httpx.delete(f"{two.url}/jobs/{long['id']}")


@pytest.mark.long
def test_jobs_of_both_models_survive_a_kill(small: Path, colour: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint", f"colour={colour}", "--state-dir", str(tmp_path))
    server = start_server(small, *flags)
    paths = {"": "small", "/models/colour": "colour"}
    expected = {path: sampled(server, path, **LONG).content for path in paths}
    server.slow_down()
    ids = {path: httpx.post(f"{server.url}{path}/jobs", json=LONG).json()["id"] for path in paths}
    server.wait_until(lambda: all(httpx.get(f"{server.url}/jobs/{each}").json()["step"] > 5 for each in ids.values()))
    server.process.send_signal(signal.SIGKILL)
    server.process.wait(60)
    server = start_server(small, *flags)
    for path, job_id in ids.items():
        server.wait_until(lambda job_id=job_id: httpx.get(f"{server.url}/jobs/{job_id}").json()["state"] == "done")  # type: ignore[misc]
        assert httpx.get(f"{server.url}/jobs/{job_id}/image").content == expected[path]
        assert httpx.get(f"{server.url}/jobs/{job_id}").json()["model"] == paths[path]
    assert stop_server(server) == 0


def test_a_reload_under_load_fails_nobody(small: Path, colour: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grey"
    shutil.copytree(small, folder)
    flags = ("--checkpoint", f"rgb={colour}", "--state-dir", str(tmp_path / "state"))
    server = start_server(folder, *flags, **KEYS)
    name = httpx.get(f"{server.url}/models").json()["models"][0]["name"]
    first = sampled(server, "").headers["x-fingerprint"]
    server.slow_down()
    durable = httpx.post(f"{server.url}/jobs", json=LONG | {"steps": 1000}).json()["id"]
    going = True

    def client(seed: int) -> list[tuple[int, str]]:
        found = []
        with httpx.Client(base_url=server.url, timeout=120) as http:
            while going:
                answer = http.post("/sample", json=QUICK | {"seed": seed})
                found.append((answer.status_code, answer.headers.get("x-fingerprint", "")))
        return found

    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(client, seed) for seed in range(8)]
        fingerprints = [first]
        for round_ in range(2):
            new_weights(folder, 0.01 * (round_ + 1))
            answer = change(server, name, "reload")
            assert answer.status_code == 200, answer.text
            fingerprints.append(answer.json()["model"]["fingerprint"])
            server.wait_until(lambda: sampled(server, "").headers["x-fingerprint"] == fingerprints[-1])
        going = False
        answers = [each for future in clients for each in future.result()]
    assert len(set(fingerprints)) == 3
    assert {status for status, _ in answers} == {200}
    assert {fingerprint for _, fingerprint in answers} <= set(fingerprints)
    assert httpx.get(f"{server.url}/jobs/{durable}").json()["state"] == "running", "it is of the first weights"
    server.speed_up()
    server.wait_until(lambda: httpx.get(f"{server.url}/jobs/{durable}").json()["state"] == "done")
    assert httpx.get(f"{server.url}/jobs/{durable}").json()["fingerprint"] == first, "it ends as it began"
    assert httpx.get(f"{server.url}/jobs/{durable}/image").status_code == 200
    server.wait_until(lambda: server.log.count(" is unloaded") == 2)
    assert stop_server(server) == 0
    assert "Traceback" not in server.log


@pytest.fixture(scope="module")
def own_models(
    small: Path, colour: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningServer, Path]]:
    """A server of a model of its own and of a folder of models, and that folder. Each test leaves rgb as it was."""
    folder = tmp_path_factory.mktemp("library")
    shutil.copytree(colour, folder / "rgb")
    server = start_server(small, "--models", str(folder), "--result-cache-mb", "0", **KEYS)
    yield server, folder
    assert stop_server(server) == 0, server.log
    assert "Traceback" not in server.log, server.log


def states(server: RunningServer) -> dict[str, str]:
    return {each["name"]: each["state"] for each in httpx.get(f"{server.url}/models").json()["models"]}


def test_models_of_a_folder_come_and_go(own_models: tuple[RunningServer, Path], colour: Path) -> None:
    server, folder = own_models
    shutil.copytree(colour, folder / "other")
    new_weights(folder / "other", 0.05)
    shutil.copytree(colour, folder / ".hidden")
    assert states(server) == {"small": "loaded", "rgb": "loaded", "other": "unloaded"}, "as it is now"
    assert change(server, "other", "load").status_code == 200
    assert sampled(server, "/models/other").content != sampled(server, "/models/rgb").content
    assert change(server, "rgb", "unload").status_code == 204
    server.wait_until(lambda: states(server)["rgb"] == "unloaded")
    assert httpx.post(f"{server.url}/models/rgb/sample").json()["code"] == "model_not_found"
    assert change(server, ".hidden", "load").json()["code"] == "model_not_found"
    assert change(server, "..%2fsmall", "load").status_code == 404
    assert change(server, "rgb", "load").status_code == 200


def break_shortened(folder: Path) -> str:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    return "diffusion_pytorch_model.safetensors"


def break_missing(folder: Path) -> str:
    shutil.rmtree(folder / "unet")
    return "unet"


@pytest.mark.parametrize("break_", [break_shortened, break_missing])
def test_a_folder_that_is_broken_is_refused_and_what_was_served_is_served_on(
    own_models: tuple[RunningServer, Path], colour: Path, break_: Callable[[Path], str]
) -> None:
    server, folder = own_models
    before = sampled(server, "/models/rgb").content
    named = break_(folder / "rgb")
    refused = change(server, "rgb", "reload")
    assert (refused.status_code, refused.json()["code"]) == (422, "checkpoint_refused")
    assert named in refused.json()["detail"], refused.text
    assert sampled(server, "/models/rgb").content == before
    shutil.rmtree(folder / "rgb")
    shutil.copytree(colour, folder / "rgb")
    assert change(server, "rgb", "reload").status_code == 200
    assert sampled(server, "/models/rgb").content == before


def test_a_server_that_is_stopped_while_it_loads_ends_well(small: Path, colour: Path, tmp_path: Path) -> None:
    shutil.copytree(colour, tmp_path / "models" / "rgb")
    flags = ("--models", str(tmp_path / "models"))
    server = start_server(small, *flags, **KEYS, XDG_CACHE_HOME=str(tmp_path / "measured anew"))
    shutil.copytree(small, tmp_path / "models" / "new")
    new_weights(tmp_path / "models" / "new", 0.3)
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(change, server, "new", "load")
        server.wait_until(lambda: states(server).get("new") == "loading")
        code = stop_server(server)
        answer = loading.result()
    assert code == 0, server.log
    assert answer.status_code in (200, 503), answer.text  # it may have been quick
    assert "Traceback" not in server.log, server.log
