"""The U-Net of Ho et al. 2020, with modules named as in diffusers' `UNet2DModel`.

Skip blocks are from NCSN++ (Song et al. 2021, appendix H). On the way down, the input image is halved from level to
level, and a projection of it is added to the feature maps. On the way up, an output image is doubled in size from level
to level, and an image computed from the feature maps is added to it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tminus.model.denoiser import Denoiser
from tminus.model.layers import (
    ACTIVATIONS,
    Attention,
    Downsample,
    FirResample,
    FourierFeatures,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    average_down,
    nearest_up,
    sinusoidal_embedding,
)
from tminus.model.unet_config import IMAGE_CHANNELS, SKIP_DOWN_BLOCKS, SKIP_UP_BLOCKS, UNetConfig, groups_of

SKIP_ATTENTION_GROUPS = 32
SKIP_OUTPUT_SCALE = math.sqrt(2)


def _resnet(config: UNetConfig, in_channels: int, out_channels: int, **kwargs: Any) -> ResnetBlock:
    usual = {"groups": config.groups(in_channels), "groups_out": config.groups(out_channels)}
    return ResnetBlock(
        in_channels,
        out_channels,
        config.temb_dim,
        eps=config.norm_eps,
        act=config.act_fn,
        dropout=config.dropout,
        scale_shift=config.resnet_time_scale_shift == "scale_shift",
        **usual | kwargs,
    )


def _skip_resnet(config: UNetConfig, in_channels: int, out_channels: int, groups: int, **kwargs: Any) -> ResnetBlock:
    own = {"groups": groups, "groups_out": groups_of(out_channels), "output_scale_factor": SKIP_OUTPUT_SCALE}
    return _resnet(config, in_channels, out_channels, **own, **kwargs)


def _attentions(config: UNetConfig, channels: int, count: int, groups: int | None, scale: float = 1.0) -> nn.ModuleList:
    width, eps = config.head_width(channels), config.norm_eps
    return nn.ModuleList(
        Attention(channels, width, groups=groups, eps=eps, output_scale_factor=scale) for _ in range(count)
    )


def _skip_attentions(config: UNetConfig, channels: int, count: int) -> nn.ModuleList:
    return _attentions(config, channels, count, SKIP_ATTENTION_GROUPS, SKIP_OUTPUT_SCALE)


class DownBlock(nn.Module):
    """Resnets, each followed by attention in an Attn block, and a downsampler except in the last block."""

    def __init__(self, kind: str, config: UNetConfig, in_channels: int, out: int, last: bool) -> None:
        super().__init__()
        layers = config.layers_per_block
        self.resnets = nn.ModuleList(_resnet(config, in_channels if i == 0 else out, out) for i in range(layers))
        attends = kind == "AttnDownBlock2D"
        self.attentions = _attentions(config, out, layers, config.groups(out)) if attends else None
        by_resnet = kind == "ResnetDownsampleBlock2D" or (attends and config.downsample_type == "resnet")
        self.downsamplers: nn.ModuleList | None = None
        if not last:
            by_conv = None if by_resnet else Downsample(out, config.downsample_padding)
            self.downsamplers = nn.ModuleList([by_conv or _resnet(config, out, out, resample=average_down)])

    def forward(self, h: Tensor, act_temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, act_temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
            skips.append(h)
        if self.downsamplers is not None:
            h = _resample(self.downsamplers[0], h, act_temb)
            skips.append(h)
        return h, skips


class MidBlock(nn.Module):
    """A resnet, attention and another resnet, at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, scale = config.block_out_channels[-1], float(config.mid_block_scale_factor)
        groups = config.attn_norm_num_groups
        if groups is None and config.resnet_time_scale_shift != "scale_shift":
            groups = config.groups(channels)
        self.resnets = nn.ModuleList(_resnet(config, channels, channels, output_scale_factor=scale) for _ in range(2))
        self.attentions: nn.ModuleList | None = None
        if config.add_attention:
            self.attentions = _attentions(config, channels, 1, groups, scale)

    def forward(self, h: Tensor, act_temb: Tensor) -> Tensor:
        h = self.resnets[0](h, act_temb)
        if self.attentions is not None:
            h = self.attentions[0](h)
        out: Tensor = self.resnets[1](h, act_temb)
        return out


