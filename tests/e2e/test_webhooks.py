"""Webhooks of real servers, to a real receiver: after kill -9, at another server, and as docs/webhooks.md has them."""

import base64
import hashlib
import hmac
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from tests import postgres
from tests.documents import code_blocks, run_shell
from tests.e2e.conftest import RunningServer
from tests.e2e.restarting import Restarting, Start
from tests.receivers import SECRET, receiver, status

TELLING = {"TMINUS_WEBHOOK_SECRET": SECRET, "TMINUS_WEBHOOK_ALLOW": "127.0.0.1"}
COMPLETED = {"steps": 5, "seed": 3, "webhook_events_filter": ["completed"]}


def post(server: RunningServer, url: str) -> str:
    answer = httpx.post(f"{server.url}/jobs", json=COMPLETED | {"webhook": url}, timeout=60)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def deliveries(server: RunningServer, job_id: str) -> list[dict[str, object]]:
    webhook = httpx.get(f"{server.url}/jobs/{job_id}", timeout=60).json()["webhook"]
    found: list[dict[str, object]] = webhook["deliveries"]
    return found


def all_delivered(server: RunningServer, ids: list[str]) -> bool:
    return all(deliveries(server, each)[0]["state"] == "delivered" for each in ids)


@pytest.mark.long
def test_kill_9_between_the_end_of_a_job_and_its_delivery_loses_nothing(own_server: Start, tmp_path: Path) -> None:
    over = threading.Event()
    with receiver(lambda _request: over.wait(60) and None, status(204)) as there:
        restarting = Restarting(lambda *flags, **env: own_server(*flags, **TELLING, **env), tmp_path / "state")
        job_id = post(restarting.server, f"{there.url}/hook?token=s3cret")
        there.wait_for(1)  # the job is done, its receiver is being told, and has not answered
        assert deliveries(restarting.server, job_id)[0]["state"] == "pending"
        restarting.kill()
        server = restarting.start()
        first, again = there.wait_for(2)
        assert first.id == again.id, "at least once, under one id"
        assert again.document["state"] == "done"
        server.wait_until(lambda: deliveries(server, job_id)[0]["state"] == "delivered")
        over.set()
        assert there.refused == [], "each was signed"
        assert "s3cret" not in server.log
        assert f"webhook {again.id} of job {job_id}: delivered to {there.url} in" in server.log
        assert server.metric("tminus_webhook_events_total") == 1


@pytest.mark.long
@pytest.mark.slow
def test_of_two_servers_each_tells_some_once_and_one_tells_what_the_other_left_when_it_was_killed(
    own_server: Start, database: postgres.Postgres
) -> None:
    shared = {"TMINUS_JOB_STORE": database.url(), "TMINUS_JOB_LEASE_S": "2", **TELLING}
    one, other = own_server(**shared), own_server(**shared)
    with receiver() as there:
        ids = [post(server, there.url) for _ in range(10) for server in (one, other)]
        told = there.wait_for(20)
        assert sorted(each.document["id"] for each in told) == sorted(ids)
        for server in (one, other):
            server.wait_until(lambda server=server: all_delivered(server, ids))  # type: ignore[misc]
        assert len(there.told) == 20, "once each"
    with receiver(status(503), port=there.port) as there:
        job_id = post(one, there.url)
        there.wait_for(1)
        one.wait_until(lambda: deliveries(one, job_id)[0]["error"] == "the receiver answered 503")
        one.process.kill()
        there.answers[:] = [status(200)]
        first, again = there.wait_for(2)
        assert first.id == again.id
        other.wait_until(lambda: deliveries(other, job_id)[0]["state"] == "delivered")
        assert deliveries(other, job_id)[0]["attempts"] == 2
        assert there.refused == []


# --- docs/webhooks.md, word for word ---


def test_the_receiver_of_the_docs_is_told_and_refuses_what_is_forged_or_old(own_server: Start, tmp_path: Path) -> None:
    setup, ask = code_blocks("docs/webhooks.md", "sh")
    (program,) = code_blocks("docs/webhooks.md", "python")
    make, flags = re.search(r"^echo.*$", setup, re.MULTILINE), re.search(r"serve (.*)$", setup, re.MULTILINE)
    assert make is not None
    assert flags is not None
    run_shell(make[0], tmp_path)
    port = postgres.free_port()
    command = [sys.executable, "-c", program.replace("9000", str(port))]
    listening = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert listening.stdout is not None
    try:
        server = own_server(*flags[1].replace("webhook-secret ", f"{tmp_path}/webhook-secret ").split())
        said = run_shell(ask.replace("9000", str(port)), tmp_path, server.url)
        job_id = re.search(r'"id":"(\w+)"', said)
        assert job_id is not None, said
        assert listening.stdout.readline() == f"completed {job_id[1]} done\n"
        secret = base64.b64decode((tmp_path / "webhook-secret").read_text().strip().removeprefix("whsec_"))
        body, url = b'{"id": "x", "state": "done"}', f"http://127.0.0.1:{port}/"

        def send(at_s: int, key: bytes) -> int:
            signed = base64.b64encode(hmac.digest(key, f"completed_x.{at_s}.".encode() + body, hashlib.sha256)).decode()
            headers = {"webhook-id": "completed_x", "webhook-timestamp": str(at_s), "webhook-signature": f"v1,{signed}"}
            return httpx.post(url, content=body, headers=headers).status_code

        now_s = int(time.time())
        assert send(now_s, bytes(32)) == 401, "forged"
        assert send(now_s - 3600, secret) == 401, "old"
        assert httpx.post(url, content=body).status_code == 401
        assert [send(now_s, secret) for _ in range(2)] == [204, 204]
        assert listening.stdout.readline() == "completed x done\n"
    finally:
        listening.kill()
        rest, _ = listening.communicate()
    assert rest == "", "told twice, it did it once"
