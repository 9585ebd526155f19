"""Whether one row of a model fits the memory there is, told before anything of its size is made."""

from pathlib import Path

import torch

from tminus.model.denoiser import NetConfig

GIB = 2**30


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def check_memory(config: NetConfig, size_px: tuple[int, int], device: torch.device) -> None:
    """Raise ValueError for a model of which not even one row fits."""
    needed, free = config.pass_bytes(size_px), available_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"sample_size {size_px[0]}x{size_px[1]} of this network takes about {needed / GIB:.1f} GiB for one image, "
            f"and {free / GIB:.1f} GiB are free on {device}"
        )
