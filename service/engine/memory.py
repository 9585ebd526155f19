"""Whether one row of a model fits the memory there is, told before anything of its size is made."""

from pathlib import Path

import torch

from tminus.model.unet_config import UNetConfig

GIB = 2**30
MAPS_PER_LAYER = 3  # of a layer's width that are alive at once: its input, its output, and one between


def pass_bytes(config: UNetConfig, size_px: tuple[int, int]) -> int:
    """Roughly what one row takes in a forward pass, in float32: feature maps, those kept for the way up, attention."""
    height, width = size_px
    total = 0
    names = list(zip(config.down_block_types, config.up_block_types[::-1], strict=True))
    for level, (channels, blocks) in enumerate(zip(config.block_out_channels, names, strict=True)):
        pixels = height * width >> 2 * level
        total += 4 * channels * pixels * (config.layers_per_block + MAPS_PER_LAYER)
        if any(name.startswith("Attn") for name in blocks):
            total += 4 * (channels // config.head_width(channels)) * pixels**2
    return total


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def check_memory(config: UNetConfig, size_px: tuple[int, int], device: torch.device) -> None:
    """Raise ValueError for a model of which not even one row fits."""
    needed, free = pass_bytes(config, size_px), available_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"sample_size {size_px[0]}x{size_px[1]} of this U-Net takes about {needed / GIB:.1f} GiB for one image, "
            f"and {free / GIB:.1f} GiB are free on {device}"
        )
