"""Previews from the real server, over a WebSocket library that is not the server's own side of things."""

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageSequence
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from tests.e2e.conftest import RunningServer, SlowDown, pixels, run_cli

SPEC = {"n": 2, "steps": 20, "sampler": "ddim", "seed": 5, "class_label": "sneaker"}


def open_stream(server: RunningServer, **options: Any) -> ClientConnection:
    return connect(f"{server.url.replace('http', 'ws')}/sample/stream", open_timeout=60, **options)


def read(ws: ClientConnection) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    """Messages, each with the pictures that follow it, until the server closes."""
    while True:
        try:
            message = json.loads(ws.recv(timeout=60))
        except ConnectionClosed:
            return
        count = {"frame": 1, "done": message.get("images", 0)}.get(message["type"], 0)
        pictures = [ws.recv(timeout=60) for _ in range(count)]
        assert all(isinstance(picture, bytes) for picture in pictures)
        yield message, pictures  # type: ignore[misc]


def send_and_wait(ws: ClientConnection, text: str) -> None:
    ws.send(text)
    ws.recv(timeout=60)


def test_noise_becomes_an_image_step_by_step(bundled_server: RunningServer, slow_down: SlowDown) -> None:
    slow_down(bundled_server, between_ticks_s=0.03)
    with open_stream(bundled_server) as ws:
        ws.send(json.dumps(SPEC | {"every": 1, "show": ["x_t", "x_0"]}))
        got = list(read(ws))
        assert ws.close_code == 1000
    kinds = [message["type"] for message, _ in got]
    assert (kinds[0], kinds[-1]) == ("accepted", "done")
    frames = {
        show: [(message, pixels(pictures[0]).astype(float)) for message, pictures in got if message.get("show") == show]
        for show in ("x_t", "x_0")
    }
    final = pixels(got[-1][1][0]).astype(float)
    assert got[-1][1][0] == bundled_server.post(json=SPEC).content
    for each in frames.values():
        steps = [message["step"] for message, _ in each]
        assert steps == sorted(set(steps))
        assert len(steps) + got[-1][0]["frames_dropped"] == 19
        times = [message["t"] for message, _ in each]
        assert times == sorted(times, reverse=True)
        distances = [np.abs(picture - final).mean() for _, picture in each]
        assert distances[-1] < 0.5 * distances[0], "it comes nearer to the image"
    # The guess of the image is nearer to it than the latent is, half way.
    x_t, x_0 = ({message["step"]: picture for message, picture in frames[show]} for show in ("x_t", "x_0"))
    half = min(x_t.keys() & x_0.keys(), key=lambda step: abs(step - 10))
    assert np.abs(x_0[half] - final).mean() < np.abs(x_t[half] - final).mean()


def test_the_command_line_watches_and_keeps_the_way(
    bundled_server: RunningServer, tmp_path: Path, slow_down: SlowDown
) -> None:
    slow_down(bundled_server, between_ticks_s=0.03)
    what = ("-n", "4", "--steps", "20", "--sampler", "ddim", "--seed", "5", "--class-label", "sneaker")
    keep = ("--watch", str(tmp_path / "way.webp"), "--every", "4", "--out", str(tmp_path / "sheet.png"), "--scale", "1")
    done = run_cli("sample", "--url", bundled_server.url, *what, *keep)
    assert done.returncode == 0, done.stderr
    assert "seed 5" in done.stdout
    assert done.stderr == "", "there is no terminal for a bar"
    with Image.open(tmp_path / "way.webp") as opened:
        assert (opened.n_frames, opened.size) == (5, (64, 64))  # type: ignore[attr-defined]
        first, last = (np.asarray(each.convert("L")).astype(float) for each in ImageSequence.all_frames(opened)[::4])
    assert np.abs(np.diff(first)).mean() > 2 * np.abs(np.diff(last)).mean(), "from noise to an image"
    assert (tmp_path / "sheet.png").read_bytes() == bundled_server.post(json=SPEC | {"n": 4}).content


def test_a_stream_that_is_dropped_frees_its_rows(server: RunningServer, slow_down: SlowDown) -> None:
    before = server.metric("tminus_jobs_aborted_total")
    slow_down(server)
    with open_stream(server) as ws:
        ws.send(json.dumps(SPEC | {"n": 8, "steps": 1000, "sampler": "ddpm", "every": 1}))
        ws.recv(timeout=60)
        # Dropped without a word, as a phone that goes out of reach would do; a reset, so that the server may know.
        ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ws.socket.close()
    server.wait_until(lambda: server.metric("tminus_jobs_aborted_total") == before + 1)
    server.wait_until(lambda: server.metric("tminus_rows_active") == 0)


@pytest.mark.alone
def test_a_reader_that_sleeps_gets_the_newest_frame_and_the_image_and_holds_up_nobody(server: RunningServer) -> None:
    spec = SPEC | {"n": 16, "steps": 150, "sampler": "ddpm", "every": 1, "layout": "images", "show": ["x_t", "x_0"]}
    with open_stream(server, max_queue=1, ping_interval=None) as ws:
        ws.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ws.send(json.dumps(spec))
        began = time.monotonic()
        alone = server.post(json=SPEC | {"seed": 6})
        assert alone.status_code == 200
        assert time.monotonic() - began < 20
        job = json.loads(ws.recv(timeout=60))["id"]
        server.wait_until(
            lambda: httpx.get(f"{server.url}/jobs/{job}").status_code == 404
        )  # done, and nothing was read
        got = list(read(ws))
    assert got[-1][0]["type"] == "done"
    assert len(got[-1][1]) == 16
    steps = [message["step"] for message, _ in got[:-1]]
    assert steps == sorted(steps)
    assert got[-1][0]["frames_dropped"] > 50
    assert server.metric("tminus_frames_dropped_total") > 50


def test_a_message_over_the_limit_is_not_taken(server: RunningServer) -> None:
    """Of thirty megabytes the rest is still on its way when the connection is cut, so that the reason may get lost."""
    for size, codes in ((2_400_000, {1009}), (30_000_000, {1009, 1006})):
        with open_stream(server) as ws:
            message = "[" + "1," * (size // 2) + "1]"
            if size < 22_000_000:  # as much as a message with images may have
                ws.send(message)
                assert json.loads(ws.recv(timeout=60))["code"] == "body_too_large"
            with pytest.raises(ConnectionClosed):
                send_and_wait(ws, message)
            assert ws.close_code in codes
    assert server.post(json=SPEC).status_code == 200


@pytest.mark.alone
def test_streams_that_run_when_the_server_is_told_to_stop_get_their_images(
    own_server: Callable[..., RunningServer],
) -> None:
    server = own_server()
    spec = SPEC | {"n": 32, "steps": 10, "every": 5, "layout": "images"}
    with ExitStack() as stack:
        streams = [stack.enter_context(open_stream(server)) for _ in range(4)]
        idle = stack.enter_context(open_stream(server))
        for seed, ws in enumerate(streams):
            ws.send(json.dumps(spec | {"seed": seed}))
            assert json.loads(ws.recv(timeout=60))["type"] == "accepted"
        server.process.terminate()
        with ThreadPoolExecutor(4) as pool:
            for got in pool.map(lambda ws: list(read(ws)), streams):
                assert got[-1][0]["type"] == "done"
                assert len(got[-1][1]) == 32
        assert list(read(idle)) == []
        assert idle.close_code == 1012
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log