class UpBlock(nn.Module):
    """Resnets with skip connections, and an upsampler except in the last block.

    There is one resnet more than in a down block. In an Attn block, attention follows each resnet.
    """

    def __init__(self, kind: str, config: UNetConfig, prev: int, skip_last: int, out: int, last: bool) -> None:
        super().__init__()
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList()
        for i in range(layers):
            h_channels, skip_channels = (prev if i == 0 else out), (skip_last if i == layers - 1 else out)
            self.resnets.append(_resnet(config, h_channels + skip_channels, out))
        attends = kind == "AttnUpBlock2D"
        self.attentions = _attentions(config, out, layers, config.groups(out)) if attends else None
        by_resnet = kind == "ResnetUpsampleBlock2D" or (attends and config.upsample_type == "resnet")
        self.upsamplers: nn.ModuleList | None = None
        if not last:
            by_conv = None if by_resnet else Upsample(out)
            self.upsamplers = nn.ModuleList([by_conv or _resnet(config, out, out, resample=nearest_up)])

    def forward(self, h: Tensor, skips: list[Tensor], act_temb: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), act_temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
        if self.upsamplers is not None:
            h = _resample(self.upsamplers[0], h, act_temb)
        return h


class SkipDownBlock(nn.Module):
    """Like `DownBlock`, with the input image added (see the module docstring)."""

    def __init__(self, attends: bool, config: UNetConfig, in_channels: int, out: int, last: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList()
        for i in range(config.layers_per_block):
            width = in_channels if i == 0 else out
            self.resnets.append(_skip_resnet(config, width, out, groups_of(width)))
        self.attentions = _skip_attentions(config, out, len(self.resnets)) if attends else None
        self.resnet_down: ResnetBlock | None = None
        self.image_down = FirResample(IMAGE_CHANNELS, up=False)
        self.skip_conv: nn.Conv2d | None = None
        if not last:
            self.resnet_down = _skip_resnet(
                config, out, out, groups_of(out), resample=FirResample(out, up=False), always_project=True
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
    """Like `UpBlock`, with a growing output image (see the module docstring).

    An Attn block has a single attention, after the last resnet.
    """

    def __init__(self, attends: bool, config: UNetConfig, prev: int, skip_last: int, out: int, last: bool) -> None:
        super().__init__()
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList()
        for i in range(layers):
            width = (prev if i == 0 else out) + (skip_last if i == layers - 1 else out)
            self.resnets.append(_skip_resnet(config, width, out, 32 if attends else groups_of(width)))
        self.attentions = _skip_attentions(config, out, 1) if attends else None
        self.image_up = FirResample(IMAGE_CHANNELS, up=True)
        self.resnet_up: ResnetBlock | None = None
        if not last:
            self.resnet_up = _skip_resnet(
                config, out, out, groups_of(out), resample=FirResample(out, up=True), always_project=True
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


def _down_block(kind: str, config: UNetConfig, in_channels: int, out: int, last: bool) -> nn.Module:
    if kind in SKIP_DOWN_BLOCKS:
        return SkipDownBlock(kind == "AttnSkipDownBlock2D", config, in_channels, out, last)
    return DownBlock(kind, config, in_channels, out, last)


def _up_block(kind: str, config: UNetConfig, prev: int, skip_last: int, out: int, last: bool) -> nn.Module:
    if kind in SKIP_UP_BLOCKS:
        return SkipUpBlock(kind == "AttnSkipUpBlock2D", config, prev, skip_last, out, last)
    return UpBlock(kind, config, prev, skip_last, out, last)


def _resample(module: nn.Module, h: Tensor, act_temb: Tensor) -> Tensor:
    out: Tensor = module(h, act_temb) if isinstance(module, ResnetBlock) else module(h)
    return out


def _embedding(count: int, width: int) -> nn.Embedding:
    """Create an embedding initialised like nn.Embedding; on the meta device, it has no values.

    torch's own initialisation is avoided because on the meta device it imports torch._dynamo or sympy, which takes
    longer than the rest of loading a checkpoint.
    """
    weight = torch.empty(count, width)
    if not weight.is_meta:
        torch.randn(count, width, out=weight)
    embedding: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
    return embedding


def _embed_time(
    config: UNetConfig, own: nn.Embedding | FourierFeatures | None, mlp: TimestepEmbedding, t: Tensor
) -> Tensor:
    if isinstance(own, nn.Embedding):
        embedding = own(t.long())
    elif own is not None:
        embedding = own(t * config.timestep_scale)
    else:
        embedding = sinusoidal_embedding(
            t * config.timestep_scale,
            config.time_width,
            flip_sin_to_cos=config.flip_sin_to_cos,
            freq_shift=config.freq_shift,
        )
    out: Tensor = mlp(embedding.to(mlp.linear_1.weight.dtype))
    return out


class UNet2D(Denoiser):
    """The U-Net of Ho et al. 2020 and its descendants. Equivalent to diffusers' `UNet2DModel`."""

    config: UNetConfig
    unit_input = False
    """True if the network was trained on images in [0, 1], so that x must be converted to (x + 1) / 2.

    This is not part of the config.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        self.act = ACTIVATIONS[config.act_fn]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_proj: nn.Embedding | FourierFeatures | None = None
        if config.time_embedding_type == "learned":
            self.time_proj = _embedding(config.num_train_timesteps or 0, config.time_width)
        elif config.time_embedding_type == "fourier":
            self.time_proj = FourierFeatures(config.time_width // 2)
        self.time_embedding = TimestepEmbedding(config.time_width, config.temb_dim)
        self.class_embedding: nn.Embedding | None = None
        if config.num_class_embeds is not None:
            self.class_embedding = _embedding(config.num_class_embeds, config.temb_dim)

        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            _down_block(kind, config, widths[max(i - 1, 0)], widths[i], last=i == last)
            for i, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidBlock(config) if config.mid_block_type is not None else None
        up = widths[::-1]
        self.up_blocks = nn.ModuleList(
            _up_block(kind, config, up[max(i - 1, 0)], up[min(i + 1, last)], up[i], last=i == last)
            for i, kind in enumerate(config.up_block_types)
        )
        self.conv_norm_out = nn.GroupNorm(config.groups(widths[0]), widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @property
    def fractional(self) -> bool:
        """True unless the embedding of timesteps is a learned table."""
        return not isinstance(self.time_proj, nn.Embedding)

    def time_embedder(self) -> Callable[[Tensor], Tensor]:
        return partial(_embed_time, self.config, self.time_proj, self.time_embedding)

    def denoise(self, x: Tensor, act_temb: Tensor) -> Tensor:
        centred = self.config.center_input_sample
        if centred != self.unit_input:  # if both are set, the two conversions cancel out
            x = 2 * x - 1 if centred else (x + 1) / 2
        h: Tensor = self.conv_in(x)
        skips, image = [h], x  # the image is used only by Skip blocks
        for block in self.down_blocks:
            if isinstance(block, SkipDownBlock):
                h, block_skips, image = block(h, act_temb, image)
            else:
                h, block_skips = block(h, act_temb)
            skips += block_skips
        if self.mid_block is not None:
            h = self.mid_block(h, act_temb)
        added: Tensor | None = None
        for block in self.up_blocks:
            if isinstance(block, SkipUpBlock):
                h, added = block(h, skips, act_temb, added)
            else:
                h = block(h, skips, act_temb)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out if added is None else out + added

    @property
    def blocks(self) -> list[nn.Module]:
        return [*self.down_blocks, *([self.mid_block] if self.mid_block is not None else []), *self.up_blocks]
