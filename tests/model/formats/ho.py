"""The U-Net of Ho et al. 2020 (appendix B) with the parameter names of its PyTorch port, written again as an oracle."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, temb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(cin), nn.Conv2d(cin, cout, 3, padding=1)
        self.temb_proj = nn.Linear(temb, cout)
        self.norm2, self.conv2 = norm(cout), nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(temb))[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attn(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("nci,ncj->nij", q, k) / math.sqrt(x.shape[1]), dim=2)
        return x + self.proj_out(torch.einsum("nij,ncj->nci", weights, v).reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if up else nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    def __init__(self, blocks: list[Block], attn: list[Attn]) -> None:
        super().__init__()
        self.block, self.attn = nn.ModuleList(blocks), nn.ModuleList(attn)


class Ho(nn.Module):
    """model(x, t): widths ch times mult, attention at the levels of `attends`."""

    def __init__(
        self,
        ch: int = 32,
        mult: tuple[int, ...] = (1, 2),
        blocks: int = 2,
        attends: tuple[int, ...] = (1,),
        channels: int = 3,
    ) -> None:
        super().__init__()
        self.ch, temb = ch, 4 * ch
        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(ch, temb), nn.Linear(temb, temb)])
        self.conv_in = nn.Conv2d(channels, ch, 3, padding=1)
        width, skips = ch, [ch]
        down = []
        for i, m in enumerate(mult):
            level = Level([], [])
            for _ in range(blocks):
                level.block.append(Block(width, ch * m, temb))
                width = ch * m
                if i in attends:
                    level.attn.append(Attn(width))
                skips.append(width)
            if i < len(mult) - 1:
                level.downsample = Resample(width, up=False)
                skips.append(width)
            down.append(level)
        self.down = nn.ModuleList(down)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = (
            Block(width, width, temb),
            Attn(width),
            Block(width, width, temb),
        )
        up = []
        for i, m in reversed(list(enumerate(mult))):
            level = Level([], [])
            for _ in range(blocks + 1):
                level.block.append(Block(width + skips.pop(), ch * m, temb))
                width = ch * m
                if i in attends:
                    level.attn.append(Attn(width))
            if i:
                level.upsample = Resample(width, up=True)
            up.insert(0, level)
        self.up = nn.ModuleList(up)
        self.norm_out, self.conv_out = norm(width), nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        half = self.ch // 2
        angles = t.float()[:, None] * torch.tensor([10_000 ** (-i / (half - 1)) for i in range(half)])
        temb = self.temb.dense[0](torch.cat([angles.sin(), angles.cos()], dim=1))
        temb = self.temb.dense[1](F.silu(temb))
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for i, block in enumerate(level.block):
                h = block(h, temb)
                h = level.attn[i](h) if len(level.attn) else h
                skips.append(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
                skips.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, temb)), temb)
        for level in reversed(self.up):
            for i, block in enumerate(level.block):
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
                h = level.attn[i](h) if len(level.attn) else h
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))
