"""Durable jobs on the real server: SIGKILL, SIGTERM, a full disk, a damaged file."""

import random
import shutil
import signal
import sqlite3
import subprocess
import time
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.e2e.conftest import RunningServer, pixels, png_of
from tests.e2e.restarting import Restarting, Start, make_specs
from tests.e2e.test_models import new_weights


@pytest.fixture
def restarting(own_server: Start, tmp_path: Path) -> Restarting:
    return Restarting(own_server, tmp_path / "state")


def test_after_kill_9_at_any_moment_every_accepted_job_ends_once_and_in_the_same_bytes(restarting: Restarting) -> None:
    rng, specs = random.Random(2), make_specs(8)
    ids = {key: restarting.post(spec, str(key)) for key, spec in enumerate(specs)}
    for _ in range(2):  # tests/trials/replicas.py does it fifty times
        time.sleep(rng.uniform(0.1, 1.0))  # past the first snapshots, or not
        restarting.kill()
        restarting.start()
        assert {key: restarting.post(spec, str(key)) for key, spec in enumerate(specs)} == ids, (
            "a retry is no other job"
        )
    for key, job_id in ids.items():
        job = restarting.wait_for(job_id)
        assert job["state"] == "done", job
        undisturbed = restarting.server.post(json=specs[key]).content
        assert restarting.get(f"/jobs/{job_id}/image").content == undisturbed, specs[key]
    listed = restarting.get("/jobs?limit=200").json()["jobs"]
    assert sorted(job["id"] for job in listed) == sorted(ids.values()), "none lost, none doubled"
    assert restarting.server.metric("tminus_rows_active") == 0


def test_a_durable_edit_that_was_killed_ends_in_the_same_bytes(restarting: Restarting, server: RunningServer) -> None:
    cat = server.post(json={"steps": 20, "seed": 5, "class_label": "sneaker"}).content
    mask = np.where(np.arange(32)[:, None] < 18, 255, 0).astype(np.uint8).repeat(32, 1)
    files = {"image": cat, "mask": png_of(mask)}
    data = {"steps": 1000, "n": 2, "strength": 0.9, "seed": 11, "class_label": "ankle-boot", "guidance": 2}
    restarting.server.slow_down()

    def post() -> httpx.Response:
        headers = {"Idempotency-Key": "edit"}
        return httpx.post(f"{restarting.server.url}/jobs", files=files, data=data, headers=headers, timeout=60)

    job_id = post().json()["id"]
    restarting.server.wait_until(lambda: restarting.server.metric("tminus_snapshots_total") >= 1)
    before = restarting.get(f"/jobs/{job_id}").json()
    assert 0 < before["step"] < before["steps"] == 900
    restarting.kill()
    restarting.start()
    ended = restarting.wait_for(job_id)
    assert ended["state"] == "done", ended
    step = int(restarting.server.log.partition(f"job {job_id} goes on from step ")[2].split()[0])
    assert 0 < step <= before["step"] + 200
    image, again = restarting.get(f"/jobs/{job_id}/image").content, post()
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (job_id, "true")
    assert restarting.server.post(files=files, data=data).content == image
    for k in range(2):
        np.testing.assert_array_equal(pixels(image)[18:, 32 * k : 32 * k + 32], pixels(cat)[18:])


def test_a_start_on_other_weights_names_the_jobs_that_a_killed_server_left(
    own_server: Start, small: Path, tmp_path: Path
) -> None:
    folder, state = tmp_path / "small", tmp_path / "state"
    shutil.copytree(small, folder)
    restarting = Restarting(partial(own_server, "--executor", "eager", checkpoint=folder), state)
    weights = next(state.glob("*.sqlite3")).stem.removeprefix("jobs-")
    job_id = restarting.post({"n": 4, "steps": 1000, "seed": 3}, "k")
    restarting.kill()
    new_weights(folder, 0.01)
    left = {each.name: each.read_bytes() for each in state.glob(f"jobs-{weights}*")}
    server = restarting.start()
    assert server.log.count(f"1 durable jobs wait for a start with the weights {weights}: {job_id}\n") == 1
    assert {name: (state / name).read_bytes() for name in left} == left, "nothing was changed"
    beside = own_server(TMINUS_STATE_DIR=str(state))  # it takes them on, beside the first
    beside.wait_until(lambda: f"job {job_id} goes on from step" in beside.log)
    restarting.kill()
    assert "wait for a start with the weights" not in restarting.start().log, "a server has them"


