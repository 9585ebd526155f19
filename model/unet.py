"""The U-Net that predicts eps, with diffusers' `UNet2DModel` module names. Its configuration is in unet_config.py."""

from collections.abc import Callable
from dataclasses import dataclass
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
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    sinusoidal_embedding,
)
from tminus.model.unet_config import UNetConfig


@dataclass(frozen=True, slots=True)
class _BlockArgs:
    """The arguments that all blocks of one net share."""

    temb_dim: int
    groups: int
    eps: float
    act: str
    dropout: float
    scale_shift: bool
    head_width: Callable[[int], int]

    def resnet(self, in_channels: int, out_channels: int, **kwargs: Any) -> ResnetBlock:
        return ResnetBlock(
            in_channels,
            out_channels,
            self.temb_dim,
            groups=self.groups,
            eps=self.eps,
            act=self.act,
            dropout=self.dropout,
            scale_shift=self.scale_shift,
            **kwargs,
        )

    def attention(self, channels: int) -> Attention:
        return Attention(channels, self.head_width(channels), groups=self.groups, eps=self.eps)


class DownBlock(nn.Module):
    """Resnets (each followed by attention in an Attn block), then a downsampler unless this is the last block."""

    def __init__(self, kind: str, config: UNetConfig, args: _BlockArgs, in_channels: int, out: int, last: bool) -> None:
        super().__init__()
        layers = config.layers_per_block
        self.resnets = nn.ModuleList(args.resnet(in_channels if i == 0 else out, out) for i in range(layers))
        attends = kind == "AttnDownBlock2D"
        self.attentions = nn.ModuleList(args.attention(out) for _ in range(layers)) if attends else None
        by_resnet = kind == "ResnetDownsampleBlock2D" or (attends and config.downsample_type == "resnet")
        self.downsamplers: nn.ModuleList | None = None
        if not last:
            down = args.resnet(out, out, down=True) if by_resnet else Downsample(out, config.downsample_padding)
            self.downsamplers = nn.ModuleList([down])

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
    """Resnet, attention, resnet at the lowest resolution."""

    def __init__(self, config: UNetConfig, args: _BlockArgs) -> None:
        super().__init__()
        channels, scale = config.block_out_channels[-1], float(config.mid_block_scale_factor)
        groups = config.attn_norm_num_groups
        if groups is None and not args.scale_shift:
            groups = args.groups
        self.resnets = nn.ModuleList(args.resnet(channels, channels, output_scale_factor=scale) for _ in range(2))
        self.attentions: nn.ModuleList | None = None
        if config.add_attention:
            attention = Attention(
                channels, args.head_width(channels), groups=groups, eps=args.eps, output_scale_factor=scale
            )
            self.attentions = nn.ModuleList([attention])

    def forward(self, h: Tensor, act_temb: Tensor) -> Tensor:
        h = self.resnets[0](h, act_temb)
        if self.attentions is not None:
            h = self.attentions[0](h)
        out: Tensor = self.resnets[1](h, act_temb)
        return out


class UpBlock(nn.Module):
    """One resnet more than the down block, each with a skip connection, then an upsampler unless this is the last."""

    def __init__(
        self, kind: str, config: UNetConfig, args: _BlockArgs, prev: int, skip_last: int, out: int, last: bool
    ) -> None:
        super().__init__()
        layers = config.layers_per_block + 1
        self.resnets = nn.ModuleList()
        for i in range(layers):
            h_channels, skip_channels = (prev if i == 0 else out), (skip_last if i == layers - 1 else out)
            self.resnets.append(args.resnet(h_channels + skip_channels, out))
        attends = kind == "AttnUpBlock2D"
        self.attentions = nn.ModuleList(args.attention(out) for _ in range(layers)) if attends else None
        by_resnet = kind == "ResnetUpsampleBlock2D" or (attends and config.upsample_type == "resnet")
        self.upsamplers: nn.ModuleList | None = None
        if not last:
            self.upsamplers = nn.ModuleList([args.resnet(out, out, up=True) if by_resnet else Upsample(out)])

    def forward(self, h: Tensor, skips: list[Tensor], act_temb: Tensor) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), act_temb)
            if self.attentions is not None:
                h = self.attentions[i](h)
        if self.upsamplers is not None:
            h = _resample(self.upsamplers[0], h, act_temb)
        return h


