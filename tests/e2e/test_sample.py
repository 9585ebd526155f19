"""The real server with the bundled checkpoint, asked by curl, httpx and our client, read back with Pillow."""

import io
import json
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from PIL import Image

from tests.e2e.conftest import BUNDLED, RunningServer, SlowDown
from tests.tools import needs
from tminus.model.pixels import to_uint8
from tminus.model.rng import image_noise

QUICK: dict[str, Any] = {"steps": 4, "sampler": "ddim", "seed": 1}


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        assert image.format == "PNG"
        return np.asarray(image, np.int16)


def test_curl_gets_a_sheet_of_eight_garments(bundled_server: RunningServer, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    url = f"{bundled_server.url}/sample?n=8&steps=25&seed=1&class_label=trouser&guidance=2"
    subprocess.run([needs("curl"), "--fail", "--silent", "-X", "POST", url, "-o", str(out)], check=True, timeout=120)
    sheet = pixels(out.read_bytes())
    assert sheet.shape == (64, 128)
    # Trousers of Fashion-MNIST: black at the sides, bright in the middle, in every one of the eight cells.
    for cell in sheet.reshape(2, 32, 4, 32).swapaxes(1, 2).reshape(8, 32, 32):
        assert cell[:, :4].mean() < 10
        assert cell[:, -4:].mean() < 10
        assert cell[6:26, 10:22].mean() > 60


def test_diffusers_draws_the_same_from_the_bundled_folder(
    bundled_server: RunningServer, own_server: Callable[..., RunningServer]
) -> None:
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
        with Image.open(io.BytesIO(running.post(json=asked).content)) as sheet:
            cells = np.asarray(sheet).reshape(1, 32, 2, 32).swapaxes(1, 2).reshape(2, 32, 32)
        return abs(cells.astype(int) - theirs.astype(int))

    assert differences(bundled_server).mean() < 1, "which runs as it does by default"
    float32 = bundled_server
    if httpx.get(f"{bundled_server.url}/model").json()["precision"] != "float32":
        float32 = own_server("--executor", "openvino", "--precision", "float32", checkpoint=BUNDLED)
    assert differences(float32).max() <= 1


def test_sheet_zip_and_json_hold_the_same_images(server: RunningServer) -> None:
    spec = QUICK | {"n": 3, "class_label": [0, "bag", None]}
    with server.api() as tminus:
        sheet = tminus.sample(**spec)
        archive = tminus.sample(accept="application/zip", **spec)
        document = tminus.sample(accept="application/json", **spec)
    in_sheet = pixels(sheet.data).reshape(1, 32, 3, 32).swapaxes(1, 2).reshape(3, 32, 32)
    assert list(archive.files) == ["00000.png", "00001.png", "00002.png"]
    for each in (archive, document):
        np.testing.assert_array_equal(np.stack([*map(pixels, each.pngs)]), in_sheet)
    assert [(i["index"], i["class_label"], i["class_name"]) for i in document.document["images"]] == [
        (0, 0, "t-shirt"),
        (1, 8, "bag"),
        (2, None, None),
    ]


def test_the_headers_of_the_contract_are_there(server: RunningServer) -> None:
    with server.client() as client:
        response = client.post("/sample", params=QUICK, headers={"X-Request-ID": "mine-1"})
        drawn = client.post("/sample", params={"steps": 1})
        model = client.get("/model").json()
    assert response.headers["X-Request-ID"] == "mine-1"
    assert response.headers["X-Seed"] == "1"
    assert response.headers["X-Fingerprint"] == model["fingerprint"]
    assert len(response.headers["X-Job-ID"]) == 32
    timing = dict(part.split(";dur=") for part in response.headers["Server-Timing"].split(", "))
    assert timing.keys() == {"queue", "first_step", "denoise", "encode"}
    assert float(response.headers["X-ETA-Seconds"]) >= 0
    assert response.headers["X-Queue-Position"] == "0"
    assert response.headers["ETag"].startswith('"')
    assert "ETag" not in drawn.headers
    assert all(float(ms) >= 0 for ms in timing.values())
    assert drawn.headers["X-Seed"].isdecimal()


def mixed_requests() -> list[dict[str, Any]]:
    names = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
    return [
        {
            "n": 1 + k % 3,
            "steps": (5, 8, 13, 21)[k % 4],
            "seed": k,
            "sampler": ("ddpm", "ddim", "ddpm", "dpmpp_2m")[k % 4],
            **({"eta": 0.5} if k % 4 == 1 else {}),
            **({"class_label": names[k % 10]} if k % 3 else {}),
            **({"guidance": 1 + k / 4} if k % 3 == 2 else {}),
        }
        for k in range(16)
    ]


def test_sixteen_mixed_clients_at_once_get_what_each_gets_alone(server: RunningServer, slow_down: SlowDown) -> None:
    def post(body: dict[str, Any]) -> np.ndarray:
        with server.api() as tminus:
            return pixels(tminus.sample(**body).data)

    requests = mixed_requests()
    ticks, steps = server.metric("tminus_step_duration_seconds_count"), server.metric("tminus_row_steps_total")
    slow_down(server)
    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(post, requests))
    server.speed_up()
    ticks = server.metric("tminus_step_duration_seconds_count") - ticks
    steps = server.metric("tminus_row_steps_total") - steps
    assert steps == sum(body["n"] * body["steps"] for body in requests)
    # They shared their ticks, as far as these have places: one after the other would have taken the sum of their steps.
    places = sum(body["n"] * body["steps"] * (2 if "guidance" in body else 1) for body in requests)
    max_batch = httpx.get(f"{server.url}/model").json()["limits"]["max_batch"]
    assert ticks < max(0.6 * sum(body["steps"] for body in requests), 1.1 * places / max_batch)
    for body, beside_others in zip(requests, together, strict=True):
        np.testing.assert_array_equal(post(body), beside_others, err_msg=str(body))


