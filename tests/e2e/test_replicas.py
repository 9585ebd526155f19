"""Real servers on a real PostgreSQL."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.servers import Server
from tests import postgres
from tests import s3 as s3_server
from tests.e2e.conftest import KEYS, RunningServer
from tests.e2e.restarting import Deadly, ForkedServer, make_specs
from tests.e2e.test_models import change, new_weights
from tests.service.durable import events
from tests.service.keys import key_line
from tests.tools import needs
from tests.trials import faults, replicas
from tminus.service.client import Ended, Frame
from tminus.service.client.results import Event

pytestmark = pytest.mark.long

LONG = {"n": 16, "steps": 1000, "seed": 3}
SLOW = """
from types import SimpleNamespace
from tests.trials.injected import pace
from tminus.service.cli.main import main
pace(SimpleNamespace(value=0.1))
main()
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[s3_server.S3]:
    with s3_server.running() as server:
        yield server


Start = Callable[..., RunningServer]


@pytest.fixture
def namespace(request: pytest.FixtureRequest) -> str:
    return f"test_{abs(hash(request.node.name)) % 10**8}"


@pytest.fixture
def shared(database: postgres.Postgres, namespace: str) -> dict[str, str]:
    """The settings of replicas of one namespace."""
    return {
        "TMINUS_JOB_STORE": database.url(),
        "TMINUS_JOB_NAMESPACE": namespace,
        "TMINUS_JOB_LEASE_S": "2",
    }


@pytest.fixture
def start(shared: dict[str, str], own_server: Start) -> Start:
    """Starts replicas."""
    return lambda **own: own_server(**shared | own)


def post(url: str, spec: dict[str, Any], **headers: str) -> str:
    answer = httpx.post(f"{url}/jobs", json=spec, headers=headers, timeout=60)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def follow(server: RunningServer, job_id: str, query: str, found: list[str], cookie: bytes = b"") -> None:
    """Read events to the end, as an EventSource does: it comes back where a stream breaks off."""
    last: str | None = None
    while last != "end":
        told = [(b"cookie", cookie), *([(b"last-event-id", last.encode())] if last is not None else [])]
        with httpx.stream("GET", f"{server.url}/jobs/{job_id}/events?{query}", headers=told, timeout=60) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                found.append(line)
                if line.startswith("id: "):
                    last = line.removeprefix("id: ")


