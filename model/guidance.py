"""Classifier-free guidance (Ho & Salimans 2022): combine outputs with and without a class."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""A network run by any executor: x [B, C, H, W], t [B], class_labels [B] or None -> out [B, C or 2C, H, W]."""


def guide(out_u: Tensor, out_c: Tensor, guidance: Tensor | float, channels: int | None = None) -> Tensor:
    """Return out_u + g (out_c - out_u), where g = 1 + w in Ho & Salimans 2022, eq. 6.

    out_u and out_c are the outputs without and with a class. Guidance applies to the first `channels`; None means all
    of them. The remaining channels hold the v of a learned variance and are copied from out_c.
    """
    if channels is None or channels == out_c.shape[1]:
        return out_u + guidance * (out_c - out_u)
    guided = guide(out_u[:, :channels], out_c[:, :channels], guidance)
    return torch.cat([guided, out_c[:, channels:]], dim=1)


def rescale(guided: Tensor, out_c: Tensor, share: Tensor | float, channels: int | None = None) -> Tensor:
    """Rescale guided outputs towards the standard deviation of out_c (Lin et al. 2024, eq. 15 and 16).

    Returns guided * (share * std(out_c) / std(guided) + 1 - share), where std is taken per image over the first
    `channels`. All tensors are [B, C, H, W]; share is a number or [B, 1, 1, 1]. An image's result does not depend on
    the rest of the batch, not even in the last bit.
    """
    ratio = (_variance(out_c[:, :channels]) / _variance(guided[:, :channels]).clamp(min=1e-20)).sqrt()
    factor = share * ratio.reshape(-1, 1, 1, 1) + (1 - share)
    if channels is None or channels == guided.shape[1]:
        return guided * factor
    return torch.cat([guided[:, :channels] * factor, guided[:, channels:]], dim=1)


def _variance(x: Tensor) -> Tensor:
    """Return the variance of each image, [B, ...] -> [B].

    torch.var is not used because its rounding depends on the batch.
    """
    flat = x.flatten(1)
    mean = _sum(flat) / flat.shape[1]
    return _sum((flat - mean[:, None]).square()) / flat.shape[1]


def _sum(x: Tensor) -> Tensor:
    """Sum each row of x [B, N] by repeatedly adding its two halves."""
    while x.shape[1] > 1:
        if x.shape[1] % 2:
            x = F.pad(x, (0, 1))
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def guided(
    net: Forward,
    x: Tensor,
    t: Tensor,
    class_labels: Tensor | None,
    null_class: int | None,
    guidance: float,
    guidance_rescale: float = 0.0,
) -> Tensor:
    """Run the network with the same guidance for all images.

    With guidance, each image is in the network's batch twice.
    """
    if guidance == 1.0 or class_labels is None or null_class is None:
        return net(x, t, class_labels)
    both = torch.cat([class_labels, torch.full_like(class_labels, null_class)])
    out_c, out_u = net(torch.cat([x, x]), torch.cat([t, t]), both).chunk(2)
    out = guide(out_u, out_c, guidance, x.shape[1])
    return rescale(out, out_c, guidance_rescale, x.shape[1]) if guidance_rescale else out
