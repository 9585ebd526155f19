"""Models that are loaded when they are asked for and unloaded when idle, on fake engines."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.service.api.pictures import CAT
from tests.service.conftest import INSTANT, MakeSite, prepare, problem
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, FakeEngine, wait_until
from tests.service.keys import access_of, bearer, key_line
from tests.service.several import ADMIN, COLOUR, KEY, QUICK, Several, Shelf
from tminus.model.files import CheckpointError
from tminus.service.errors import Draining
from tminus.service.startup import loader
from tminus.service.startup.models import Prepared, UnloadedModel
from tminus.service.startup.settings import Library

FITTING = 2  # beside the default model
OTHERS = {name: replace(COLOUR, name=name, weights_hash=f"{k:02x}" * 32) for k, name in enumerate("abcd", 1)}


def on_demand(make_site: MakeSite, *lines: str, idle_s: float = 3600.0, **kwargs: Any) -> Several:
    """A site whose default model is in memory, and four more that are out. lines: keys beside the admin's."""
    shelf = Shelf(dict(OTHERS) | {"fake": INFO})
    shelf.gate.set()
    unknown = {"fingerprint": "", "executor": "", "precision": ""}
    speed = prepare(FakeEngine(COLOUR), LIMITS, INSTANT).speed

    def prepare_one(name: str, folder: Path) -> Prepared:
        return replace(shelf.prepare(name, folder), memory_bytes=1)

    app = {
        "access": access_of(key_line("ops", KEY, "admin"), *lines, is_open=True),
        "library": Library({name: Path(name) for name in ("fake", *OTHERS)}),
        "prepare": prepare_one,
        "unloaded": [
            UnloadedModel(Path(info.name), replace(info, **unknown), LIMITS, speed) for info in OTHERS.values()
        ],  # type: ignore[arg-type]
        "room_lacking": lambda _folder, used: None if used < FITTING else "is one too many",
        "idle_unload_s": idle_s,
    }
    return Several(make_site(app=app, **kwargs), FakeEngine(COLOUR), shelf)


@pytest.fixture(autouse=True)
def _may_go_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "STAY_S", 0.0)


@pytest.fixture
def several(make_site: MakeSite) -> Several:
    return on_demand(make_site)


def ask(several: Several, name: str, **fields: Any) -> Any:
    return several.post(f"/models/{name}/sample", json=QUICK | fields)


def loaded(several: Several) -> set[str]:
    return {name for name, state in several.states().items() if state == "loaded"} - {"fake"}


def state_of(several: Several, job_id: str) -> str:
    return str(several.get(f"/jobs/{job_id}").json()["state"])


def test_the_model_that_was_used_the_longest_ago_makes_room(several: Several) -> None:
    assert several.states() == dict.fromkeys(OTHERS, "unloaded") | {"fake": "loaded"}
    for name in "aba":
        assert ask(several, name).status_code == 200
    assert several.states() == {"fake": "loaded", "a": "loaded", "b": "loaded", "c": "unloaded", "d": "unloaded"}
    assert several.post("/sample", json=QUICK).status_code == 200  # or the default one would go
    several.shelf.engines.clear()
    assert ask(several, "c").headers["x-fingerprint"] == OTHERS["c"].fingerprint
    assert loaded(several) == {"a", "c"}
    metrics = several.site.metrics()
    assert metrics['tminus_model_loads_total{"outcome": "done", "reason": "demand"}'] == 3
    assert metrics['tminus_model_unloads_total{"reason": "room"}'] == 1
    assert (metrics['tminus_models{"state": "loaded"}'], metrics['tminus_models{"state": "unloaded"}']) == (3, 2)
    assert several.shelf.freed == [True], "its engine is gone"


def test_what_is_known_of_a_model_that_is_out_is_told_and_loads_nothing(several: Several) -> None:
    told = several.get("/models/a").json()
    assert (told["name"], told["fingerprint"], told["class_names"]) == ("a", "", ["red", "green"])
    assert several.get("/models/a/").status_code == several.get("/models/a/model/schedule").status_code == 200
    problem(ask(several, "a", steps=0), 422, "invalid_field")
    assert not several.shelf.engines
    (entry,) = [each for each in several.get("/models").json()["models"] if each["name"] == "a"]
    assert (entry["state"], entry["url"], entry["model"]["channels"]) == ("unloaded", "/models/a/", 3)