def test_a_short_request_does_not_wait_for_a_long_one(server: RunningServer, slow_down: SlowDown) -> None:
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        before = server.metric("tminus_row_steps_total")
        slow_down(server)
        long = pool.submit(lambda: server.post(params={"n": 8, "steps": 500, "seed": 2}))
        server.wait_until(lambda: server.metric("tminus_row_steps_total") > before)
        short = client.post("/sample", params=QUICK)
        assert short.status_code == 200
        assert not long.done()
        server.speed_up()
        assert long.result(120).status_code == 200


def test_a_client_that_goes_away_frees_its_rows(server: RunningServer, slow_down: SlowDown) -> None:
    cancelled = server.metric("tminus_cancelled_total")
    slow_down(server)
    with server.client() as client, pytest.raises(httpx.ReadTimeout):
        client.post("/sample", params={"n": 8, "steps": 1000}, timeout=httpx.Timeout(60, read=0.3))
    server.wait_until(lambda: server.metric("tminus_cancelled_total") > cancelled)
    assert server.metric("tminus_rows_active") + server.metric("tminus_rows_waiting") == 0
    assert server.metric("tminus_row_steps_saved_total") > 0
    assert server.metric("tminus_backlog_seconds") == 0


def test_a_hundred_megabytes_are_refused_without_being_read(server: RunningServer, tmp_path: Path) -> None:
    sent = 0

    def endless() -> Any:
        nonlocal sent
        for _ in range(1600):
            sent += 65536
            yield bytes(65536)

    with server.client() as client:
        try:
            response = client.post("/sample", content=endless())  # chunked: no Content-Length gives it away
            assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
        except (httpx.WriteError, httpx.ReadError):
            pass  # the server hung up while we were still sending, as it may
    assert sent < 50_000_000
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(10**8)
    curl = [needs("curl"), "--silent", "--data-binary", f"@{big}", "--write-out", "%{size_upload}"]
    done = subprocess.run([*curl, f"{server.url}/sample"], capture_output=True, text=True, timeout=60, check=False)
    problem, _, uploaded = done.stdout.rpartition("}")
    bound = 65536 + 2 * 4 * (2**23 // 3 + 1)  # with an image and a mask in base64
    assert json.loads(problem + "}")["bound"] == f"at most {bound} bytes"
    assert int(uploaded) < 50_000_000
