"""Two real servers with the variables that pods have by docker/kubernetes/example, on a real PostgreSQL."""

import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests import postgres
from tests.docker.test_kubernetes import KUBERNETES, container, environment, pod, render
from tests.e2e.conftest import RunningServer, start_server, stop_server
from tests.service.fakes import wait_until
from tests.service.keys import bearer, key_line

pytestmark = pytest.mark.long

KEY = "tm_of_the_pods_test"
LONG = {"n": 3, "steps": 1000, "seed": 3}


@pytest.fixture(scope="module")
def pods(
    small: Path, database: postgres.Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[list[RunningServer]]:
    """They differ in their addresses alone; and each has, beside its own, what no two can have on one machine."""
    objects = render(KUBERNETES / "example")
    folder = tmp_path_factory.mktemp("pods")
    (folder / "keys").write_text(key_line("studio", KEY))
    started: list[RunningServer] = []
    for number in range(2):
        port = postgres.free_port()
        found = environment(objects) | {
            "TMINUS_JOB_STORE": database.url(),
            "TMINUS_KEYS_FILE": str(folder / "keys"),
            "TMINUS_JOB_ADDRESS": f"http://127.0.0.1:{port}",
            "TMINUS_CACHE_DIR": str(folder / "cache"),
            "TMINUS_STATE_DIR": str(folder / f"state-{number}"),
            "TMINUS_METRICS_PORT": str(postgres.free_port()),
        }
        started.append(start_server(small, "--port", str(port), **found))
        started[number].url = f"http://127.0.0.1:{port}"
    yield started
    for server in started:
        stop_server(server)


def test_a_pod_ends_in_its_time_and_leaves_its_jobs_to_the_other(
    pods: list[RunningServer],
) -> None:
    ends, stays = pods
    names = {"Host": "tminus.tminus.svc"} | bearer(KEY)
    with httpx.Client(headers=names, timeout=60) as http:
        ends.slow_down()
        job_id = http.post(f"{ends.url}/jobs", json=LONG).json()["id"]
        wait_until(lambda: bool(http.get(f"{stays.url}/jobs/{job_id}").json()["step"]))
        assert http.get(f"{ends.url}/readyz").status_code == 200
        ends.process.terminate()
        told_s = time.monotonic()
        assert ends.process.wait(60) == 0
        objects = render(KUBERNETES / "example")
        pause_s = container(objects)["lifecycle"]["preStop"]["sleep"]["seconds"]
        assert time.monotonic() - told_s < pod(objects)["terminationGracePeriodSeconds"] - pause_s
        stays.wait_until(lambda: http.get(f"{stays.url}/jobs/{job_id}").json()["state"] == "done")
        assert http.get(f"{stays.url}/jobs/{job_id}/image").status_code == 200
        assert "TMINUS_STATE_DIR" not in stays.log
        assert httpx.get(f"{stays.url}/jobs/{job_id}").status_code == 401
