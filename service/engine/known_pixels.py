"""The known pixels of rows whose masks keep some: on the device, a slot a row. torch is here for the engine only."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.data import to_model_range
from model.samplers import keep_known
from service.spec import Images


class KnownPixels:
    """Owns images, masks and noise levels. Made when the first mask comes: who never sends one pays nothing."""

    def __init__(self, max_rows: int, max_lines: int, shape: Sequence[int], device: torch.device) -> None:
        """max_lines: of the plans of all jobs; shape: C, H, W."""
        channels, height, width = shape
        self._device = device
        # As bytes: an eighth of what the rows' latents take, and their pixels come out as they came in.
        self._image = torch.zeros((max_rows, channels, height, width), dtype=torch.uint8, device=device)
        self._new = torch.zeros((max_rows, 1, height, width), dtype=torch.bool, device=device)
        self._levels = torch.zeros((max_lines, 2), dtype=torch.float32, device=device)  # Plan.known

    def put(self, rows: Tensor, image: Images, mask: npt.NDArray[np.bool_], first_line: int, levels: Tensor) -> None:
        """Give one job's rows their image [H, W, C], mask [H, W] and plan.known, which begins at first_line."""
        self._image[rows] = to_device(image, self._device).permute(2, 0, 1)
        self._new[rows] = to_device(mask, self._device)
        self._levels[first_line : first_line + len(levels)] = levels.to(torch.float32)

    def restore(self, x: Tensor, rows: Tensor, lines: Tensor, eps: Tensor) -> Tensor:
        """Put them back into x [B, C, H, W] of these rows, at the noise level that these lines of theirs lead to."""
        return keep_known(x, self._new[rows], to_model_range(self._image[rows]), eps, self._levels[lines])


def to_device(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Bring pixels to the device; nobody waits for them."""
    tensor = torch.tensor(array)  # a copy: what was read from a store may not be written to, which from_numpy minds
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
