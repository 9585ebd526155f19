"""Pictures, and an edit of one: what is sent, and what the engine and the answer have of it."""

import base64
import io
import json
from typing import Any

import numpy as np
from PIL import Image

from tests.service.conftest import Site
from tminus.service.spec import Inputs


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(picture: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(out, kind, **options)
    return out.getvalue()


PICTURE = noise(4, 6)
CAT = encode(PICTURE)
MASK_PIXELS = np.repeat(np.arange(6)[None] < 3, 4, axis=0)
MASK = encode(np.where(MASK_PIXELS, 255, 0).astype(np.uint8))
INPUTS = Inputs(PICTURE[..., None], MASK_PIXELS)
EDIT: dict[str, Any] = {"steps": 5, "seed": 1, "n": 2}
# Of 6x4 pixels that count in a palette, which is not there. Pillow finds that only after it has decoded them.
NO_PALETTE = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAYAAAAECAMAAACa2r5xAAAAC0lEQVR4nGNgwA0AABwAAVTiHp4AAAAASUVORK5CYII="
)


def b64(data: bytes, kind: str | None = None) -> str:
    text = base64.b64encode(data).decode()
    return text if kind is None else f"data:{kind};base64,{text}"


def got(site: Site) -> Inputs | None:
    """What came with the last job."""
    return site.engine.inputs[-1]


def same(inputs: Inputs | None, image: np.ndarray = PICTURE, mask: np.ndarray | None = None) -> bool:
    if inputs is None or (inputs.mask is None) != (mask is None):
        return False
    return np.array_equal(inputs.image[..., 0], image) and (mask is None or np.array_equal(inputs.mask, mask))


def spec_in(png: bytes) -> dict[str, Any]:
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        found: dict[str, Any] = json.loads(image.text["tminus"])["spec"]  # type: ignore[attr-defined]
    return found
