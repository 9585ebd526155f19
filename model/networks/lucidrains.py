"""The U-Net of lucidrains/denoising-diffusion-pytorch.

It uses RMS norms, linear attention, and learned additional keys and values.
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
from tminus.model.layers import sinusoidal_embedding


@dataclass(frozen=True, slots=True, kw_only=True)
class LucidrainsConfig(NetConfig):
    """The network's arguments. Those that differ between levels are lists with one value per level."""

    CLASS_NAME: ClassVar[str] = "LucidrainsUnet"
    KIND: ClassVar[str] = "LucidrainsUnet config: "

    dim: Count
    init_dim: Count
    level_widths: Counts
    attn_heads: Counts
    attn_dim_head: Counts
    full_attn: tuple[bool, ...]
    """For each level, True for full attention and False for linear attention."""
    num_mem_kv: Count = 4

    def __post_init__(self) -> None:
        NetConfig.__post_init__(self)
        self.require(is_count(self.sample_size), "sample_size", "a positive integer")
        self.require(self.num_class_embeds is None, "num_class_embeds", "null: it knows no classes")
        self.require(self.dim >= 4 and self.dim % 2 == 0, "dim", "even and 4 or more")
        for field in ("level_widths", "attn_heads", "attn_dim_head", "full_attn"):
            value = getattr(self, field)
            fits = isinstance(value, tuple) and len(value) == len(self.level_widths)
            self.require(fits, field, "a list with one for each level")
        self.require(
            all(isinstance(full, bool) for full in self.full_attn), "full_attn", "true or false for each level"
        )

    @property
    def size_multiple(self) -> int:
        return 1 << (len(self.level_widths) - 1)

    @property
    def widths(self) -> tuple[int, ...]:
        return self.level_widths

    def pass_bytes(self, size_px: tuple[int, int]) -> int:
        total = 0
        for level, (width, full, heads) in enumerate(
            zip(self.level_widths, self.full_attn, self.attn_heads, strict=True)
        ):
            pixels = size_px[0] * size_px[1] >> 2 * level
            total += 4 * 6 * width * pixels + (4 * heads * pixels**2 if full else 0)
        return total


class _RMSNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = math.sqrt(channels)
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * self.scale


class _Block(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm = _RMSNorm(cout)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        h: Tensor = self.norm(self.proj(x))
        return F.silu(h if scale is None or shift is None else h * (scale + 1) + shift)


class _Resnet(nn.Module):
    def __init__(self, cin: int, cout: int, temb: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(temb, 2 * cout))
        self.block1, self.block2 = _Block(cin, cout), _Block(cout, cout)
        self.res_conv = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x: Tensor, act_temb: Tensor) -> Tensor:
        scale, shift = self.mlp[1](act_temb)[:, :, None, None].chunk(2, dim=1)  # mlp[0] is a SiLU, already applied
        out: Tensor = self.block2(self.block1(x, scale, shift)) + self.res_conv(x)
        return out


class _LinearAttention(nn.Module):
    """Linear attention (Shen et al. 2021). The softmax is over channels for q, and over pixels for k."""

    def __init__(self, channels: int, heads: int, width: int, mem: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, width**-0.5
        self.norm = _RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, width, mem))
        self.to_qkv = nn.Conv2d(channels, 3 * heads * width, 1, bias=False)
        self.to_out = nn.Sequential(nn.Conv2d(heads * width, channels, 1), _RMSNorm(channels))

    def forward(self, x: Tensor) -> Tensor:
        # The batch size is x.shape[0], because tracing would record len(x) as a constant.
        qkv = self.to_qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        q, k, v = (each.reshape(x.shape[0], self.heads, -1, each.shape[2]) for each in qkv)  # [B, heads, width, HW]
        mem_k, mem_v = (each.expand(x.shape[0], -1, -1, -1) for each in self.mem_kv.unbind(0))
        k, v = torch.cat([mem_k, k], dim=3), torch.cat([mem_v, v], dim=3)
        context = k.softmax(dim=3) @ v.transpose(2, 3)  # [B, heads, width of k, width of v]
        out = context.transpose(2, 3) @ (q.softmax(dim=2) * self.scale)
        of_pixels: Tensor = self.to_out(out.reshape(x.shape[0], -1, *x.shape[2:]))
        return of_pixels


