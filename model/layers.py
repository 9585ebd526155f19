"""The layers of a denoising U-Net.

Modules have the names used in diffusers, so diffusers' state dicts load without conversion.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "mish": F.mish,
}


def sinusoidal_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """Embed timesteps t [B] as sines and cosines [B, dim] in float32 (Vaswani et al. 2017, sec. 3.5)."""
    half = dim // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t.to(torch.float32)[:, None] * exponent.exp()[None, :]
    halves = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    embedding = torch.cat(halves, dim=1)
    return F.pad(embedding, (0, dim % 2))


class FourierFeatures(nn.Module):
    """Embed noise levels t [B] as sines and cosines of log t: [B, 2 count].

    See Song et al. 2021, appendix C. The frequencies are random numbers that are not trained. Values of t below the
    smallest positive normal number are raised to it, so the result is always finite.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        # A checkpoint supplies the values. They are not trained.
        self.weight = nn.Parameter(torch.zeros(count), requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        log_t = t.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny).log()
        angles = log_t[:, None] * self.weight[None, :] * 2 * math.pi
        return torch.cat([angles.sin(), angles.cos()], dim=1)


class TimestepEmbedding(nn.Module):
    """A two-layer MLP that maps timestep embeddings [B, dim] to temb [B, temb_dim]."""

    def __init__(self, dim: int, temb_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim, temb_dim)
        self.linear_2 = nn.Linear(temb_dim, temb_dim)

    def forward(self, embedding: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(embedding)))
        return out


def nearest_up(x: Tensor) -> Tensor:
    """Double H and W by repeating each pixel."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def average_down(x: Tensor) -> Tensor:
    """Halve H and W by averaging each 2x2 block of pixels."""
    return F.avg_pool2d(x, 2)


class FirResample(nn.Module):
    """Double or halve H and W with the separable filter (1, 3, 3, 1) (Karras et al. 2019).

    The border is padded with zeros. On a CPU, this depthwise convolution is several times faster than adding slices or
    averaging neighbours three times.
    """

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        # Checkpoints do not contain the filter, so create it on the CPU even if the network is built on the meta
        # device.
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0], device="cpu") / (4 if up else 8)
        kernel = taps.outer(taps).expand(channels, 1, 4, 4).contiguous()
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel = self.get_buffer("kernel")
        resample = F.conv_transpose2d if self.up else F.conv2d
        return resample(x, kernel, stride=2, padding=1, groups=len(kernel))


class ResnetBlock(nn.Module):
    """Residual block: norm, act, [resample], conv, + temb, norm, act, conv (Ho et al. 2020, appendix B).

    x [B, in, H, W], act_temb [B, temb] (activation already applied) -> [B, out, H', W'].

    temb_dim: None for a block without a timestep, as in autoencoders.
    groups_out: the number of groups of the second norm; None means `groups`.
    scale_shift: let the timestep scale and shift the second norm's output (AdaGN, Dhariwal & Nichol 2021).
    resample: a function that doubles or halves H and W.
    always_project: put a convolution on the residual connection even if the number of channels stays the same.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        temb_dim: int | None,
        *,
        groups: int,
        groups_out: int | None = None,
        eps: float,
        act: str,
        dropout: float = 0.0,
        scale_shift: bool = False,
        output_scale_factor: float = 1.0,
        resample: Callable[[Tensor], Tensor] | None = None,
        always_project: bool = False,
    ) -> None:
        super().__init__()
        self.act = ACTIVATIONS[act]
        self.scale_shift = scale_shift
        self.output_scale_factor = output_scale_factor
        self.resample = resample
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj: nn.Linear | None = None
        if temb_dim is not None:
            self.time_emb_proj = nn.Linear(temb_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups_out or groups, out_channels, eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        projects = always_project or in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if projects else None

    def forward(self, x: Tensor, act_temb: Tensor | None = None) -> Tensor:
        h = self.act(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        if self.time_emb_proj is None:
            h = self.norm2(h)
        else:
            temb = self.time_emb_proj(act_temb)[:, :, None, None]
            if self.scale_shift:
                scale, shift = temb.chunk(2, dim=1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + temb)
        h = self.conv2(self.dropout(self.act(h)))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        out: Tensor = x + h
        return out if self.output_scale_factor == 1.0 else out / self.output_scale_factor


class Attention(nn.Module):
    """Self-attention over the pixels of x [B, C, H, W], with a residual connection.

    The number of heads is C // head_dim.

    groups: the number of groups of the group norm. None omits the norm, as in the mid block of a scale_shift network.
    """

    def __init__(
        self, channels: int, head_dim: int, *, groups: int | None, eps: float, output_scale_factor: float = 1.0
    ) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.output_scale_factor = output_scale_factor
        inner = self.heads * head_dim
        self.group_norm = nn.GroupNorm(groups, channels, eps) if groups is not None else None
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.group_norm(x) if self.group_norm is not None else x
        h = h.flatten(2).transpose(1, 2)  # [B, HW, C]
        q, k, v = (f(h).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        h = F.scaled_dot_product_attention(q, k, v)  # [B, heads, HW, head_dim]
        h = self.to_out[0](h.transpose(1, 2).flatten(2))
        out: Tensor = x + h.transpose(1, 2).reshape(batch, channels, height, width)
        return out if self.output_scale_factor == 1.0 else out / self.output_scale_factor


class Downsample(nn.Module):
    """Halve H and W with a stride-2 convolution.

    padding=0 pads only on the right and at the bottom, as in Ho et al. 2020.
    """

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)
        return out


class Upsample(nn.Module):
    """Double H and W with nearest-neighbour interpolation, followed by a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(nearest_up(x))
        return out
