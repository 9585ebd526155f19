"""The promise that is the point of it all: one spec, one answer, to the byte, whatever else goes on."""

import io
import json
import random
import subprocess
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import BUNDLED, RunningServer, SlowDown, run_cli
from tests.tools import needs
from tminus.model.checkpoint import load_checkpoint, save_checkpoint

Start = Callable[..., RunningServer]
Body = dict[str, Any]

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


def mixed_bodies() -> list[Body]:
    """Sixteen requests of 24 images: every sampler, with and without class, guidance, interval, eta and spacing."""
    bodies: list[Body] = []
    for k in range(16):
        body: Body = {"n": 1 + k % 2, "steps": (2, 3, 5, 8)[k // 4], "seed": 1000 + k, "index": 3 * k}
        body["sampler"] = ("ddpm", "ddim", "dpmpp_2m")[k % 3]
        if body["sampler"] == "ddim":
            body["eta"] = k / 16
        if k % 5:
            body["class_label"] = CLASSES[k % 10]
        if k % 5 > 1:
            body["guidance"] = 1 + k / 4
        if k % 5 > 2:
            body["guidance_interval"] = [100 + 10 * k, 700]
        if k % 7 == 3:
            body["timestep_spacing"] = "trailing"
        bodies.append(body)
    assert sum(body["n"] for body in bodies) >= 24
    return bodies


def sheet(server: RunningServer, body: Body, accept: str = "image/png") -> bytes:
    response = server.post(json=body, headers={"Accept": accept})
    assert response.status_code == 200, response.text
    assert "cache-status" not in response.headers, "made, not remembered"
    return response.content


def at_once(server: RunningServer, bodies: Sequence[Body]) -> list[bytes]:
    """All of them at the same time."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: sheet(server, body), bodies))


@pytest.fixture(scope="module")
def alone(bundled_server: RunningServer) -> list[bytes]:
    """What each request gets that has the server for itself."""
    return [sheet(bundled_server, body) for body in mixed_bodies()]


def active_jobs(server: RunningServer) -> list[dict[str, Any]]:
    """The jobs that wait or run; durable ones that have ended are listed too, and the server has seen other tests."""
    found: list[dict[str, Any]] = httpx.get(f"{server.url}/jobs?state=waiting,running").json()["jobs"]
    return found


def test_each_gets_the_same_bytes_in_another_order_beside_other_work(
    bundled_server: RunningServer, alone: list[bytes]
) -> None:
    order = list(range(len(alone)))
    random.Random(1).shuffle(order)
    bodies = mixed_bodies()
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(lambda: bundled_server.post(json={"n": 3, "steps": 30, "class_label": 3, "guidance": 3}))
        assert at_once(bundled_server, [bodies[k] for k in order]) == [alone[k] for k in order]
        assert beside.result(120).status_code == 200


def test_each_gets_the_same_bytes_after_a_restart(own_server: Start, alone: list[bytes]) -> None:
    server = own_server("--result-cache-mb", "0", checkpoint=BUNDLED)
    assert at_once(server, mixed_bodies()) == alone


def test_image_k_alone_is_image_k_of_the_zip_to_the_byte(server: RunningServer) -> None:
    body = {"n": 4, "steps": 8, "seed": 77, "index": 10, "class_label": [0, 1, "bag", 9], "guidance": 2}
    with zipfile.ZipFile(io.BytesIO(sheet(server, body, "application/zip"))) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert list(files) == ["00010.png", "00011.png", "00012.png", "00013.png"]
    with Image.open(io.BytesIO(sheet(server, body))) as image:
        whole = np.asarray(image).reshape(2, 32, 2, 32).swapaxes(1, 2).reshape(4, 32, 32)
    for k, png in enumerate(files.values()):
        made_alone = sheet(server, body | {"n": 1, "index": 10 + k, "class_label": body["class_label"][k]})  # type: ignore[index]
        assert made_alone == png
        with Image.open(io.BytesIO(made_alone)) as image:
            np.testing.assert_array_equal(np.asarray(image), whole[k])


def test_a_client_killed_in_mid_request_changes_nothing_for_nineteen_others(
    server: RunningServer, tmp_path: Path, slow_down: SlowDown
) -> None:
    bodies = [{"n": 1, "steps": 40 + k, "seed": k, "class_label": k % 10, "guidance": 1 + k % 2} for k in range(19)]
    expected = [sheet(server, body) for body in bodies]
    cancelled = server.metric("tminus_cancelled_total")
    url = f"{server.url}/sample?n=64&steps=900&seed=1"
    slow_down(server)
    victim = subprocess.Popen([needs("curl"), "--silent", "-X", "POST", url, "-o", str(tmp_path / "never.png")])
    try:
        server.wait_until(lambda: server.metric("tminus_rows_active") > 0)
        with ThreadPoolExecutor(19) as pool:
            answers = [pool.submit(sheet, server, body) for body in bodies]
            server.wait_until(lambda: len(active_jobs(server)) > 10)
            victim.kill()
            server.wait_until(lambda: server.metric("tminus_cancelled_total") == cancelled + 1)
            server.speed_up()
            assert [answer.result(120) for answer in answers] == expected
    finally:
        victim.kill()
        victim.wait()
    assert server.metric("tminus_cancelled_total") == cancelled + 1
    assert server.metric("tminus_backlog_seconds") == 0
    assert active_jobs(server) == []


# --- reproduce ---


@pytest.fixture
def drawn(server: RunningServer, tmp_path: Path) -> Path:
    """A picture as curl leaves it."""
    out = tmp_path / "drawn.png"
    url = f"{server.url}/sample?steps=6&seed=12&class_label=coat&guidance=2&guidance_interval=100&guidance_interval=800"
    subprocess.run([needs("curl"), "--fail", "--silent", url, "-o", str(out)], check=True, timeout=120)
    return out


def test_a_png_alone_is_enough_to_make_it_again_offline_and_from_the_server(
    server: RunningServer, small: Path, drawn: Path
) -> None:
    for where in (("--checkpoint", str(small), "--device", "cpu"), ("--url", server.url)):
        result = run_cli("reproduce", str(drawn), *where)
        assert result.returncode == 0, result.stderr
        assert f"the same {drawn.stat().st_size} bytes" in result.stdout


# --- jobs, deadlines and repeats, on the wire ---


def test_a_job_is_listed_and_deleted_by_another_client(server: RunningServer, slow_down: SlowDown) -> None:
    slow_down(server)
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: server.post(json={"n": 32, "steps": 900, "seed": 4}))
        server.wait_until(lambda: active_jobs(server) != [])
        (job,) = active_jobs(server)
        server.wait_until(lambda: client.get(f"/jobs/{job['id']}").json()["step"] > 2)
        assert client.get(f"/jobs/{job['id']}").json()["state"] == "running"
        assert client.get(f"/jobs/{job['id']}").json()["eta_s"] > 0
        assert client.delete(f"/jobs/{job['id']}").status_code == 204
        answer = waiting.result(30)
        assert (answer.status_code, answer.json()["code"]) == (499, "cancelled")
        assert client.delete(f"/jobs/{job['id']}").status_code == 404


def test_deadlines_on_the_wire(server: RunningServer, slow_down: SlowDown) -> None:
    impossible = server.post(json={"n": 8, "steps": 1000, "deadline_s": 0.5})
    assert (impossible.status_code, impossible.json()["field"]) == (422, "deadline_s")
    easy = server.post(json={"steps": 2, "deadline_s": 60})
    assert easy.status_code == 200
    slow_down(server)
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(lambda: server.post(json={"n": 8, "steps": 300}))
        server.wait_until(lambda: server.metric("tminus_rows_active") > 0)
        eta_s = active_jobs(server)[0]["eta_s"]
        tight = {"n": 8, "steps": 300, "deadline_s": 1.2 * eta_s}
        refused = server.post(json=tight)
        assert (refused.status_code, refused.json()["code"]) == (429, "deadline_unmeetable"), refused.text
        least_s = float(refused.json()["bound"].split()[2])  # "at least 2.3 s at this load"
        assert least_s > tight["deadline_s"]
        server.speed_up()
        assert server.post(json=tight | {"deadline_s": 3 * least_s}).status_code == 200
        assert load.result(120).status_code == 200


# --- a network that gives NaN ---


def test_a_class_that_gives_nan_is_told_so_while_the_others_are_served(
    own_server: Start, small: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(small)
    state = {key: value.clone() for key, value in checkpoint.net.state_dict().items()}
    state["class_embedding.weight"][7] = 3e38  # finite, as a checkpoint must be, until something is added to it
    folder = tmp_path / "overflows"
    save_checkpoint(folder, state, checkpoint.net.config, checkpoint.noise, checkpoint.labels, {})
    # Two threads, where servers beside other tests have one.
    server = own_server("--result-cache-mb", "0", "--threads", "2", checkpoint=folder)
    good = [{"steps": 10, "seed": k, "class_label": k, "guidance": 2} for k in (0, 1, 8)]
    expected = [sheet(server, body) for body in good]
    sick = [
        {"steps": 10, "seed": 1, "class_label": 7},
        {"n": 2, "steps": 12, "class_label": [0, "sneaker"], "guidance": 2},
    ]
    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(lambda body: server.post(json=body), [*good, *sick]))
    assert [answer.content for answer in answers[:3]] == expected
    for answer in answers[3:]:
        assert (answer.status_code, answer.json()["code"]) == (500, "not_finite"), answer.text
        assert answer.headers["content-type"] == "application/problem+json"
    assert [sheet(server, body) for body in good] == expected, "the slots serve again"
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert server.metric("tminus_cancelled_total") == 2
    assert "Traceback" not in server.log


# --- a thousand at once ---


def thousand(server: RunningServer) -> list[tuple[int, str | None, str]]:
    """A thousand clients at once: the status, Retry-After and code that each got."""
    import asyncio

    async def ask_all() -> list[tuple[int, str | None, str]]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as client:

            async def ask(k: int) -> tuple[int, str | None, str]:
                response = await client.post("/sample", json={"steps": 10, "seed": k})
                is_problem = response.headers["content-type"] == "application/problem+json"
                code = response.json()["code"] if is_problem else response.headers["content-type"]
                return response.status_code, response.headers.get("retry-after"), code

            return await asyncio.gather(*(ask(k) for k in range(1000)))

    return asyncio.run(ask_all())


def test_a_thousand_requests_at_once_are_each_answered_or_told_when_to_come_again(own_server: Start) -> None:
    server = own_server("--result-cache-mb", "0", "--max-backlog-s", "0.3")
    started = time.monotonic()
    answers = thousand(server)
    took_s = time.monotonic() - started
    assert len(answers) == 1000
    assert {status for status, _, _ in answers} <= {200, 429}, json.dumps(sorted({str(answer) for answer in answers}))
    refused = [answer for answer in answers if answer[0] == 429]
    assert 0 < len(refused) < 1000
    for _, retry_after, code in refused:
        assert code == "overloaded"
        assert int(retry_after or 0) >= 1
    assert took_s < 90
    assert server.post(json={"steps": 1}).status_code in (200, 429)
    server.wait_until(lambda: server.metric("tminus_backlog_seconds") == 0)
    assert server.metric("tminus_images_total") >= 1000 - len(refused)
    assert "Traceback" not in server.log, server.log[-3000:]


def test_an_animation_is_the_same_bytes_alone_and_under_load(server: RunningServer, slow_down: SlowDown) -> None:
    spec = {"n": 3, "steps": 40, "seed": 8, "class_label": "ankle-boot", "guidance": 2, "guidance_interval": [300, 700]}

    def animated() -> bytes:
        response = server.post(json=spec | {"every": 3}, headers={"Accept": "image/webp"})
        assert response.status_code == 200, response.text
        return response.content

    alone = animated()
    slow_down(server)
    with ThreadPoolExecutor(9) as pool:
        others = [pool.submit(server.post, json={"n": k % 4 + 1, "steps": 200 + k}) for k in range(8)]
        server.wait_until(lambda: server.metric("tminus_rows_active") > 2)
        assert animated() == alone
        server.speed_up()
        assert {other.result().status_code for other in others} == {200}
