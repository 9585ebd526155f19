"""The sheets of samples that a run of training draws on its way."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from tminus.model.denoiser import Denoiser, NetConfig
    from tminus.model.samplers import Plan

ROWS_PER_CLASS = 2
IMAGES_WITHOUT_CLASSES = 16


def sheet_writer(folder: Path, unet: "NetConfig", device: "torch.device") -> Callable[["Denoiser", "Plan", int], None]:
    """Make the function that draws a sheet of samples, always from the same noise, so that sheets can be compared."""
    import torch

    from tminus.model.pixels import to_uint8
    from tminus.model.rng import image_noise
    from tminus.model.samplers import sample
    from tminus.service.images.encoder import contact_sheet, encode_png

    num_classes = (unet.num_class_embeds or 1) - 1
    n = num_classes * ROWS_PER_CLASS or IMAGES_WITHOUT_CLASSES
    labels = torch.arange(n, device=device) % num_classes if num_classes else None
    shape = (unet.in_channels, *(unet.size_px or (0, 0)))

    def write(net: "Denoiser", plan: "Plan", step: int) -> None:
        x_T = image_noise(0, range(n), 0, shape, device)
        x = sample(net, plan, x_T, lambda k: image_noise(0, range(n), k + 1, shape, device), class_labels=labels)
        pixels = to_uint8(x).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        sheets = folder / "sheets"
        sheets.mkdir(exist_ok=True)
        (sheets / f"{step:07d}.png").write_bytes(encode_png(contact_sheet(pixels)))

    return write
