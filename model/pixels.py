"""Pixels: pictures fitted to a size, and uint8 [0, 255] to the range the network works in, [-1, 1], and back."""

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


def to_model_range(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1], as Ho et al. 2020, sec. 3.3."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 [0, 255], clipped and rounded to nearest."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def fit_square(image: Image.Image, size_px: int, channels: int) -> np.ndarray:
    """Turn a picture upright as its EXIF data says, crop it about its centre and scale it: uint8 [size, size, C].

    channels is 1 (grey) or 3 (RGB). Raises OSError for a picture that cannot be decoded.
    """
    upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
    fitted = ImageOps.fit(upright, (size_px, size_px), Image.Resampling.LANCZOS)
    return np.asarray(fitted).reshape(size_px, size_px, channels)
