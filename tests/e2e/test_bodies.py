"""Large bodies and hostile pictures: the real server refuses them early, and disturbs nobody for them."""

import io
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from tests.e2e.conftest import RunningServer, pixels
from tests.tools import needs


def test_a_hundred_megabytes_are_refused_without_being_read(server: RunningServer, tmp_path: Path) -> None:
    sent = 0

    def endless() -> Any:
        nonlocal sent
        for _ in range(1600):
            sent += 65536
            yield bytes(65536)

    try:
        response = server.post(content=endless())  # chunked: no Content-Length gives it away
        assert (response.status_code, response.json()["code"]) == (413, "body_too_large")
    except (httpx.WriteError, httpx.ReadError):
        pass  # the server hung up while we were still sending, as it may
    assert sent < 50_000_000
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(10**8)
    picture = ("--data-binary", f"@{big}", "-H", "Content-Type: image/png", f"{server.url}/noise?t=5")
    form = ("-F", f"image=@{big}", f"{server.url}/noise?t=5")
    for asked in (picture, form, ("--data-binary", f"@{big}", f"{server.url}/sample")):
        curl = [needs("curl"), "--silent", "--write-out", "%{size_upload}", *asked]
        answer = subprocess.run(curl, capture_output=True, text=True, timeout=60, check=False).stdout
        problem, _, uploaded = answer.rpartition("}")
        assert json.loads(problem + "}")["code"] == "body_too_large"
        assert int(uploaded) < 50_000_000


def test_hostile_uploads_disturb_nobody(server: RunningServer) -> None:
    spec = {"n": 2, "steps": 60, "seed": 3}
    alone = server.post(json=spec).content
    garment = server.post(params={"steps": 2}).content
    bomb = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(bomb, "PNG")
    hostile = {b"": 422, b"<svg/>": 422, garment[:-40]: 422, bomb.getvalue(): 422, bytes(9_000_000): 413}
    with server.client() as client:
        for content, status in hostile.items():
            try:
                answer = client.post("/noise?t=5", files={"image": ("cat.png", content, "image/png")})
                assert answer.status_code == status, answer.text
                assert answer.headers["content-type"] == "application/problem+json"
            except (httpx.WriteError, httpx.ReadError):  # the server hung up while we were still sending, as it may
                assert status == 413
    assert server.post(json=spec).content == alone


def test_large_bodies_are_taken_for_their_pictures_only(server: RunningServer) -> None:
    padded = server.post(params={"steps": 2}).content.ljust(6_000_000, b"\xff")
    edited = server.post(files={"image": padded}, data={"steps": 20, "strength": 0.1})
    assert pixels(edited.content).shape == (32, 32)
    for body in (b"[" + b"[]," * 400_000 + b"[]]", b'{"sampler": "' + b"x" * 3_000_000 + b'"}', bytes(30_000_000)):
        started = time.monotonic()
        try:
            answer = httpx.post(f"{server.url}/sample", content=body, timeout=60)
            assert (answer.status_code, answer.json()["code"]) == (413, "body_too_large")
        except httpx.TransportError:
            pass  # it hung up while we were still sending
        assert time.monotonic() - started < 10
