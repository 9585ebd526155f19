"""The parameters of a job, and how they are sent."""

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

Picture = bytes | Path | str
PICTURES = ("image", "mask")
JSON_BODY = {"Content-Type": "application/json"}


class Parameters(TypedDict, total=False):
    """The parameters of POST /sample, as the API reference describes them. The server has a default for each.

    A Picture is the bytes of a PNG, JPEG or WebP, the Path of such a file, or its base64.
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
    image: Picture
    mask: Picture
    strength: float
    image_sha256: str
    mask_sha256: str


class Preview(TypedDict, total=False):
    """The frames of a job.

    every: steps between frames. fps: frames a second (10 if neither is given). show: `x_t` (the latent), `x_0` (the
    network's prediction), or a list of both. By default `watch` shows `x_t`; `events`, nothing.
    frame_format: `png`, `webp` or `jpeg`. layout: `sheet` (one picture of all images) or `images` (one each).
    """

    every: int
    fps: float
    show: str | Sequence[str]
    frame_format: str
    layout: str


class Sampling(Parameters, total=False):
    """The parameters of `sample`.

    For accept="image/webp": every, the steps between frames; show, `x_t` or `x_0`. For
    accept="application/vnd.tminus.trajectory": keep, the passes (default: all); dtype, float32 or float16. For
    accept="application/x-npy": clip_output, whether to clip to the model's range (default: yes).
    """

    every: int
    show: str
    keep: Sequence[int]
    dtype: str
    clip_output: bool


class Shown(Parameters, Preview, total=False):
    """The parameters of `watch`."""


def text_of(parameters: Mapping[str, Any]) -> str:
    """Return the parameters as JSON. Raises OSError for an unreadable file, and ValueError for NaN or infinity."""
    pictures = {
        name: base64.b64encode(bytes_of(value)).decode("ascii")
        for name in PICTURES
        if isinstance(value := parameters.get(name), bytes | Path)
    }
    return json.dumps({**parameters, **pictures}, allow_nan=False)


def webhook_members(webhook: str | None, events: Sequence[str] | None) -> dict[str, Any]:
    """The parameters of a webhook."""
    members = {"webhook": webhook, "webhook_events_filter": None if events is None else list(events)}
    return {name: value for name, value in members.items() if value is not None}


def bytes_of(image: bytes | Path) -> bytes:
    """The bytes of an image. Raises OSError for an unreadable file."""
    return image.read_bytes() if isinstance(image, Path) else image
