"""Whether one row of a model fits the memory there is, told before anything of its size is made; and giving it back."""

import ctypes
import gc
from contextlib import suppress
from typing import Protocol

import torch

from tminus.model.machine import GIB, free_memory_bytes


def available_bytes(device: torch.device) -> int | None:
    """Memory that is free; None where the system does not tell."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory_bytes()


class NeedsMemory(Protocol):
    """The configuration of a network that can tell what a pass takes."""

    def pass_bytes(self, size_px: tuple[int, int]) -> int:
        """Roughly what one image of (height, width) takes."""


def check_memory(
    config: NeedsMemory, size_px: tuple[int, int], device: torch.device, what: str = "network", weights_bytes: int = 0
) -> None:
    """Raise ValueError for a model of which not even one row fits. weights_bytes: of weights that are not there yet."""
    needed, free = config.pass_bytes(size_px) + weights_bytes, available_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"sample_size {size_px[0]}x{size_px[1]} of this {what} takes about {needed / GIB:.1f} GiB for one image, "
            f"and {free / GIB:.1f} GiB are free on {device}"
        )


def release_memory() -> None:
    """Give back to the system what a model took that nobody has any more. Takes some 0.1 s."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError):  # only glibc keeps freed memory, and has a call for that
        ctypes.CDLL(None).malloc_trim(0)
