"""Frames to an animation: lossless WebP, or GIF."""

import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, features

WEBP_VERSION = f"libwebp {features.version('webp')}"  # another version may write other bytes
FRAME_MS, LAST_MS = 40, 1500
OPTIONS: dict[str, dict[str, Any]] = {"webp": {"lossless": True}, "gif": {}}


def encode_animation(frames: Sequence[Image.Image], kind: str = "webp") -> bytes:
    """Encode pictures of one size and mode as an endless loop; the last is shown longer."""
    out = io.BytesIO()
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    frames[0].save(out, kind, save_all=True, append_images=frames[1:], duration=durations, loop=0, **OPTIONS[kind])
    return out.getvalue()
