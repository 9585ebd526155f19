"""The known pixels of masked rows: image, mask and noise levels on the device, one slot per row."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tminus.model.pixels import to_model_range
from tminus.model.samplers import keep_known
from tminus.service.engine.transfer import to_device
from tminus.service.spec import Images


class KnownPixels:
    """Owns images, masks and noise levels. Made when the first mask comes: servers without masks pay nothing."""

    def __init__(self, max_rows: int, max_lines: int, shape: Sequence[int], device: torch.device) -> None:
        """max_lines: lines of all jobs' plans together; shape [C, H, W] of one row."""
        channels, height, width = shape
        self._device = device
        # Stored as bytes: an eighth of the latents' size, returned bit for bit.
        self._image = torch.zeros((max_rows, channels, height, width), dtype=torch.uint8, device=device)
        self._new = torch.zeros((max_rows, 1, height, width), dtype=torch.bool, device=device)
        self._levels = torch.zeros((max_lines, 2), dtype=torch.float32, device=device)  # Plan.known

    def put(self, rows: Tensor, image: Images, mask: npt.NDArray[np.bool_], first_line: int, levels: Tensor) -> None:
        """Store one job's image [H, W, C], mask [H, W] and levels (`Plan.known`), which begin at first_line."""
        self._image[rows] = to_device(image, self._device).permute(2, 0, 1)
        self._new[rows] = to_device(mask, self._device)
        self._levels[first_line : first_line + len(levels)] = levels.to(torch.float32)

    def restore(self, x: Tensor, rows: Tensor, lines: Tensor, eps: Tensor) -> Tensor:
        """Put the known pixels back into x [B, C, H, W] of these rows, at the noise level their lines lead to."""
        return keep_known(x, self._new[rows], to_model_range(self._image[rows]), eps, self._levels[lines])
