"""The known pixels of masked rows: image and mask on the device, one slot per row."""

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
    """Owns images and masks. Made when the first mask comes: servers without masks pay nothing."""

    def __init__(self, max_rows: int, shape: Sequence[int], device: torch.device) -> None:
        """shape [C, H, W] of one row."""
        channels, height, width = shape
        self._device = device
        # Stored as bytes: an eighth of the latents' size, returned bit for bit.
        self._image = torch.zeros((max_rows, channels, height, width), dtype=torch.uint8, device=device)
        self._new = torch.zeros((max_rows, 1, height, width), dtype=torch.bool, device=device)

    def put(self, rows: Tensor, image: Images, mask: npt.NDArray[np.bool_]) -> None:
        """Store one job's image [H, W, C] and mask [H, W]."""
        self._image[rows] = to_device(image, self._device).permute(2, 0, 1)
        self._new[rows] = to_device(mask, self._device)

    def restore(self, x: Tensor, rows: Tensor, levels: Tensor, eps: Tensor) -> Tensor:
        """Put the known pixels back into x [B, C, H, W] of these rows, at the levels [B, 2] of `Plan.known`."""
        return keep_known(x, self._new[rows], to_model_range(self._image[rows]), eps, levels)
