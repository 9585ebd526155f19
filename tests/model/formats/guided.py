"""The U-Net of guided-diffusion, written again from its papers and its parameter names, as an oracle.

Nichol & Dhariwal 2021, appendix A, and Dhariwal & Nichol 2021, section 3. Attention is spelt out, one head at a time.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Res(nn.Module):
    def __init__(self, cin: int, cout: int, temb: int, *, shift: bool, resample: str = "") -> None:
        super().__init__()
        self.shift, self.resample = shift, resample
        self.in_layers = nn.ModuleList([nn.GroupNorm(32, cin), nn.SiLU(), nn.Conv2d(cin, cout, 3, padding=1)])
        self.emb_layers = nn.ModuleList([nn.SiLU(), nn.Linear(temb, 2 * cout if shift else cout)])
        self.out_layers = nn.ModuleList(
            [nn.GroupNorm(32, cout), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(cout, cout, 3, padding=1)]
        )
        if cin != cout:
            self.skip_connection = nn.Conv2d(cin, cout, 1)

    def resampled(self, x: Tensor) -> Tensor:
        if self.resample == "up":
            return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        if self.resample == "down":
            return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4
        return x

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](self.resampled(F.silu(self.in_layers[0](x))))
        e = self.emb_layers[1](F.silu(emb))[:, :, None, None]
        if self.shift:
            half = e.shape[1] // 2
            h = self.out_layers[0](h) * (1 + e[:, :half]) + e[:, half:]
        else:
            h = self.out_layers[0](h + e)
        h = self.out_layers[3](F.silu(h))
        x = self.resampled(x)
        return h + (self.skip_connection(x) if hasattr(self, "skip_connection") else x)


class Attend(nn.Module):
    def __init__(self, channels: int, heads: int, order: str) -> None:
        super().__init__()
        self.heads, self.order = heads, order
        self.norm = nn.GroupNorm(32, channels)
        self.qkv, self.proj_out = nn.Conv1d(channels, 3 * channels, 1), nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, _emb: Tensor) -> Tensor:
        flat = x.flatten(2)
        qkv = self.qkv(self.norm(flat))
        channels = flat.shape[1]
        width = channels // self.heads
        outs = []
        for head in range(self.heads):
            if self.order == "legacy":
                q, k, v = (qkv[:, (3 * head + i) * width :][:, :width] for i in range(3))
            else:
                q, k, v = (qkv[:, i * channels + head * width :][:, :width] for i in range(3))
            weights = torch.softmax(q.transpose(1, 2) @ k / math.sqrt(width), dim=2)  # [N, T, S]
            outs.append(v @ weights.transpose(1, 2))
        return (flat + self.proj_out(torch.cat(outs, dim=1))).reshape(x.shape)


class Down(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, _emb: Tensor) -> Tensor:
        return self.op(x)


class Up(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, _emb: Tensor) -> Tensor:
        return self.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


class First(nn.Conv2d):
    def forward(self, x: Tensor, _emb: Tensor) -> Tensor:
        return super().forward(x)


class Guided(nn.Module):
    """model(x, t, y): widths of model_channels times mult, attention at the levels of `attends`."""

    def __init__(
        self,
        model_channels: int = 32,
        mult: tuple[float, ...] = (1, 2),
        blocks: int = 2,
        attends: tuple[int, ...] = (1,),
        channels: int = 3,
        out_channels: int = 3,
        classes: int | None = None,
        heads: int | None = None,
        head_width: int | None = None,
        order: str = "legacy",
        shift: bool = False,
        updown: bool = False,
    ) -> None:
        super().__init__()
        self.model_channels = model_channels
        temb = 4 * model_channels
        self.time_embed = nn.ModuleList([nn.Linear(model_channels, temb), nn.SiLU(), nn.Linear(temb, temb)])
        if classes is not None:
            self.label_emb = nn.Embedding(classes, temb)

        def res(cin: int, cout: int, **kwargs: Any) -> Res:
            return Res(cin, cout, temb, shift=shift, **kwargs)

        def attend(width: int) -> Attend:
            return Attend(width, heads or width // (head_width or 1), order)

        ch = int(mult[0] * model_channels)
        self.input_blocks = nn.ModuleList([nn.ModuleList([First(channels, ch, 3, padding=1)])])
        skips = [ch]
        for level, m in enumerate(mult):
            for _ in range(blocks):
                layers: list[nn.Module] = [res(ch, int(m * model_channels))]
                ch = int(m * model_channels)
                layers += [attend(ch)] if level in attends else []
                self.input_blocks.append(nn.ModuleList(layers))
                skips.append(ch)
            if level < len(mult) - 1:
                self.input_blocks.append(nn.ModuleList([res(ch, ch, resample="down") if updown else Down(ch)]))
                skips.append(ch)
        self.middle_block = nn.ModuleList([res(ch, ch), attend(ch), res(ch, ch)])
        self.output_blocks = nn.ModuleList()
        for level, m in reversed(list(enumerate(mult))):
            for i in range(blocks + 1):
                layers = [res(ch + skips.pop(), int(m * model_channels))]
                ch = int(m * model_channels)
                layers += [attend(ch)] if level in attends else []
                if level and i == blocks:
                    layers.append(res(ch, ch, resample="up") if updown else Up(ch))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.ModuleList([nn.GroupNorm(32, ch), nn.SiLU(), nn.Conv2d(ch, out_channels, 3, padding=1)])

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        half = self.model_channels // 2
        angles = t.float()[:, None] * torch.tensor([10_000 ** (-i / half) for i in range(half)])
        emb = self.time_embed[0](torch.cat([angles.cos(), angles.sin()], dim=1))
        emb = self.time_embed[2](F.silu(emb))
        if y is not None:
            emb = emb + self.label_emb(y)
        h, skips = x, []
        for block in self.input_blocks:
            for layer in block:
                h = layer(h, emb)
            skips.append(h)
        for layer in self.middle_block:
            h = layer(h, emb)
        for block in self.output_blocks:
            h = torch.cat([h, skips.pop()], dim=1)
            for layer in block:
                h = layer(h, emb)
        return self.out[2](F.silu(self.out[0](h)))
