"""The images that `train` learns from and `evaluate` compares with."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tminus.model.training.data import ImageSet


def load_training_data(
    data: str, split: str, idx_folder: Path | None, size_px: int, channels: int, background: str
) -> "ImageSet":
    """Load a split (train, test) of Fashion-MNIST, or all of the folder that `data` names.

    idx_folder is where Fashion-MNIST's files lie, None for Debian's place; size_px, channels and background, the colour
    that transparent pixels are laid over, are those of a folder's images. Raises DataError, and ValueError for a
    background that is no colour.
    """
    from tminus.model.pixels import colour
    from tminus.model.training.data import FASHION_MNIST_DIR, load_fashion_mnist, load_image_folder

    if data == "fashion-mnist":
        return load_fashion_mnist(split, idx_folder or FASHION_MNIST_DIR)
    return load_image_folder(Path(data), size_px, channels, colour(background))
