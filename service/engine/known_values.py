"""What masked rows keep: pixels or latents, and a mask, on the device, one slot per row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tminus.model.pixels import to_model_range
from tminus.model.samplers import keep_known


class KnownValues:
    """Owns x_0 and masks of rows. Made when the first mask comes: servers without masks pay nothing."""

    def __init__(self, max_rows: int, shape: Sequence[int], device: torch.device, latent: bool) -> None:
        """shape [C, H, W] of one row."""
        channels, height, width = shape
        self._latent = latent
        # Pixels are stored as bytes: a quarter of the latents' size, returned bit for bit.
        dtype = torch.float32 if latent else torch.uint8
        self._x_0 = torch.zeros((max_rows, channels, height, width), dtype=dtype, device=device)
        self._new = torch.zeros((max_rows, 1, height, width), dtype=torch.bool, device=device)

    def put(self, rows: Tensor, x_0: Tensor, mask: Tensor) -> None:
        """Store one job's x_0 [C, H, W], pixels as uint8, and its mask. A latent is new if any of its pixels is."""
        height, width = x_0.shape[1:]
        squares = mask.reshape(height, mask.shape[0] // height, width, mask.shape[1] // width)
        self._x_0[rows] = x_0
        self._new[rows] = squares.any(3).any(1)

    def restore(self, x: Tensor, rows: Tensor, levels: Tensor, eps: Tensor) -> Tensor:
        """Put what is known back into x [B, C, H, W] of these rows, at the levels [B, 2] of `Plan.known`."""
        x_0 = self._x_0[rows]
        return keep_known(x, self._new[rows], x_0 if self._latent else to_model_range(x_0), eps, levels)
