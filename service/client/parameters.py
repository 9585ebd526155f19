"""The parameters of a job, as the server takes them."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

Picture = bytes | Path | str
PICTURES = ("image", "mask")


class Parameters(TypedDict, total=False):
    """What of POST /sample may be given; README.md says what each means. What is left out is the server's default.

    A Picture is the bytes of a PNG, JPEG or WebP, the Path of such a file, or its base64.
    """

    n: int
    steps: int
    sampler: str
    eta: float
    seed: int
    index: int
    class_label: int | str | Sequence[int | str | None] | None
    guidance: float
    guidance_interval: tuple[int, int]
    timestep_spacing: str
    clip: bool
    deadline_s: float
    image: Picture
    mask: Picture
    strength: float
    image_sha256: str
    mask_sha256: str


class Preview(TypedDict, total=False):
    """How a job is shown.

    A frame after `every` so many steps, or `fps` a second (10 if neither is given). show: `x_t`, the latent (the
    default of `watch`; `events` shows nothing unless asked to), `x_0`, the network's guess, or a list of both.
    frame_format: `png`, `webp` or `jpeg`. layout: `sheet`, one picture of all images, or `images`, one each.
    """

    every: int
    fps: float
    show: str | Sequence[str]
    frame_format: str
    layout: str


class Sampling(Parameters, total=False):
    """A job of `sample`. With accept="image/webp" a frame after `every` so many steps, of x_t or as `show` says."""

    every: int
    show: str


class Shown(Parameters, Preview, total=False):
    """A job, and how it is shown."""


def body_of(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object to send. Raises OSError where a file cannot be read."""
    body = dict(parameters)
    for name in PICTURES:
        value = body.get(name)
        if isinstance(value, bytes | Path):
            body[name] = base64.b64encode(bytes_of(value)).decode("ascii")
    return body


def bytes_of(image: bytes | Path) -> bytes:
    """The bytes of an image. Raises OSError where a file cannot be read."""
    return image.read_bytes() if isinstance(image, Path) else image
