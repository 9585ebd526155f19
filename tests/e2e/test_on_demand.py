"""Models that are loaded when they are asked for and unloaded when idle: ten of them on a budget of three."""

import random
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests import postgres
from tests.e2e.conftest import BUNDLED, KEYS, RECOMMENDED, RunningServer, SlowDown, run_cli, serving, stop_server
from tests.e2e.restarting import Restarting
from tests.e2e.test_models import change, new_weights
from tests.tiny import randomize
from tminus.model.checkpoint import load_checkpoint, needs_of, save_checkpoint
from tminus.model.unet import UNet2D

NUMBER, FITTING = 10, 3
QUICK: dict[str, Any] = {"n": 2, "steps": 5, "seed": 7, "class_label": 1, "sampler": "ddim"}
LONG: dict[str, Any] = {"n": 4, "steps": 50, "seed": 9, "class_label": 0, "sampler": "ddpm"}

StartServer = Callable[..., RunningServer]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model m0, and in `more` the others: tiny ones, of the same network with other weights."""
    folder, like = tmp_path_factory.mktemp("ten"), load_checkpoint(BUNDLED)
    config = replace(
        like.net.config, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,),
        norm_num_groups=4, add_attention=False,
    )  # fmt: skip
    for k in range(NUMBER):
        net = UNet2D(config)
        randomize(net, k)
        save_checkpoint(
            folder / ("more" if k else "") / f"m{k}", net.state_dict(), config, like.noise, like.labels, {}, RECOMMENDED
        )
    return folder


def all_with_room_for(models: Path, fitting: float = FITTING) -> tuple[str, ...]:
    """The flags for all ten, with room for so many."""
    most_gb = (fitting + 0.5) * needs_of(models / "m0").serving_bytes / 2**30
    return "--models", str(models / "more"), "--models-memory-gb", f"{most_gb:.9f}"


# Eager, which takes no test of its bits: a load is a matter of a tenth of a second.
FLAGS = ("--executor", "eager", "--result-cache-mb", "0", "--max-backlog-s", "6000")


@pytest.fixture(scope="module")
def ten(models: Path) -> Iterator[RunningServer]:
    with serving(models / "m0", *FLAGS, "--idle-unload", "1h", *all_with_room_for(models)) as server:
        yield server


def sampled(server: RunningServer, model: str, **fields: Any) -> bytes:
    response = httpx.post(f"{server.url}/models/{model}/sample", json=QUICK | fields, timeout=120)
    assert response.status_code == 200, response.text
    return response.content


def states(server: RunningServer) -> dict[str, str]:
    return {each["name"]: each["state"] for each in httpx.get(f"{server.url}/models").json()["models"]}


def loaded(server: RunningServer) -> set[str]:
    return {name for name, state in states(server).items() if state == "loaded"}


def test_requests_in_any_order_all_get_the_bytes_of_their_model_alone(
    ten: RunningServer, models: Path, own_server: StartServer
) -> None:
    asked = [(f"m{k}", seed) for k in range(NUMBER) for seed in range(2)]
    random.Random(0).shuffle(asked)
    with ThreadPoolExecutor(6) as clients:
        together = dict(zip(asked, clients.map(lambda each: sampled(ten, each[0], seed=each[1]), asked), strict=True))
    assert len(loaded(ten)) == FITTING
    assert ten.metric("tminus_models") == NUMBER
    assert httpx.get(f"{ten.url}/readyz").status_code == 200
    for name in ("m0", "m9"):
        alone = own_server(*FLAGS, checkpoint=models / ("" if name == "m0" else "more") / name)
        told, known = httpx.get(f"{alone.url}/model").json(), httpx.get(f"{ten.url}/models/{name}").json()
        assert (told["fingerprint"], told["executor_details"]) == (known["fingerprint"], known["executor_details"])
        for seed in range(2):
            response = httpx.post(f"{alone.url}/sample", json=QUICK | {"seed": seed}, timeout=120)
            assert response.content == together[name, seed]
        stop_server(alone)


def test_many_requests_for_one_that_is_out_load_it_once(ten: RunningServer) -> None:
    name = min(states(ten).keys() - loaded(ten))
    before = ten.metric("tminus_model_loads_total")
    with ThreadPoolExecutor(8) as clients:
        made = set(clients.map(lambda _: sampled(ten, name), range(8)))
    assert len(made) == 1
    assert ten.metric("tminus_model_loads_total") == before + 1


def test_an_unloaded_model_is_told_of_and_a_bad_request_loads_nothing(ten: RunningServer) -> None:
    name = max(states(ten).keys() - loaded(ten))
    before = ten.metric("tminus_model_loads_total")
    told = httpx.get(f"{ten.url}/models/{name}").json()
    assert told["num_parameters"] == 10641
    assert told["class_names"] == list(load_checkpoint(BUNDLED).labels.class_names)
    for path in ("/", "/model", "/model/schedule", "/openapi.json", "/jobs"):
        assert httpx.get(f"{ten.url}/models/{name}{path}").status_code == 200, path
    refused = httpx.post(f"{ten.url}/models/{name}/sample", json=QUICK | {"steps": 0})
    assert refused.status_code == 422
    assert (ten.metric("tminus_model_loads_total"), name in loaded(ten)) == (before, False)


def test_a_deadline_counts_while_a_model_is_loaded_and_the_refusal_says_when_to_come_back(ten: RunningServer) -> None:
    name = max(states(ten).keys() - loaded(ten))
    refused = httpx.post(f"{ten.url}/models/{name}/sample", json=QUICK | {"deadline_s": 0.001})
    assert (refused.status_code, refused.json()["code"]) == (503, "model_loading")
    assert int(refused.headers["Retry-After"]) >= 1
    ten.wait_until(lambda: name in loaded(ten))  # it is loaded all the same
    sampled(ten, name, deadline_s=60)


def test_each_way_in_loads_the_model_that_it_names(ten: RunningServer) -> None:
    def out() -> str:
        return min(states(ten).keys() - loaded(ten))

    name = out()
    job = httpx.post(f"{ten.url}/models/{name}/jobs", json=QUICK)
    assert (job.status_code, job.json()["state"]) == (202, "waiting")
    ten.wait_until(lambda: httpx.get(f"{ten.url}/jobs/{job.json()['id']}").json()["state"] == "done")
    name = out()
    told = httpx.post(f"{ten.url}/v1/images/generations", json={"model": name, "prompt": "bag"}, timeout=60)
    assert told.status_code == 200, told.text
    name = out()
    assert httpx.post(f"{ten.url}/models/{name}", json={"inputs": "bag"}, timeout=60).status_code == 200
    name = out()
    assert httpx.post(f"{ten.url}/v2/models/{name}/infer", json={"inputs": []}, timeout=60).status_code == 200
    name = out()
    with ten.api(model=name) as client:
        assert client.sample(n=1, steps=2, seed=1).data


def test_a_model_with_a_job_stays_and_what_comes_for_others_waits(
    ten: RunningServer, slow_down: SlowDown, models: Path
) -> None:
    """All that fit are busy: so that which is done first makes room."""
    busy = [f"m{k}" for k in range(FITTING)]
    for name in busy:
        sampled(ten, name)
    slow_down(ten)
    jobs = [httpx.post(f"{ten.url}/models/{name}/jobs", json=LONG).json()["id"] for name in busy]
    with ThreadPoolExecutor(4) as clients:
        others = list(clients.map(lambda name: sampled(ten, name), ("m7", "m8", "m7", busy[0])))
    assert others[0] == others[2]
    ten.speed_up()
    for job in jobs:
        ten.wait_until(lambda job=job: httpx.get(f"{ten.url}/jobs/{job}").json()["state"] == "done")


def test_idle_models_are_unloaded_and_come_back_with_the_same_bytes(models: Path, own_server: StartServer) -> None:
    server = own_server(*FLAGS, "--idle-unload", "0.5s", *all_with_room_for(models), checkpoint=models / "m0")
    first = {name: sampled(server, name) for name in ("m0", "m1")}
    server.wait_until(lambda: not loaded(server))
    assert httpx.get(f"{server.url}/readyz").status_code == 200
    assert httpx.get(f"{server.url}/model").json()["name"] == "m0"
    server.slow_down()
    job = httpx.post(f"{server.url}/models/m1/jobs", json=QUICK | {"steps": 40}).json()["id"]
    server.wait_until(lambda: httpx.get(f"{server.url}/jobs/{job}").json()["step"] > 20)  # two seconds of steps
    assert loaded(server) == {"m1"}, "a job keeps its model in memory"
    server.speed_up()
    assert httpx.post(f"{server.url}/sample", json=QUICK, timeout=60).content == first["m0"]
    assert sampled(server, "m1") == first["m1"]
    assert server.metric("tminus_model_unloads_total") >= 2


@pytest.mark.long
def test_jobs_of_a_model_that_is_out_are_finished_after_a_kill(
    models: Path, tmp_path: Path, own_server: StartServer, ten: RunningServer
) -> None:
    flags = (*FLAGS, "--idle-unload", "1h", *all_with_room_for(models))
    restarting = Restarting(partial(own_server, *flags, checkpoint=models / "m0"), tmp_path)
    restarting.server.slow_down()
    begun = restarting.post(LONG, "the-first-key", "/models/m5")
    restarting.server.wait_until(lambda: restarting.get(f"/jobs/{begun}").json()["step"] > 5)
    not_begun = restarting.post(LONG, "the-second-key", "/models/m6")  # it may still be out
    restarting.kill()
    restarting.start()
    for name, job_id in (("m5", begun), ("m6", not_begun)):
        job = restarting.wait_for(job_id)
        assert (job["state"], job["model"]) == ("done", name)
        assert restarting.get(f"/jobs/{job_id}/image").content == sampled(ten, name, **LONG)


def test_a_reload_of_a_model_that_is_out_serves_the_new_weights(models: Path, tmp_path: Path) -> None:
    more = tmp_path / "more"
    shutil.copytree(models / "more", more)
    with serving(models / "m0", *FLAGS, "--idle-unload", "1h", "--models", str(more), **KEYS) as server:
        first = sampled(server, "m1")
        new_weights(more / "m1", 0.3)
        new_weights(more / "m2", 0.3)
        assert sampled(server, "m1") == first, "what is in memory does not change with its files"
        assert change(server, "m1", "unload").status_code == 204
        server.wait_until(lambda: "m1" not in loaded(server))
        assert change(server, "m2", "load").json()["state"] == "loaded"
        assert change(server, "m2", "load").json()["code"] == "model_busy"
        # The first request for other weights than those that are known may be told to come again.
        server.wait_until(lambda: httpx.post(f"{server.url}/models/m1/sample", json=QUICK).status_code == 200)
        assert sampled(server, "m1") != first
        assert change(server, "m0", "unload").status_code == 204, "the default one too"
        server.wait_until(lambda: "m0" not in loaded(server))
        assert httpx.post(f"{server.url}/sample", json=QUICK, timeout=60).status_code == 200
        shutil.rmtree(more / "m3")
        refused = httpx.post(f"{server.url}/models/m3/sample", json=QUICK)
        assert (refused.status_code, refused.json()["code"]) == (422, "checkpoint_refused")


@pytest.mark.parametrize("given", ["0", "0s", "-1m", "soon", "1d"])
def test_an_idle_time_that_is_none_is_refused(given: str) -> None:
    refused = run_cli("serve", "--idle-unload", given)
    assert refused.returncode == 1
    assert "--idle-unload (TMINUS_IDLE_UNLOAD): must be a time above 0, such as 90s, 15m or 1h" in refused.stderr


@pytest.mark.long
def test_jobs_in_a_shared_store_bring_their_models_in(
    models: Path, own_server: StartServer, database: postgres.Postgres
) -> None:
    shared = {
        "TMINUS_JOB_STORE": database.url(), "TMINUS_JOB_NAMESPACE": "on_demand", "TMINUS_JOB_LEASE_S": "2",
    }  # fmt: skip
    flags = (*FLAGS, "--idle-unload", "1h", *all_with_room_for(models))
    first = own_server(*flags, checkpoint=models / "m0", **shared)
    first.slow_down()
    posted = httpx.post(f"{first.url}/models/m4/jobs", json=LONG, timeout=60)
    assert posted.status_code == 202, posted.text
    job = posted.json()["id"]
    first.wait_until(lambda: (httpx.get(f"{first.url}/jobs/{job}").json()["step"] or 0) > 5)
    first.process.send_signal(signal.SIGKILL)
    second = own_server(*flags, checkpoint=models / "m0", **shared)
    second.wait_until(lambda: httpx.get(f"{second.url}/jobs/{job}").json()["state"] == "done")
    assert httpx.get(f"{second.url}/jobs/{job}/image").content == sampled(second, "m4", **LONG)
