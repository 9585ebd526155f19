"""Models that are loaded, reloaded and unloaded while the server runs."""

import gc
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.service.conftest import INSTANT, MakeSite, pixels, prepare, problem
from tests.service.fakes import INFO, LIMITS, PATIENCE_S, FakeEngine, fake_pixels, make_spec, wait_until
from tests.service.several import COLOUR, QUICK, Several, make_several, version_of
from tminus.model.files import CheckpointError
from tminus.service.errors import Draining, Stalled, StorageFailed
from tminus.service.jobs.store.records import JobRecord
from tminus.service.jobs.store.sqlite_store import SqliteStore
from tminus.service.worker import worker
from tminus.service.worker.worker import Worker

THIRD = replace(COLOUR, weights_hash="ef" * 32)


@pytest.fixture
def several(make_site: MakeSite) -> Several:
    made = make_several(make_site)
    made.shelf.found = {"fake": version_of(INFO, 1), "colour": version_of(COLOUR, 2), "third": THIRD}
    return made


def fingerprint(several: Several, path: str) -> str:
    response = several.post(f"{path}/sample", json=QUICK)
    assert response.status_code == 200, response.text
    return str(response.headers["x-fingerprint"])


# --- what is found out while no job runs ---


def test_a_promise_that_is_found_not_to_hold_is_told_to_clients_from_then_on(make_site: MakeSite) -> None:
    engine, begin = FakeEngine(COLOUR), threading.Event()

    def spare_work() -> Iterator[None]:
        while not begin.is_set():
            time.sleep(0.01)
            yield
        engine.info = replace(engine.info, exact=False, fingerprint="f" * 16)

    site = make_site(app={"others": [replace(prepare(engine, LIMITS, INSTANT), spare_work=spare_work())]})
    path = f"/models/{COLOUR.name}"
    before = site.client.post(f"{path}/sample", json=QUICK | {"seed": 1})
    assert before.headers["x-fingerprint"] == COLOUR.fingerprint
    assert "etag" in before.headers
    begin.set()
    wait_until(lambda: not site.client.get(f"{path}/model").json()["exact"])
    after = site.client.post(f"{path}/sample", json=QUICK | {"seed": 1})
    assert after.headers["x-fingerprint"] == "f" * 16
    assert "etag" not in after.headers
    job = site.client.post(f"{path}/jobs", json=QUICK).json()["id"]
    wait_until(lambda: site.client.get(f"{path}/jobs/{job}").json()["state"] == "done")
    assert site.client.get(f"{path}/jobs/{job}").json()["fingerprint"] == "f" * 16, "of a durable job too"
    assert f'fingerprint="{"f" * 16}"' in site.client.get("/metrics").text
    assert site.client.get("/model").json()["exact"], "the other model is as it was"


# --- reload ---


@pytest.mark.parametrize(("name", "paths"), [("fake", ["", "/models/fake"]), ("colour", ["/models/colour"])])
def test_after_a_reload_requests_are_of_the_new_weights(several: Several, name: str, paths: list[str]) -> None:
    before = {path: fingerprint(several, path) for path in paths}
    answer = several.change(name, "reload").json()
    (engine,) = several.shelf.engines
    for path in paths:
        assert fingerprint(several, path) == answer["model"]["fingerprint"] == engine.info.fingerprint != before[path]
        assert several.get(f"{path}/model").json()["weights_hash"] == engine.info.weights_hash
    assert several.states() == {"fake": "loaded", "colour": "loaded", "third": "unloaded"}


