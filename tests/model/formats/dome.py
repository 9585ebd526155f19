"""The U-Net of dome272's tutorial, written again from its description and parameter names, as an oracle."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Double(nn.Module):
    def __init__(self, cin: int, cout: int, mid: int, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.double_conv = nn.ModuleList(
            [
                nn.Conv2d(cin, mid, 3, padding=1, bias=False),
                nn.GroupNorm(1, mid),
                nn.GELU(),
                nn.Conv2d(mid, cout, 3, padding=1, bias=False),
                nn.GroupNorm(1, cout),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.double_conv:
            h = layer(h)
        return F.gelu(x + h) if self.residual else h


class Down(nn.Module):
    def __init__(self, cin: int, cout: int, temb: int) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), Double(cin, cin, cin, True), Double(cin, cout, cout))
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(temb, cout))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.maxpool_conv(x) + self.emb_layer(t)[:, :, None, None]


class Up(nn.Module):
    def __init__(self, cin: int, cout: int, temb: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(Double(cin, cin, cin, True), Double(cin, cout, cin // 2))
        self.emb_layer = nn.Sequential(nn.SiLU(), nn.Linear(temb, cout))

    def forward(self, x: Tensor, skip: Tensor, t: Tensor) -> Tensor:
        x = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)(x)
        return self.conv(torch.cat([skip, x], dim=1)) + self.emb_layer(t)[:, :, None, None]


class Sa(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(channels, 4, batch_first=True)
        self.ln = nn.LayerNorm([channels])
        self.ff_self = nn.Sequential(
            nn.LayerNorm([channels]), nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2).transpose(1, 2)
        n = self.ln(h)
        h = self.mha(n, n, n, need_weights=False)[0] + h
        h = self.ff_self(h) + h
        return h.transpose(1, 2).reshape(x.shape)


class Dome(nn.Module):
    """model(x, t, y=None); y None adds nothing. middle: (512, 512, 256) at first, (256, 256) later."""

    def __init__(
        self, channels: int = 3, temb: int = 256, classes: int | None = None, middle: tuple[int, ...] = (512, 512, 256)
    ) -> None:
        super().__init__()
        self.width = temb
        self.inc = Double(channels, 64, 64)
        self.down1, self.sa1 = Down(64, 128, temb), Sa(128)
        self.down2, self.sa2 = Down(128, 256, temb), Sa(256)
        self.down3, self.sa3 = Down(256, 256, temb), Sa(256)
        widths = (256, *middle)
        self.bottom = ["bot1", "bot2", "bot3"] if len(middle) == 3 else ["bot1", "bot3"]
        for name, cin, cout in zip(self.bottom, widths, widths[1:], strict=False):
            setattr(self, name, Double(cin, cout, cout))
        self.up1, self.sa4 = Up(512, 128, temb), Sa(128)
        self.up2, self.sa5 = Up(256, 64, temb), Sa(64)
        self.up3, self.sa6 = Up(128, 64, temb), Sa(64)
        self.outc = nn.Conv2d(64, channels, 1)
        if classes is not None:
            self.label_emb = nn.Embedding(classes, temb)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        inverse = 1.0 / 10000 ** (torch.arange(0, self.width, 2).float() / self.width)
        angles = t.float()[:, None].repeat(1, self.width // 2) * inverse
        emb = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
        if y is not None:
            emb = emb + self.label_emb(y)
        x1 = self.inc(x)
        x2 = self.sa1(self.down1(x1, emb))
        x3 = self.sa2(self.down2(x2, emb))
        h = self.sa3(self.down3(x3, emb))
        for name in self.bottom:
            h = getattr(self, name)(h)
        h = self.sa4(self.up1(h, x3, emb))
        h = self.sa5(self.up2(h, x2, emb))
        h = self.sa6(self.up3(h, x1, emb))
        return self.outc(h)