def test_a_head_loads_nothing(several: Several) -> None:
    told = several.site.client.head("/models/a/sample", params=QUICK)
    assert (told.status_code, told.headers["x-seed"]) == (200, "5")
    assert not {"etag", "x-fingerprint"} & {*told.headers}, "nobody knows them yet"
    assert several.site.client.head("/models/a/sample?steps=0").status_code == 422
    assert not several.shelf.engines
    assert ask(several, "a").status_code == 200
    several.change("a", "unload")
    wait_until(lambda: "a" not in loaded(several))
    told = several.site.client.head("/models/a/sample", params=QUICK)
    assert told.headers["x-fingerprint"] == OTHERS["a"].fingerprint
    assert "etag" in told.headers
    assert not loaded(several)


def stream(several: Several, secret: str) -> int:
    with several.site.client.websocket_connect("/models/a/sample/stream", headers=bearer(secret)) as ws:
        ws.send_json(QUICK)
        while "status" not in (message := ws.receive_json()):
            pass
        return int(message["status"])


DOORS: dict[str, Callable[[Several, dict[str, str]], int]] = {
    "POST /sample": lambda site, key: site.post("/models/a/sample", json=QUICK, headers=key).status_code,
    "GET /sample": lambda site, key: site.get("/models/a/sample", params=QUICK, headers=key).status_code,
    "a durable job": lambda site, key: site.post("/models/a/jobs", json=QUICK, headers=key).status_code,
    "OpenAI": lambda site, key: site.post(
        "/v1/images/generations", json={"model": "a", "prompt": "red"}, headers=key).status_code,
    "Hugging Face": lambda site, key: site.post("/models/a", json={"inputs": "red"}, headers=key).status_code,
    "KServe": lambda site, key: site.post("/v2/models/a/infer", json={"inputs": []}, headers=key).status_code,
    "a stream": lambda site, key: stream(site, key["Authorization"].removeprefix("Bearer ")),
    "POST /noise": lambda site, key: site.post(
        "/models/a/noise?t=5", content=CAT, headers=key | {"Content-Type": "image/png"}).status_code,
}  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
def test_a_key_without_quota_loads_nothing(make_site: MakeSite, door: str) -> None:
    several = on_demand(make_site, key_line("poor", "tm_poor", row_steps_per_minute=1))
    assert several.post("/sample", json=QUICK, headers=bearer("tm_poor")).status_code == 200
    assert DOORS[door](several, bearer("tm_poor")) == 429
    assert several.states()["a"] == "unloaded"
    assert not several.shelf.engines


def test_a_key_with_all_its_jobs_loads_nothing(make_site: MakeSite) -> None:
    several = on_demand(make_site, key_line("one", "tm_one", jobs=1))
    several.site.engine.gate.shut()
    assert several.post("/jobs", json=QUICK, headers=bearer("tm_one")).status_code == 202
    problem(several.post("/models/a/sample", json=QUICK, headers=bearer("tm_one")), 429, "quota_exceeded")
    assert several.states()["a"] == "unloaded"


def test_a_kept_answer_of_a_model_that_is_out_costs_nothing_and_loads_nothing(make_site: MakeSite) -> None:
    line = key_line("poor", "tm_poor", row_steps_per_minute=1)
    several = on_demand(make_site, line, result_cache_bytes=10**6)
    first = ask(several, "a")
    several.change("a", "unload")
    wait_until(lambda: "a" not in loaded(several))
    assert several.post("/sample", json=QUICK | {"seed": 6}, headers=bearer("tm_poor")).status_code == 200
    kept = several.post("/models/a/sample", json=QUICK, headers=bearer("tm_poor"))
    assert (kept.status_code, kept.content, kept.headers["etag"]) == (200, first.content, first.headers["etag"])
    assert not loaded(several)


