"""A server behind a real nginx with TLS, by the configuration of docker/nginx."""

import json
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from tests.e2e.conftest import RunningServer, SlowDown, serving
from tests.e2e.nginx import TEMPLATE, Names, filled, name_server, nginx
from tests.postgres import free_port
from tests.service.fakes import wait_until
from tests.service.keys import bearer, key_line
from tests.tools import needs

ADDRESS = "127.0.0.1"
NAME, KEY = "diffusion.example", "tm_of_the_proxys_test"
SPEC: dict[str, Any] = {"n": 2, "steps": 4, "seed": 5}


@dataclass
class Proxied:
    server: RunningServer
    port: int
    certificate: Path
    names: Names

    def client(self, **headers: str) -> httpx.Client:
        """A client that knows the name by another address, as one with DNS would."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        context.check_hostname = False
        return httpx.Client(
            base_url=f"https://127.0.0.1:{self.port}", verify=context, headers={"Host": NAME} | headers, timeout=60
        )


@pytest.fixture(scope="module")
def proxied(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    certificate, key = folder / "fullchain.pem", folder / "privkey.pem"
    request = [needs("openssl"), "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    request += ["-days", "2", "-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}", "-keyout", str(key)]
    subprocess.run([*request, "-out", str(certificate)], check=True, capture_output=True, timeout=60)
    env = {"TMINUS_KEYS": key_line("studio", KEY), "FORWARDED_ALLOW_IPS": "127.0.0.1"}
    text = TEMPLATE.read_text().replace("${NAME}", NAME).replace("/certificates", str(folder))
    with serving(small, "--allowed-hosts", NAME, **env) as server, name_server() as names:
        of_server = f"tminus:{server.url.rpartition(':')[2]}"
        own = {"listen 8443": f"listen 127.0.0.1:{port}", "127.0.0.11": f"127.0.0.1:{names.port}"}
        text = filled(text, own | {"tminus:8000": of_server})
        names.addresses["tminus"] = [ADDRESS]
        found = Proxied(server, port, certificate, names)
        with nginx(folder, text, found.client):
            yield found


def test_requests_arrive_as_they_were_sent_and_answers_come_back_as_they_are(proxied: Proxied) -> None:
    with proxied.client(**bearer(KEY)) as client:
        through = client.post("/sample", json=SPEC)
        assert through.headers["strict-transport-security"]
        assert through.content == proxied.server.post(json=SPEC, headers=bearer(KEY)).content
        for path, code in (("/jobs/a%20b", "job_not_found"), ("/jobs/a%2Fb", "not_found"), ("/jobs?limit=%35", None)):
            through = client.get(path)
            assert through.content == httpx.get(f"{proxied.server.url}{path}", headers=bearer(KEY)).content
            assert through.json().get("code") == code
    with proxied.client() as client:
        assert client.get("/model").status_code == 401
        assert client.get("/model", headers={"Host": "evil.example"}).json()["code"] == "foreign_host"


def test_a_server_is_found_again_at_another_address(proxied: Proxied) -> None:
    """As that of a container that was made anew."""

    def status() -> int:
        with proxied.client() as client:
            return client.get("/readyz").status_code

    assert status() == 200
    proxied.names.addresses["tminus"] = ["127.0.0.2"]  # where nobody listens
    try:
        wait_until(lambda: status() == 502)
    finally:
        proxied.names.addresses["tminus"] = [ADDRESS]
    wait_until(lambda: status() == 200)


def test_frames_come_through_a_websocket_one_by_one(proxied: Proxied) -> None:
    context = ssl.create_default_context(cafile=str(proxied.certificate))
    # The name is that of the certificate, and the address that of this test's proxy.
    sock = socket.create_connection(("127.0.0.1", proxied.port))
    url = f"wss://{NAME}/sample/stream"
    with connect(url, sock=sock, ssl=context, server_hostname=NAME, additional_headers=bearer(KEY)) as ws:
        ws.send(json.dumps(SPEC | {"every": 1}))
        kinds = [json.loads(text)["type"] for text in ws if isinstance(text, str)]
    assert (kinds[0], *{*kinds[1:-1]}, kinds[-1]) == ("accepted", "frame", "done")


def test_events_leave_before_the_job_ends(proxied: Proxied, slow_down: SlowDown) -> None:
    slow_down(proxied.server)
    with proxied.client(**bearer(KEY)) as client:
        job = client.post("/jobs", json={"steps": 1000, "n": 8}).json()
        with client.stream("GET", f"/jobs/{job['id']}/events", params={"every": 1}) as events:
            lines = events.iter_lines()
            assert any(line.startswith("event: ") for line in lines)
            assert client.get(f"/jobs/{job['id']}").json()["state"] in ("waiting", "running")
        client.delete(f"/jobs/{job['id']}")


def test_no_key_is_in_the_log_wherever_the_proxy_passes_it_on(proxied: Proxied) -> None:
    """Also where uvicorn writes the line, and the query is as it came."""
    spellings = KEY, KEY.upper(), KEY.replace("t", "%74"), KEY.replace("_", "%255F"), f"u{KEY}"
    for number, spelled in enumerate(spellings):
        headers = bearer("wrong") | {"X-Forwarded-For": spelled, "X-Request-ID": spelled, "User-Agent": "x"}
        url = f"{proxied.server.url.replace('http', 'ws')}/sample/stream?key={spelled}"
        with pytest.raises(InvalidStatus) as refused:
            connect(url, additional_headers=headers)
        assert refused.value.response.status_code == 422
        answer = httpx.get(f"{proxied.server.url}/jobs/{number}?key={spelled}", headers=headers)
        assert answer.status_code == 401
        assert "proxys_test" not in str(answer.headers).lower()
        proxied.server.wait_until(lambda said=f"/jobs/{number}?": said in proxied.server.log)  # type: ignore[misc]
    log = proxied.server.log
    assert log.count('"WebSocket /sample/stream?key=') == len(spellings)
    assert "proxys_test" not in re.sub("%(25)?5f", "_", log.lower())


def test_a_login_over_tls_gives_a_cookie_that_never_goes_without(proxied: Proxied) -> None:
    with proxied.client() as client:
        response = client.post("/login", json={"key": KEY})
        assert "secure" in response.headers["set-cookie"].lower()
        own = {"Origin": f"https://{NAME}", "Sec-Fetch-Site": "same-origin"}
        assert client.post("/login", json={"key": KEY}, headers=own).status_code == 200
        assert client.post("/login", json={"key": KEY}, headers={"Origin": "https://evil.example"}).status_code == 403