def _resample(module: nn.Module, h: Tensor, act_temb: Tensor) -> Tensor:
    out: Tensor = module(h, act_temb) if isinstance(module, ResnetBlock) else module(h)
    return out


def _embedding(count: int, width: int) -> nn.Embedding:
    """An embedding with nn.Embedding's own initialisation, but on the meta device none.

    There torch would import torch._dynamo or sympy, which takes longer than all the rest of loading a checkpoint.
    """
    weight = torch.empty(count, width)
    if not weight.is_meta:
        torch.randn(count, width, out=weight)
    embedding: nn.Embedding = nn.Embedding.from_pretrained(weight, freeze=False)  # type: ignore[no-untyped-call]
    return embedding


def _embed_time(config: UNetConfig, table: nn.Embedding | None, mlp: TimestepEmbedding, t: Tensor) -> Tensor:
    if table is not None:
        embedding = table(t.long())
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
    """The U-Net of Ho et al. 2020 and its descendants, as diffusers' `UNet2DModel`."""

    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.block_out_channels
        temb_dim = config.time_embedding_dim or widths[0] * 4
        args = _BlockArgs(
            temb_dim=temb_dim,
            groups=config.norm_num_groups,
            eps=config.norm_eps,
            act=config.act_fn,
            dropout=config.dropout,
            scale_shift=config.resnet_time_scale_shift == "scale_shift",
            head_width=config.head_width,
        )
        self.act = ACTIVATIONS[config.act_fn]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_proj: nn.Embedding | None = None
        if config.time_embedding_type == "learned":
            self.time_proj = _embedding(config.num_train_timesteps or 0, config.time_width)
        self.time_embedding = TimestepEmbedding(config.time_width, temb_dim)
        self.class_embedding: nn.Embedding | None = None
        if config.num_class_embeds is not None:
            self.class_embedding = _embedding(config.num_class_embeds, temb_dim)

        last = len(widths) - 1
        self.down_blocks = nn.ModuleList(
            DownBlock(kind, config, args, widths[max(i - 1, 0)], widths[i], last=i == last)
            for i, kind in enumerate(config.down_block_types)
        )
        self.mid_block = MidBlock(config, args) if config.mid_block_type is not None else None
        up = widths[::-1]
        self.up_blocks = nn.ModuleList(
            UpBlock(kind, config, args, up[max(i - 1, 0)], up[min(i + 1, last)], up[i], last=i == last)
            for i, kind in enumerate(config.up_block_types)
        )
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    @property
    def fractional(self) -> bool:
        """See Denoiser: not with a learned embedding, which has whole timesteps only."""
        return self.time_proj is None

    def time_embedder(self) -> Callable[[Tensor], Tensor]:
        """See Denoiser."""
        return partial(_embed_time, self.config, self.time_proj, self.time_embedding)

    def denoise(self, x: Tensor, act_temb: Tensor) -> Tensor:
        """See Denoiser."""
        h, skips = self.encode(x, act_temb)
        for block in self.up_blocks:
            h = block(h, skips, act_temb)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(h)))
        return out

    def encode(self, x: Tensor, act_temb: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See Denoiser."""
        if self.config.center_input_sample:
            x = 2 * x - 1
        h: Tensor = self.conv_in(x)
        skips = [h]
        for block in self.down_blocks:
            h, block_skips = block(h, act_temb)
            skips += block_skips
        if self.mid_block is not None:
            h = self.mid_block(h, act_temb)
        return h, skips

    @property
    def blocks(self) -> list[nn.Module]:
        """See Denoiser."""
        return [*self.down_blocks, *([self.mid_block] if self.mid_block is not None else []), *self.up_blocks]
