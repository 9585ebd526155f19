"""The U-Net of dome272/Diffusion-Models-pytorch.

It uses max pooling, bilinear upsampling, and attention at each level.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tminus.model.config import Count, Counts, is_count
from tminus.model.denoiser import Denoiser, NetConfig

WIDTHS = (64, 128, 256, 256)
HEADS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Dome272Config(NetConfig):
    """The network's arguments. All widths are fixed except those of the middle layers.

    middle: (512, 512, 256) in the project's first version, (256, 256) in later ones.
    """

    CLASS_NAME: ClassVar[str] = "Dome272UNet"
    KIND: ClassVar[str] = "Dome272UNet config: "

    time_dim: Count = 256
    middle: Counts = (512, 512, 256)

    def __post_init__(self) -> None:
        NetConfig.__post_init__(self)
        self.require(is_count(self.sample_size), "sample_size", "a positive integer")
        self.require(self.time_dim % 2 == 0, "time_dim", "even")
        fits = len(self.middle) <= 3 and self.middle[-1] == WIDTHS[-1]
        self.require(fits, "middle", f"at most three widths, the last {WIDTHS[-1]}")

    @property
    def size_multiple(self) -> int:
        return 1 << (len(WIDTHS) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        return WIDTHS

    def pass_bytes(self, size_px: tuple[int, int]) -> int:
        """Estimate the memory of a forward pass of one image, in bytes. The largest attention is at full resolution."""
        pixels = [size_px[0] * size_px[1] >> 2 * level for level in range(len(WIDTHS))]
        maps = sum(4 * 6 * width * each for width, each in zip(WIDTHS, pixels, strict=True))
        return maps + 4 * HEADS * pixels[0] ** 2


class _DoubleConv(nn.Module):
    def __init__(self, cin: int, cout: int, mid: int | None = None, *, residual: bool = False) -> None:
        super().__init__()
        mid = mid or cout
        self.residual = residual
        self.double_conv = nn.Sequential(
            nn.Conv2d(cin, mid, 3, padding=1, bias=False),
            nn.GroupNorm(1, mid),
            nn.GELU(),
            nn.Conv2d(mid, cout, 3, padding=1, bias=False),
            nn.GroupNorm(1, cout),
        )

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.double_conv(x)
        return F.gelu(x + h) if self.residual else h


class _Resampling(nn.Module):
    """Base class for a level of the U-Net, which ends by adding the timestep embedding to each pixel."""

    def __init__(self, temb: int, cout: int) -> None:
        super().__init__()
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(temb, cout))

    def add_time(self, h: Tensor, act_temb: Tensor) -> Tensor:
        emb: Tensor = self.emb_layer[1](act_temb)  # emb_layer[0] is a SiLU, already applied
        return h + emb[:, :, None, None]


class _Down(_Resampling):
    def __init__(self, cin: int, cout: int, temb: int) -> None:
        super().__init__(temb, cout)
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), _DoubleConv(cin, cin, residual=True), _DoubleConv(cin, cout))

    def forward(self, x: Tensor, act_temb: Tensor) -> Tensor:
        return self.add_time(self.maxpool_conv(x), act_temb)


class _Up(_Resampling):
    def __init__(self, cin: int, cout: int, temb: int) -> None:
        super().__init__(temb, cout)
        self.conv = nn.Sequential(_DoubleConv(cin, cin, residual=True), _DoubleConv(cin, cout, cin // 2))

    def forward(self, x: Tensor, skip: Tensor, act_temb: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=True)
        return self.add_time(self.conv(torch.cat([skip, x], dim=1)), act_temb)


class _Attention(nn.Module):
    """Self-attention with parameters named as in nn.MultiheadAttention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * channels, channels) / math.sqrt(channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=2)
        q, k, v = (each.reshape(*each.shape[:2], HEADS, -1).transpose(1, 2) for each in qkv)
        out: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class _SelfAttention(nn.Module):
    """A transformer block over the pixels of x [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mha = _Attention(channels)
        self.ln = nn.LayerNorm([channels])
        self.ff_self = nn.Sequential(
            nn.LayerNorm([channels]), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2).transpose(1, 2)
        h = h + self.mha(self.ln(h))
        h = h + self.ff_self(h)
        out: Tensor = h.transpose(1, 2).reshape(x.shape)
        return out


class Dome272UNet(Denoiser):
    """The U-Net, with parameters named as in dome272's code.

    class_embedding is the exception: it is the project's label_emb with the null class appended.
    """

    config: Dome272Config

    def __init__(self, config: Dome272Config) -> None:
        super().__init__()
        self.config = config
        self.act = F.silu
        temb, (a, b, c, d) = config.time_dim, WIDTHS
        self.class_embedding: nn.Embedding | None = None
        if config.num_class_embeds is not None:
            rows = torch.randn(config.num_class_embeds, temb)
            self.class_embedding = nn.Embedding.from_pretrained(rows, freeze=False)  # type: ignore[no-untyped-call]
        self.inc = _DoubleConv(config.in_channels, a)
        self.down1, self.sa1 = _Down(a, b, temb), _SelfAttention(b)
        self.down2, self.sa2 = _Down(b, c, temb), _SelfAttention(c)
        self.down3, self.sa3 = _Down(c, d, temb), _SelfAttention(d)
        widths = (d, *config.middle)
        names = ("bot1", "bot2", "bot3") if len(config.middle) == 3 else ("bot1", "bot3")[: len(config.middle)]
        self.bots = [name for name, _ in zip(names, config.middle, strict=True)]
        for name, cin, cout in zip(names, widths[:-1], widths[1:], strict=True):
            self.add_module(name, _DoubleConv(cin, cout))
        self.up1, self.sa4 = _Up(c + d, b, temb), _SelfAttention(b)
        self.up2, self.sa5 = _Up(b + b, a, temb), _SelfAttention(a)
        self.up3, self.sa6 = _Up(a + a, a, temb), _SelfAttention(a)
        self.outc = nn.Conv2d(a, config.out_channels, 1)

    def time_embedder(self) -> Callable[[Tensor], Tensor]:
        return partial(_sines_and_cosines, self.config.time_dim)

    def denoise(self, x: Tensor, act_temb: Tensor) -> Tensor:
        x1 = self.inc(x)
        x2 = self.sa1(self.down1(x1, act_temb))
        x3 = self.sa2(self.down2(x2, act_temb))
        h: Tensor = self.sa3(self.down3(x3, act_temb))
        for name in self.bots:
            h = self.get_submodule(name)(h)
        h = self.sa4(self.up1(h, x3, act_temb))
        h = self.sa5(self.up2(h, x2, act_temb))
        h = self.sa6(self.up3(h, x1, act_temb))
        out: Tensor = self.outc(h)
        return out

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.sa1, self.sa2, self.sa3, self.sa4, self.sa5, self.sa6]


def _sines_and_cosines(width: int, t: Tensor) -> Tensor:
    """Embed timesteps t [B] as sines, then cosines, of t / 10000^(2 i / width): [B, width].

    See Vaswani et al. 2017, sec. 3.5.
    """
    frequencies = 1 / 10_000 ** (torch.arange(0, width, 2, device=t.device, dtype=torch.float32) / width)
    angles = t.to(torch.float32)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
