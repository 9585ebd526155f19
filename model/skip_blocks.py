"""The blocks of NCSN++ (Song et al. 2021, appendix H), with the module names of diffusers' Skip blocks.

Beside the feature maps a small image goes down, from which each level learns, and another up, to which each level adds.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tminus.model.layers import Attention, FirResample, ResnetBlock
from tminus.model.unet_config import IMAGE_CHANNELS, UNetConfig, groups_of

ATTENTION_GROUPS = 32
OUTPUT_SCALE = math.sqrt(2)


def _resnet(config: UNetConfig, in_channels: int, out: int, **kwargs: Any) -> ResnetBlock:
    return ResnetBlock(
        in_channels,
        out,
        config.temb_dim,
        groups_out=groups_of(out),
        eps=config.norm_eps,
        act=config.act_fn,
        dropout=config.dropout,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        output_scale_factor=OUTPUT_SCALE,
        **kwargs,
    )


def _attentions(config: UNetConfig, channels: int, count: int) -> nn.ModuleList:
    width, eps = config.head_width(channels), config.norm_eps
    return nn.ModuleList(
        Attention(channels, width, groups=ATTENTION_GROUPS, eps=eps, output_scale_factor=OUTPUT_SCALE)
        for _ in range(count)
    )


class SkipDownBlock(nn.Module):
    """Resnets (each followed by attention in an Attn block), then, but in the last block, a level of half the size."""

    def __init__(self, attends: bool, config: UNetConfig, in_channels: int, out: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList()
        for i in range(config.layers_per_block):
            width = in_channels if i == 0 else out
            self.resnets.append(_resnet(config, width, out, groups=groups_of(width)))
        self.attentions = _attentions(config, out, len(self.resnets)) if attends else None
        self.resnet_down: ResnetBlock | None = None
        self.image_down = FirResample(IMAGE_CHANNELS, up=False)
        self.skip_conv: nn.Conv2d | None = None
        if not last:
            self.resnet_down = _resnet(
                config, out, out, groups=groups_of(out), resample=FirResample(out, up=False), always_project=True
            )
            self.skip_conv = nn.Conv2d(IMAGE_CHANNELS, out, 1)

    def forward(self, h: Tensor, act_temb: Tensor, image: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, act_temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
            skips.append(h)
        if self.resnet_down is not None and self.skip_conv is not None:
            image = self.image_down(image)
            h = self.skip_conv(image) + self.resnet_down(h, act_temb)
            skips.append(h)
        return h, skips, image


class SkipUpBlock(nn.Module):
    """One resnet more than the down block (attention after the last in an Attn block), then a level twice the size."""

    def __init__(self, attends: bool, config: UNetConfig, prev: int, skip_last: int, out: int, last: bool) -> None:
        super().__init__()
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList()
        for i in range(layers):
            width = (prev if i == 0 else out) + (skip_last if i == layers - 1 else out)
            self.resnets.append(_resnet(config, width, out, groups=32 if attends else groups_of(width)))
        self.attentions = _attentions(config, out, 1) if attends else None
        self.image_up = FirResample(IMAGE_CHANNELS, up=True)
        self.resnet_up: ResnetBlock | None = None
        if not last:
            self.resnet_up = _resnet(
                config, out, out, groups=groups_of(out), resample=FirResample(out, up=True), always_project=True
            )
            self.skip_norm = nn.GroupNorm(groups_of(out), out, config.norm_eps)
            self.skip_conv = nn.Conv2d(out, IMAGE_CHANNELS, 3, padding=1)

    def forward(
        self, h: Tensor, skips: list[Tensor], act_temb: Tensor, image: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        for resnet in self.resnets:
            h = resnet(torch.cat([h, skips.pop()], dim=1), act_temb)
        if self.attentions is not None:
            h = self.attentions[0](h)
        image = self.image_up(image) if image is not None else None
        if self.resnet_up is not None:
            own: Tensor = self.skip_conv(F.silu(self.skip_norm(h)))
            image = own if image is None else image + own
            h = self.resnet_up(h, act_temb)
        return h, image
