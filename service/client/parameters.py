"""Parameters of a job, and their encoding as JSON."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

Picture = bytes | Path | str
PICTURES = ("image", "mask")
JSON_BODY = {"Content-Type": "application/json"}


class Parameters(TypedDict, total=False):
    """Parameters of POST /sample; the API reference describes them. All are optional.

    A Picture is a PNG, JPEG or WebP file: its content as bytes or base64, or its Path.
    """

    n: int
    steps: int
    sampler: str
    eta: float
    seed: int
    index: int
    to_seed: int
    mix: float
    class_label: int | str | Sequence[int | str | None] | None
    guidance: float
    guidance_interval: tuple[int, int]
    guidance_rescale: float
    timestep_spacing: str
    nearest: bool
    table: str
    clip: bool
    bit_depth: int
    deadline_s: float
    quality: str
    image: Picture
    mask: Picture
    strength: float
    image_sha256: str
    mask_sha256: str


class Preview(TypedDict, total=False):
    """Parameters for the frames of a job.

    every: number of steps between frames. fps: frames per second; 10 if neither every nor fps is given. show:
    `x_t` (the latent), `x_0` (the network's prediction), or a list of both. By default `watch` shows `x_t`, and
    `events` shows no frames. frame_format: `png`, `webp` or `jpeg`. layout: `sheet` (one picture of all images) or
    `images` (one picture per image).
    """

    every: int
    fps: float
    show: str | Sequence[str]
    frame_format: str
    layout: str


class Sampling(Parameters, total=False):
    """Parameters of `sample`. Some apply only to one format.

    accept="image/webp": every, the number of steps between frames; show, `x_t` or `x_0`.
    accept="application/vnd.tminus.trajectory": keep, the passes to return (default: all); dtype, float32 or float16.
    accept="application/x-npy": clip_output, whether to clip to the model's range (default: True).
    """

    every: int
    show: str
    keep: Sequence[int]
    dtype: str
    clip_output: bool


class Shown(Parameters, Preview, total=False):
    """Parameters of `watch`."""


def text_of(parameters: Mapping[str, Any]) -> str:
    """Encode parameters as JSON. Raises OSError for an unreadable file, ValueError for NaN or infinity."""
    pictures = {
        name: base64.b64encode(bytes_of(value)).decode("ascii")
        for name in PICTURES
        if isinstance(value := parameters.get(name), bytes | Path)
    }
    return json.dumps({**parameters, **pictures}, allow_nan=False)


def webhook_members(webhook: str | None, events: Sequence[str] | None) -> dict[str, Any]:
    """Return the parameters for a webhook. Leaves out None."""
    members = {"webhook": webhook, "webhook_events_filter": None if events is None else list(events)}
    return {name: value for name, value in members.items() if value is not None}


def bytes_of(image: bytes | Path) -> bytes:
    """Return the content of an image file. Raises OSError if it cannot be read."""
    return image.read_bytes() if isinstance(image, Path) else image
