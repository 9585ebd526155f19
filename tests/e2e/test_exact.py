"""The promise that is the point of it all: one spec, one answer, to the byte, whatever else goes on."""

import asyncio
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
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

from tests.e2e.conftest import BUNDLED, RunningServer, SlowDown, pixels, png_of, run_cli
from tests.tools import needs
from tminus.model.pixels import to_uint8
from tminus.model.rng import image_noise

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
    return bodies


def made(server: RunningServer, accept: str = "image/png", **how: Any) -> bytes:
    response = server.post(headers={"Accept": accept}, **how)
    assert response.status_code == 200, response.text
    assert "cache-status" not in response.headers, "made, not remembered"
    return response.content


def at_once(server: RunningServer, bodies: Sequence[Body]) -> list[bytes]:
    """All of them at the same time."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: made(server, json=body), bodies))


def grid(sheet: bytes, rows: int, columns: int) -> np.ndarray:
    """The images of a sheet."""
    return pixels(sheet).reshape(rows, 32, columns, 32).swapaxes(1, 2).reshape(rows * columns, 32, 32)


@pytest.fixture(scope="module")
def alone(bundled_server: RunningServer) -> list[bytes]:
    """What each request gets that has the server for itself."""
    return [made(bundled_server, json=body) for body in mixed_bodies()]


def test_each_gets_the_same_bytes_in_another_order_beside_other_work_with_which_it_shares_ticks(
    bundled_server: RunningServer, alone: list[bytes], slow_down: SlowDown
) -> None:
    bodies, order = mixed_bodies(), list(range(len(alone)))
    random.Random(1).shuffle(order)
    beside = {"n": 3, "steps": 30, "class_label": 3, "guidance": 3}
    ticks = bundled_server.metric("tminus_tick_duration_seconds_count")
    slow_down(bundled_server)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(made, bundled_server, json=beside)
        assert at_once(bundled_server, [bodies[k] for k in order]) == [alone[k] for k in order]
        bundled_server.speed_up()
        other.result(120)
    ticks = bundled_server.metric("tminus_tick_duration_seconds_count") - ticks
    # They shared them as far as a tick has places: one after the other they would have taken the sum of their steps.
    asked = [*bodies, beside]
    places = sum(body["n"] * body["steps"] * (2 if "guidance" in body else 1) for body in asked)
    max_batch = httpx.get(f"{bundled_server.url}/model").json()["limits"]["max_batch"]
    assert ticks < max(0.6 * sum(body["steps"] for body in asked), 1.1 * places / max_batch)


@pytest.mark.long
def test_each_gets_the_same_bytes_after_a_restart(own_server: Start, alone: list[bytes]) -> None:
    # With as many threads as the first: another number may find another executor the fastest.
    server = own_server("--result-cache-mb", "0", "--threads", "2", checkpoint=BUNDLED)
    assert at_once(server, mixed_bodies()) == alone


def test_sheet_zip_and_json_have_each_image_as_it_is_alone_to_the_byte(server: RunningServer) -> None:
    body = {"n": 4, "steps": 8, "seed": 77, "index": 10, "class_label": [0, 1, "bag", None]}
    with zipfile.ZipFile(io.BytesIO(made(server, "application/zip", json=body))) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    assert list(files) == ["00010.png", "00011.png", "00012.png", "00013.png"]
    with server.api() as tminus:
        document = tminus.sample(accept="application/json", **body)
    assert document.pngs == [*files.values()]
    images = [(each["index"], each["class_label"], each["class_name"]) for each in document.document["images"]]
    assert images == [(10, 0, "t-shirt"), (11, 1, "trouser"), (12, 8, "bag"), (13, None, None)]
    whole = grid(made(server, json=body), 2, 2)
    for k, (png, label) in enumerate(zip(files.values(), body["class_label"], strict=True)):  # type: ignore[call-overload]
        assert made(server, json=body | {"n": 1, "index": 10 + k, "class_label": label}) == png
        np.testing.assert_array_equal(pixels(png), whole[k])


def test_answers_of_every_kind_are_the_same_bytes_alone_and_under_load(
    server: RunningServer, slow_down: SlowDown
) -> None:
    boots = {"steps": 20, "seed": 8, "class_label": "ankle-boot", "guidance": 2}
    upper = np.where(np.arange(32)[:, None] < 18, 255, 0).astype(np.uint8).repeat(32, 1)
    picture = made(server, json={"steps": 5, "seed": 5, "class_label": "sneaker"})
    edit = {"files": {"image": picture, "mask": png_of(upper)}}
    film = boots | {"n": 3, "steps": 40, "guidance_interval": [300, 700], "every": 3}
    sde = {"steps": 15, "sampler": "dpmpp_2m_sde", "seed": 10, "guidance": 3, "class_label": 1}
    trajectory = "application/vnd.tminus.trajectory"
    asked: list[tuple[str, dict[str, Any]]] = [
        ("image/webp", {"json": film}),
        (trajectory, {"json": boots | {"n": 3, "sampler": "ddpm"}}),
        (trajectory, {"json": {"n": 2, "steps": 12, "sampler": "ddim", "eta": 0.6, "seed": 9, "index": 5}}),
        (trajectory, {"json": sde | {"guidance_interval": [100, 600]}}),
        ("image/png", edit | {"data": boots | {"strength": 0.7, "index": 2}}),
        ("image/png", edit | {"data": boots | {"strength": 0.7, "n": 4}}),
    ]
    alone = [made(server, accept, **how) for accept, how in asked]
    np.testing.assert_array_equal(grid(alone[5], 2, 2)[2], pixels(alone[4]), "image 2 of four")
    slow_down(server)
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(server.post, json={"n": k % 4 + 1, "steps": 200 + k}) for k in range(6)]
        server.wait_until(lambda: server.metric("tminus_rows_active") > 2)
        under_load = [pool.submit(made, server, accept, **how) for accept, how in asked]
        assert [each.result(120) for each in under_load] == alone
        server.speed_up()
        assert {other.result().status_code for other in others} == {200}


def test_a_client_killed_in_mid_request_changes_nothing_for_nineteen_others_and_frees_its_rows(
    server: RunningServer, tmp_path: Path, slow_down: SlowDown
) -> None:
    bodies = [{"n": 1, "steps": 40 + k, "seed": k, "class_label": k % 10, "guidance": 1 + k % 2} for k in range(19)]
    expected = [made(server, json=body) for body in bodies]
    cancelled = server.metric("tminus_jobs_aborted_total")
    url = f"{server.url}/sample?n=64&steps=900&seed=1"
    slow_down(server)
    victim = subprocess.Popen([needs("curl"), "--silent", "-X", "POST", url, "-o", str(tmp_path / "never.png")])
    try:
        server.wait_until(lambda: server.metric("tminus_rows_active") > 0)
        with ThreadPoolExecutor(19) as pool:
            answers = [pool.submit(made, server, json=body) for body in bodies]
            server.wait_until(lambda: len(httpx.get(f"{server.url}/jobs?state=waiting,running").json()["jobs"]) > 10)
            victim.kill()
            server.wait_until(lambda: server.metric("tminus_jobs_aborted_total") == cancelled + 1)
            server.speed_up()
            assert [answer.result(120) for answer in answers] == expected
    finally:
        victim.kill()
        victim.wait()
    assert server.metric("tminus_jobs_aborted_total") == cancelled + 1
    assert server.metric("tminus_row_steps_saved_total") > 0
    assert server.metric("tminus_backlog_seconds") == 0


def test_a_short_request_does_not_wait_for_a_long_one(server: RunningServer, slow_down: SlowDown) -> None:
    with ThreadPoolExecutor(1) as pool:
        before = server.metric("tminus_row_steps_total")
        slow_down(server)
        long = pool.submit(lambda: server.post(params={"n": 8, "steps": 500, "seed": 2}))
        server.wait_until(lambda: server.metric("tminus_row_steps_total") > before)
        assert server.post(params={"steps": 4}).status_code == 200
        assert not long.done()
        server.speed_up()
        assert long.result(120).status_code == 200


def test_a_png_alone_is_enough_to_make_it_again_offline_and_from_the_server(
    server: RunningServer, small: Path, tmp_path: Path
) -> None:
    spec = {"steps": 6, "seed": 12, "class_label": "coat", "guidance": 2, "guidance_interval": [100, 800]}
    drawn = tmp_path / "drawn.png"
    drawn.write_bytes(made(server, json=spec))
    for where in (("--checkpoint", str(small), "--device", "cpu"), ("--url", server.url)):
        result = run_cli("reproduce", str(drawn), *where)
        assert result.returncode == 0, result.stderr
        assert f"the same {drawn.stat().st_size} bytes" in result.stdout


# --- what the bundled checkpoint draws ---


def test_a_sheet_of_eight_trousers(bundled_server: RunningServer) -> None:
    asked = {"n": 8, "steps": 25, "seed": 1, "class_label": "trouser", "guidance": 2}
    # Trousers of Fashion-MNIST: black at the sides, bright in the middle, in every one of the eight cells.
    for cell in grid(made(bundled_server, params=asked), 2, 4):
        assert cell[:, :4].mean() < 10
        assert cell[:, -4:].mean() < 10
        assert cell[6:26, 10:22].mean() > 60


def test_diffusers_draws_the_same_from_the_bundled_folder(bundled_server: RunningServer, own_server: Start) -> None:
    pipeline: Any = DDPMPipeline.from_pretrained(BUNDLED)
    assert type(pipeline.unet).__name__ == "UNet2DModel"
    unet: Any = UNet2DModel.from_pretrained(BUNDLED, subfolder="unet")
    scheduler: Any = DDIMScheduler.from_pretrained(BUNDLED, subfolder="scheduler")
    scheduler.set_timesteps(10)
    labels = torch.tensor([1, 7])
    x = image_noise(11, range(2), 0, (1, 32, 32), torch.device("cpu"))
    with torch.inference_mode():
        for t in scheduler.timesteps:
            eps = unet(x, t, class_labels=labels).sample
            x = scheduler.step(eps, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
    theirs = to_uint8(x).numpy()[:, 0]

    def differences(running: RunningServer) -> Any:
        asked = {"n": 2, "steps": 10, "sampler": "ddim", "seed": 11, "class_label": ["trouser", "sneaker"]}
        return abs(grid(made(running, json=asked), 1, 2).astype(int) - theirs.astype(int))

    assert differences(bundled_server).mean() < 1, "which runs as it does by default"
    float32 = bundled_server
    if httpx.get(f"{bundled_server.url}/model").json()["precision"] != "float32":
        float32 = own_server(
            "--executor", "openvino", "--precision", "float32", "--result-cache-mb", "0", checkpoint=BUNDLED
        )
    assert differences(float32).max() <= 1


# --- a thousand at once ---


def thousand(server: RunningServer) -> list[tuple[int, str | None, str]]:
    """A thousand clients at once: the status, Retry-After and code that each got."""

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


@pytest.mark.long
def test_a_thousand_requests_at_once_are_each_answered_or_told_when_to_come_again(own_server: Start) -> None:
    server = own_server("--result-cache-mb", "0", "--max-backlog-s", "0.3")
    started = time.monotonic()
    answers = thousand(server)
    took_s = time.monotonic() - started
    assert {status for status, _, _ in answers} == {200, 429}, json.dumps(sorted({str(answer) for answer in answers}))
    refused = [answer for answer in answers if answer[0] == 429]
    for _, retry_after, code in refused:
        assert code == "overloaded"
        assert int(retry_after or 0) >= 1
    assert took_s < 90
    assert server.post(json={"steps": 1}).status_code in (200, 429)
    server.wait_until(lambda: server.metric("tminus_backlog_seconds") == 0)
    assert server.metric("tminus_images_total") >= 1000 - len(refused)
    assert "Traceback" not in server.log, server.log[-3000:]