class _Attention(nn.Module):
    def __init__(self, channels: int, heads: int, width: int, mem: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _RMSNorm(channels)
        self.mem_kv = nn.Parameter(torch.randn(2, heads, mem, width))
        self.to_qkv = nn.Conv2d(channels, 3 * heads * width, 1, bias=False)
        self.to_out = nn.Conv2d(heads * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(self.norm(x)).flatten(2).chunk(3, dim=1)
        q, k, v = (
            each.reshape(x.shape[0], self.heads, -1, each.shape[2]).transpose(2, 3) for each in qkv
        )  # [B, heads, HW, width]
        mem_k, mem_v = (each.expand(x.shape[0], -1, -1, -1) for each in self.mem_kv.unbind(0))
        out = F.scaled_dot_product_attention(q, torch.cat([mem_k, k], dim=2), torch.cat([mem_v, v], dim=2))
        of_pixels: Tensor = self.to_out(out.transpose(2, 3).reshape(x.shape[0], -1, *x.shape[2:]))
        return of_pixels


class LucidrainsUnet(Denoiser):
    """The U-Net, with parameters named as in lucidrains' code."""

    config: LucidrainsConfig

    def __init__(self, config: LucidrainsConfig) -> None:
        super().__init__()
        self.config = config
        self.act = F.silu
        self.class_embedding: nn.Embedding | None = None
        temb, mem, start = 4 * config.dim, config.num_mem_kv, config.init_dim
        self.init_conv = nn.Conv2d(config.in_channels, start, 7, padding=3)
        self.time_mlp = nn.Sequential(
            nn.Identity(), nn.Linear(config.dim, temb), nn.GELU(), nn.Linear(temb, temb)
        )  # time_mlp[0] has no parameters

        def attention(level: int, channels: int) -> nn.Module:
            kind = _Attention if config.full_attn[level] else _LinearAttention
            return kind(channels, config.attn_heads[level], config.attn_dim_head[level], mem)

        pairs = list(zip((start, *config.level_widths), config.level_widths, strict=False))
        last = len(pairs) - 1
        self.downs = nn.ModuleList()
        for level, (cin, cout) in enumerate(pairs):
            halve = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * cin, cout, 1))
            down = halve if level < last else nn.Conv2d(cin, cout, 3, padding=1)
            resnets = (_Resnet(cin, cin, temb), _Resnet(cin, cin, temb))
            self.downs.append(nn.ModuleList([*resnets, attention(level, cin), down]))
        middle = config.level_widths[-1]
        self.mid_block1 = _Resnet(middle, middle, temb)
        self.mid_attn = _Attention(middle, config.attn_heads[-1], config.attn_dim_head[-1], mem)
        self.mid_block2 = _Resnet(middle, middle, temb)
        self.ups = nn.ModuleList()
        for level, (cin, cout) in reversed(list(enumerate(pairs))):
            conv = nn.Conv2d(cout, cin, 3, padding=1)
            up = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), conv) if level else conv
            resnets = (_Resnet(cout + cin, cout, temb), _Resnet(cout + cin, cout, temb))
            self.ups.append(nn.ModuleList([*resnets, attention(level, cout), up]))
        self.final_res_block = _Resnet(2 * start, start, temb)
        self.final_conv = nn.Conv2d(start, config.out_channels, 1)

    def time_embedder(self) -> Callable[[Tensor], Tensor]:
        return partial(_embed_time, self.config.dim, self.time_mlp)

    def denoise(self, x: Tensor, act_temb: Tensor) -> Tensor:
        h: Tensor = self.init_conv(x)
        skips = [h]
        for level in self.downs:
            block1, block2, attn, down = level.children()
            h = block1(h, act_temb)
            skips.append(h)
            h = block2(h, act_temb)
            h = attn(h) + h
            skips.append(h)
            h = down(h)
        h = self.mid_block1(h, act_temb)
        h = self.mid_attn(h) + h
        h = self.mid_block2(h, act_temb)
        for level in self.ups:
            block1, block2, attn, up = level.children()
            h = block1(torch.cat([h, skips.pop()], dim=1), act_temb)
            h = block2(torch.cat([h, skips.pop()], dim=1), act_temb)
            h = attn(h) + h
            h = up(h)
        out: Tensor = self.final_conv(self.final_res_block(torch.cat([h, skips.pop()], dim=1), act_temb))
        return out

    @property
    def blocks(self) -> list[nn.Module]:
        return [*(down[1] for down in self.downs), self.mid_block2, *(up[1] for up in self.ups)]  # type: ignore[index]


def _embed_time(dim: int, mlp: nn.Sequential, t: Tensor) -> Tensor:
    """Embed timesteps: t [B] -> [B, 4 dim]."""
    embedding = sinusoidal_embedding(t, dim, flip_sin_to_cos=False, freq_shift=1)
    out: Tensor = mlp(embedding.to(next(mlp.parameters()).dtype))
    return out