def test_what_runs_or_waits_ends_on_the_weights_that_it_began_with(several: Several) -> None:
    site, old, once = several.site, several.site.engine, {"Idempotency-Key": "once"}
    old.gate.shut()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(several.post, "/sample", json=QUICK | {"steps": 6})
        old.next_begun()
        spec = QUICK | {"n": 3, "steps": 9, "seed": 7}
        durable = several.post("/jobs", json=spec, headers=once).json()["id"]
        reload = pool.submit(several.change, "fake", "reload")
        wait_until(lambda: len(several.shelf.engines) == 1)
        old.gate.open()
        assert reload.result(PATIENCE_S).status_code == 200
        assert running.result(PATIENCE_S).headers["x-fingerprint"] == INFO.fingerprint
    (new,) = several.shelf.engines
    wait_until(lambda: several.get(f"/jobs/{durable}").json()["state"] == "done")
    image = several.get(f"/jobs/{durable}/image")
    assert image.headers["x-fingerprint"] == INFO.fingerprint
    assert (
        pixels(image.content)[0, :: INFO.width_px] == fake_pixels(make_spec(n=3, steps=9, seed=7), 9)[:, 0, 0, 0]
    ).all()
    assert (new.jobs, old.jobs) == ({}, {})
    again = several.post("/jobs", json=spec, headers=once)
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (durable, "true")
    later = several.post("/jobs", json=QUICK).json()["id"]
    wait_until(lambda: all(job["state"] == "done" for job in several.get("/jobs").json()["jobs"]))
    found = {job["id"]: job["fingerprint"] for job in several.get("/jobs").json()["jobs"]}
    assert found == {durable: INFO.fingerprint, later: new.info.fingerprint}
    assert site.client.delete(f"/jobs/{durable}").status_code == 204


def test_reloading_again_and_again_leaves_nothing(several: Several) -> None:
    fingerprint(several, "/models/colour")
    engine, several.colour = weakref.ref(several.colour), None  # type: ignore[assignment]
    for version in range(3, 10):
        several.shelf.found["colour"] = version_of(COLOUR, version)
        assert several.change("colour", "reload").status_code == 200
        assert fingerprint(several, "/models/colour") == f"{version:016x}"
    metrics = several.site.metrics()
    infos = [name for name in metrics if name.startswith("tminus_model_info") and '"colour"' in name]
    assert len(infos) == 1
    assert f"{9:016x}" in infos[0]
    assert metrics['tminus_model_loads_total{"outcome": "done", "reason": "admin"}'] == 7

    def freed() -> bool:
        gc.collect()
        return engine() is None

    wait_until(freed)


def test_the_same_weights_may_be_loaded_again(several: Several) -> None:
    """As after a change of the class names alone."""
    several.shelf.found["fake"] = replace(INFO, class_names=("dog", "cat", "3d-print"), fingerprint="0" * 16)
    job = several.post("/jobs", json=QUICK).json()["id"]
    wait_until(lambda: several.get(f"/jobs/{job}").json()["state"] == "done")
    for _ in range(2):
        assert several.change("fake", "reload").status_code == 200
        assert several.get("/model").json()["class_names"][0] == "dog"
        assert several.get(f"/jobs/{job}/image").headers["x-fingerprint"] == INFO.fingerprint
        assert several.post("/jobs", json=QUICK).status_code == 202


def test_a_stream_goes_on_with_the_new_weights(several: Several) -> None:
    def next_job(ws: Any) -> str:
        ws.send_json(QUICK | {"keep_open": True, "every": 1000})
        found = ws.receive_json()["fingerprint"]
        while (message := ws.receive()).get("bytes") is None or "done" in (message.get("text") or ""):
            pass
        return str(found)

    with several.site.client.websocket_connect("/models/colour/sample/stream") as ws:
        assert next_job(ws) == COLOUR.fingerprint
        several.change("colour", "reload")
        assert next_job(ws) == several.shelf.engines[0].info.fingerprint


# --- what is refused ---


@pytest.mark.parametrize(("name", "what"), [("fake", "reload"), ("third", "load")])
def test_a_bad_checkpoint_changes_nothing_and_says_why(several: Several, name: str, what: str) -> None:
    errors = {
        CheckpointError("model.safetensors is truncated"): "model.safetensors is truncated",
        OSError("the disk is gone"): "the disk is gone",
        RuntimeError("CUDA out of memory. Tried to allocate 9.00 GiB\nmore"): "memory. Tried to allocate 9.00 GiB",
        MemoryError(): "MemoryError",
    }
    for error, said in errors.items():
        several.shelf.found[name] = error
        document = problem(several.change(name, what), 422, "checkpoint_refused")
        assert (document["field"], document["value"]) == ("model", name)
        assert document["detail"].startswith(f"{name} cannot be loaded: ")
        assert document["detail"].endswith(said)
    assert several.states() == {"fake": "loaded", "colour": "loaded", "third": "unloaded"}
    assert fingerprint(several, "") == INFO.fingerprint
    assert several.site.metrics()['tminus_model_loads_total{"outcome": "refused", "reason": "admin"}'] == len(errors)
    several.shelf.found[name] = version_of(INFO, 5)
    assert several.change(name, what).status_code == 200, "and the next attempt is not in its way"