def test_a_model_that_came_in_stays_for_a_while_and_is_served_meanwhile(
    several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    several.change("fake", "unload")  # or it would make room
    wait_until(lambda: several.states()["fake"] == "unloaded")
    assert [ask(several, name).status_code for name in "ab"] == [200, 200]
    monkeypatch.setattr(loader, "STAY_S", 3600.0)
    problem(ask(several, "c", deadline_s=0.3), 503, "model_loading")
    assert [ask(several, name, seed=7).status_code for name in "ab"] == [200, 200]
    assert loaded(several) == {"a", "b"}
    monkeypatch.setattr(loader, "STAY_S", 0.0)
    wait_until(lambda: loaded(several) == {"b", "c"})


def test_where_all_are_busy_a_request_waits_until_one_is_done(several: Several) -> None:
    for name in ("fake", "a", "b"):
        assert several.post(f"/models/{name}/sample", json=QUICK).status_code == 200
    first, second = several.shelf.engines
    engines = (several.site.engine, first, second)
    for engine in engines:
        engine.gate.shut()
    with ThreadPoolExecutor(6) as pool:
        long = [pool.submit(several.post, f"/models/{name}/sample", json=QUICK) for name in ("fake", "a", "b")]
        wait_until(lambda: len(several.site.worker.jobs) == 3)
        waiting = [pool.submit(ask, several, "c") for _ in range(2)]
        wait_until(lambda: "unloading" in several.states().values())
        (closing,) = [name for name, state in several.states().items() if state == "unloading"]
        later = pool.submit(ask, several, closing)
        wait_until(lambda: several.states()["c"] == "loading")
        for engine in engines:
            engine.gate.open()
        for each in (*long, *waiting, later):
            assert each.result(PATIENCE_S).status_code == 200
    assert len([engine for engine in several.shelf.engines if engine.info.name == "c"]) == 1


def test_a_durable_job_for_a_model_that_is_to_go_out_does_not_keep_it_in(several: Several) -> None:
    """Or both would wait for ever: the model for its job to end, the job for its model to come back."""
    assert ask(several, "a").status_code == 200
    (engine,) = several.shelf.engines
    engine.gate.shut()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(ask, several, "a")
        wait_until(lambda: len(several.site.worker.jobs) == 1)
        assert several.change("a", "unload").status_code == 204
        jobs = [several.post("/models/a/jobs", json=QUICK).json()["id"] for _ in range(2)]
        engine.gate.open()
        assert busy.result(PATIENCE_S).status_code == 200
    for job in jobs:
        wait_until(lambda job=job: state_of(several, job) == "done")  # type: ignore[misc]
    assert several.site.metrics()['tminus_model_loads_total{"outcome": "done", "reason": "demand"}'] == 2


def test_a_deadline_that_loading_cannot_meet_is_refused_and_the_model_is_loaded_all_the_same(several: Several) -> None:
    several.shelf.gate.clear()
    refusal = problem(refused := ask(several, "a", deadline_s=0.3), 503, "model_loading")
    assert refusal["field"] == "deadline_s"
    assert int(refused.headers["retry-after"]) >= 1
    assert several.states()["a"] == "loading"
    several.shelf.gate.set()
    wait_until(lambda: "a" in loaded(several))
    assert ask(several, "a", deadline_s=30).status_code == 200


def test_a_durable_job_is_accepted_at_once_and_loads_its_model(several: Several) -> None:
    several.shelf.gate.clear()
    answer = several.post("/models/a/jobs", json=QUICK, headers={"Idempotency-Key": "once"})
    assert (answer.status_code, answer.json()["state"]) == (202, "waiting")
    again = several.post("/models/a/jobs", json=QUICK, headers={"Idempotency-Key": "once"})
    assert again.headers["idempotent-replayed"] == "true"
    unwanted = several.post("/models/a/jobs", json=QUICK).json()["id"]
    assert several.site.client.delete(f"/jobs/{unwanted}").status_code == 204
    several.shelf.gate.set()
    wait_until(lambda: state_of(several, answer.json()["id"]) == "done")
    assert several.get(f"/jobs/{answer.json()['id']}").json()["fingerprint"] == COLOUR.fingerprint
    several.change("a", "unload")
    wait_until(lambda: "a" not in loaded(several))
    assert several.get(f"/jobs/{answer.json()['id']}/image").status_code == 200, "also while its model is out"


def test_no_more_jobs_wait_for_a_model_than_the_server_holds(several: Several) -> None:
    several.shelf.gate.clear()
    assert several.post("/models/b/jobs", json=QUICK).json()["position"] == 0
    for _ in range(LIMITS.max_jobs):
        assert several.post("/models/a/jobs", json=QUICK).status_code == 202
    problem(refused := several.post("/models/a/jobs", json=QUICK), 429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    several.shelf.gate.set()
    wait_until(lambda: all(job["state"] == "done" for job in several.get("/jobs").json()["jobs"]))


def test_a_checkpoint_that_cannot_be_loaded_refuses_requests_and_its_jobs_wait_until_it_is_mended(
    several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.jobs.job_runner.LOAD_RETRY_S", 0.05)
    several.shelf.found["a"] = CheckpointError("a: the weights are cut off")
    assert "cut off" in problem(ask(several, "a"), 422, "checkpoint_refused")["detail"]
    job = several.post("/models/a/jobs", json=QUICK).json()["id"]
    wait_until(lambda: several.site.metrics().get(
        'tminus_model_loads_total{"outcome": "refused", "reason": "demand"}', 0) > 2)  # fmt: skip
    assert state_of(several, job) == "waiting"
    several.shelf.found["a"] = OTHERS["a"]
    wait_until(lambda: state_of(several, job) == "done")


def test_idle_models_go_out_and_come_back_for_the_next_request(make_site: MakeSite) -> None:
    several = on_demand(make_site, idle_s=0.2)
    several.shelf.engines = deque(maxlen=0)  # only the server holds an engine
    job = several.post("/models/a/jobs", json=QUICK).json()["id"]
    wait_until(lambda: state_of(several, job) == "done")
    wait_until(lambda: not loaded(several) and several.states()["fake"] == "unloaded")
    assert several.get("/readyz").status_code == 200
    wait_until(lambda: several.shelf.freed == [True])  # its engine is gone
    assert several.post("/sample", json=QUICK).headers["x-fingerprint"] == INFO.fingerprint
    assert ask(several, "a").headers["x-fingerprint"] == COLOUR.fingerprint
    assert several.site.metrics()['tminus_model_unloads_total{"reason": "idle"}'] >= 2


def test_memory_that_cannot_be_freed_keeps_no_later_model_out(several: Several) -> None:
    assert ask(several, "a").status_code == 200
    several.shelf.freed = None  # type: ignore[assignment]  # so that `release` fails
    several.change("a", "unload")
    wait_until(lambda: "a" not in loaded(several))
    several.shelf.freed = []
    assert [ask(several, name).status_code for name in "ab"] == [200, 200]


def test_other_weights_in_the_folder_are_served_from_the_next_load_on(several: Several) -> None:
    assert ask(several, "a").status_code == 200
    assert several.change("a", "unload").status_code == 204
    wait_until(lambda: "a" not in loaded(several))
    several.shelf.found["a"] = replace(OTHERS["a"], weights_hash="fe" * 32, fingerprint="f" * 16)
    wait_until(lambda: ask(several, "a").headers.get("x-fingerprint") == "f" * 16)


def test_an_admin_loads_and_makes_room_and_nobody_else_may(several: Several) -> None:
    for name in "abc":
        answer = several.change(name, "load")
        assert (answer.status_code, answer.json()["state"]) == (200, "loaded")
    assert len(loaded(several) | {"fake"}) == FITTING + 1
    problem(several.change("c", "load"), 409, "model_busy")
    problem(several.post("/models/a/load"), 401, "unauthorized")
    assert several.change("fake", "unload").status_code == 204, "the default one too"
    wait_until(lambda: several.states()["fake"] == "unloaded")
    assert several.post("/sample", json=QUICK).status_code == 200
    assert several.post("/models/c/reload", headers=ADMIN).status_code == 200


def test_who_waits_for_a_model_is_told_when_the_server_ends(several: Several) -> None:
    several.shelf.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, several, "a")
        wait_until(lambda: several.states()["a"] == "loading")
        several.site.worker.drain()
        problem(waiting.result(PATIENCE_S), Draining.status, Draining.code)
    several.shelf.gate.set()
