"""Edits on the real server: the calls of the docs, against diffusers, under load, killed and resumed."""

import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from PIL import Image

from tests.e2e.conftest import BUNDLED, ROOT, RunningServer, SlowDown
from tests.e2e.test_jobs import Restarting, restarting  # noqa: F401
from tests.tools import needs
from tminus.model.rng import image_noise

DOC = (ROOT / "docs" / "editing.md").read_text("utf-8")
SEEDED: dict[str, Any] = {"steps": 20, "seed": 11, "class_label": "ankle-boot", "guidance": 2}


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)


def encode(picture: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def cat(bundled_server: RunningServer) -> bytes:
    return bundled_server.post(json={"steps": 20, "sampler": "dpmpp_2m", "seed": 5, "class_label": "sneaker"}).content


TOP = np.repeat(np.arange(32)[:, None] < 18, 32, 1)  # is made new
MASK = encode(np.where(TOP, 255, 0).astype(np.uint8))


def edit(server: RunningServer, files: dict[str, bytes], **fields: Any) -> bytes:
    response = httpx.post(f"{server.url}/sample", files=files, data=SEEDED | fields, timeout=120)
    assert response.status_code == 200, response.text
    return response.content


def test_the_calls_of_the_docs_run(bundled_server: RunningServer, tmp_path: Path) -> None:
    for name in ("docs", "checkpoints"):  # what they read of the repository
        (tmp_path / name).symlink_to(ROOT / name)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```$", DOC, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks] == ["sh", "sh", "python", "sh", "sh"]
    for kind, code in blocks:
        code = re.sub(r"(steps\W{1,3})50\b", r"\g<1>10", code).replace(
            "localhost:8000", bundled_server.url.removeprefix("http://")
        )
        code = code.replace("curl ", "curl -fsS ").replace(".venv/bin/tminus", f"{sys.executable} -m tminus")
        if kind == "sh":
            needs("curl")
        command = ["bash", "-ec", code] if kind == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, code + done.stderr
        fillings, original = tmp_path / "fillings.png", pixels((tmp_path / "sneaker.png").read_bytes())
        if fillings.exists():
            kept = ~pixels((tmp_path / "docs" / "images" / "upper-half.png").read_bytes())
            sheet = pixels(fillings.read_bytes())
            assert 0.2 < kept.mean() < 0.8
            for corner in (sheet[:32, :32], sheet[:32, -32:], sheet[-32:, :32], sheet[-32:, -32:]):
                np.testing.assert_array_equal(corner[kept], original[kept])
            fillings.unlink()
    assert {"varied.png", "way.webp"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.parametrize(("sampler", "strength"), [("ddpm", None), ("ddim", 0.05), ("dpmpp_2m", 1)])
def test_known_pixels_come_out_as_they_went_in(
    server: RunningServer, cat: bytes, sampler: str, strength: float | None
) -> None:
    fields = {"sampler": sampler} | ({} if strength is None else {"strength": strength})
    found = pixels(edit(server, {"image": cat, "mask": MASK}, **fields))
    np.testing.assert_array_equal(found[~TOP], pixels(cat)[~TOP])


def test_an_edit_is_what_diffusers_makes_of_it(bundled_server: RunningServer, cat: bytes) -> None:
    """DDIM as StableDiffusionImg2ImgPipeline and its inpainting do it, with our noise, in float32 here and there."""
    net = UNet2DModel.from_pretrained(BUNDLED, subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(BUNDLED, subfolder="scheduler")
    scheduler.set_timesteps(20)

    def draw(k: int) -> torch.Tensor:
        return image_noise(11, [0], k, (1, 32, 32), torch.device("cpu"))

    x_0 = torch.from_numpy(pixels(cat) / 127.5 - 1).float()[None, None]
    timesteps = scheduler.timesteps[20 - int(20 * 0.6) :]
    x = scheduler.add_noise(x_0, draw(0), timesteps[:1])
    with torch.inference_mode():
        for i, t in enumerate(timesteps):
            out = net(x, t, torch.tensor([9])).sample
            x = scheduler.step(out, t, x, use_clipped_model_output=True).prev_sample
            last = i == len(timesteps) - 1
            known = x_0 if last else scheduler.add_noise(x_0, draw(2**31 + 8 + i), timesteps[i + 1 : i + 2])
            x = torch.where(torch.from_numpy(TOP), x, known)
    theirs = (x[0, 0].numpy().clip(-1, 1) + 1) * 127.5
    ours = pixels(edit(bundled_server, {"image": cat, "mask": MASK}, strength=0.6, sampler="ddim", guidance=1))
    assert np.abs(ours - theirs).mean() < 2


def test_an_edit_is_the_same_under_load_and_image_by_image(
    server: RunningServer, cat: bytes, slow_down: SlowDown
) -> None:
    files = {"image": cat, "mask": MASK}
    alone = edit(server, files, strength=0.7, n=1, index=2)
    slow_down(server)
    with server.client() as client:
        busy = client.post("/jobs", json={"n": 16, "steps": 1000, "class_label": "bag", "guidance": 2}).json()["id"]
        sheet = pixels(edit(server, files, strength=0.7, n=4))
        under_load = edit(server, files, strength=0.7, n=1, index=2)
        client.delete(f"/jobs/{busy}")
    assert under_load == alone
    np.testing.assert_array_equal(sheet[32:, :32], pixels(alone), "image 2 of four")


def test_a_durable_edit_that_was_killed_ends_in_the_same_bytes(restarting: Restarting, cat: bytes) -> None:  # noqa: F811
    def url(path: str) -> str:
        return f"{restarting.server.url}{path}"

    form: dict[str, Any] = {
        "files": {"image": cat, "mask": MASK},
        "data": SEEDED | {"steps": 1000, "n": 2, "strength": 0.9},
    }
    restarting.server.slow_down()
    job_id = httpx.post(url("/jobs"), **form, headers={"Idempotency-Key": "edit"}, timeout=60).json()["id"]
    kept = restarting.server
    kept.wait_until(lambda: kept.metric("tminus_snapshots_total") >= 1)
    before = httpx.get(url(f"/jobs/{job_id}")).json()
    assert before["state"] == "running", before
    assert 0 < before["step"] < before["steps"] == 900
    restarting.kill()
    restarting.start()
    ended = restarting.wait_for(job_id)
    assert ended["state"] == "done", ended
    assert "goes on from step" in restarting.server.log
    image = httpx.get(url(f"/jobs/{job_id}/image"), timeout=60).content
    again = httpx.post(url("/jobs"), **form, headers={"Idempotency-Key": "edit"}, timeout=60)
    assert (again.json()["id"], again.headers["idempotent-replayed"]) == (job_id, "true")
    assert httpx.post(url("/sample"), **form, timeout=240).content == image
    (first,) = {tuple(map(tuple, pixels(image)[18:32, 32 * k : 32 * k + 32])) for k in range(2)}
    np.testing.assert_array_equal(np.array(first), pixels(cat)[18:])


def test_large_bodies_are_taken_for_their_pictures_only(server: RunningServer, cat: bytes) -> None:
    padded = cat.ljust(6_000_000, b"\xff")
    assert pixels(edit(server, {"image": padded}, strength=0.1)).shape == (32, 32)
    for body in (b"[" + b"[]," * 100_000 + b"[]]", b'{"sampler": "' + b"x" * 3_000_000 + b'"}', bytes(30_000_000)):
        started = time.monotonic()
        try:
            answer = httpx.post(f"{server.url}/sample", content=body, timeout=60)
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        except httpx.TransportError:
            pass  # it hung up while we were still sending
        assert time.monotonic() - started < 10
