"""Training images, from Fashion-MNIST or from a folder, in memory as uint8 [N, C, H, W].

Examples are the inputs of a network: images, or their latents.
"""

import gzip
import logging
import math
import os
import zlib
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tminus.model.latent.autoencoder import Autoencoder, latents_of
from tminus.model.pixels import BLACK, RGBA, Colour, fit_picture, to_model_range

log = logging.getLogger(__name__)

FASHION_MNIST_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
)
FASHION_MNIST_DIR = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist installs it
MOST_LISTED = 20  # names shown in a message
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif"})


class DataError(ValueError):
    """Raised if a data set is missing or malformed. The message names the file or folder."""


@dataclass(frozen=True)
class ImageSet:
    """A data set: images uint8 [N, C, H, W], and labels int64 [N] or None if there are no classes."""

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True, slots=True)
class Examples:
    """x_0 [N, C, H, W], either uint8 pixels or latents, and class_labels int64 [N] or None, on any device.

    Pixels stay uint8 to save memory. Each batch is converted to the network's range.
    """

    x_0: Tensor
    class_labels: Tensor | None

    @classmethod
    def of(cls, data: ImageSet, autoencoder: Autoencoder | None, device: torch.device) -> "Examples":
        """Move an entire data set to the device, as pixels, or as latents if there is an autoencoder."""
        x_0 = data.images.to(device) if autoencoder is None else latents_of(autoencoder, data.images, device)
        return cls(x_0, data.labels.to(device) if data.labels is not None else None)

    @classmethod
    def some_of(cls, data: ImageSet, count: int, autoencoder: Autoencoder | None, device: torch.device) -> "Examples":
        """Take `count` evenly spaced images of a data set. Pixels stay on the host; latents are on the device."""
        picked = evenly(len(data), count)
        images, labels = data.images[picked], data.labels[picked] if data.labels is not None else None
        return cls(images if autoencoder is None else latents_of(autoencoder, images, device), labels)

    def rows(self, picked: Tensor | slice, device: torch.device | None = None) -> Tensor:
        """Return x_0 of the picked examples in the network's range, on `device` or where the examples are."""
        x_0 = self.x_0[picked].to(device or self.x_0.device)
        return to_model_range(x_0) if x_0.dtype == torch.uint8 else x_0


def evenly(length: int, count: int) -> Tensor:
    """Return `count` evenly spaced indices below `length`, int64 [count], to cover all classes of sorted data."""
    return torch.arange(count) * length // count


def read_idx(path: Path) -> np.ndarray:
    """Read a gzipped IDX file of unsigned bytes, the format of MNIST. Raises DataError if that fails."""
    try:
        with gzip.open(path, "rb") as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: {error}") from error
    if len(data) < 4 or data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{path}: not an IDX file of unsigned bytes")
    ndim = data[3]
    shape = tuple(int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(ndim))
    body = np.frombuffer(data[4 + 4 * ndim :], np.uint8)
    if body.size != math.prod(shape):
        raise DataError(f"{path}: {body.size} bytes where its header says {shape}")
    return body.reshape(shape)


def load_fashion_mnist(split: str, folder: Path = FASHION_MNIST_DIR) -> ImageSet:
    """Load Fashion-MNIST, padded with black from 28x28 to 32x32.

    `split` is `train` (60,000 images) or `test` (10,000). Raises DataError if the files are missing or malformed.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    if not folder.is_dir():
        raise DataError(f"{folder}: not there (apt-get install dataset-fashion-mnist, or name its folder)")
    images = torch.from_numpy(read_idx(folder / f"{prefix}-images-idx3-ubyte.gz").copy())[:, None]
    labels = torch.from_numpy(read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz").astype(np.int64))
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} images but {len(labels)} labels")
    return ImageSet(F.pad(images, (2, 2, 2, 2)), labels, FASHION_MNIST_CLASSES, f"fashion-mnist {split}")


def load_image_folder(folder: Path, size_px: int, channels: int | None, background: Colour = BLACK) -> ImageSet:
    """Load all pictures below `folder`, centre-cropped and resized to size_px x size_px.

    The subfolders of `folder` are the classes, sorted by name, or by number if all names are numbers. Folders inside
    the classes are allowed, with a warning. Alternatively, all pictures are directly in `folder`, and there are no
    classes. Pictures are sorted by path, so the same folder always gives the same data set.

    `channels` is 1 for grey, 3 for RGB or 4 for RGBA. None means grey if no pixel has a colour, otherwise RGB. Except
    in RGBA, transparent pixels are blended with the background. If the background is not black, the name of the data
    set includes it. Raises DataError if there are no pictures, if the layout is wrong, or if a picture cannot be read.
    """
    if channels == RGBA and background != BLACK:
        raise DataError(f"background must be black, its default, for RGBA, which keeps alpha; got {background}")
    files = sorted(_image_files(folder))
    if not files:
        raise DataError(f"{folder}: no image files ({', '.join(sorted(IMAGE_SUFFIXES))})")
    parts = [file.relative_to(folder).parts for file in files]
    nested = {len(p) > 1 for p in parts}
    if nested == {True, False}:
        raise DataError(f"{folder}: some images lie in class subfolders and some do not")
    class_names = _in_order({p[0] for p in parts}) if nested == {True} else ()
    if len({name.casefold() for name in class_names}) < len(class_names):
        raise DataError(f"{folder}: two subfolders differ by case alone, and classes are named without regard to it")
    if further := sorted({"/".join(p[:2]) for p in parts if len(p) > 2}):
        log.warning(
            "%s: its classes are the folders directly in it: %s. They have folders inside, which are not classes: %s; "
            "for these to be the classes, give the folder that they are in",
            folder, listed(class_names), listed(further),
        )  # fmt: skip
    labels = torch.tensor([class_names.index(p[0]) for p in parts]) if class_names else None

    def load(file: Path) -> np.ndarray:
        try:
            with Image.open(file) as image:
                return fit_picture(image, (size_px, size_px), channels or 3, background)
        except MemoryError:
            raise
        except Exception as error:  # For broken files, Pillow raises OSError, SyntaxError, ValueError and others.
            raise DataError(f"{file}: {str(error) or type(error).__name__}") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        stacked = np.stack(list(pool.map(load, files)))
    if channels is None and (stacked == stacked[..., :1]).all():
        stacked = stacked[..., :1]
    name = folder.name if background == BLACK else f"{folder.name} over #{bytes(background).hex()}"
    return ImageSet(torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous(), labels, class_names, name)


def listed(names: Sequence[str]) -> str:
    """Join names with commas. Names beyond the first MOST_LISTED are only counted."""
    return ", ".join(names[:MOST_LISTED]) + (f" and {len(names) - MOST_LISTED} more" if names[MOST_LISTED:] else "")


def _in_order(names: Collection[str]) -> tuple[str, ...]:
    if all(name.isascii() and name.isdecimal() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _image_files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder}: not a folder")
    for path in folder.rglob("*"):
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            yield path