def test_a_model_whose_first_tick_fails_changes_nothing(several: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: FakeEngine, _batch: object) -> None:
        several.shelf.engines.clear()
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(FakeEngine, "step", fail)
    monkeypatch.setattr(worker.log, "exception", lambda *_: None)  # pytest would keep the traceback, and the engine
    problem(several.change("third", "load"), 500, "engine_failed")
    monkeypatch.undo()
    assert several.shelf.freed == [True], "its memory is given back"
    assert several.states()["third"] == "unloaded"
    assert several.site.worker.state.alive
    assert fingerprint(several, "") == INFO.fingerprint
    assert several.change("third", "load").status_code == 200


def test_what_may_not_be_changed_is_refused(several: Several) -> None:
    several.shelf.found["third"] = replace(COLOUR)
    document = problem(several.change("third", "load"), 422, "checkpoint_refused")
    assert "the weights of colour" in document["detail"]
    assert len(several.shelf.freed) == 1
    for name, what in (("nobody", "load"), ("third", "reload"), ("third", "unload")):
        problem(several.change(name, what), 404, "model_not_found")
    assert "is loaded already" in problem(several.change("colour", "load"), 409, "model_busy")["detail"]
    assert "default" in problem(several.change("fake", "unload"), 409, "model_busy")["detail"]


def test_one_change_at_a_time(several: Several) -> None:
    several.shelf.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(several.change, "third", "load")
        wait_until(lambda: several.states()["third"] == "loading")
        for name, what in (("third", "load"), ("colour", "reload"), ("colour", "unload")):
            document = problem(several.change(name, what), 409, "model_busy")
            assert "third is being loaded" in document["detail"]
        assert fingerprint(several, "") == INFO.fingerprint, "the server goes on"
        several.shelf.gate.set()
        assert loading.result(PATIENCE_S).status_code == 200


def test_while_the_server_drains_nothing_is_loaded(several: Several) -> None:
    several.shelf.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(several.change, "third", "load")
        wait_until(lambda: several.states()["third"] == "loading")
        several.site.worker.drain()
        several.shelf.gate.set()
        problem(loading.result(PATIENCE_S), 503, Draining.code)


# --- unload ---


def test_an_unloaded_model_finishes_its_jobs_first_and_can_be_loaded_again(several: Several) -> None:
    several.colour.gate.shut()
    job = several.post("/models/colour/jobs", json=QUICK | {"steps": 4}).json()["id"]
    assert several.change("colour", "unload").status_code == 204
    assert several.states()["colour"] == "unloading"
    problem(several.post("/models/colour/sample", json=QUICK), 404, "model_not_found")
    several.colour.gate.open()
    wait_until(lambda: several.states()["colour"] == "unloaded")
    assert several.get(f"/jobs/{job}").json()["state"] == "done"
    assert pixels(several.get(f"/jobs/{job}/image").content).shape == (COLOUR.height_px, COLOUR.width_px, 3)
    assert not any('"colour"' in name for name in several.site.metrics() if name.startswith("tminus_model_info"))
    for _ in range(2):
        assert several.change("colour", "load").status_code == 200
        fingerprint(several, "/models/colour")
        assert several.change("colour", "unload").status_code == 204


# --- when more goes wrong ---


class Disks:
    """Opens a store for each set of weights. Those whose weights are in `away` fail."""

    def __init__(self, files: dict[str, Path] | None = None) -> None:
        self.files, self.away = files or {}, set[str]()

    def open(self, weights_hash: str) -> Any:
        store, away = SqliteStore(self.files.get(weights_hash)), self.away

        class Disk:
            def __getattr__(self, name: str) -> Any:
                value = getattr(store, name)
                if weights_hash in away and callable(value) and name not in ("now_us", "close"):
                    raise StorageFailed("the disk is away")
                return value

        return Disk()


