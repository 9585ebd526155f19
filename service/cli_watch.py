"""`tminus sample --url … --watch FILE`: look on while a server denoises, and keep the frames as an animation."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from service.cli import fail

if TYPE_CHECKING:
    from PIL.Image import Image
    from websockets.sync.client import ClientConnection

FRAME_MS, LAST_MS = 40, 1500
MOST_FRAMES = 100  # unless --every says so
FORMATS: dict[str, dict[str, Any]] = {".webp": {"lossless": True}, ".gif": {}}


def follow(
    url: str, parameters: dict[str, Any], sheet: bool, animation: Path, every: int | None, show: str
) -> tuple[dict[str, bytes], int]:
    """Run a job on a server with a progress bar; write the animation; give its PNG files by name, and the seed."""
    from websockets.exceptions import InvalidHandshake, InvalidURI, WebSocketException
    from websockets.sync.client import connect

    if animation.suffix.lower() not in FORMATS:
        fail(f"--watch {animation}: must end in {' or '.join(FORMATS)}")
    every = every or max(1, int(parameters.get("steps", 1000)) // MOST_FRAMES)
    layout = "sheet" if sheet else "images"
    spec = parameters | {"every": every, "show": show, "layout": layout}
    address = url.rstrip("/").replace("http", "ws", 1) + "/sample/stream"
    try:
        with connect(address, max_size=None) as ws:
            ws.send(json.dumps(spec))
            seed, frames, finals = _read(ws, url)
    except InvalidHandshake as error:
        fail(f"{url}: {_reason(error)}")
    except (InvalidURI, WebSocketException, OSError) as error:
        fail(f"{url}: {error}")
    try:
        _write(animation, [*frames, _sheet(finals)])
    except OSError as error:
        fail(f"--watch {animation}: {error}")
    click.echo(f"{animation}: {len(frames) + 1} frames")
    index = int(parameters.get("index", 0))
    names = ["sheet"] if sheet else [f"{index + k:05d}.png" for k in range(len(finals))]
    return dict(zip(names, finals, strict=True)), seed


def _read(ws: "ClientConnection", url: str) -> tuple[int, list["Image"], list[bytes]]:
    """Read a job's stream to its end: the seed, a picture of each step that was shown, and the PNGs."""
    from tqdm import tqdm

    seed, shown = 0, dict[int, list[bytes]]()
    with tqdm(total=None, unit="step", dynamic_ncols=True) as progress:
        for message in _messages(ws):
            if message["type"] == "accepted":
                seed = message["seed"]
                if message["position"]:
                    progress.set_description(f"{message['position']} jobs ahead, {message['eta_s']:.0f} s")
            elif message["type"] == "frame":
                shown.setdefault(message["step"], []).append(_picture(ws))
                progress.total = message["steps"]
                progress.set_description(f"t={message['t']}, {message['eta_s']:.1f} s left")
                progress.update(message["step"] - progress.n)
            elif message["type"] == "done":
                progress.update((progress.total or progress.n) - progress.n)
                return seed, [_sheet(each) for each in shown.values()], [_picture(ws) for _ in range(message["images"])]
            else:
                progress.close()  # so that the reason is the last line
                fail(f"{url}: {message.get('status', '')} {message.get('detail', message['type'])}")
    return fail(f"{url}: the server closed before the job was done")


def _messages(ws: "ClientConnection") -> Iterator[dict[str, Any]]:
    for text in ws:
        yield json.loads(text)


def _picture(ws: "ClientConnection") -> bytes:
    data = ws.recv()
    assert isinstance(data, bytes)
    return data


def _sheet(pictures: list[bytes]) -> "Image":
    """One picture of one or several."""
    import numpy as np
    from PIL import Image

    from service.encoder import contact_sheet

    opened = [Image.open(io.BytesIO(each)).convert("RGB") for each in pictures]
    return opened[0] if len(opened) == 1 else Image.fromarray(contact_sheet(np.stack([*map(np.asarray, opened)])))


def _write(file: Path, frames: list["Image"]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    options = FORMATS[file.suffix.lower()]
    frames[0].save(file, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)


def _reason(error: Exception) -> str:
    """What a refused handshake says: a problem document, where it is one of ours."""
    body = getattr(getattr(error, "response", None), "body", None)
    try:
        return str(json.loads(body or b"")["detail"])
    except (ValueError, KeyError, TypeError):
        return str(error)