@pytest.mark.alone
def test_sigterm_writes_durable_jobs_down_at_once_and_the_next_start_ends_them(restarting: Restarting) -> None:
    spec = {"n": 2, "steps": 1000, "seed": 4}
    restarting.server.slow_down()
    job_id = restarting.post(spec, "k")
    restarting.server.wait_until(lambda: restarting.get(f"/jobs/{job_id}").json()["step"] > 5)
    asked = time.monotonic()
    restarting.server.process.send_signal(signal.SIGTERM)
    assert restarting.server.process.wait(30) == 0
    assert time.monotonic() - asked < 5, "it does not finish them first"
    assert "Traceback" not in restarting.server.log
    server = restarting.start()
    assert restarting.wait_for(job_id)["state"] == "done"
    assert "goes on from step 0\n" not in server.log
    assert restarting.get(f"/jobs/{job_id}/image").content == server.post(json=spec).content


def test_a_damaged_job_ends_and_the_server_starts_and_finishes_the_others(restarting: Restarting) -> None:
    done = [restarting.post({"steps": 3, "seed": k}, f"done {k}") for k in range(2)]
    for job_id in done:
        restarting.wait_for(job_id)
    restarting.server.slow_down()
    names = ("spec", "snapshot", "sound")
    ids = {name: restarting.post({"n": 2, "steps": 1000, "seed": k}, name) for k, name in enumerate(names)}
    restarting.server.wait_until(lambda: restarting.server.metric("tminus_snapshots_total") >= 3)
    restarting.kill()
    (file,) = restarting.state.glob("*.sqlite3")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE jobs SET spec = ? WHERE id IN (?, ?)", ('{"n":1}', done[0], ids["spec"]))
        changed = connection.execute("UPDATE snapshots SET data = x'00' WHERE job_id = ?", (ids["snapshot"],))
        assert changed.rowcount == 1
    connection.close()
    server = restarting.start()
    for name in ("snapshot", "sound"):
        assert restarting.wait_for(ids[name])["state"] == "done"
    listed = restarting.get("/jobs").json()["jobs"]
    assert {job["id"] for job in listed} == {done[1], ids["snapshot"], ids["sound"]}
    for damaged in (done[0], ids["spec"]):
        answer = restarting.get(f"/jobs/{damaged}")
        assert (answer.status_code, answer.json()["code"]) == (507, "storage_failed")
        assert f"the record of job {damaged} cannot be read" in server.log
        assert httpx.delete(f"{server.url}/jobs/{damaged}", timeout=60).status_code == 204
    assert f"job {ids['snapshot']} goes on from step 0\n" in server.log
    assert "Traceback" not in server.log


def test_a_full_disk_refuses_new_jobs_and_keeps_the_old(restarting: Restarting) -> None:
    """The process may write no file beyond a size: what a full disk does, by the kernel's own hand."""
    first = restarting.post({"steps": 5, "seed": 1}, "first")
    restarting.wait_for(first)
    image = restarting.get(f"/jobs/{first}/image").content
    wal = next(restarting.state.glob("*-wal"))
    pid, limit = restarting.server.process.pid, wal.stat().st_size
    subprocess.run(["prlimit", "--pid", str(pid), f"--fsize={limit}:"], check=True)
    refused = httpx.post(f"{restarting.server.url}/jobs", json={"steps": 5}, timeout=60)
    assert (refused.status_code, refused.json()["code"]) == (507, "storage_failed"), refused.text
    assert restarting.server.post(params={"steps": 3}).status_code == 200, "sampling goes on"
    assert restarting.get(f"/jobs/{first}/image").content == image
    subprocess.run(["prlimit", "--pid", str(pid), "--fsize=unlimited:"], check=True)
    assert restarting.wait_for(restarting.post({"steps": 5}, "second"))["state"] == "done"
