"""Two real servers on one PostgreSQL behind a real nginx, by the configuration of docker/nginx and the settings of
docker/production.yaml. The one thing that stands for another is a name server, for Docker's. TLS is in test_proxy.py.
"""

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from websockets.sync.client import connect

from tests import postgres
from tests.e2e.conftest import RunningServer, SlowDown, start_server, stop_server
from tests.e2e.nginx import TEMPLATE, Names, filled, name_server, nginx
from tests.postgres import free_port
from tests.service.fakes import wait_until

pytestmark = pytest.mark.long

ADDRESSES = ("127.0.0.1", "127.0.0.2")
LONG: dict[str, Any] = {"n": 8, "steps": 1000, "seed": 3}
SPEC: dict[str, Any] = {"n": 2, "steps": 4, "seed": 5}
PASSWORD = "of all kinds: @/%&' \""
COMPOSE = yaml.safe_load((TEMPLATE.parents[1] / "production.yaml").read_text().replace("!reset", ""))["services"]


@dataclass
class Cluster:
    """What docker/production.yaml runs."""

    checkpoint: Path
    environment: dict[str, str]
    port: int  # of each server, at its address
    url: str  # of the proxy
    names: Names
    servers: dict[str, RunningServer]

    def start(self, address: str) -> None:
        """Start the server of an address, which the name has from then on."""
        flags = ("--host", address, "--port", str(self.port))
        self.servers[address] = start_server(self.checkpoint, *flags, **self.environment)
        self.names.addresses["tminus"] = [*self.servers]

    def gone(self, address: str) -> None:
        """A server that ended loses the name."""
        del self.servers[address]
        self.names.addresses["tminus"] = [*self.servers]

    def client(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def post(self, spec: dict[str, Any]) -> str:
        with self.client() as http:
            answer = http.post("/jobs", json=spec)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def holder(self, job_id: str) -> str:
        """The address of the server that works on a job."""
        found: list[str] = []

        def is_held() -> bool:
            for address, server in self.servers.items():
                asked = httpx.get(f"{server.url}/jobs/{job_id}", headers={"x-tminus-forwarded": "1"}).json()
                if asked["step"]:
                    found.append(address)
            return bool(found)

        wait_until(is_held)
        return found[0]


@pytest.fixture(scope="module")
def url(database: postgres.Postgres) -> str:
    """The URL of a database that asks for a password, without it, as compose writes it."""
    rules = database.folder / "data" / "pg_hba.conf"
    rules.write_text(f"host all app all scram-sha-256\n{rules.read_text()}")
    quoted = PASSWORD.replace("'", "''")
    database.sql(f"CREATE ROLE app LOGIN PASSWORD '{quoted}'")
    database.sql("CREATE DATABASE app OWNER app")
    database.sql("SELECT pg_reload_conf()")
    return database.url("app", "app")


@pytest.fixture(scope="module")
def cluster(small: Path, url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("nginx")
    environment = {name: str(value) for name, value in COMPOSE["tminus"]["environment"].items()}
    del environment["TMINUS_KEYS_FILE"]  # for what asks with keys, see test_production.py
    environment |= {"TMINUS_ALLOWED_HOSTS": "", "TMINUS_OPEN": "yes"}
    environment |= {"TMINUS_JOB_STORE": url, "PGPASSWORD": PASSWORD, "TMINUS_RESULT_CACHE_MB": "0"}
    environment |= {"TMINUS_JOB_LEASE_S": "1", "TMINUS_JOB_NAMESPACE": f"test_{time.monotonic_ns()}"}
    port, of_proxy = free_port(), free_port()
    with name_server() as names:
        own = {"listen 8443 ssl": f"listen 127.0.0.1:{of_proxy}", "127.0.0.11": f"127.0.0.1:{names.port}"}
        text = re.sub(r"ssl_certificate\S* .*;", "", TEMPLATE.read_text()).replace("${NAME}", "localhost")
        text = filled(text, own | {"tminus:8000": f"tminus:{port}"})
        running = Cluster(small, environment, port, f"http://127.0.0.1:{of_proxy}", names, {})
        for address in ADDRESSES:
            running.start(address)
        with nginx(folder, text, running.client):
            yield running
        for server in running.servers.values():
            stop_server(server)


def test_what_is_posted_is_known_wherever_the_next_request_lands(cluster: Cluster) -> None:
    made: set[bytes] = set()
    with cluster.client() as http:
        before = len(http.get("/jobs?limit=200").json()["jobs"])
        for _ in range(6):
            job_id = cluster.post(SPEC)
            wait_until(lambda job_id=job_id: http.get(f"/jobs/{job_id}").json()["state"] == "done")  # type: ignore[misc]
            made |= {http.get(f"/jobs/{job_id}/image").content for _ in range(4)}
            made.add(http.post("/sample", json=SPEC).content)
        assert len(http.get("/jobs?limit=200").json()["jobs"]) == before + 6, "none was made twice"
    assert len(made) == 1
    for server in cluster.servers.values():
        assert len(re.findall(" GET /jobs/[0-9a-f]+/image 200 ", server.log)) > 1, "each of them was asked"


def test_frames_and_events_come_through_one_by_one(cluster: Cluster, slow_down: SlowDown) -> None:
    for _ in range(4):  # at either server
        with connect(f"ws{cluster.url.removeprefix('http')}/sample/stream") as ws:
            ws.send(json.dumps(SPEC | {"every": 1}))
            kinds = [json.loads(text)["type"] for text in ws if isinstance(text, str)]
        assert (kinds[0], *{*kinds[1:-1]}, kinds[-1]) == ("accepted", "frame", "done")
    for server in cluster.servers.values():
        slow_down(server)
    with cluster.client() as http:
        for _ in range(4):
            job_id = cluster.post(LONG)
            cluster.holder(job_id)
            with http.stream("GET", f"/jobs/{job_id}/events", params={"every": 20, "show": "x_t"}) as answer:
                assert any(line == "event: frame" for line in answer.iter_lines())
                assert http.get(f"/jobs/{job_id}").json()["state"] == "running"
            http.delete(f"/jobs/{job_id}")


def test_the_servers_know_their_clients_by_address(cluster: Cluster) -> None:
    address = "127.0.0.9"
    with cluster.client(transport=httpx.HTTPTransport(local_address=address)) as http:

        def are_told() -> bool:
            assert http.get("/model").status_code == 200  # of a server that nginx chooses at random
            return all(re.search(rf" {address}: GET /model 200 ", server.log) for server in cluster.servers.values())

        wait_until(are_told)


def test_while_a_server_drains_the_other_is_asked(cluster: Cluster, slow_down: SlowDown) -> None:
    address, draining = next(iter(cluster.servers.items()))
    wait_until(lambda: draining.metric("tminus_rows_active") == 0)
    slow_down(draining)
    with cluster.client() as http, ThreadPoolExecutor(1) as pool:
        last = pool.submit(httpx.post, f"{draining.url}/sample", json=LONG, timeout=60)
        wait_until(lambda: draining.metric("tminus_rows_active") > 0)
        draining.process.terminate()
        wait_until(lambda: httpx.get(f"{draining.url}/readyz").status_code == 503)
        answers = [http.post("/sample", json=SPEC).status_code for _ in range(8)]
        answers += [http.get("/model").status_code for _ in range(8)]
        with connect(f"ws{cluster.url.removeprefix('http')}/sample/stream") as ws:
            ws.send(json.dumps(SPEC))
            assert json.loads(ws.recv())["type"] == "accepted"
        assert not last.done(), "it drains to the last"
        draining.speed_up()
        assert set(answers) == {200}
        assert last.result(60).status_code == 200
    assert draining.process.wait(30) == 0
    cluster.gone(address)
    cluster.start(address)