def test_jobs_that_could_not_be_found_at_the_start_end_on_their_weights_after_a_reload(
    make_site: MakeSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store fails at the start, then a reload comes, then the store is there again."""
    file = tmp_path / "jobs.sqlite3"
    with closing(SqliteStore(file)) as store:
        store.add(JobRecord("a" * 32, make_spec(n=2, steps=3), 1_000_000))
    disks = Disks({INFO.weights_hash: file})
    disks.away.add(INFO.weights_hash)
    monkeypatch.setattr("tminus.service.jobs.retention.RETRY_S", 0.05)
    several = make_several(make_site, state_file=disks.open)
    several.shelf.found = {"fake": version_of(INFO, 1)}
    assert several.change("fake", "reload").status_code == 200
    assert several.post("/sample", json=QUICK).status_code == 200
    disks.away.clear()
    wait_until(lambda: several.get(f"/jobs/{'a' * 32}").json().get("state") == "done")
    assert several.get(f"/jobs/{'a' * 32}").json()["fingerprint"] == INFO.fingerprint


def test_an_unload_while_a_tick_hangs_is_done_when_it_ends(several: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    unload, hangs = Worker.unload, [Stalled(100), Stalled(101)]

    def hanging(self: Worker, number: int) -> Any:
        if hangs:
            raise hangs.pop()
        return unload(self, number)

    monkeypatch.setattr(Worker, "unload", hanging)
    monkeypatch.setattr("tminus.service.startup.models.RETRY_S", 0.05)
    several.change("colour", "unload")
    wait_until(lambda: several.states()["colour"] == "unloaded")
    assert hangs == []


def test_what_is_loaded_again_while_it_leaves_keeps_its_jobs(several: Several, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that leaves must not close the store of the one that comes."""
    monkeypatch.setattr("tminus.service.startup.models.POLL_INTERVAL_S", 0.3)
    several.shelf.found["colour"] = COLOUR
    for _ in range(3):
        while not several.colour.begun.empty():  # the warm-up
            several.colour.begun.get()
        with ThreadPoolExecutor(1) as pool:
            several.colour.gate.shut()
            running = pool.submit(several.post, "/models/colour/sample", json=QUICK | {"seed": 77})
            several.colour.next_begun()
            several.change("colour", "unload")
            several.colour.gate.open()
            assert several.change("colour", "load").status_code == 200
            assert running.result(PATIENCE_S).status_code == 200
        wait_until(lambda: several.site.metrics()["tminus_rows_active"] == 0)
        job = several.post("/models/colour/jobs", json=QUICK).json()["id"]
        wait_until(lambda job=job: several.get(f"/jobs/{job}").json()["state"] == "done")  # type: ignore[misc]
        several.colour = several.shelf.engines[-1]


def test_before_the_warm_up_nothing_is_unloaded(make_site: MakeSite) -> None:
    several = make_several(make_site, gate_shut=True)
    problem(several.change("colour", "unload"), 503, "not_ready")
    problem(several.change("third", "load"), 503, "not_ready")
    several.site.engine.gate.open()
    several.site.wait_until_ready()
    assert several.states()["colour"] == "loaded"
    assert several.site.worker.state.alive


def test_no_more_than_some_stores_of_earlier_weights_are_kept_open(
    several: Several, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tminus.service.startup.models.MAX_LEFT_MODELS", 2)
    monkeypatch.setattr("tminus.service.startup.models.KEPT_JOBS_INTERVAL_S", 0.05)
    ids = []
    for version in range(3, 9):
        ids.append(several.post("/models/colour/jobs", json=QUICK).json()["id"])
        wait_until(lambda: several.get(f"/jobs/{ids[-1]}").json()["state"] == "done")
        several.shelf.found["colour"] = version_of(COLOUR, version)
        assert several.change("colour", "reload").status_code == 200
    wait_until(lambda: len(several.get("/jobs").json()["jobs"]) == 2)
    assert [job["id"] for job in several.get("/jobs").json()["jobs"]] == ids[:-3:-1]


def test_a_store_of_earlier_weights_that_fails_harms_no_other(make_site: MakeSite) -> None:
    disks = Disks()
    several = make_several(make_site, state_file=disks.open)
    several.shelf.found = {"colour": version_of(COLOUR, 2)}
    job = several.post("/models/colour/jobs", json=QUICK).json()["id"]
    wait_until(lambda: several.get(f"/jobs/{job}").json()["state"] == "done")
    several.change("colour", "reload")
    disks.away.add(COLOUR.weights_hash)
    assert several.get("/readyz").status_code == 200
    assert several.get("/jobs").status_code == 200
    problem(several.get(f"/jobs/{'b' * 32}"), 404, "job_not_found")
    assert several.post("/jobs", json=QUICK, headers={"Idempotency-Key": "x"}).status_code == 202
