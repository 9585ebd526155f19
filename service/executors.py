"""How a forward pass is run. One small interface: places in, the network's output in float32 out."""

from typing import Protocol

import torch
from torch import Tensor

from model.unet import UNet2D


class Executor(Protocol):
    """Runs the U-Net on one batch of places."""

    name: str

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """x [B, C, H, W] float32, t [B] int64, class_labels [B] int64 or None -> out [B, C', H, W] float32."""
        ...


class EagerExecutor:
    """PyTorch as it is, float32, channels last."""

    name = "eager"

    def __init__(self, net: UNet2D, device: torch.device) -> None:
        self._net: UNet2D = net.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """See Executor."""
        out: Tensor = self._net(x.contiguous(memory_format=torch.channels_last), t, class_labels)
        return out
