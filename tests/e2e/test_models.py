"""Several models on one server: bytes, kills, and a folder that is replaced while clients are being served."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import ADMIN, KEYS, RunningServer, SlowDown, serving, stop_server
from tests.e2e.restarting import Restarting

WEIGHTS = Path("unet") / "diffusion_pytorch_model.safetensors"
QUICK: dict[str, Any] = {"n": 2, "steps": 5, "seed": 7, "class_label": 1, "sampler": "ddim"}
LONG: dict[str, Any] = {"n": 4, "steps": 200, "seed": 9, "class_label": 0, "sampler": "ddpm"}

StartServer = Callable[..., RunningServer]


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


def test_each_model_gives_the_bytes_that_it_gives_alone(
    two: RunningServer, server: RunningServer, own_server: StartServer, colour: Path
) -> None:
    one_of_each = {"": server, "/models/colour": own_server(checkpoint=colour)}
    asked = [(path, seed) for path in one_of_each for seed in range(4)]
    alone = [sampled(one_of_each[path], "", seed=seed).content for path, seed in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda each: sampled(two, each[0], seed=each[1]).content, asked))
    assert together == alone


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
def test_jobs_of_both_models_survive_a_kill(own_server: StartServer, colour: Path, tmp_path: Path) -> None:
    restarting = Restarting(partial(own_server, "--checkpoint", f"colour={colour}"), tmp_path)
    paths = {"": "small", "/models/colour": "colour"}
    expected = {path: sampled(restarting.server, path, **LONG).content for path in paths}
    restarting.server.slow_down()
    ids = {path: restarting.post(LONG, "k" + path.rpartition("/")[2], path) for path in paths}
    restarting.server.wait_until(
        lambda: all(restarting.get(f"/jobs/{each}").json()["step"] > 5 for each in ids.values())
    )
    restarting.kill()
    restarting.start()
    for path, job_id in ids.items():
        job = restarting.wait_for(job_id)
        assert (job["state"], job["model"]) == ("done", paths[path])
        assert restarting.get(f"/jobs/{job_id}/image").content == expected[path]


def test_a_reload_under_load_fails_nobody(own_server: StartServer, small: Path, colour: Path, tmp_path: Path) -> None:
    folder = tmp_path / "grey"
    shutil.copytree(small, folder)
    flags = ("--checkpoint", f"rgb={colour}", "--state-dir", str(tmp_path / "state"), "--executor", "eager")
    server = own_server(*flags, checkpoint=folder, **KEYS)
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
    with serving(small, "--models", str(folder), "--result-cache-mb", "0", **KEYS) as running:
        yield running, folder


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


def test_a_folder_that_is_broken_is_refused_and_what_was_served_is_served_on(
    own_models: tuple[RunningServer, Path], colour: Path
) -> None:
    server, folder = own_models
    before = sampled(server, "/models/rgb").content
    weights = folder / "rgb" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    refused = change(server, "rgb", "reload")
    assert (refused.status_code, refused.json()["code"]) == (422, "checkpoint_refused")
    assert WEIGHTS.name in refused.json()["detail"], refused.text
    assert sampled(server, "/models/rgb").content == before
    shutil.rmtree(folder / "rgb")
    shutil.copytree(colour, folder / "rgb")
    assert change(server, "rgb", "reload").status_code == 200
    assert sampled(server, "/models/rgb").content == before


def test_a_server_that_is_stopped_while_it_loads_ends_well(
    own_server: StartServer, small: Path, colour: Path, tmp_path: Path
) -> None:
    shutil.copytree(colour, tmp_path / "models" / "rgb")
    server = own_server("--models", str(tmp_path / "models"), **KEYS, XDG_CACHE_HOME=str(tmp_path / "measured anew"))
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
