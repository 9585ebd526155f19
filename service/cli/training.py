"""What the commands that train share: the images they learn from, and the sheets of samples that a run draws."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from tminus.model.denoiser import Denoiser, NetConfig
    from tminus.model.latent.autoencoder import Autoencoder
    from tminus.model.samplers import Plan
    from tminus.model.training.data import ImageSet

ROWS_PER_CLASS = 2
IMAGES_WITHOUT_CLASSES = 16
RECONSTRUCTIONS = 8  # a row of the sheet


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


def sheet_writer(
    folder: Path, unet: "NetConfig", device: "torch.device", autoencoder: "Autoencoder | None" = None
) -> Callable[["Denoiser", "Plan", int], None]:
    """Make the function that draws a sheet of samples, always from the same noise, so that sheets can be compared.

    autoencoder: of a latent model, makes images of the samples.
    """
    import torch

    from tminus.model.latent.latents import images_of
    from tminus.model.rng import image_noise
    from tminus.model.samplers import sample

    num_classes = (unet.num_class_embeds or 1) - 1
    n = num_classes * ROWS_PER_CLASS or IMAGES_WITHOUT_CLASSES
    labels = torch.arange(n, device=device) % num_classes if num_classes else None
    assert unet.size_px is not None  # which every network that is trained, or loaded, has
    shape = (unet.in_channels, *unet.size_px)

    def write(net: "Denoiser", plan: "Plan", step: int) -> None:
        x_T = image_noise(0, range(n), 0, shape, device)
        x = sample(net, plan, x_T, lambda k: image_noise(0, range(n), k + 1, shape, device), class_labels=labels)
        _write(folder, step, x if autoencoder is None else images_of(autoencoder, x))

    return write


def reconstruction_writer(
    folder: Path, data: "ImageSet", device: "torch.device"
) -> Callable[["Autoencoder", int], None]:
    """Make the function that draws the first images of the data, and below each what an autoencoder makes of it."""
    import torch

    from tminus.model.latent.latents import images_of, latents_of
    from tminus.model.pixels import to_model_range

    images = data.images[:: max(1, len(data) // RECONSTRUCTIONS)][:RECONSTRUCTIONS]

    def write(autoencoder: "Autoencoder", step: int) -> None:
        again = images_of(autoencoder, latents_of(autoencoder, images, device))
        _write(folder, step, torch.cat([to_model_range(images.to(device)), again]))

    return write


def _write(folder: Path, step: int, x: "torch.Tensor") -> None:
    """Write images [n, C, H, W] in [-1, 1] as the sheet of a step."""
    from tminus.model.pixels import to_uint8
    from tminus.service.images.encoder import contact_sheet, encode_png

    pixels = to_uint8(x).permute(0, 2, 3, 1).contiguous().cpu().numpy()
    sheets = folder / "sheets"
    sheets.mkdir(exist_ok=True)
    (sheets / f"{step:07d}.png").write_bytes(encode_png(contact_sheet(pixels)))
