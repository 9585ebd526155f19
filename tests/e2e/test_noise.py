"""The forward process by the real server, asked with curl as in the docs, held against formulas and diffusers."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from tests.e2e.conftest import BUNDLED, ROOT, RunningServer
from tests.tools import needs
from tminus.model.rng import image_noise

DOC = (ROOT / "docs" / "forward-process.md").read_text("utf-8")


@pytest.fixture(scope="module")
def garment(server: RunningServer) -> bytes:
    return server.post(json={"steps": 20, "sampler": "dpmpp_2m", "seed": 5, "class_label": "sneaker"}).content


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def noise(server: RunningServer, image: bytes, t: int, seed: int | None = 7) -> httpx.Response:
    params = {"t": t} if seed is None else {"t": t, "seed": seed}
    response = httpx.post(f"{server.url}/noise", params=params, files={"image": image}, timeout=60)
    assert response.status_code == 200, response.text
    return response


def eps(seed: int) -> torch.Tensor:
    return image_noise(seed, [0], 0, (1, 32, 32), torch.device("cpu"))


@pytest.mark.parametrize(("t", "seed"), [(0, 7), (500, 2**64 - 1), (999, 0)])
def test_x_t_is_equation_4_and_what_diffusers_adds(server: RunningServer, garment: bytes, t: int, seed: int) -> None:
    response = noise(server, garment, t, seed)
    out = pixels(response.content).astype(float)
    betas = np.linspace(1e-4, 0.02, 1000)  # Ho et al. 2020, sec. 4
    alpha_bar = np.prod(1 - betas[: t + 1])
    assert float(response.headers["x-alpha-bar"]) == pytest.approx(alpha_bar, rel=1e-9)
    x_0 = pixels(garment) / 127.5 - 1
    x_t = np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps(seed)[0, 0].double().numpy()
    exact = (np.clip(x_t, -1, 1) + 1) * 127.5
    assert np.abs(out - exact).max() < 0.5 + 1e-3, "rounded to nearest"

    theirs = DDPMScheduler.from_pretrained(BUNDLED, subfolder="scheduler").add_noise(
        torch.from_numpy(x_0).float()[None, None], eps(seed), torch.tensor([t])
    )
    assert np.abs(out - (theirs[0, 0].numpy().clip(-1, 1) + 1) * 127.5).max() < 0.5 + 1e-2


def test_the_calls_of_the_docs_run(bundled_server: RunningServer, tmp_path: Path) -> None:
    commands = DOC.split("```sh\n")[1].split("```")[0].replace("localhost:8000", bundled_server.url)
    needs("curl")
    subprocess.run(["bash", "-ec", commands.replace("curl", "curl -fsS")], cwd=tmp_path, check=True, timeout=60)
    code = DOC.split("```python\n")[1].split("```")[0].replace("http://localhost:8000", bundled_server.url)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
    assert {file.name for file in tmp_path.iterdir()} == {
        "sneaker.png", "the_same.png", *[f"x_{t:03d}.png" for t in (0, 100, 250, 500, 999)]
    }  # fmt: skip
    assert (tmp_path / "the_same.png").read_bytes() == (tmp_path / "x_500.png").read_bytes()
    pictures = [pixels((tmp_path / f"x_{t:03d}.png").read_bytes()).astype(float) for t in (0, 100, 250, 500, 999)]
    roughness = [np.abs(np.diff(picture)).mean() for picture in pictures]
    assert roughness == sorted(roughness), "more and more noise"
    clipped = np.isin(pictures[3], (0, 255)).mean()
    assert 0.25 < clipped < 0.45, "as the docs say"


def test_the_png_says_how_it_was_made_and_the_seed_makes_it_again(server: RunningServer, garment: bytes) -> None:
    response = noise(server, garment, 250, None)
    with Image.open(io.BytesIO(response.content)) as image:
        image.load()
        text = json.loads(image.text["tminus"])  # type: ignore[attr-defined]
    assert text["noise"]["t"] == 250
    assert text["noise"]["seed"] == int(response.headers["x-seed"])
    assert text["noise"]["alpha_bar"] == float(response.headers["x-alpha-bar"])
    again = noise(server, garment, 250, text["noise"]["seed"])
    assert again.content == response.content
    headers = {"If-None-Match": again.headers["etag"], "Content-Type": "image/png"}
    params = {"t": 250, "seed": text["noise"]["seed"]}
    assert httpx.post(f"{server.url}/noise", params=params, content=garment, headers=headers).status_code == 304


def test_an_image_over_the_limit_of_other_bodies_is_taken(server: RunningServer) -> None:
    """The server here takes 64 KiB of JSON."""
    large = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), dtype=np.uint8)).save(large, "PNG")
    assert len(large.getvalue()) > 2_900_000
    assert pixels(noise(server, large.getvalue(), 100).content).shape == (32, 32)


def test_a_hundred_megabytes_are_refused_without_being_read(server: RunningServer, tmp_path: Path) -> None:
    big = tmp_path / "big.png"
    with big.open("wb") as file:
        file.truncate(10**8)
    for send in (("--data-binary", f"@{big}", "-H", "Content-Type: image/png"), ("-F", f"image=@{big}")):
        curl = [needs("curl"), "--silent", *send, "--write-out", "%{size_upload}", f"{server.url}/noise?t=5"]
        answer = subprocess.run(curl, capture_output=True, text=True, timeout=60, check=False).stdout
        problem, _, uploaded = answer.rpartition("}")
        assert json.loads(problem + "}")["code"] == "body_too_large"
        assert int(uploaded) < 50_000_000


def test_hostile_uploads_disturb_nobody(server: RunningServer, garment: bytes) -> None:
    spec = {"n": 2, "steps": 60, "seed": 3}
    alone = server.post(json=spec).content
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    hostile: list[tuple[bytes, int]] = [
        (b"", 422), (b"<svg/>", 422), (garment[:-40], 422), (bomb.getvalue(), 422), (bytes(9_000_000), 413),
    ]  # fmt: skip
    with server.client() as client:
        answers: list[Any] = []
        for content, status in hostile:
            try:
                answer = client.post("/noise?t=5", files={"image": ("cat.png", content, "image/png")})
                assert answer.status_code == status, answer.text
                assert answer.headers["content-type"] == "application/problem+json"
                answers.append(answer)
            except (httpx.WriteError, httpx.ReadError):  # the server hung up while we were still sending, as it may
                assert status == 413
        assert len(answers) >= 4
    assert server.post(json=spec).content == alone