def test_whatever_happens_to_a_server_or_the_database_each_job_ends_once_in_the_same_bytes(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small form of tests/trials/replicas.py, each fault once."""
    monkeypatch.setattr(replicas, "LEASE_S", 2.0)
    monkeypatch.setattr(replicas, "MOMENT_S", 1.0)
    monkeypatch.setattr(replicas, "Server", ForkedServer)
    claims = replicas.trial(small, dict.fromkeys(replicas.FAULTS, 1), jobs=6, count=2)
    for claim in claims[:4]:  # the last is a time
        assert claim.holds, claim


def test_step_frames_and_end_of_a_job_are_passed_on_by_every_other_replica(start: Start) -> None:
    holder, asked = start(), start()
    holder.slow_down(0.01)
    job_id = post(holder.url, LONG | {"n": 4})
    asked.wait_until(lambda: (httpx.get(f"{asked.url}/jobs/{job_id}").json()["step"] or 0) > 0)
    assert httpx.get(f"{asked.url}/jobs/{job_id}").json()["eta_s"] > 0
    lines: list[str] = []
    follow(asked, job_id, "every=100&show=x_t&show=x_0", lines, b"name=\xc3\xa9")
    found = events("\n".join(lines))
    frames = [data for name, data, _ in found if name == "frame"]
    steps = [data["step"] for data in frames if data["show"] == "x_t"]
    assert steps == sorted(set(steps))
    assert len(steps) > 2
    assert {data["show"] for data in frames} == {"x_t", "x_0"}
    assert all(data["data"] for data in frames)
    assert found[-1][0] == "done"
    images = {httpx.get(f"{server.url}/jobs/{job_id}/image").content for server in (holder, asked)}
    assert len(images) == 1


def test_a_viewer_at_another_replica_sees_the_job_to_its_end_though_its_holder_dies(start: Start) -> None:
    holder, asked, third = start(), start(), start()
    for server in (holder, asked, third):
        server.slow_down(0.02)
    spec = LONG | {"n": 4}
    job_id = post(holder.url, spec)
    found: list[Event] = []

    def read() -> None:
        with asked.api() as tminus:
            found.extend(tminus.job(job_id).events(every=20, show="x_t"))

    reading = threading.Thread(target=read)
    reading.start()
    asked.wait_until(lambda: sum(isinstance(event, Frame) for event in found) > 2)
    holder.process.send_signal(signal.SIGKILL)
    seen = len(found)
    reading.join(60)
    assert not reading.is_alive()
    assert isinstance(found[-1], Ended)
    assert found[-1].job.state == "done"
    assert any(isinstance(event, Frame) for event in found[seen:]), "frames of the next holder"
    third.speed_up()
    undisturbed = httpx.post(f"{third.url}/sample", json=spec, timeout=120).content
    assert httpx.get(f"{third.url}/jobs/{job_id}/image").content == undisturbed


def test_one_stream_of_events_shows_progress_and_the_end_though_the_holder_stops(start: Start) -> None:
    """Without coming back, at a server that passes on what the holder sends."""
    holder = start()
    asked, third = start(TMINUS_MAX_ROWS="4"), start()  # the first has no room for the job
    job_id = post(holder.url, LONG | {"n": 5})
    asked.wait_until(lambda: (httpx.get(f"{asked.url}/jobs/{job_id}").json()["step"] or 0) > 0)
    lines: list[str] = []
    try:
        with httpx.stream("GET", f"{asked.url}/jobs/{job_id}/events?every=20", timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)
                if line == "event: progress" and lines.count(line) == 3:
                    holder.process.send_signal(signal.SIGSTOP)
                    gone_at = len(lines)
    finally:
        holder.process.kill()
    after = events("\n".join(["", *lines[gone_at + 3 :]]))
    assert after[-1][0] == "done"
    assert [data["step"] for name, data, _ in after if name == "progress"], "of the next holder"
    assert httpx.get(f"{third.url}/jobs/{job_id}/image").status_code == 200


def test_a_stream_of_events_at_a_holder_that_slept_past_its_lease_goes_on_with_the_next_one(start: Start) -> None:
    holder, other = start(), start()
    job_id = post(holder.url, LONG)
    names: list[str] = []
    with httpx.stream("GET", f"{holder.url}/jobs/{job_id}/events?every=20", timeout=60) as answer:
        for line in answer.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
            if names.count("progress") == 3 and "asleep" not in names:
                names.append("asleep")
                holder.process.send_signal(signal.SIGSTOP)
                try:
                    other.wait_until(lambda: "goes on from step" in other.log)
                finally:
                    holder.process.send_signal(signal.SIGCONT)
    assert names[-1] == "done"


def test_what_is_passed_on_is_the_callers_own(start: Start) -> None:
    keys = "\n".join(key_line(name, f"the-secret-of-{name}") for name in ("studio", "lab"))
    holder, asked = (start(TMINUS_KEYS=keys) for _ in range(2))
    studio, lab = ({"Authorization": f"Bearer the-secret-of-{name}"} for name in ("studio", "lab"))
    holder.slow_down()
    job_id = post(holder.url, LONG, **studio)
    url = f"{asked.url}/jobs/{job_id}"
    asked.wait_until(lambda: (httpx.get(url, headers=studio).json()["step"] or 0) > 0)
    assert httpx.get(url, headers=lab).status_code == 404
    assert httpx.get(f"{url}/events", headers=lab).status_code == 404
    assert httpx.get(url).status_code == 401
    assert json.loads(httpx.get(f"{asked.url}/jobs", headers=lab).content)["jobs"] == []


def test_a_server_whose_clock_is_an_hour_ahead_shares_jobs_with_others_as_any(
    start: Start, shared: dict[str, str], small: Path, tmp_path: Path
) -> None:
    """Leases, ages and deadlines are by the database's clock."""
    needs("libfaketime")
    clock = faults.Clock(tmp_path)
    clock.set(faults.HOUR_S)
    ahead, other = Server(small, tmp_path / "state", (), shared | clock.environment), start()
    assert ahead.command[1:3] == ["-m", "tminus"]
    ahead.command[1:3] = ["-c", SLOW]  # not forked, since the clock is of a process from its start
    other.slow_down()
    ahead.start()

    def job(url: str, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = httpx.get(f"{url}/jobs/{job_id}").json()
        return found

    try:
        with httpx.Client(base_url=ahead.url) as http:
            assert faults.date_of(http) - time.time() > faults.HOUR_S - 60, "its clock is not ahead"
        for holder, asked in ((ahead.url, other.url), (other.url, ahead.url)):
            job_id = post(holder, LONG | {"deadline_s": 1000})
            other.wait_until(lambda url=asked, job_id=job_id: (job(url, job_id)["step"] or 0) > 0)  # type: ignore[misc]
            time.sleep(3)  # longer than a lease
            for told in (job(ahead.url, job_id), job(other.url, job_id)):
                assert told["state"] == "running", "its holder works on it still"
                assert 0 <= told["age_s"] < 60
                assert abs(datetime.fromisoformat(told["created"]).timestamp() - time.time()) < 60
            assert httpx.post(f"{asked}/jobs/{job_id}/cancel").json()["state"] == "cancelled"
        job_id = post(ahead.url, LONG | {"deadline_s": 1000})
    finally:
        ahead.kill()
    other.wait_until(lambda: (job(other.url, job_id)["step"] or 0) > 0)
    assert job(other.url, job_id)["state"] == "running", "its deadline is not over"


def test_a_full_database_refuses_new_jobs_and_loses_none(
    start: Start, database: postgres.Postgres, namespace: str
) -> None:
    """Its error is raised by triggers: PostgreSQL tells of a full disk with the same code and words."""
    servers = start(), start()
    tables = [f"{namespace}.{name}" for name in ("jobs", "snapshots", "images")]
    for server in servers:
        server.slow_down()
    job_ids = [post(server.url, {"n": 2, "steps": 200, "seed": 3}) for server in servers]
    database.sql(
        "CREATE FUNCTION full_disk() RETURNS trigger LANGUAGE plpgsql AS "
        "$$BEGIN RAISE 'could not extend file: No space left on device' USING ERRCODE = 'disk_full'; END$$; "
        + "".join(f"CREATE TRIGGER full_disk BEFORE INSERT ON {t} EXECUTE FUNCTION full_disk();" for t in tables)
    )
    for server in servers:
        answer = httpx.post(f"{server.url}/jobs", json={"steps": 3})
        assert (answer.status_code, answer.json()["code"]) == (507, "storage_failed")
        assert answer.headers["retry-after"] == "5"
        said = answer.json()["detail"]
        assert "No space left" in said or "results of finished jobs cannot be stored" in said
        assert httpx.post(f"{server.url}/sample?steps=3").status_code == 200
        assert httpx.get(f"{server.url}/readyz").status_code == 200, "no other server would do better"
    for server in servers:
        server.speed_up()
        server.wait_until(lambda server=server: server.metric("tminus_rows_active") == 0)  # type: ignore[misc]
    states = {httpx.get(f"{servers[0].url}/jobs/{job_id}").json()["state"] for job_id in job_ids}
    assert states <= {"running", "waiting"}, "until its end is kept nobody is told of it"
    database.sql("".join(f"DROP TRIGGER full_disk ON {t};" for t in tables) + "DROP FUNCTION full_disk")
    for job_id in job_ids:
        path = f"{servers[0].url}/jobs/{job_id}"
        servers[0].wait_until(lambda path=path: httpx.get(path).json()["state"] == "done")  # type: ignore[misc]
    assert len({httpx.get(f"{servers[1].url}/jobs/{job_id}/image").content for job_id in job_ids}) == 1
    for server in servers:
        server.wait_until(lambda server=server: server.metric("tminus_store_up") == 1)  # type: ignore[misc]


def test_a_job_that_waits_in_the_table_for_weights_that_are_replaced_is_done_by_them(
    start: Start, small: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    shutil.copytree(small, folder)
    server = start(checkpoint=folder, **KEYS)
    name, first = (httpx.get(f"{server.url}/model").json()[field] for field in ("name", "fingerprint"))
    server.slow_down()
    spec = LONG | {"steps": 400}
    job_ids = [post(server.url, spec)]
    while httpx.get(f"{server.url}/jobs/{job_ids[-1]}").json()["position"] is not None:  # it is in the worker
        job_ids.append(post(server.url, spec | {"seed": len(job_ids)}))
        assert len(job_ids) < 100
    new_weights(folder, 0.01)
    assert change(server, name, "reload").status_code == 200
    server.wait_until(lambda: httpx.get(f"{server.url}/model").json()["fingerprint"] != first)
    for job_id in job_ids[:-1]:
        assert httpx.post(f"{server.url}/jobs/{job_id}/cancel").status_code == 200
    server.speed_up()
    path = f"{server.url}/jobs/{job_ids[-1]}"
    server.wait_until(lambda: httpx.get(path).json()["state"] == "done")
    assert httpx.get(path).json()["fingerprint"] == first
    assert httpx.get(f"{path}/image").status_code == 200


def test_a_result_that_is_an_object_is_read_at_another_replica_and_goes_with_its_job(
    start: Start, s3: s3_server.S3
) -> None:
    results = s3.env | {"TMINUS_JOB_RESULTS": f"s3://{s3_server.BUCKET}/jobs", "TMINUS_MAX_N": "512"}
    maker, asked, bare = start(**results), start(**results), start()
    spec = {"n": 300, "steps": 2, "seed": 3}  # 300 KiB of pixels
    job_id = post(maker.url, spec)
    url = f"{asked.url}/jobs/{job_id}"
    asked.wait_until(lambda: httpx.get(url).json()["state"] == "done")
    (key,) = s3.keys("jobs")
    assert f"/{job_id}/" in key
    image = httpx.get(f"{url}/image")
    assert image.headers["content-type"] == "image/png"
    assert image.content == asked.post(json=spec).content, "the bytes of an undisturbed request"
    answer = httpx.get(f"{bare.url}/jobs/{job_id}/image")
    assert answer.status_code == 507
    assert "which this server was not told of" in answer.json()["detail"]
    assert httpx.delete(url).status_code == 204
    asked.wait_until(lambda: s3.keys("jobs") == [])
    assert s3.env["AWS_SECRET_ACCESS_KEY"] not in maker.log + asked.log


def test_a_job_that_ends_each_server_that_takes_it_fails_and_all_others_are_done(
    small: Path, shared: dict[str, str], tmp_path: Path
) -> None:
    quick = ("--executor", "eager", "--threads", "1", "--max-batch", "16")
    flags = (*quick, "--max-backlog-s", "6000")
    servers = [ForkedServer(small, tmp_path / name, flags, shared) for name in ("one", "two")]
    deadly, specs = Deadly(servers, tmp_path / "trigger"), make_specs(4)
    try:
        killer, others = deadly.post(specs)
        assert deadly.states([killer, *others], 120.0) == ["failed", *["done"] * len(others)]
        # The other server may take them all on before the first one is there again to say how it ended.
        assert 2 <= deadly.deaths <= 3
        assert deadly.job(killer)["problem"]["code"] == "engine_failed"
        for job_id, spec in zip(others, specs, strict=True):
            image, undisturbed = deadly.image(job_id, spec)
            assert image == undisturbed
    finally:
        deadly.stop()


def test_a_job_that_ends_each_server_that_takes_it_ends_two_of_four_before_all_others_are_done(
    small: Path, shared: dict[str, str], tmp_path: Path
) -> None:
    """No restart counts a crash, and the job goes first wherever it is tried."""
    flags = ("--executor", "eager", "--threads", "1", "--max-batch", "16")
    servers = [ForkedServer(small, tmp_path / str(number), flags, shared) for number in range(4)]
    deadly = Deadly(servers, tmp_path / "trigger")
    try:
        for server in servers:
            assert server.process is not None
            server.process.between_ticks_s.value = 0.05 if server is not servers[0] else 0.3
        specs = [{"n": 2, "steps": 30, "seed": seed} for seed in range(4)]
        killer, others = deadly.post(specs, {"n": 1, "steps": 20})
        until_s = time.monotonic() + 60
        while {deadly.job(job_id).get("state") for job_id in others} != {"done"}:
            assert deadly.living >= 2
            assert time.monotonic() < until_s
            time.sleep(0.2)
        assert deadly.job(killer)["state"] == "waiting", "it has not failed either: each server may have been killed"
    finally:
        deadly.stop()
