"""Convert pictures to model inputs, and model outputs to pixel values. Does not import torch.

The same function converts training pictures and uploads, so the model sees the same pixels.
"""

import contextlib
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageColor, ImageOps

if TYPE_CHECKING:
    from torch import Tensor

Colour = tuple[int, int, int]
BLACK: Colour = (0, 0, 0)
VALUE_RANGE = (-1.0, 1.0)  # range of the model's pixel values
MAX_CHANNELS = 64  # of a model; picture files have at most four
RGBA = 4
MODES = {1: "L", 3: "RGB", RGBA: "RGBA"}  # Pillow modes, keyed by the number of channels


def to_model_range(images: "Tensor") -> "Tensor":
    """Convert uint8 [0, 255] to float32 [-1, 1], as in Ho et al. 2020, sec. 3.3."""
    return images.float() / 127.5 - 1


def to_uint8(x: "Tensor") -> "Tensor":
    """Convert [-1, 1] to uint8 [0, 255], with clipping and rounding to nearest."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


def as_uint8(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Do the same as `to_uint8` for a NumPy array, with identical results."""
    whole: npt.NDArray[np.uint8] = np.rint((x.clip(-1, 1) + np.float32(1)) * np.float32(127.5)).astype(np.uint8)
    return whole


def to_uint16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Convert [-1, 1] to uint16 [0, 65535], with clipping and rounding to nearest."""
    return np.rint((x.clip(-1, 1).astype(np.float64) + 1) / 2 * 65535).astype(np.uint16)


def shown_channels(channels: int, *, alpha: bool) -> int:
    """Return the number of channels in the picture file of an image: 1 (grey), 3 (RGB) or 4 (RGBA).

    An image with two channels is shown as grey, using the first. An image with more than three is shown as RGB, using
    the first three, unless `alpha` is set.

    alpha: True if the last of four channels is alpha. The picture is then RGBA.
    """
    if alpha:
        return RGBA
    return 3 if channels >= 3 else 1


def fit_picture(
    image: Image.Image,
    size_px: tuple[int, int],
    channels: int,
    background: Colour = BLACK,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> npt.NDArray[np.uint8]:
    """Convert a picture to uint8 [height, width, channels] for a model.

    The picture is rotated according to its EXIF orientation and converted to grey (1 channel, ITU-R 601 luma), RGB (3
    channels) or RGBA (4 channels, straight alpha). In grey and RGB, transparent pixels are blended with the background.
    CMYK is converted by R = (1 - C)(1 - K), and likewise for G and B. Colour profiles are ignored. If the size does not
    match, the picture is cropped around its centre to the target's aspect ratio, then resampled with colours weighted
    by alpha.

    size_px: (width, height).

    Raises OSError or another of Pillow's exceptions if the picture cannot be decoded.
    """
    if channels not in MODES:
        raise ValueError(f"the channels of a picture must be 1, 3 or 4 (RGBA), got {channels}")
    turned = upright(image)
    if channels == RGBA and may_be_transparent(turned) and not turned.mode.startswith("I"):
        ready = turned.convert("RGBA")
    else:
        opaque = _opaque(turned, background)
        opaque = opaque.convert("RGB") if opaque.mode == "CMYK" else opaque
        ready = opaque.convert(MODES[channels])
    if ready.size != size_px:
        ready = ImageOps.fit(ready, size_px, resampling)
    return np.array(ready).reshape(size_px[1], size_px[0], channels)


def colour(text: str) -> Colour:
    """Parse a CSS colour name or #rrggbb. Raises ValueError if the text is neither."""
    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise ValueError(f"background must be a colour such as white or #ff8000, got {text!r:.100}") from None


def upright(image: Image.Image) -> Image.Image:
    """Rotate a picture in place according to its EXIF orientation, and return it. Invalid EXIF data is ignored."""
    with contextlib.suppress(Exception):  # some cameras write invalid EXIF data
        ImageOps.exif_transpose(image, in_place=True)
    return image


def may_be_transparent(image: Image.Image) -> bool:
    """Return True if the picture may have transparent pixels. Raises OSError if its palette is missing."""
    if image.mode == "P" and image.palette is None:  # Pillow opens such a file, but an assertion fails later
        raise OSError("it has no palette")
    return image.has_transparency_data


def _opaque(image: Image.Image, background: Colour) -> Image.Image:
    """Reduce 16 bits to 8, and blend transparent pixels with the background."""
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.uint32)
        # Round to nearest. Pillow's own conversion would clip values at 255.
        grey = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
        if (transparent := image.info.get("transparency")) is None:
            return grey
        visible = Image.fromarray(np.where(deep == transparent, 0, 255).astype(np.uint8))
        return Image.composite(grey.convert("RGB"), Image.new("RGB", image.size, background), visible)
    if not may_be_transparent(image):
        return image
    if background == BLACK:
        # Blending with black just multiplies colours by alpha. alpha_composite would hold the GIL for 90 ms.
        return Image.merge("RGB", image.convert("RGBA").convert("RGBa").split()[:3])
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image.convert("RGBA"))
