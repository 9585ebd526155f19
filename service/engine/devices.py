"""Which device the model runs on, and how many rows it holds there unless the settings say so."""

import math

import torch

from tminus.model.checkpoint import Checkpoint

LATENT_BUDGET_BYTES = 512 * 2**20
MAX_DEFAULT_ROWS = 4096


def choose_device(name: str) -> torch.device:
    """Turn auto, cpu, cuda or cuda:N into a device. Raises ValueError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def is_lost(device: torch.device) -> bool:
    """Whether a GPU's context is dead, as after an illegal access: every call fails then. Waits for the device.

    After a want of memory it goes on.
    """
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except Exception:
        return True
    return False


def default_max_rows(checkpoint: Checkpoint) -> int:
    """How many rows' state (x and x0, float32) fits the latent budget."""
    row_bytes = 2 * 4 * math.prod(checkpoint.row_shape)
    return max(4, min(MAX_DEFAULT_ROWS, LATENT_BUDGET_BYTES // row_bytes))
